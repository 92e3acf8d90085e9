# SPDX-License-Identifier: Apache-2.0
"""Verbs that change what a VM does: start attach stop kill pause resume reset detach. Arguments and results: docs/operations.md.

Each may be carried on by another worker than the one that began it (worker/requests.py): it looks at where the VM is, and what it sends
to QEMU goes through `Requests.command`, which sends a step once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from ...common.definition import definition_from_toml
from ...common.errors import (
    Busy,
    ConfigError,
    DeadlineExceeded,
    Denied,
    LaunchFailed,
    MonitorFrozen,
    MonitorLost,
    NotRunning,
    OutcomeUnknown,
    VmloopError,
)
from ...common.states import VmState
from .. import beginnings
from ..qemu.launch import log_tail
from ..recognition import FACT, WAY_OUT, hold_again
from ..transitions import of_status
from .request import NoArguments, Request

if TYPE_CHECKING:
    from ..app import App
    from ..vm import Vm

# How long a QEMU may take to end after SIGKILL before it counts as stuck in the kernel (an unreachable disk).
KILL_SECONDS = 30.0
# How long a QEMU that keeps running after its guest powered off (-no-shutdown) is left to end by itself.
QUIT_AFTER = 1.0
# QEMU's own events and states follow a command within milliseconds; a loaded host may need longer.
SETTLE_SECONDS = 5.0


class StartArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    paused: bool = False


class AttachArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    qmp: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
    agent: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)] | None = None
    pid: Annotated[int, msgspec.Meta(gt=1)] | None = None


class StopArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    timeout: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 60.0
    force: bool = False


async def start(app: App, request: Request, arguments: StartArguments) -> dict[str, Any]:
    """Launch the VM from its definition."""
    if _has_run_since(app, request):
        return await _carry_on_start(app, request, arguments)
    path = app.paths.definition
    if not path.exists():
        raise ConfigError(f"VM {app.name} has no definition; define it first, or attach it")
    definition = definition_from_toml(path.read_bytes(), str(path))
    if definition.name != app.name:
        raise ConfigError(
            f"{path}: it names {definition.name!r}, but it is the definition of {app.name}; define it again"
        )
    go = _go(app, request)
    await beginnings.start(
        app.vm,
        app.handling,
        definition,
        paused=arguments.paused,
        deadline=request.deadline,
        go=go,
        tell=app.send_status_if_due,
    )
    return _run_facts(app)


async def _carry_on_start(app: App, request: Request, arguments: StartArguments) -> dict[str, Any]:
    """An earlier worker had begun the run."""
    vm = app.vm
    await vm.wait_until(lambda: (vm.came_up and vm.connected) or not vm.alive, request.deadline)
    if not vm.came_up and vm.alive:
        raise DeadlineExceeded(f"VM {app.name}: QEMU was started, but its monitor has not answered in time")
    if vm.alive:
        await beginnings.carry_on(vm, app.handling, paused=arguments.paused, go=_go(app, request))
    elif not vm.came_up:
        tail = log_tail(app.paths, vm.run.epoch if vm.run is not None else 0)
        raise LaunchFailed(f"VM {app.name} did not start: {vm.exit_text or vm.state.reason}", log=tail)
    return _run_facts(app)


def _go(app: App, request: Request) -> Callable[[], Awaitable[Any]]:
    """Lets the guest's CPUs run for the first time."""
    return lambda: app.requests.command(request, "cont", deadline=request.deadline)


def _has_run_since(app: App, request: Request) -> bool:
    """Whether a new run has begun since an earlier worker took the request up."""
    run = app.vm.run
    return request.begun is not None and run is not None and run.first_epoch > request.begun.epoch


async def attach(app: App, request: Request, arguments: AttachArguments) -> dict[str, Any]:
    """Adopt a running QMP server as this VM."""
    if _has_run_since(app, request):
        return await _carry_on_attach(app, request)
    first = app.vm.run is None and app.definition is None
    try:
        await beginnings.attach(
            app.vm, app.handling, arguments.qmp, arguments.agent, arguments.pid, deadline=request.deadline
        )
    except VmloopError:
        if first:  # nothing came of this name
            app.forget = True
            app.send_status()
            app.vm.gone.set()
        raise
    return _run_facts(app)


