# SPDX-License-Identifier: Apache-2.0
"""worker/agent/ledger.py: what the agent owes is on the page, whole or not at all, and survives any number of workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmloop.common.page import AGENT_SLOTS, Page
from vmloop.worker.agent.ledger import AgentLedger, AgentOwed, Part

from ..fakes.killed_worker import Killed, Steps

NUMBERS = st.integers(1, 2**63 - 1)
TIMES = st.floats(0, 1e9)
ENTRIES = st.builds(
    AgentOwed,
    part=st.sampled_from(list(Part)),
    number=NUMBERS,
    request=st.integers(0, 2**64 - 1),
    reading=st.booleans(),
    quiet=st.booleans(),
    reboot=st.booleans(),
    told=st.booleans(),
    deadline=TIMES,
    sent=TIMES,
    limit=TIMES,
    key=st.binary(max_size=64),
    name=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=80),
)


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with Page(tmp_path / "page", writable=True) as page:
        yield page


def entries(page: Page) -> list[AgentOwed]:
    """What the next worker finds."""
    return list(AgentLedger(page))


def owed(number: int, part: Part = Part.CURRENT, **changes: Any) -> AgentOwed:
    return AgentOwed(part, number, request=number, sent=float(number), **changes)


@given(entry=ENTRIES)
def test_an_entry_comes_back_as_it_went_in(tmp_path_factory: pytest.TempPathFactory, entry: AgentOwed) -> None:
    with Page(tmp_path_factory.mktemp("ledger") / "page", writable=True) as page:
        AgentLedger(page).enter(entry)
        assert entries(page) == [entry]


def test_a_name_that_is_too_long_is_cut_and_touches_nothing_else(page: Page) -> None:
    ledger = AgentLedger(page)
    ledger.enter(owed(1, name="é" * 100))
    ledger.enter(owed(2, name="guest-ping", part=Part.ENDING))
    assert [entry.name for entry in entries(page)] == ["é" * 40, "guest-ping"]


MOVES = st.lists(
    st.tuples(st.sampled_from(["enter", "strike", "answered", "given_up", "told", "in_step"]), st.integers(1, 12)),
    max_size=60,
)


@settings(deadline=None)
@given(moves=MOVES, quiet=st.sets(st.integers(1, 12)))
def test_what_this_worker_knows_and_the_next_one_finds_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[str, int]], quiet: set[int]
) -> None:
    with Page(tmp_path_factory.mktemp("ledger") / "page", writable=True) as page:
        ledger = AgentLedger(page)
        entered: set[int] = set()
        for move, number in moves:
            if move == "enter":
                if any(entry.part is Part.CURRENT for entry in ledger) or number in {e.number for e in ledger}:
                    continue  # one command at a time, and no number twice
                ledger.enter(owed(number, quiet=number in quiet))
                entered.add(number)
            elif move == "in_step":
                ledger.in_step()
                assert {entry.part for entry in ledger} <= {Part.CURRENT, Part.ENDING}
            else:
                getattr(ledger, move)(number)
            assert list(ledger) == entries(page)
            assert len(entries(page)) <= AGENT_SLOTS
            assert {entry.number for entry in ledger} <= entered
        ledger.clear()
        assert entries(page) == []


def test_the_oldest_that_was_given_up_makes_room_and_the_command_on_the_wire_never(page: Page) -> None:
    ledger = AgentLedger(page)
    ledger.enter(owed(1, Part.ENDING))
    for number in range(2, AGENT_SLOTS + 1):
        ledger.enter(owed(number, Part.GIVEN_UP if number > 2 else Part.SYNC))
    for number in range(100, 104):
        ledger.enter(owed(number, Part.CURRENT if number == 100 else Part.GIVEN_UP))
    assert [entry.number for entry in entries(page)] == [1, 6, 7, 8, 100, 101, 102, 103]


def test_a_command_that_ends_the_guest_is_kept_until_its_caller_is_told(page: Page) -> None:
    ledger = AgentLedger(page)
    for number, over in ((1, ledger.answered), (2, ledger.given_up)):
        ledger.enter(owed(number, quiet=True))
        over(number)
        ledger.in_step()
        assert [entry.part for entry in entries(page)] == [Part.ENDING]
        ledger.told(number)
        assert entries(page) == []
    ledger.enter(owed(3, quiet=True))
    ledger.told(3)
    assert entries(page)[0].told
    ledger.given_up(3)
    assert entries(page)[0].part is Part.GIVEN_UP


class _StepPage:
    def __init__(self, page: Page, steps: Steps) -> None:
        self.words = self
        self._page, self._steps = page, steps

    def __getitem__(self, index: int) -> int:
        return self._page.words[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._steps.step()
        self._page.words[index] = value


def test_an_entry_is_whole_or_not_there_whenever_its_worker_is_killed(tmp_path: Path) -> None:
    older = owed(2**60, name="x" * 80, key=b"k" * 64, reading=True, quiet=True)
    newer = owed(5, name="guest-exec", key=b"short", deadline=3.5)
    kill = 0
    while True:
        with Page(tmp_path / f"page-{kill}", writable=True) as page:
            before = AgentLedger(page)
            before.enter(older)
            before.strike(older.number)
            steps = Steps(kill)
            ledger = AgentLedger(_StepPage(page, steps))  # type: ignore[arg-type]
            try:
                ledger.enter(newer)
            except Killed:
                assert entries(page) == []
            else:
                assert entries(page) == [newer]
                return
        kill += 1


def test_the_page_speaks_of_one_connection_only(page: Page) -> None:
    ledger = AgentLedger(page)
    assert not ledger.is_of(0)
    ledger.opened(2**32 - 5)
    ledger.note(synced=True, repeats_ids=True)
    assert (ledger.is_of(2**32 - 5), ledger.is_of(7)) == (True, False)
    assert (ledger.synced, ledger.repeats_ids) == (True, True)
    ledger.note(synced=False, repeats_ids=True)
    assert (ledger.synced, ledger.is_of(2**32 - 5)) == (False, True)
    ledger.sending = 7
    ledger.ended()
    assert (ledger.is_of(2**32 - 5), ledger.synced, ledger.sending) == (False, False, 0)


def test_a_figure_that_is_no_entry_is_none(page: Page) -> None:
    ledger = AgentLedger(page)
    ledger.enter(owed(1))
    taken = next(at for at in range(320, 512, 24) if page.words[at])
    page.words[taken] = 200
    assert entries(page) == []
    page.words[taken], page.words[taken + 1] = int(Part.CURRENT), 0
    assert entries(page) == []
