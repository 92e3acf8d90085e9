# SPDX-License-Identifier: Apache-2.0
"""Busy or frozen, on a clock that the test moves: when the question goes out, what an answer and what silence mean, and the way back."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from typing import cast

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from vmloop.common.settings import WorkerSettings
from vmloop.common.states import MONITOR_MOVES, MonitorState
from vmloop.worker.qmp.liveness import Liveness

READY, BUSY, FROZEN = MonitorState.READY, MonitorState.BUSY, MonitorState.FROZEN
SETTINGS = msgspec.structs.replace(WorkerSettings(), probe_after=1.0, frozen_after=2.0)


class _Timer:
    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def __lt__(self, other: _Timer) -> bool:
        return self.when < other.when


class FakeClock:
    """The part of an event loop that knows the time."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[_Timer] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> _Timer:
        timer = _Timer(when, callback)
        heapq.heappush(self.timers, timer)
        return timer

    def call_later(self, seconds: float, callback: Callable[[], None]) -> _Timer:
        return self.call_at(self.now + seconds, callback)

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while self.timers and self.timers[0].when <= end:
            timer = heapq.heappop(self.timers)
            self.now = max(self.now, timer.when)
            if not timer.cancelled:
                timer.callback()
        self.now = end

    @property
    def waiting(self) -> int:
        return sum(not timer.cancelled for timer in self.timers)


class Bench:
    """A ladder, with the commands that are on the wire."""

    def __init__(self, *, oob: bool = True) -> None:
        self.clock = FakeClock()
        self.oob = oob
        self.probes: list[float] = []  # their deadlines
        self.states: list[MonitorState] = []
        self.on_wire: list[float] = []
        self.ladder = Liveness(cast("asyncio.AbstractEventLoop", self.clock), SETTINGS, self._probe, self._on_state)

    def _probe(self, deadline: float) -> bool:
        if self.oob:
            self.probes.append(deadline)
            self.ladder.sent(True)
        return self.oob

    def _on_state(self, state: MonitorState, reason: str) -> None:
        assert reason
        assert state is self.ladder.state
        self.states.append(state)

    def start(self) -> Bench:
        self.ladder.start(self.on_wire[0] if self.on_wire else None)
        return self

    def send(self) -> None:
        self.on_wire.append(self.clock.now)
        self.ladder.sent(False)

    def answer(self) -> None:
        self.on_wire.pop(0)
        self.ladder.answered(False, self.on_wire[0] if self.on_wire else None)

    def answer_probe(self) -> None:
        self.ladder.answered(True, self.on_wire[0] if self.on_wire else None)


def test_while_commands_are_answered_nothing_is_asked() -> None:
    bench = Bench().start()
    for _ in range(50):
        bench.send()
        bench.clock.pass_time(0.9)
        bench.answer()
    assert (bench.probes, bench.states, bench.ladder.state) == ([], [], READY)


def test_while_nothing_is_outstanding_no_timer_runs() -> None:
    bench = Bench().start()
    assert bench.clock.waiting == 0
    bench.send()
    bench.answer()
    bench.clock.pass_time(10)
    assert bench.clock.waiting == 0
    assert bench.probes == []


def test_an_unanswered_command_makes_it_ask_out_of_band_once() -> None:
    bench = Bench().start()
    bench.send()
    bench.clock.pass_time(0.99)
    assert bench.probes == []
    bench.clock.pass_time(0.02)
    assert bench.probes == [100.0 + 1.0 + 2.0]
    bench.clock.pass_time(30)
    assert len(bench.probes) == 1


def test_a_vm_that_answers_only_out_of_band_is_busy_and_is_asked_again() -> None:
    bench = Bench().start()
    bench.send()
    bench.clock.pass_time(1)
    bench.answer_probe()
    assert bench.states == [BUSY]
    bench.clock.pass_time(4)
    assert len(bench.probes) == 2
    bench.answer_probe()
    assert bench.states == [BUSY]


def test_a_vm_that_answers_nothing_is_frozen() -> None:
    bench = Bench().start()
    bench.send()
    bench.clock.pass_time(2.99)
    assert bench.states == []
    bench.clock.pass_time(0.02)
    assert bench.states == [FROZEN]
    assert round(bench.ladder.silent_for()) == 3


