# SPDX-License-Identifier: Apache-2.0
"""What an event, a query-status or the end of the process means for a VM's state. Pure; used by vm.py.

States change by what QEMU says of itself, not by the replies of the commands that asked for it. Reasons follow libvirt's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from ..common.states import VmState


class Move(NamedTuple):
    """Where to go, and why."""

    state: VmState
    reason: str


# query-status → state. `prelaunch` is a VM started with -S whose CPUs have never run.
_OF_STATUS: Final[Mapping[str, Move]] = {
    "running": Move(VmState.RUNNING, "unknown"),
    "paused": Move(VmState.PAUSED, "user"),
    "prelaunch": Move(VmState.PAUSED, "starting up"),
    "preconfig": Move(VmState.PAUSED, "starting up"),
    "inmigrate": Move(VmState.PAUSED, "migration"),
    "postmigrate": Move(VmState.PAUSED, "migration"),
    "finish-migrate": Move(VmState.PAUSED, "migration"),
    "io-error": Move(VmState.PAUSED, "ioerror"),
    "colo": Move(VmState.PAUSED, "migration"),
    "save-vm": Move(VmState.PAUSED, "save"),
    "restore-vm": Move(VmState.PAUSED, "unknown"),
    "debug": Move(VmState.PAUSED, "unknown"),
    "internal-error": Move(VmState.PAUSED, "unknown"),
    "watchdog": Move(VmState.PAUSED, "watchdog"),
    "shutdown": Move(VmState.SHUTDOWN, "unknown"),
    "guest-panicked": Move(VmState.CRASHED, "panicked"),
    "suspended": Move(VmState.PMSUSPENDED, "unknown"),
}


def of_status(reply: object) -> Move:
    """The state that a `query-status` reply stands for; an unknown status goes by its `running` flag."""
    reply = reply if isinstance(reply, dict) else {}
    known = _OF_STATUS.get(str(reply.get("status")))
    if known is not None:
        return known
    return Move(VmState.RUNNING, "unknown") if reply.get("running") is True else Move(VmState.PAUSED, "unknown")


def of_event(state: VmState, event: str, data: Mapping[str, Any], intent: str) -> Move | None:
    """The move that an event calls for in a state; None for most. `intent`: the reason of whoever asked for it, or ''."""
    if state is VmState.SHUTOFF:  # only a new run leaves it; a late event of the old one does not
        return None
    match event:
        case "STOP" if state in (VmState.RUNNING, VmState.STARTING, VmState.UNKNOWN):
            return Move(VmState.PAUSED, intent or "unknown")
        case "RESUME" if state is not VmState.RUNNING:
            return Move(VmState.RUNNING, intent or "unpaused")
        case "SHUTDOWN" if state is not VmState.SHUTDOWN:
            return Move(VmState.SHUTDOWN, intent or "unknown")
        case "GUEST_PANICKED" if state is not VmState.CRASHED:
            return Move(VmState.CRASHED, "panicked")
        case "SUSPEND" | "SUSPEND_DISK" if state is VmState.RUNNING:
            return Move(VmState.PMSUSPENDED, "unknown")
        case "WAKEUP" if state is VmState.PMSUSPENDED:
            return Move(VmState.RUNNING, "wakeup")
        case "WATCHDOG" if data.get("action") == "pause" and state is VmState.RUNNING:
            return Move(VmState.PAUSED, "watchdog")
        case "BLOCK_IO_ERROR" if data.get("action") == "stop" and state is VmState.RUNNING:
            return Move(VmState.PAUSED, "ioerror")
    return None


def of_end(*, killed: bool, started: bool, shutdown_seen: bool, unseen: bool = False) -> Move:
    """The final state of a run whose process is known to be gone. `unseen`: whatever QEMU said at its end, nobody heard it."""
    if killed:
        return Move(VmState.SHUTOFF, "destroyed")
    if not started:
        return Move(VmState.SHUTOFF, "failed")
    if shutdown_seen:
        return Move(VmState.SHUTOFF, "shutdown")
    return Move(VmState.SHUTOFF, "unknown" if unseen else "crashed")


def of_ended(state: str, reason: str) -> Move:
    """What a VM is whose newest run has ended so, as run.json has it."""
    # `unknown` is a detached VM: not vmloop's any more, and not known to be gone.
    return Move(VmState.UNKNOWN if state == VmState.UNKNOWN.value else VmState.SHUTOFF, reason)
