# SPDX-License-Identifier: Apache-2.0
"""Two of the three ways in which a run of a VM begins: start (launch a QEMU) and attach (adopt one). The third is in resumption.py.

Called by verbs/lifecycle.py; vm.py has what they share, and everything that follows.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from ..common.definition import AGENT_ID, AgentSection, Definition
from ..common.errors import AlreadyRunning, ConfigError, DeadlineExceeded, LaunchFailed, VmloopError
from ..common.process import ProcessGone, boot_id
from ..common.states import VmState
from .handling import Handling
from .qemu.adopt import BUSY_SECONDS, connect_in_turn, find_process
from .qemu.launch import launch, log_tail, mark_of
from .qemu.recognise import recognise
from .recognition import WAY_OUT
from .run_page import Fact
from .runfile import Run
from .transitions import Move
from .vm import END_GRACE, Vm

log = logging.getLogger(__name__)

LAST_WORDS: Final = 0.2  # seconds: a QEMU that has closed its monitor before it came up has so long to end by itself
AGENT_PORT: Final = f"{AGENT_ID}-port"  # the device id that launch.py gives the agent's port


async def start(
    vm: Vm,
    handling: Handling,
    definition: Definition,
    *,
    paused: bool,
    deadline: float,
    go: Callable[[], Awaitable[Any]],
    tell: Callable[[], None],
) -> None:
    """Launch QEMU and bring it to running, or to paused. `go` lets its CPUs run; `tell` sends the VM's status at once: the launch itself
    holds the loop up for a while, and who asks meanwhile must not hear of the new run's events and the old one's state.

    Raises `LaunchFailed`, `AlreadyRunning`, `ConfigError`; then it is shut off.
    """
    _refuse_second_run(vm)
    _require_kept_page(vm)
    known = handling.capabilities.check(definition)
    migrates_in = "-incoming" in definition.qemu.args
    epoch = vm.begin_run("booted")
    run = Run(
        epoch=epoch,
        boot_id=boot_id(),
        started=time.time(),
        monitor=os.fspath(vm.paths.monitor_socket),
        agent=os.fspath(vm.paths.agent_socket) if definition.agent.enabled else None,
        may_kill=True,
        mark=mark_of(vm.paths, epoch),
        binary=definition.qemu.binary,
        definition=msgspec.to_builtins(definition),
    )
    try:
        vm.save(run)
        handling.capabilities.keep(known)
        handling.begin(definition)
        tell()
        launched = launch(definition, vm.paths, epoch, stopped=not migrates_in, log_bytes=vm.settings.log_bytes)
    except OSError as error:
        vm.settle(Move(VmState.SHUTOFF, "failed"), f"{error}")
        raise LaunchFailed(f"VM {vm.name}: {error}", log="") from error
    except VmloopError as error:
        vm.settle(Move(VmState.SHUTOFF, "failed"), str(error))
        raise
    vm.hold(launched.process)
    try:
        vm.save(msgspec.structs.replace(run, process=launched.process.identity, argv=launched.argv))
        vm.agent.begin(run.agent, definition.agent, AGENT_PORT)
        await vm.bring_up(launched.monitor, min(deadline, vm.loop.time() + vm.settings.launch))
        await carry_on(vm, handling, paused=paused, go=go)
    except (VmloopError, OSError) as error:
        failure = await _abandon_launch(vm, error)
        if known is None and isinstance(failure, LaunchFailed):
            await handling.capabilities.explain(definition, deadline - vm.loop.time())
        raise failure from error


async def carry_on(vm: Vm, handling: Handling, *, paused: bool, go: Callable[[], Awaitable[Any]]) -> None:
    """The monitor of a new run is there: prepare the guest, and let it run unless it is wanted stopped."""
    await handling.prepare()
    args = handling.definition.qemu.args if handling.definition is not None else []
    if not paused and "-S" not in args and "-incoming" not in args:
        vm.intent = "booted"
        try:
            await go()
        finally:
            vm.intent = ""


async def attach(vm: Vm, handling: Handling, qmp: str, agent: str | None, pid: int | None, *, deadline: float) -> None:
    """Adopt a QMP server that runs. Raises `MonitorLost`, `Denied`, `DeadlineExceeded`; then it is left alone."""
    _refuse_alive(vm)
    _require_kept_page(vm)
    connection = await connect_in_turn(qmp, min(deadline - vm.loop.time(), BUSY_SECONDS))
    try:
        _refuse_alive(vm)  # again: that may have taken a while
        found = find_process(connection, pid)
    except VmloopError:
        connection.close()
        raise
    epoch = vm.begin_run("attached")
    vm.noted.note(Fact.ATTACHED)
    run = Run(
        epoch=epoch,
        boot_id=boot_id(),
        started=time.time(),
        process=found.process.identity if found.process else None,
        monitor=qmp,
        agent=agent,
        launched=False,
        may_kill=found.may_kill,
    )
    try:
        vm.save(run)
        handling.capabilities.keep(None)
        if found.process is not None:
            vm.hold(found.process)
        vm.agent.begin(agent, AgentSection(enabled=agent is not None), None)
        handling.begin(None)
        await vm.bring_up(connection, min(deadline, vm.loop.time() + vm.settings.launch))
    except (VmloopError, OSError) as error:
        vm.let_go()
        connection.close()  # if no session came of it
        vm.settle(Move(VmState.SHUTOFF, "failed"), str(error))
        if isinstance(error, OSError):
            raise ConfigError(f"VM {vm.name}: not attached: {error}; it was left alone") from error
        raise


def _refuse_alive(vm: Vm) -> None:
    if vm.alive:
        raise AlreadyRunning(f"VM {vm.name} is {vm.state.state.value} already")


def _require_kept_page(vm: Vm) -> None:
    """A run whose page dies with this worker could not be taken over. This worker ends then: the next one tries again."""
    if vm.page_unkept:
        vm.gone.set()
        raise LaunchFailed(f"VM {vm.name}: {vm.page_unkept}; make room there, and try again", log="")


def _refuse_second_run(vm: Vm) -> None:
    """Never two QEMUs for one VM: neither beside one that vmloop has, nor beside one that it let go."""
    _refuse_alive(vm)
    last = vm.run
    if (
        last is None
        or last.boot_id != boot_id()
        or (last.ended is not None and last.ended.state == VmState.SHUTOFF.value)
    ):
        return
    try:
        process = recognise(last, vm.paths)
    except ProcessGone:
        return  # the old run is over
    except OSError as error:
        text = f"VM {vm.name}: whether its last QEMU still runs cannot be told: {error.strerror or error}; {WAY_OUT}, or end it"
        raise AlreadyRunning(text) from error
    if process is not None:
        process.close()
        raise AlreadyRunning(
            f"VM {vm.name}: its QEMU (pid {process.pid}), which was detached, still runs; attach it again, or end it"
        )


async def _abandon_launch(vm: Vm, error: VmloopError | OSError) -> VmloopError:
    """QEMU did not come up: make sure that it is gone, and say what it printed."""
    if (
        vm.session is None and vm.process is not None
    ):  # who hangs up is mostly about to end: then its own end is what to tell
        await vm.wait_until(vm.gone.is_set, vm.loop.time() + LAST_WORDS)
    process = vm.process
    ended_by_itself = process is None or process.ended()
    if process is not None:
        process.kill()
        if not await vm.wait_until(vm.gone.is_set, vm.loop.time() + END_GRACE):
            return DeadlineExceeded(f"VM {vm.name}: {error}; its QEMU (pid {process.pid}) does not end either")
    tail = log_tail(vm.paths, vm.run.epoch if vm.run is not None else 0)
    why = f"QEMU {vm.exit_text}" if ended_by_itself and vm.exit_text else str(error)
    last = tail.splitlines()[-1] if tail else "nothing was printed"
    return LaunchFailed(f"VM {vm.name} did not start: {why}: {last}", log=tail)