def test_ready_busy_frozen_and_back_again() -> None:
    bench = Bench().start()
    bench.send()
    bench.clock.pass_time(1)
    bench.answer_probe()
    bench.clock.pass_time(8)  # it is asked again, and does not answer any more
    assert bench.states == [BUSY, FROZEN]
    bench.answer_probe()
    assert bench.states == [BUSY, FROZEN, BUSY]
    bench.answer()
    assert bench.states == [BUSY, FROZEN, BUSY, READY]
    assert bench.ladder.silent_for() == 0.0


def test_an_answer_in_band_is_enough_to_be_ready() -> None:
    bench = Bench().start()
    bench.send()
    bench.send()
    bench.clock.pass_time(5)
    bench.answer()
    assert bench.states == [FROZEN, READY]


def test_the_answer_to_the_question_may_come_after_the_command_s_own() -> None:
    bench = Bench().start()
    bench.send()
    bench.clock.pass_time(1)
    bench.answer()
    bench.answer_probe()
    bench.clock.pass_time(30)
    assert bench.states == []


def test_a_vm_that_freezes_again_is_found_out_again() -> None:
    bench = Bench().start()
    for _ in range(3):
        bench.send()
        bench.clock.pass_time(4)
        bench.answer_probe()
        bench.answer()
        bench.clock.pass_time(5)
    assert bench.states == [FROZEN, BUSY, READY] * 3


def test_a_question_that_was_never_answered_does_not_keep_a_later_freeze_from_being_seen() -> None:
    bench = Bench().start()
    bench.send()
    bench.clock.pass_time(4)
    bench.answer()  # but the question stays unanswered
    bench.clock.pass_time(5)
    bench.send()
    bench.clock.pass_time(10)
    assert bench.states == [FROZEN, READY, FROZEN]


def test_a_newer_command_that_is_answered_in_time_does_not_hide_how_long_an_older_one_waits() -> None:
    bench = Bench().start()
    bench.send()
    bench.clock.pass_time(0.8)
    bench.send()
    bench.answer()  # the first; now the second counts
    bench.clock.pass_time(0.5)
    assert bench.probes == []
    bench.clock.pass_time(0.6)
    assert len(bench.probes) == 1


def test_without_oob_an_unanswered_command_only_ever_means_busy() -> None:
    bench = Bench(oob=False).start()
    bench.send()
    bench.clock.pass_time(60)
    assert bench.states == [BUSY]
    bench.answer()
    assert bench.states == [BUSY, READY]


def test_a_connection_that_was_taken_over_counts_from_what_its_predecessor_sent() -> None:
    bench = Bench()
    bench.on_wire.append(bench.clock.now - 50)
    bench.start()
    bench.clock.pass_time(0)
    assert len(bench.probes) == 1


def test_nothing_is_asked_before_the_negotiation_is_through() -> None:
    bench = Bench()
    bench.send()  # qmp_capabilities itself
    bench.clock.pass_time(60)
    assert (bench.probes, bench.states) == ([], [])
    bench.answer()
    assert bench.ladder.state is MonitorState.CONNECTING
    bench.start()
    assert bench.ladder.state is READY


def test_after_stop_no_timer_is_left() -> None:
    bench = Bench().start()
    bench.send()
    bench.ladder.stop()
    assert bench.clock.waiting == 0
    bench.ladder.stop()


@given(st.lists(st.sampled_from(["send", "answer", "answer probe", "wait", "wait long"]), max_size=60), st.booleans())
def test_it_makes_only_legal_moves_and_always_comes_back(steps: list[str], oob: bool) -> None:
    bench = Bench(oob=oob).start()
    answered_probes = 0
    for step in steps:
        if step == "send":
            bench.send()
        elif step == "answer" and bench.on_wire:
            bench.answer()
        elif step == "answer probe" and answered_probes < len(bench.probes):
            answered_probes += 1
            bench.answer_probe()
        elif step.startswith("wait"):
            bench.clock.pass_time(0.4 if step == "wait" else 2.5)
        assert bench.clock.waiting <= 1
    for before, after in zip([READY, *bench.states], bench.states, strict=False):
        assert after in MONITOR_MOVES[before]
        assert oob or after is not FROZEN
    while bench.on_wire:
        bench.answer()
    for _ in range(len(bench.probes) - answered_probes):
        bench.answer_probe()
    assert bench.ladder.state is READY
    bench.send()
    bench.clock.pass_time(10)  # and the ladder still works
    assert bench.ladder.state is (FROZEN if oob else BUSY)
