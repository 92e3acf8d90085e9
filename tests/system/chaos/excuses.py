# SPDX-License-Identifier: Apache-2.0
"""Which fault excuses which answer: what nobody could have known or kept. Pure; asked by the rules of the verdict."""

from __future__ import annotations

from collections import defaultdict
from typing import Final

from .plan import BROKER, KILL, QEMU, STOP, WORKER, ZYGOTE
from .recording import RESULT, STOP_SECONDS, Life, Recording

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
# Worker and zygote are dead: a broker may have to come back first, then a worker, then QEMU may stand still for a while.
RECONNECT: Final = 15.0  # seconds
# The witness of a process's end is as exact as its poll; an operation that killed it was under way then, or a fault had just been.
KILL_SEEN: Final = 1.0  # seconds
# Who was launched has an agent a moment later: it boots, and opens its port.
BOOT: Final = 3.0  # seconds

Span = tuple[float, float]


class Excuses:
    """Made of a whole recording."""

    def __init__(self, recording: Recording) -> None:
        self._faults = recording.faults
        self._lives = recording.lives
        self._commands = recording.commands
        self._epoch = recording.epoch
        self._still: dict[str, list[float]] = defaultdict(list)  # when `list` said of a VM that its CPUs do not run
        for claim in recording.claims:
            if claim.state != "running":
                self._still[claim.vm].append(claim.answered)
        self._unkept = _spans_without_zygote(recording)
        self._zygote_deaths = [fault.at for fault in recording.faults if (fault.what, fault.whom) == (KILL, ZYGOTE)]
        self._worker_births = _worker_births(recording)

    def qemu_touched(self, vm: str, began: float, ended: float) -> bool:
        """The VM's QEMU ended or stood still while the command was under way."""
        return self.qemu_stopped(vm, began, ended) or self.qemu_ended(vm, began, ended)

    def qemu_ended(self, vm: str, began: float, ended: float) -> bool:
        """A QEMU of the VM's ended while the command was under way: what the kernel saw, whoever killed it."""
        return any(
            life.vm == vm and life.gone is not None and began - EDGE <= life.gone <= ended + EDGE
            for life in self._lives
        )

    def was_killed(self, life: Life) -> bool:
        """The process did not end in order: a fault hit it, or vmloop was told to end it, or gave up a start."""
        if life.gone is None:
            return False
        return self.fault_killed(life) or any(
            command.vm == life.vm
            and command.began - EDGE <= life.gone <= command.ended + EDGE
            and (
                command.op == "kill"
                or (command.op == "stop" and life.gone >= command.began + STOP_SECONDS - EDGE)  # then it is killed
                or (command.op == "start" and command.outcome != RESULT)
            )
            for command in self._commands
        )

    def fault_killed(self, life: Life) -> bool:
        """The process ended by a fault."""
        return life.gone is not None and bool(self._killed(QEMU, life.vm, life.gone - KILL_SEEN, life.gone))

    def qemu_stopped(self, vm: str, began: float, ended: float) -> bool:
        """The VM's QEMU stood still in that time."""
        return any(
            (fault.what, fault.whom, fault.vm) == (STOP, QEMU, vm) and fault.at <= ended and _end(fault.until) >= began
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

    def worker_touched(self, vm: str, began: float, ended: float) -> bool:
        """The VM's worker was killed in that time, or stood still: one that does not take up a kill is replaced."""
        return any(
            (fault.whom, fault.vm) == (WORKER, vm)
            and fault.at <= ended
            and max(fault.at, fault.until or 0.0) >= began - EDGE
            for fault in self._faults
        )

    def worker_deaths(self, vm: str, began: float, ended: float) -> list[float]:
        """When the VM's worker was killed with the command under way, or a moment before."""
        return self._killed(WORKER, vm, began - EDGE, ended)

    def agent_not_there(self, vm: str, began: float, ended: float) -> bool:
        """The guest's agent had reason to be silent or absent: a guest that ends, has just come or stands still, or a new connection."""
        return (
            self.qemu_touched(vm, began - AGENT_RECOVERY, ended)
            or self.guest_stood_still(vm, began, ended)
            or self.worker_died(vm, began - AGENT_RECOVERY, ended)
            or any(life.vm == vm and began - BOOT <= life.born <= ended + EDGE for life in self._lives)
        )

    def connection_lost(self, vm: str, began: float, ended: float) -> bool:
        """Nobody held the VM's connection: worker and zygote died, whichever was first, before anybody came in the place of the first."""
        return bool(self._losses(vm, began - EDGE, ended))

    def unconnected(self, vm: str, began: float, ended: float) -> bool:
        """The connection was lost so shortly before that it need not be there again."""
        return any(start <= ended and began <= end for start, end in self.losses(vm))

    def losses(self, vm: str) -> list[Span]:
        """The spans in which events may be lost: from a death of worker and zygote together until the next worker must have connected."""
        return self._losses(vm, float("-inf"), float("inf"))

    def may_be_lost_at(self, vm: str, at: float) -> bool:
        return any(start <= at <= end for start, end in self.losses(vm))

    def on_our_clock(self, micros: float) -> float:
        """An event's time as seconds on the clock of the recording."""
        return micros / 1e6 - self._epoch

    def _losses(self, vm: str, began: float, ended: float) -> list[Span]:
        spans = []
        for at in self._killed(WORKER, vm, began, ended):
            unkept = any(start <= at <= end for start, end in self._unkept)
            later = self._zygote_death_before_a_successor_of(vm, at)
            if unkept or later is not None:
                spans.append((self._read_until(vm, at) - EDGE, max(at, later or at) + RECONNECT))
        return spans

    def _read_until(self, vm: str, worker_death: float) -> float:
        """A worker that stood still when it was killed had read nothing since."""
        stops = [
            fault.at
            for fault in self._faults
            if (fault.what, fault.whom, fault.vm) == (STOP, WORKER, vm)
            and fault.at <= worker_death <= _end(fault.until)
        ]
        return min([worker_death, *stops])

    def _zygote_death_before_a_successor_of(self, vm: str, worker_death: float) -> float | None:
        came = min((born for born in self._worker_births[vm] if born > worker_death), default=float("inf"))
        return next((at for at in self._zygote_deaths if worker_death <= at <= came), None)

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
