# SPDX-License-Identifier: Apache-2.0
"""Deadlines against the plainest model there is, a dict: nothing early, nothing later than a slice, nothing that was dropped."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vmloop.common.deadlines import SLICE, Deadlines

ROUNDING = 1e-6

TIMES = st.floats(0, 1e6) | st.integers(0, 10_000).map(lambda slices: slices * SLICE)
THINGS = st.integers(0, 8)


class Model(RuleBasedStateMachine):
    """Adds, changes, drops and takes at random, beside a dict of what is due when."""

    @initialize(start=TIMES)
    def begin(self, start: float) -> None:
        self.now = start
        self.subject: Deadlines[int] = Deadlines()
        self.due: dict[int, float] = {}

    @rule(thing=THINGS, ahead=st.floats(-1, 5) | st.integers(-4, 100).map(lambda slices: slices * SLICE))
    def add(self, thing: int, ahead: float) -> None:
        due = max(0.0, self.now + ahead)
        self.subject.add(thing, due)
        self.due[thing] = due

    @rule(thing=THINGS)
    def drop(self, thing: int) -> None:
        self.subject.drop(thing)
        self.due.pop(thing, None)

    @rule(ahead=st.floats(0, 3) | st.integers(0, 8).map(lambda slices: slices * SLICE))
    def time_passes(self, ahead: float) -> None:
        self.now += ahead
        self.take()

    @rule()
    def time_passes_until_next_due(self) -> None:
        when = self.subject.next_due()
        assert (when is None) == (not self.due)
        if when is not None:
            self.now = max(self.now, when)
            assert self.take(), "next_due named a time at which nothing was due"

    def take(self) -> list[int]:
        taken = self.subject.take_due(self.now)
        assert len(taken) == len(set(taken))
        for thing in taken:
            assert self.due.pop(thing) <= self.now + ROUNDING, "early, or dropped before"
        for thing, due in self.due.items():
            assert due > self.now - SLICE - ROUNDING, f"{thing} is more than a slice late"
        return taken

    @invariant()
    def the_count_and_the_next_time_are_right(self) -> None:
        assert len(self.subject) == len(self.due)
        when = self.subject.next_due()
        if when is None:
            assert not self.due
        else:
            earliest = min(self.due.values())
            assert earliest - ROUNDING <= when <= earliest + SLICE + ROUNDING


TestDeadlines = Model.TestCase
TestDeadlines.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(TIMES, max_size=30))
def test_everything_comes_once_in_order_of_its_slice(times: list[float]) -> None:
    subject: Deadlines[int] = Deadlines()
    for number, due in enumerate(times):
        subject.add(number, due)
    came: list[int] = []
    while (when := subject.next_due()) is not None:
        came += subject.take_due(when)
    assert sorted(came) == list(range(len(times)))
    assert [int(times[number] / SLICE) for number in came] == sorted(int(due / SLICE) for due in times)
    assert subject.take_due(1e12) == []


def test_nothing_waits_in_an_empty_set() -> None:
    subject: Deadlines[str] = Deadlines()
    assert (len(subject), subject.next_due(), subject.take_due(1e12)) == (0, None, [])
    subject.drop("never added")


@pytest.mark.parametrize("due", [0.0, 1.0, 100 * SLICE, 1e9])
def test_a_thing_is_not_due_at_its_own_time_but_by_the_end_of_a_slice(due: float) -> None:
    subject: Deadlines[str] = Deadlines()
    subject.add("a", due)
    assert subject.take_due(due - ROUNDING) == []
    assert subject.take_due(due + SLICE + ROUNDING) == ["a"]
    assert subject.take_due(due + 2 * SLICE) == []


def test_a_changed_deadline_counts_once_and_at_its_new_time() -> None:
    subject: Deadlines[str] = Deadlines()
    subject.add("a", 1.0)
    subject.add("a", 5.0)
    assert len(subject) == 1
    assert subject.take_due(4.9) == []
    assert subject.take_due(6.0) == ["a"]


def test_nothing_lingers_for_what_was_dropped() -> None:
    subject: Deadlines[int] = Deadlines()
    for number in range(10_000):
        subject.add(number, number * SLICE)
    for number in range(10_000):
        subject.drop(number)
    assert subject.next_due() is None
    assert not any(vars(subject).values())
