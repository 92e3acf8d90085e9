# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin: fixtures for tests of handlers, and of programs that steer VMs. Loaded by pytest itself (entry point `pytest11`).

    broker             a broker of the test's own                     private_broker.PrivateBroker
    simulated_vm       a simulated VM under it, running               double.Double
    simulated_vms      more of them: simulated_vms(name, *args, …)
    vmloop_handlers    one with handlers of yours: vmloop_handlers("mail.py", on_panic, …)
    handler_bench      handlers on a fake VM, without any process     handler_bench.HandlerBench
    replayed_monitor   a recorded dialogue behind a socket            replay.Replay
    replayed_vm        the same, attached as a VM

docs/testing.md is the guide. Every run of pytest imports this file, so it imports nothing of vmloop's before a fixture is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from ..client.vm import Vm
    from .double import Double
    from .handler_bench import HandlerBench
    from .handler_files import Source
    from .private_broker import PrivateBroker
    from .replay import Replay


class SimulatedVms(Protocol):
    """What the fixture `simulated_vms` gives."""

    def __call__(self, name: str | None = None, *args: str, **sections: Any) -> Double: ...


class VmloopHandlers(Protocol):
    """What the fixture `vmloop_handlers` gives."""

    def __call__(self, *handlers: Source, **section: Any) -> Double: ...


class Bench(Protocol):
    """What the fixture `handler_bench` gives."""

    def __call__(self, *handlers: Source, name: str = "web1", limit: float = ...) -> HandlerBench: ...


class ReplayedMonitor(Protocol):
    """What the fixture `replayed_monitor` gives."""

    def __call__(self, recording: str | Path, *, pace: float = 0.0) -> Replay: ...


class ReplayedVm(Protocol):
    """What the fixture `replayed_vm` gives."""

    def __call__(self, recording: str | Path, *, pace: float = 0.0, name: str | None = None) -> Vm: ...


_CHECKS = pytest.StashKey[
    list["Callable[[], None]"]
]()  # what is still to be looked at when the test function has returned


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """A handler that failed in the background fails the test itself, not its clearing up. A test that has failed already is left alone."""
    result = yield
    for check in item.stash.get(_CHECKS, []):
        check()
    return result


@pytest.fixture
def broker() -> Iterator[PrivateBroker]:
    """A broker of the test's own under a short temporary directory; `broker.host` is its client. Nothing is left of it."""
    from .private_broker import PrivateBroker

    with PrivateBroker() as made:
        yield made


@pytest.fixture
def simulated_vms(broker: PrivateBroker, request: pytest.FixtureRequest) -> Iterator[SimulatedVms]:
    """Start simulated VMs: simulated_vms(name, *args, **sections) with sections of a definition, for example agent={"enabled": False}."""
    from .double import start_double

    with contextlib.ExitStack() as made:

        def start(name: str | None = None, *args: str, **sections: Any) -> Double:
            name = name or broker.new_name()
            sections.setdefault("agent", {"enabled": True})
            broker.define_simulated(name, *args, **sections)
            double = start_double(broker.host.vm(name), agent=sections["agent"].get("enabled", False))
            made.callback(double.close)
            made.enter_context(_checked_after_test(request, double.finish))
            return double

        yield start


@pytest.fixture
def simulated_vm(simulated_vms: SimulatedVms) -> Double:
    """A simulated VM, running, its guest agent ready."""
    return simulated_vms()


@pytest.fixture
def vmloop_handlers(broker: PrivateBroker, request: pytest.FixtureRequest) -> Iterator[VmloopHandlers]:
    """Start a simulated VM with handlers: files of them, or functions with `@on` at the top of a module; `limit=` and others of [handlers].

    A handler that fails fails the test, unless that was expected (`expect_failure`).
    """
    from .double import start_double
    from .handler_files import install

    with contextlib.ExitStack() as made:

        def start(*handlers: Source, **section: Any) -> Double:
            load = install(broker.handlers_directory, handlers)
            name = broker.new_name()
            broker.define_simulated(name, handlers={**section, "load": load})
            double = start_double(broker.host.vm(name), agent=True, handlers=True)
            made.callback(double.close)
            made.enter_context(_checked_after_test(request, double.finish))
            return double

        yield start


@pytest.fixture
def handler_bench() -> Iterator[Bench]:
    """Handlers on a fake VM, without any process: handler_bench(on_panic, "mail.py", …). A handler that fails fails the test."""
    from .handler_bench import LIMIT, HandlerBench

    with contextlib.ExitStack() as made:

        def make(*handlers: Source, name: str = "web1", limit: float = LIMIT) -> HandlerBench:
            bench = HandlerBench(*handlers, name=name, limit=limit)
            made.callback(bench.close)
            return bench

        yield make


@pytest.fixture
def replayed_monitor() -> Iterator[ReplayedMonitor]:
    """Play a recorded dialogue: replayed_monitor(FILE).socket is a QMP socket for any client."""
    from .replay import replaying

    with contextlib.ExitStack() as made:
        yield lambda recording, *, pace=0.0: made.enter_context(replaying(recording, pace=pace))


@pytest.fixture
def replayed_vm(broker: PrivateBroker, replayed_monitor: ReplayedMonitor) -> Iterator[ReplayedVm]:
    """Play a recorded dialogue to vmloop: replayed_vm(FILE) is an attached VM."""
    from ..common.errors import NotRunning

    with contextlib.ExitStack() as made:

        def attach(recording: str | Path, *, pace: float = 0.0, name: str | None = None) -> Vm:
            replay = replayed_monitor(recording, pace=pace)
            vm = broker.host.vm(name or broker.new_name("replay"))
            broker.host.attach(vm.name, replay.socket, pid=replay.pid)
            made.enter_context(contextlib.suppress(NotRunning))  # the recording has come to QEMU's end
            made.callback(vm.kill)
            return vm

        yield attach


@contextlib.contextmanager
def _checked_after_test(request: pytest.FixtureRequest, check: Callable[[], None]) -> Iterator[None]:
    """Have this looked at when the test function returns; not any more when its fixture has ended and the test is run again."""
    node: pytest.Item = request.node
    checks = node.stash.setdefault(_CHECKS, [])
    checks.append(check)
    try:
        yield
    finally:
        checks.remove(check)
