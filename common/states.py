# SPDX-License-Identifier: Apache-2.0
"""States of a VM, its monitor and its agent: one Enum, one table of legal moves and one setter each.

The worker owns these states; broker and clients only show them. Their meaning follows libvirt's domain states, with `starting` and
`unknown` beside them: `unknown` is a VM that cannot be reached now, which says nothing about whether it lives.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Generic, TypeVar

log = logging.getLogger(__name__)


class VmState(Enum):
    """What a VM is doing, as far as QEMU's own words and its process tell."""

    STARTING = "starting"  # QEMU is being launched or attached; may become anything
    RUNNING = "running"  # guest CPUs run
    PAUSED = "paused"  # guest CPUs stand still
    SHUTDOWN = "shutdown"  # the guest has powered off, QEMU is still there
    SHUTOFF = "shutoff"  # the process is known to be gone; only a new run leaves this state
    CRASHED = "crashed"  # the guest panicked and QEMU is still there
    PMSUSPENDED = "pmsuspended"  # the guest has suspended itself to memory
    UNKNOWN = "unknown"  # cannot be reached, or was let go; never read as gone


class MonitorState(Enum):
    """The QMP connection of one VM."""

    CONNECTING = "connecting"  # no greeting or no negotiation yet
    READY = "ready"  # answers
    BUSY = "busy"  # in-band commands wait, out-of-band ones are answered: QEMU's main loop is occupied
    FROZEN = "frozen"  # neither is answered: the process stands still
    LOST = "lost"  # no connection


class AgentState(Enum):
    """The guest agent of one VM."""

    ABSENT = "absent"  # no port, or nobody has opened it in the guest
    WAITING = "waiting"  # port there, guest side not open yet
    SYNCING = "syncing"  # guest-sync-delimited sent
    READY = "ready"  # answers
    UNRESPONSIVE = "unresponsive"  # open, and a command timed out


_live = {VmState.RUNNING, VmState.PAUSED, VmState.SHUTDOWN, VmState.CRASHED, VmState.PMSUSPENDED}
_reachable = _live | {VmState.SHUTOFF, VmState.UNKNOWN}

VM_MOVES: Mapping[VmState, frozenset[VmState]] = {
    VmState.STARTING: frozenset(_reachable),
    VmState.RUNNING: frozenset(_reachable - {VmState.RUNNING}),
    VmState.PAUSED: frozenset(_reachable - {VmState.PAUSED}),
    VmState.SHUTDOWN: frozenset(_reachable - {VmState.SHUTDOWN}),
    VmState.CRASHED: frozenset(_reachable - {VmState.CRASHED}),
    VmState.PMSUSPENDED: frozenset(_reachable - {VmState.PMSUSPENDED}),
    VmState.UNKNOWN: frozenset(
        (_reachable | {VmState.STARTING}) - {VmState.UNKNOWN}
    ),  # a detached VM can be attached again
    VmState.SHUTOFF: frozenset({VmState.STARTING}),
}

_open = frozenset({MonitorState.READY, MonitorState.BUSY, MonitorState.FROZEN})
MONITOR_MOVES: Mapping[MonitorState, frozenset[MonitorState]] = {
    MonitorState.CONNECTING: frozenset({MonitorState.READY, MonitorState.FROZEN, MonitorState.LOST}),
    MonitorState.READY: frozenset({MonitorState.BUSY, MonitorState.FROZEN, MonitorState.LOST}),
    MonitorState.BUSY: frozenset({MonitorState.READY, MonitorState.FROZEN, MonitorState.LOST}),
    MonitorState.FROZEN: frozenset({MonitorState.READY, MonitorState.BUSY, MonitorState.LOST}),
    MonitorState.LOST: frozenset({MonitorState.CONNECTING}),
}

AGENT_MOVES: Mapping[AgentState, frozenset[AgentState]] = {
    AgentState.ABSENT: frozenset({AgentState.WAITING}),
    AgentState.WAITING: frozenset({AgentState.SYNCING, AgentState.ABSENT}),
    AgentState.SYNCING: frozenset({AgentState.READY, AgentState.UNRESPONSIVE, AgentState.WAITING, AgentState.ABSENT}),
    AgentState.READY: frozenset({AgentState.SYNCING, AgentState.UNRESPONSIVE, AgentState.WAITING, AgentState.ABSENT}),
    AgentState.UNRESPONSIVE: frozenset({AgentState.SYNCING, AgentState.WAITING, AgentState.ABSENT}),
}

S = TypeVar("S", bound=Enum)


class IllegalMove(Exception):
    """A move that the table does not allow: a defect in the caller, never bad input."""


class StateHolder(Generic[S]):
    """The one place where a state changes: checks the move, logs old → new, tells the listener."""

    def __init__(
        self,
        what: str,
        initial: S,
        moves: Mapping[S, frozenset[S]],
        on_change: Callable[[S, S, str], None],
        reason: str = "",
    ) -> None:
        self._what = what
        self._moves = moves
        self._on_change = on_change
        self._state = initial
        self._reason = reason

    @property
    def state(self) -> S:
        return self._state

    @property
    def reason(self) -> str:
        return self._reason

    def can(self, new: S) -> bool:
        """Whether `move(new)` would be legal (staying is)."""
        return new is self._state or new in self._moves[self._state]

    def move(self, new: S, reason: str) -> bool:
        """Set the state; True if it changed. Staying is no change. Raises `IllegalMove` for what the table does not have."""
        old = self._state
        if new is old:
            return False
        if new not in self._moves[old]:
            raise IllegalMove(f"{self._what}: {old.value} → {new.value} ({reason}) is not in the table")
        self._state = new
        self._reason = reason
        log.info("%s: %s → %s (%s)", self._what, old.value, new.value, reason)
        self._on_change(old, new, reason)
        return True
