# SPDX-License-Identifier: Apache-2.0
"""The ledger of commands that QEMU owes an answer: entered, struck out, and found again by whoever opens the page next."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vmloop.common.page import LEDGER_SLOTS, Page, Word
from vmloop.common.wire import MAX_KEY_BYTES
from vmloop.worker.qmp.ledger import Ledger, LedgerFull, Owed

from ..fakes.killed_worker import Killed, Steps


def owed(qmp_id: int, **changes: object) -> Owed:
    values: dict[str, object] = {"request": 0, "reading": True, "oob": False, "deadline": 1.5, "key": b""}
    return Owed(qmp_id, **{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "page"


@pytest.fixture
def page(path: Path) -> Iterator[Page]:
    with Page(path, writable=True) as page:
        yield page


@pytest.fixture
def ledger(page: Page) -> Iterator[Ledger]:
    ledger = Ledger(page)
    yield ledger
    ledger.release()


def reopened(path: Path) -> list[Owed]:
    """What the next worker finds."""
    with Page(path, writable=True) as page:
        ledger = Ledger(page)
        try:
            return list(ledger)
        finally:
            ledger.release()


def test_what_is_entered_is_found_by_the_next_worker(ledger: Ledger, path: Path) -> None:
    first = owed(7, request=12, reading=True, deadline=99.25, key=b"once")
    second = owed(8, request=0, reading=False, oob=True, deadline=0.0)
    ledger.enter(first)
    ledger.enter(second)
    assert list(ledger) == reopened(path) == [first, second]


def test_what_is_struck_out_is_gone(ledger: Ledger, path: Path) -> None:
    for qmp_id in (1, 2, 3):
        ledger.enter(owed(qmp_id))
    ledger.strike(2)
    assert [entry.qmp_id for entry in reopened(path)] == [1, 3]


def test_striking_what_is_not_there_changes_nothing(ledger: Ledger, path: Path) -> None:
    ledger.enter(owed(1))
    ledger.strike(2)
    ledger.strike(1)
    ledger.strike(1)
    assert reopened(path) == []
    for qmp_id in range(10, 10 + LEDGER_SLOTS):
        ledger.enter(owed(qmp_id))
    assert len(reopened(path)) == LEDGER_SLOTS


def test_entries_come_by_their_ids_whatever_slots_they_have(ledger: Ledger, path: Path) -> None:
    for qmp_id in (5, 3, 9):
        ledger.enter(owed(qmp_id))
    ledger.strike(3)
    ledger.enter(owed(1))
    assert [entry.qmp_id for entry in ledger] == [entry.qmp_id for entry in reopened(path)] == [1, 5, 9]


def test_a_full_ledger_says_so_and_keeps_what_it_has(ledger: Ledger, path: Path) -> None:
    for qmp_id in range(LEDGER_SLOTS):
        ledger.enter(owed(qmp_id))
    with pytest.raises(LedgerFull):
        ledger.enter(owed(99))
    assert [entry.qmp_id for entry in reopened(path)] == list(range(LEDGER_SLOTS))
    ledger.strike(4)
    ledger.enter(owed(99))
    assert 99 in [entry.qmp_id for entry in reopened(path)]


def test_a_cleared_ledger_owes_nothing(ledger: Ledger, path: Path) -> None:
    for qmp_id in range(LEDGER_SLOTS):
        ledger.enter(owed(qmp_id))
    ledger.clear()
    assert list(ledger) == reopened(path) == []


def test_a_shorter_key_has_nothing_of_the_longer_one_that_was_there(ledger: Ledger) -> None:
    ledger.enter(owed(1, key=b"k" * MAX_KEY_BYTES))
    ledger.strike(1)
    for qmp_id, key in ((2, b"short"), (3, b"")):
        ledger.enter(owed(qmp_id, key=key))
    assert [entry.key for entry in ledger] == [b"short", b""]


def test_ids_never_repeat_not_even_across_workers(ledger: Ledger, path: Path) -> None:
    ids = [ledger.next_qmp_id() for _ in range(3)]
    with Page(path, writable=True) as page:
        other = Ledger(page)
        ids += [other.next_qmp_id() for _ in range(3)]
        other.release()
    assert ids == [1, 2, 3, 4, 5, 6]


def test_a_released_ledger_lets_go_of_its_page(path: Path) -> None:
    page = Page(path, writable=True)
    ledger = Ledger(page)
    ledger.enter(owed(1))
    ledger.release()
    page.close()  # raises BufferError while a slot is held


@given(
    st.builds(
        Owed,
        qmp_id=st.integers(1, (1 << 64) - 1),
        request=st.integers(0, (1 << 64) - 1),
        reading=st.booleans(),
        oob=st.booleans(),
        deadline=st.floats(0, 1e12),
        key=st.binary(max_size=MAX_KEY_BYTES),
    )
)
def test_an_entry_comes_back_as_it_went_in(tmp_path_factory: pytest.TempPathFactory, entry: Owed) -> None:
    path = tmp_path_factory.mktemp("ledger") / "page"
    with Page(path, writable=True) as page:
        ledger = Ledger(page)
        ledger.enter(entry)
        ledger.release()
    assert reopened(path) == [entry]


class _KillableSlot:
    def __init__(self, slot: memoryview, steps: Steps) -> None:
        self._slot = slot
        self._steps = steps

    def __getitem__(self, index: int) -> int:
        return self._slot[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._steps.step()
        self._slot[index] = value

    def release(self) -> None:
        self._slot.release()


class _KillablePage:
    def __init__(self, page: Page, steps: Steps) -> None:
        self.words = page.words
        self._page = page
        self._steps = steps

    def slot(self, index: int) -> _KillableSlot:
        return _KillableSlot(self._page.slot(index), self._steps)


def test_an_entry_is_whole_or_not_there_whenever_its_worker_is_killed(path: Path) -> None:
    old, new = owed(1, request=5, reading=False, key=b"an old key"), owed(2, request=6, key=b"key" * 20, deadline=3.5)
    found: list[list[Owed]] = []
    for allowed in range(100):
        with Page(path, writable=True) as page:
            steps = Steps()
            ledger = Ledger(_KillablePage(page, steps))  # type: ignore[arg-type]
            ledger.clear()
            ledger.enter(old)
            ledger.strike(1)  # so that the new one goes over its remains
            steps.made, steps.allowed = 0, allowed
            try:
                ledger.enter(new)
            except Killed:
                found.append(reopened(path))
                continue
            finally:
                ledger.release()
            found.append(reopened(path))
            break
    assert len(found) > 10
    assert found == [[]] * (len(found) - 1) + [[new]]


class LedgerAgainstDict(RuleBasedStateMachine):
    """Any order of entering and striking does what a dict does, and the page always has the same."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "page"
        self.page = Page(self.path, writable=True)
        self.ledger = Ledger(self.page)
        self.model: dict[int, Owed] = {}

    def teardown(self) -> None:
        self.ledger.release()
        self.page.close()
        self.directory.cleanup()

    @rule(request=st.integers(0, 1 << 40), key=st.binary(max_size=MAX_KEY_BYTES), oob=st.booleans())
    def enter(self, request: int, key: bytes, oob: bool) -> None:
        entry = owed(self.ledger.next_qmp_id(), request=request, key=key, oob=oob)
        if len(self.model) == LEDGER_SLOTS:
            with pytest.raises(LedgerFull):
                self.ledger.enter(entry)
        else:
            self.ledger.enter(entry)
            self.model[entry.qmp_id] = entry

    @rule(which=st.integers(0, 30))
    def strike(self, which: int) -> None:
        qmp_id = sorted(self.model)[which % len(self.model)] if self.model else which
        self.ledger.strike(qmp_id)
        self.model.pop(qmp_id, None)

    @rule()
    def succeed(self) -> None:
        self.ledger.release()
        self.page.close()
        self.page = Page(self.path, writable=True)
        self.ledger = Ledger(self.page)

    @invariant()
    def holds_the_same(self) -> None:
        assert list(self.ledger) == [self.model[qmp_id] for qmp_id in sorted(self.model)]
        assert self.page.words[Word.QMP_ID] >= max(self.model, default=0)


TestLedgerAgainstDict = LedgerAgainstDict.TestCase
