# SPDX-License-Identifier: Apache-2.0
"""What becomes of a VM whose guest powers off, resets or has to begin again: SHUTDOWN, RESET, and what QEMU is told beforehand.

`prepare` is called by beginnings.py between negotiation and the first `cont`; `restart_guest` and `settle` by the other shipped handlers
too.

Seen on QEMU 7.2: `-no-shutdown` means shutdown=pause and panic=pause; `quit` and SIGTERM end a QEMU with shutdown=pause all the same;
after a power-off `cont` is refused ("Resetting the Virtual Machine is required") until a reset has been carried out, after a panic it is
not; with `-no-reboot`, system_reset is a SHUTDOWN with the reason host-qmp-system-reset.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import tenacity

from ...common.definition import Definition
from ...common.errors import Denied, QmpError
from ...common.states import VmState
from ..events import Event
from ..transitions import of_status
from . import fields
from .context import VmContext
from .devices import refresh_memory

log = logging.getLogger(__name__)

STEP_SECONDS: Final = 10.0  # for one command that QEMU answers at once if it is well

# A reset is carried out by QEMU's main loop within milliseconds of the command; a loaded host may need longer.
RESET_SECONDS: Final = 5.0
LOOK_AGAIN: Final = 0.05  # seconds between two tries of `cont`

# A guest that dies again as soon as it is up is left as it is after so many restarts: the next one would not be better.
MAX_RESTARTS: Final = 5
RESTART_SPAN: Final = 60.0  # seconds

NO_REASONS: Final[Mapping[VmState, str]] = MappingProxyType({})

_STALE_AFTER_RESET: Final = ("panic", "crashloaded", "watchdog")
_ENDED_BY_RESET: Final = (VmState.CRASHED, VmState.SHUTDOWN, VmState.PAUSED)


# -- before the first cont ----------------------------------------------------------------------------------------------------


async def prepare(vm: VmContext) -> None:
    """Tell a QEMU that was just launched what to do when its guest panics, powers off or hangs, where the user's arguments do not.

    Fact `actions`: what was set, or why it could not be. Raises what the monitor's loss raises; a QEMU that refuses is no error.
    """
    if vm.definition is None:
        return
    try:  # without it QEMU tells nothing about migrations
        events = {"capabilities": [{"capability": "events", "state": True}]}
        await vm.qmp("migrate-set-capabilities", events, seconds=STEP_SECONDS, reading=False)
    except QmpError as error:
        log.info("VM %s: no MIGRATION events: %s", vm.name, error)
    wanted = wanted_actions(vm.definition)
    if not wanted:
        return
    try:
        await vm.qmp("set-action", wanted, seconds=STEP_SECONDS, reading=False)
    except QmpError as error:
        hint = "this QEMU is older than 6.0: give it -no-shutdown" if _not_found(error) else str(error)
        log.warning("VM %s: handlers.on_* of its definition may come too late: set-action: %s", vm.name, hint)
        vm.set_fact("actions", {"refused": hint[: fields.MAX_TEXT]})
    else:
        vm.set_fact("actions", wanted)


def wanted_actions(definition: Definition) -> dict[str, str]:
    """The arguments of set-action that a definition needs, without those that its QEMU arguments set. Pure.

    A panic pauses, also for on_crash = destroy: vmloop ends QEMU then, and the end has its true reason.
    """
    handlers = definition.handlers
    wanted = {"panic": "pause"}
    if handlers.on_poweroff != "off":
        wanted["shutdown"] = "pause"
    if handlers.on_watchdog == "dump":  # QEMU's own default, reset, would leave nothing to dump; see crash.py
        wanted["watchdog"] = "pause"
    given = users_actions(definition.qemu.args)
    return {action: value for action, value in wanted.items() if action not in given}


def users_actions(args: list[str]) -> dict[str, str]:
    """The actions that QEMU arguments set: {panic, shutdown, reboot, watchdog: value}. Pure."""
    given: dict[str, str] = {}
    for argument, following in zip(args, [*args[1:], ""], strict=False):
        match "-" + argument.lstrip("-") if argument.startswith("-") else "":
            case "-no-shutdown":
                given |= {"shutdown": "pause", "panic": "pause"}
            case "-no-reboot":
                given["reboot"] = "shutdown"
            case "-watchdog-action":
                given["watchdog"] = following
            case "-action":
                parts = (part.partition("=") for part in following.split(","))
                given |= {key: value for key, _, value in parts}
    return given


# -- events -------------------------------------------------------------------------------------------------------------------


async def guest_shutdown(vm: VmContext, event: Event) -> None:
    """SHUTDOWN. on_poweroff = restart: begin again if it was the guest's own doing, and not because vmloop's `stop` asked it to."""
    if vm.definition is None or vm.definition.handlers.on_poweroff != "restart":
        return  # off: QEMU ends by itself; preserve: it was told to wait in `shutdown`
    if not by_guest(event.data) or vm.state is not VmState.SHUTDOWN or vm.reason == "user":
        return
    await restart_guest(vm, event, "booted")


def by_guest(data: object) -> bool:
    """Whether a SHUTDOWN is the guest's own power-off: no quit, no signal, no panic, no reset under -no-reboot. Pure."""
    members = fields.mapping(data)
    return members.get("guest") is True and members.get("reason", "guest-shutdown") == "guest-shutdown"


