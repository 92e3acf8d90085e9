# SPDX-License-Identifier: Apache-2.0
"""Which fault excuses which answer: what nobody could have known or kept. Pure; asked by the rules of the verdict."""

from __future__ import annotations

from collections import defaultdict
from typing import Final

from .plan import BROKER, KILL, QEMU, STOP, WORKER, ZYGOTE
from .recording import Recording

# A command may meet a process that has just died and whose end nobody has seen yet.
EDGE: Final = 0.5  # seconds
# A QEMU that goes on has its main loop's backlog to do first, and its worker a question out of band to wait for.
THAW: Final = 1.0  # seconds
# A guest's agent that did not answer in time is asked to synchronise, and its socket opened anew: `[agent] timeout` is 5 s.
AGENT_RECOVERY: Final = 6.0  # seconds
# The test's init starts another broker within a second; it reads the directories, and clients connect again.
BROKER_BACK: Final = 3.0  # seconds
# A new zygote has its connections a moment after it is there: each worker is told, and hands its own over.
HAND_OVER: Final = 2.0  # seconds


class Excuses:
    """Made of a whole recording."""

    def __init__(self, recording: Recording) -> None:
        self._faults = recording.faults
        self._lives = recording.lives
        self._still: dict[str, list[float]] = defaultdict(list)  # when `list` said of a VM that its CPUs do not run
        for claim in recording.claims:
            if claim.state != "running":
                self._still[claim.vm].append(claim.answered)
        self._unkept = _spans_without_zygote(recording)
        self._zygote_deaths = [fault.at for fault in recording.faults if (fault.what, fault.whom) == (KILL, ZYGOTE)]
        self._worker_births = _worker_births(recording)

    def qemu_touched(self, vm: str, began: float, ended: float) -> bool:
        """The VM's QEMU ended or stood still while the command was under way."""
        stopped = any(
            fault.vm == vm
            and fault.whom == QEMU
            and fault.what == STOP
            and fault.at <= ended
            and _end(fault.until) >= began
            for fault in self._faults
        )
        return stopped or any(
            life.vm == vm and life.gone is not None and began - EDGE <= life.gone <= ended + EDGE
            for life in self._lives
        )

    def qemu_stopped(self, vm: str, began: float, ended: float) -> bool:
        """The VM's QEMU stood still in that time."""
        return any(
            fault.vm == vm
            and fault.whom == QEMU
            and fault.at <= ended
            and (fault.what == KILL or _end(fault.until) >= began)
            for fault in self._faults
        )

    def guest_stood_still(self, vm: str, began: float, ended: float) -> bool:
        """The guest could not answer, or had just begun to run again and its agent has a question from before to answer first."""
        return any(began - AGENT_RECOVERY <= at <= ended for at in self._still[vm])

    def broker_away(self, at: float) -> bool:
        """A broker had been killed so shortly before that the next one need not serve yet."""
        return any(self._killed(BROKER, "", at - BROKER_BACK, at))

    def broker_died(self, began: float, ended: float) -> bool:
        return any(self._killed(BROKER, "", began - EDGE, ended))

    def worker_died(self, vm: str, began: float, ended: float) -> bool:
        return any(self._killed(WORKER, vm, began - EDGE, ended))

    def connection_lost(self, vm: str, began: float, ended: float) -> bool:
        """Nobody held the VM's connection: worker and zygote died, whichever was first, before anybody came in the place of the first."""
        return any(
            any(start <= at <= end for start, end in self._unkept) or self._zygote_died_before_a_successor_of(vm, at)
            for at in self._killed(WORKER, vm, began - EDGE, ended)
        )

    def _zygote_died_before_a_successor_of(self, vm: str, worker_death: float) -> bool:
        came = min((born for born in self._worker_births[vm] if born > worker_death), default=float("inf"))
        return any(worker_death <= at <= came for at in self._zygote_deaths)

    def _killed(self, whom: str, vm: str, began: float, ended: float) -> list[float]:
        return [
            fault.at
            for fault in self._faults
            if fault.whom == whom and fault.what == KILL and fault.vm == vm and began <= fault.at <= ended
        ]


def _end(until: float | None) -> float:
    return float("inf") if until is None else until + THAW


def _worker_births(recording: Recording) -> dict[str, list[float]]:
    """When each VM's workers began, by what they say themselves: they have the connection from then on at the latest."""
    births: dict[str, list[float]] = defaultdict(list)
    for reading in recording.readings:
        births[reading.vm] += [
            told.time / 1e6 - recording.epoch for told in reading.events if told.event == "WORKER_STARTED"
        ]
    return births


def _spans_without_zygote(recording: Recording) -> list[tuple[float, float]]:
    spans = []
    for fault in recording.faults:
        if fault.whom == ZYGOTE and fault.what == KILL:
            later = [life.born for life in recording.zygotes if life.born > fault.at]
            spans.append((fault.at - EDGE, min(later, default=float("inf")) + HAND_OVER))
    return spans