async def _carry_on_attach(app: App, request: Request) -> dict[str, Any]:
    """An earlier worker had begun the run."""
    vm = app.vm
    await vm.wait_until(lambda: (vm.came_up and vm.connected) or not vm.alive, request.deadline)
    if not vm.alive and not vm.came_up:
        raise MonitorLost(f"VM {app.name} was not attached: {vm.exit_text or vm.state.reason}")
    if not vm.came_up:
        raise DeadlineExceeded(f"VM {app.name}: its monitor has not answered in time; it is sought on")
    return _run_facts(app)


async def stop(app: App, request: Request, arguments: StopArguments) -> dict[str, Any]:
    """Ask the guest to power down and wait until QEMU is gone; with force kill at the timeout.

    The turn is held only while the guest is asked: a guest that takes its time does not keep others from pausing or resetting it.
    """
    if _is_over(app, request):
        return _state(app)
    vm = app.vm
    until = min(app.loop.time() + arguments.timeout, request.deadline)
    try:
        if request.begun is not None:  # its worker is a new one, whose monitor may have to be sought
            await vm.wait_until(lambda: vm.connected or not vm.alive, until)
            if _is_over(app, request):
                return _state(app)
        async with app.order.turn("stop", until):
            vm.intent = "user"
            if vm.state.state is not VmState.SHUTDOWN:
                await app.requests.command(request, "system_powerdown", deadline=until)
        await _wait_gone_or_quit(app, request, until)
    except (DeadlineExceeded, MonitorFrozen, MonitorLost) as error:
        if not arguments.force or vm.gone.is_set():
            raise
        app.log_info(f"stop: {error}; killing it, as asked")
        return await kill(app, request, NoArguments())
    except OutcomeUnknown:  # QEMU hung up before it answered: if that was its end, it is stopped
        if not await vm.wait_until(vm.gone.is_set, min(until, app.loop.time() + SETTLE_SECONDS)):
            raise
    finally:
        vm.intent = ""  # a guest that did not listen: what stops it later has other reasons
    return _state(app)


async def kill(app: App, request: Request, _: NoArguments) -> dict[str, Any]:
    """End the process at once, through its pidfd. A VM without a known process is told to quit by its monitor."""
    if _is_over(app, request):
        return _state(app)
    vm = app.vm
    if not vm.alive:
        raise NotRunning(f"VM {app.name} does not run (it is {vm.state.state.value})")
    deadline = min(request.deadline, app.loop.time() + KILL_SECONDS)
    if hold_again(vm):
        try:
            vm.kill()
        except NotRunning as error:
            await _quit_instead(app, request, vm.facts.get(FACT) or str(error), deadline)
    else:
        vm.finish("it ended unseen")
    if not await vm.wait_until(vm.gone.is_set, deadline):
        raise DeadlineExceeded(
            f"VM {app.name} was killed, but its process has not ended yet; it may hang in the kernel"
        )
    return _state(app)


async def pause(app: App, request: Request, _: NoArguments) -> dict[str, Any]:
    """Stop the guest's CPUs."""
    return await _ask(app, request, "stop", "user", lambda: app.vm.state.state is not VmState.RUNNING)


async def resume(app: App, request: Request, _: NoArguments) -> dict[str, Any]:
    """Let the guest's CPUs run."""
    return await _ask(app, request, "cont", "unpaused", lambda: app.vm.state.state is VmState.RUNNING)


async def reset(app: App, request: Request, _: NoArguments) -> dict[str, Any]:
    """Press the reset button."""
    if app.vm.facts.get("dump", {}).get("status") == "active":
        text = (
            f"VM {app.name}: QEMU writes a dump of its memory, and a reset would abort QEMU now; wait for DUMP_FINISHED"
        )
        raise Busy(text)
    seen = asyncio.Event()
    unlisten = app.vm.events.listen(lambda event: seen.set() if event.event == "RESET" else None)
    if request.begun is not None and any(event.event == "RESET" for event in app.vm.events.since(request.begun.cursor)):
        seen.set()
    try:
        await app.requests.command(request, "system_reset", deadline=request.deadline)
        async with asyncio.timeout_at(min(request.deadline, app.loop.time() + SETTLE_SECONDS)):
            await seen.wait()
    except TimeoutError:
        raise DeadlineExceeded(f"VM {app.name}: system_reset was accepted, but no RESET event has come") from None
    finally:
        unlisten()
    return _state(app)