async def guest_reset(vm: VmContext, event: Event) -> None:
    """RESET. The guest begins again: its agent is gone for now, what was known of its end is over, and so is the pause after it."""
    del event
    vm.look_at_agent_port()
    for fact in _STALE_AFTER_RESET:
        if fact in vm.facts:
            vm.set_fact(fact, None)
    if vm.state in _ENDED_BY_RESET:
        await settle(vm)
    if "memory" in vm.facts:
        await refresh_memory(vm)


# -- for the other families ---------------------------------------------------------------------------------------------------


async def settle(vm: VmContext, reasons: Mapping[VmState, str] = NO_REASONS) -> VmState:
    """Take the VM's state from query-status; `reasons`: by state, better ones than the status has. The state that QEMU is in."""
    move = of_status(await vm.qmp("query-status", seconds=STEP_SECONDS))
    if move.state is not vm.state:
        vm.move(move.state, reasons.get(move.state, move.reason))
    return move.state


async def restart_guest(vm: VmContext, event: Event, reason: str) -> None:
    """Reset the machine and let it run; `reason` of the running state that follows. `event`: what it is restarted for.

    Raises `Denied` for a guest that has been restarted too often of late, and the monitor's errors. The VM is left as it is then, never
    killed: it can be looked at, dumped, reset and resumed, or killed by whoever decides so.
    """
    _refuse_no_reboot(vm)
    _count_restart(vm, event)
    await vm.qmp("system_reset", seconds=STEP_SECONDS, reading=False)
    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(_reset_pending),
        wait=tenacity.wait_fixed(LOOK_AGAIN),
        stop=tenacity.stop_after_delay(RESET_SECONDS),
        reraise=True,
    )
    vm.expect(reason)
    try:
        async for attempt in retrying:
            with attempt:
                await vm.qmp("cont", seconds=STEP_SECONDS, reading=False)
    finally:
        vm.expect("")


def _refuse_no_reboot(vm: VmContext) -> None:
    given = users_actions(vm.definition.qemu.args) if vm.definition is not None else {}
    if given.get("reboot") == "shutdown":
        raise Denied(
            f"VM {vm.name}: its guest is not restarted: with its -no-reboot QEMU "
            "takes a reset for a power-off; remove one of the two from the definition"
        )


def _count_restart(vm: VmContext, event: Event) -> None:
    since = event.time - int(RESTART_SPAN * 1e6)
    recent = [at for at in vm.facts.get("restarts", []) if at > since]
    if len(recent) >= MAX_RESTARTS:
        raise Denied(
            f"VM {vm.name}: its guest was restarted {len(recent)} times within {RESTART_SPAN:g} s and has ended again; "
            "it is left as it is. Look at its console; reset and resume it, or kill it"
        )
    vm.set_fact("restarts", [*recent, event.time])


def _reset_pending(error: BaseException) -> bool:
    return isinstance(error, QmpError) and "reset" in str(error.fields.get("desc", "")).lower()


def _not_found(error: QmpError) -> bool:
    return bool(error.fields.get("class") == "CommandNotFound")
