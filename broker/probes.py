# SPDX-License-Identifier: Apache-2.0
"""Requests `capabilities`, and the probers that answer them: one short-lived worker for each binary. Part of host.py; touches nothing.

ask → a prober is there: to it   → none: Fork, and the request waits for its HELLO     → it ends: the next one gets what it owes
The broker knows a binary by the words of the request alone: what is behind them (PATH, links, the file) is the prober's to look at, for a
disk may hang. Two words for one binary meet at the lock of its file in state/capabilities/.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from enum import Enum
from typing import Any, Final

from ..common.errors import BadRequest, Busy, VmloopError, WorkerLost
from ..common.names import PROBER_PREFIX, VmName
from ..common.pack import unpack_map
from ..common.states import StateHolder
from .actions import Action, Fork, KillWorker, ToWorker, WatchWorker
from .inflight import Entry, InFlight

log = logging.getLogger(__name__)

MAX_PROBERS: Final = 16  # at once; each may have a QEMU beside it
# A request that has cost so many probers their life is answered with an error.
MAX_TRIES: Final = 2


class ProberState(Enum):
    """Whether a prober can be asked. One that is gone, or never comes up, is forgotten unless it owes somebody an answer."""

    STARTING = "starting"  # asked for; → READY by its HELLO
    READY = "ready"  # → STARTING when it has ended and its successor was asked for


PROBER_MOVES: Final = {
    ProberState.STARTING: frozenset({ProberState.READY}),
    ProberState.READY: frozenset({ProberState.STARTING}),
}


class _Prober:
    def __init__(self, name: VmName) -> None:
        self.name = name
        self.state = StateHolder(f"prober {name}", ProberState.STARTING, PROBER_MOVES, _nobody_listens)
        self.due: float | None = None  # it must have presented itself by then
        self.pid: int | None = None
        self.identity = b""
        self.asked: dict[int, int] = {}  # number of a request → how often it was sent


class Probes:
    """All probers of a broker."""

    def __init__(
        self,
        inflight: InFlight,
        hello_seconds: float,
        act: Callable[[Action], None],
        answer_error: Callable[[Entry, VmloopError, float], None],
    ) -> None:
        """`act` leaves an action for the loop; `answer_error` answers a request that was taken out of the table."""
        self._inflight = inflight
        self._hello_seconds = hello_seconds
        self._act = act
        self._answer_error = answer_error
        self._probers: dict[VmName, _Prober] = {}

    # -- requests -----------------------------------------------------------------------------------------------------------

    def require_room(self, binary: str) -> None:
        """Raises `Busy` if a prober for it would be one too many."""
        if _name_for(binary) not in self._probers and len(self._probers) >= MAX_PROBERS:
            raise Busy(f"{MAX_PROBERS} binaries are being probed; try again in a few seconds")

    def ask(self, entry: Entry, binary: str, now: float) -> None:
        """Have a request answered that is in the table, with its frame."""
        name = _name_for(binary)
        prober = self._probers.get(name)
        if prober is None:
            prober = self._probers[name] = _Prober(name)
            self._make(prober, now, "a request came")
        prober.asked[entry.number] = 0
        if prober.state.state is ProberState.READY:
            self._send(prober, entry)

    def _make(self, prober: _Prober, now: float, why: str) -> None:
        prober.state.move(ProberState.STARTING, why)
        prober.pid, prober.identity = None, b""
        prober.due = now + self._hello_seconds
        self._act(Fork(prober.name))

    def _send(self, prober: _Prober, entry: Entry) -> None:
        prober.asked[entry.number] += 1
        self._inflight.sent(entry, prober.identity)
        self._act(ToWorker(prober.identity, entry.frame, entry.number))

    def _owed(self, prober: _Prober) -> list[Entry]:
        """The requests that it has yet to answer."""
        found = [entry for number in prober.asked if (entry := self._inflight.get(number)) is not None]
        prober.asked = {entry.number: prober.asked[entry.number] for entry in found}
        return found

    # -- probers ------------------------------------------------------------------------------------------------------------

    def on_hello(self, identity: bytes, name: str, body: bytes) -> None:
        """A prober presents itself, on every connection that it makes; one that this broker has not asked for ends by itself."""
        prober = self._probers.get(VmName(name))
        if prober is None:
            return
        try:
            status = unpack_map(body)
        except BadRequest as error:
            log.warning("a prober's greeting makes no sense: %s", error)
            return
        pid, ticks = _whole(status.get("worker_pid")), _whole(status.get("worker_ticks"))
        if prober.pid is None and 1 < pid < 1 << 31:
            prober.pid = pid
            self._act(WatchWorker(prober.name, pid, ticks))
        prober.state.move(ProberState.READY, f"pid {pid}")
        prober.identity, prober.due = identity, None
        for entry in self._owed(prober):
            if entry.sent_to != identity:
                self._send(prober, entry)

    def on_forked(self, name: VmName, pid: int) -> None:
        prober = self._probers.get(name)
        if prober is not None:
            prober.pid = pid

    def on_not_forked(self, name: VmName, error: str, now: float) -> None:
        prober = self._probers.pop(name, None)
        if prober is not None:
            self._refuse_all(prober, WorkerLost(f"no process can be made for a probe: {error}; try again"), now)

    def on_exit(self, name: VmName, pid: int, now: float) -> None:
        """Its pidfd says that it has ended: in order, for nobody had asked for long, or not."""
        prober = self._probers.get(name)
        if prober is None or prober.pid != pid:
            return
        owed = self._owed(prober)
        for entry in owed:
            if prober.asked[entry.number] >= MAX_TRIES:
                text = "the process that probed the binary ended before it had answered; see probe.log in the state directory"
                self._refuse(entry, WorkerLost(text), now)
        if self._owed(prober):
            self._make(prober, now, f"pid {pid} has ended, and owed an answer")
        else:
            del self._probers[name]

    def dismiss(self) -> None:
        """The host goes down with all that is its own: nobody is answered any more."""
        for name in tuple(self._probers):
            self._act(KillWorker(name))

    # -- time ---------------------------------------------------------------------------------------------------------------

    def next_due(self) -> float | None:
        """When `on_tick` has something to do; None: not by itself."""
        return min((prober.due for prober in self._probers.values() if prober.due is not None), default=None)

    def on_tick(self, now: float) -> None:
        for name, prober in tuple(self._probers.items()):
            if prober.due is not None and prober.due <= now:
                log.error("a prober has not presented itself in time; it is ended")
                self._act(KillWorker(name))
                del self._probers[name]
                self._refuse_all(prober, WorkerLost("the process for a probe did not come up in time; try again"), now)

    def _refuse_all(self, prober: _Prober, error: VmloopError, now: float) -> None:
        for entry in self._owed(prober):
            self._refuse(entry, error, now)

    def _refuse(self, entry: Entry, error: VmloopError, now: float) -> None:
        if self._inflight.take(entry.number) is not None:
            self._answer_error(entry, error, now)


def _name_for(binary: str) -> VmName:
    """What the prober of a binary is called: no VM can have such a name."""
    return VmName(PROBER_PREFIX + hashlib.sha256(binary.encode("utf-8", "surrogatepass")).hexdigest()[:16])


def _nobody_listens(_old: ProberState, _new: ProberState, _reason: str) -> None:
    """The log tells."""


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