async def detach(app: App, request: Request, _: NoArguments) -> dict[str, Any]:
    """Let go of the VM, which runs on. If it has no definition, vmloop forgets it."""
    if app.vm.alive:
        await _thaw(app, request.deadline)
        try:
            app.vm.detach()
        except OSError as error:
            raise ConfigError(f"VM {app.name}: not detached, for that cannot be written down: {error}") from error
    elif app.paths.definition.exists() and not _is_over(app, request):
        raise NotRunning(
            f"VM {app.name} does not run (it is {app.vm.state.state.value}): there is nothing to let go of"
        )
    app.forget = app.definition is None
    app.send_status()
    app.vm.gone.set()
    return {"name": app.name}


async def _thaw(app: App, deadline: float) -> None:
    """A guest that vmloop has frozen is not left so. Best effort: an agent that does not answer keeps nobody from letting go."""
    guard = app.vm.agent.guard
    if not guard.until:
        return
    thawed = asyncio.Event()
    unlisten = guard.on_thawed(lambda _: thawed.set())
    try:
        guard.thaw("detached")
        async with asyncio.timeout_at(min(deadline, app.loop.time() + SETTLE_SECONDS)):
            await thawed.wait()
    except TimeoutError:
        app.log_info("detach: the guest's file systems may still be frozen: its agent has not answered")
    finally:
        unlisten()


async def _ask(app: App, request: Request, command: str, intent: str, met: Any) -> dict[str, Any]:
    """Send a command and wait for the state that its event brings; what query-status says if none comes."""
    vm = app.vm
    vm.require_session()
    vm.intent = intent
    try:
        await app.requests.command(request, command, deadline=request.deadline)
        if not met():
            await _settle_by_query(vm, min(request.deadline, app.loop.time() + SETTLE_SECONDS))
    finally:
        vm.intent = ""
    return _state(app)


async def _settle_by_query(vm: Vm, deadline: float) -> None:
    """An event that should have come has not: ask QEMU for the state."""
    move = of_status(await vm.require_session().execute("query-status", seconds=deadline - vm.loop.time()))
    if move.state is not vm.state.state and vm.state.can(move.state):
        vm.state.move(move.state, vm.intent or move.reason)


async def _wait_gone_or_quit(app: App, request: Request, until: float) -> None:
    """Wait for the end. A QEMU that stays after its guest has powered off is told to quit."""
    vm = app.vm
    off = await vm.wait_until(lambda: vm.gone.is_set() or vm.state.state is VmState.SHUTDOWN, until)
    if not off:
        raise DeadlineExceeded(
            f"VM {app.name}: the guest was asked to power down and has not done so; it may ignore the power button. "
            "Stop it with force, or kill it"
        )
    if not await vm.wait_until(vm.gone.is_set, min(until, app.loop.time() + QUIT_AFTER)):
        await app.requests.command(request, "quit", deadline=until)
        if not await vm.wait_until(vm.gone.is_set, until):
            raise DeadlineExceeded(f"VM {app.name}: the guest is off, but QEMU has not ended; kill it")


async def _quit_instead(app: App, request: Request, why: str, deadline: float) -> None:
    try:
        await app.requests.command(request, "quit", deadline=deadline)
    except VmloopError as error:
        if not await app.vm.wait_until(app.vm.gone.is_set, min(deadline, app.loop.time() + SETTLE_SECONDS)):
            raise Denied(
                f"VM {app.name}: {why}; 'quit' did not end it either ({error}). {WAY_OUT[0].upper()}{WAY_OUT[1:]}"
            ) from error


def _is_over(app: App, request: Request) -> bool:
    """Whether the run that an earlier worker was to end has ended."""
    run, begun = app.vm.run, request.begun
    return begun is not None and (not app.vm.alive or run is None or not run.first_epoch <= begun.epoch <= run.epoch)


def _state(app: App) -> dict[str, Any]:
    return {"state": app.vm.state.state.value, "reason": app.vm.state.reason}


def _run_facts(app: App) -> dict[str, Any]:
    vm = app.vm
    epoch = vm.run.epoch if vm.run is not None else 0
    pid = vm.process.pid if vm.process is not None else None
    return {"name": app.name, **_state(app), "epoch": epoch, "pid": pid}
