# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with one VM while others are measured: each fault can be switched on and off. Used by containment.py.

Handlers are switched on by letting the victim's CPUs run (RESUME), and say with events of their own when they begin and are over.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Final

from vmloop.client.session import Host
from vmloop.client.vm import Vm
from vmloop.common.errors import VmloopError
from vmloop.tests.system.site import Site, signal_process, wait_for

# How long one switch-on lasts: others are measured for most of it.
SECONDS: Final = 3.0
EVENT_SECONDS: Final = 30.0

# The operator's file of handlers: what each does is told by the name of its VM.
HANDLERS: Final = f"""
import asyncio
import time
from vmloop.worker.handlers import on


def until_over():
    end = time.monotonic() + {SECONDS}
    return lambda: time.monotonic() < end


def sleep():
    time.sleep({SECONDS})


def spin():
    goes_on = until_over()
    while goes_on():
        pass


def allocate():
    goes_on, kept = until_over(), []
    while goes_on():
        try:
            kept.append(bytearray(1 << 20))
        except MemoryError:
            kept.clear()


ACTS = {{"sleeps": sleep, "spins": spin, "allocates": allocate}}


@on("RESUME")
def on_the_thread(vm, event):
    place, _, act = vm.name.partition("-")
    if place == "thread":
        vm.emit("FAULT_BEGINS", {{}})
        ACTS[act]()
        vm.emit("FAULT_OVER", {{}})


@on("RESUME")
async def on_the_loop(vm, event):
    place, _, act = vm.name.partition("-")
    if place == "loop":
        vm.emit("FAULT_BEGINS", {{}})
        await asyncio.sleep(0.05)  # the event goes out
        ACTS[act]()
        vm.emit("FAULT_OVER", {{}})
"""

IN_HANDLERS: Final = ("thread-sleeps", "loop-sleeps", "thread-spins", "loop-spins", "thread-allocates")


def install_handlers(site: Site) -> None:
    """Before the victims start."""
    directory = site.paths.etc / "handlers"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "faults.py").write_text(HANDLERS)


@contextlib.contextmanager
def in_handler(host: Host, victim: str) -> Iterator[None]:
    """The victim's handler is at it within the block, and has come to its end after it."""
    vm = host.vm(victim)
    with vm.events(since=vm.cursor()) as events:
        vm.resume()
        events.wait_for("FAULT_BEGINS", EVENT_SECONDS)
        yield
        events.wait_for("FAULT_OVER", EVENT_SECONDS)
    vm.pause()


@contextlib.contextmanager
def frozen(site: Site, host: Host, victim: str) -> Iterator[None]:
    """The victim's QEMU is stopped within the block, with a command in flight."""
    pid = host.vm(victim).show().pid
    assert pid is not None
    signal_process(pid, signal.SIGSTOP)
    asking = threading.Thread(target=_ask_in_vain, args=(site, victim))
    asking.start()
    try:
        assert wait_for(lambda: host.vm(victim).show().monitor == "frozen")
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # killed within the block
            signal_process(pid, signal.SIGCONT)
        asking.join()


@contextlib.contextmanager
def frozen_in_reset(host: Host, victim: str) -> Iterator[None]:
    """The victim is reset and its QEMU stopped at once, so that its worker hangs in what it does on RESET."""
    vm = host.vm(victim)
    pid = vm.show().pid
    assert pid is not None
    resetting = threading.Thread(target=_reset, args=(vm,))
    resetting.start()
    signal_process(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        signal_process(pid, signal.SIGCONT)
        resetting.join()


def _reset(vm: Vm) -> None:
    with contextlib.suppress(VmloopError):  # the freeze may be quicker
        vm.reset()


def _ask_in_vain(site: Site, victim: str) -> None:
    with contextlib.suppress(VmloopError):
        site.host().vm(victim).qmp("query-status", timeout=5.0)


@contextlib.contextmanager
def agent_floods(host: Host, victim: str, lines_per_second: int = 100_000) -> Iterator[None]:
    """The agent of a simulated victim says what nobody asked for within the block."""
    vm = host.vm(victim)
    vm.qmp("x-simulate", {"agent_flood": lines_per_second})
    yield
    vm.qmp("x-simulate", {"agent_flood": 0})
