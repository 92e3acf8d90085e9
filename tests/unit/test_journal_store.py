# SPDX-License-Identifier: Apache-2.0
"""Disk and backlog together: nothing raises because of the disk, and a reader sees all events in order, none twice, the lost ones told."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vmloop.common.cursor import Cursor
from vmloop.worker.journal.journal import NOWHERE, Journal
from vmloop.worker.journal.record import Record
from vmloop.worker.journal.segments import MIN_SEGMENT_BYTES
from vmloop.worker.journal.store import BACKLOG_BYTES, RECORD_OVERHEAD, RETRY_SECONDS, EventStore

from ..fakes.disks import file_size_limit, make_read_only, small_disk

SEGMENT = 400
LIMIT = 4000
BACKLOG = 8 * (RECORD_OVERHEAD + 40)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_retry(self) -> None:
        self.now += RETRY_SECONDS


def one(seq: int, body: bytes = b"body", epoch: int = 1) -> list[Record]:
    return [Record(epoch, seq, seq % 1000, body)]


def all_of(store: EventStore, since: Cursor = NOWHERE, count: int = 3) -> list[bytes]:
    bodies: list[bytes] = []
    while True:
        page = store.read(since, count, 1 << 20)
        bodies += page.bodies
        since = page.last
        if not page.more:
            return bodies


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def clock() -> Clock:
    return Clock()


# -- against a model ------------------------------------------------------------------------------------------------------


class StoreMachine(RuleBasedStateMachine):
    """The model: what is on disk, what waits, and which may be gone because it was told as lost or removed."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.events: list[Record] = []
        self.next = Cursor(1, 1)
        self.open()

    def open(self) -> None:
        self.store = EventStore(self.folder / "journal", LIMIT, BACKLOG, self.clock, segment=SEGMENT)

    def batch_of(self, sizes: list[int]) -> list[Record]:
        batch = []
        for size in sizes:
            batch.append(Record(*self.next, self.next.seq, bytes([self.next.seq % 256]) * size))
            self.next = Cursor(self.next.epoch, self.next.seq + 1)
        return batch

    def forget_what_is_told(self) -> None:
        for span in (self.store.lost(), self.store.truncated()):
            if span is not None:
                assert {span[0], span[1]} <= {record.cursor for record in self.events}
                self.events = [record for record in self.events if not span[0] <= record.cursor <= span[1]]

    @rule(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=3), room=st.none() | st.integers(0, SEGMENT + 300))
    def append(self, sizes: list[int], room: int | None) -> None:
        batch = self.batch_of(sizes)
        self.events += batch
        with file_size_limit(1 << 30 if room is None else room):
            on_disk = self.store.append(batch)
        assert on_disk == (self.store.problem == "") == (self.store.last_on_disk == batch[-1].cursor)
        self.forget_what_is_told()

    @rule(seconds=st.sampled_from([RETRY_SECONDS / 2, RETRY_SECONDS]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(room=st.none() | st.integers(0, SEGMENT + 300))
    def retry(self, room: int | None) -> None:
        with file_size_limit(1 << 30 if room is None else room):
            assert self.store.retry() == (self.store.waiting == 0)
        self.forget_what_is_told()

    @rule()
    def begin_epoch(self) -> None:
        self.next = Cursor(self.next.epoch + 1, 1)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        assert self.store.waiting == 0
        self.forget_what_is_told()
        self.open()

    @rule(data=st.data(), count=st.integers(1, 5), size=st.integers(0, 120))
    def read(self, data: st.DataObject, count: int, size: int) -> None:
        since = data.draw(st.sampled_from([NOWHERE, self.next, *(record.cursor for record in self.events)]))
        expected = [record for record in self.events if record.cursor > since]
        page = self.store.read(since, count, size)
        given = len(page.bodies)
        assert page.bodies == [record.body for record in expected[:given]]
        assert page.more == (given < len(expected))
        assert page.last == (expected[given - 1].cursor if given else since)
        assert bool(given) == bool(expected)
        assert given <= count

    @invariant()
    def the_ends_are_known(self) -> None:
        if self.events:
            assert self.store.first == self.events[0].cursor
            assert self.store.last >= self.events[-1].cursor

    @invariant()
    def memory_is_bounded(self) -> None:
        assert self.store._backlog_bytes <= BACKLOG
        waiting = [record for batch in self.store._backlog for record in batch]
        assert self.store._backlog_bytes == sum(len(record.body) + RECORD_OVERHEAD for record in waiting)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            try:
                assert all_of(self.store) == [record.body for record in self.events]
            finally:
                self.store.close()
                shutil.rmtree(self.folder)


TestStoreAgainstAList = StoreMachine.TestCase
TestStoreAgainstAList.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# -- a disk that refuses --------------------------------------------------------------------------------------------------


def test_a_full_disk_is_said_and_everything_is_on_it_once_it_has_room(tmp_path: Path, clock: Clock) -> None:
    with small_disk(tmp_path / "disk", 128 * 1024):
        directory = tmp_path / "disk" / "journal"
        store = EventStore(directory, clock=clock)
        assert store.append(one(1))
        ballast = tmp_path / "disk" / "ballast"
        with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            file.writelines([bytes(4096)] * 100)
        seq = 2
        while store.append(one(seq, bytes(600))):
            seq += 1
        assert "No space left on device" in store.problem
        assert "make room there" in store.problem
        assert str(directory) in store.problem
        assert not store.append(one(seq + 1))
        assert (store.last, store.last_on_disk) == (Cursor(1, seq + 1), Cursor(1, seq - 1))
        assert store.last_mark == seq - 1
        assert len(all_of(store)) == seq + 1
        ballast.unlink()
        assert not store.append(one(seq + 2))  # not yet time
        clock.pass_retry()
        assert store.append(one(seq + 3))
        assert (store.problem, store.waiting, store.lost()) == ("", 0, None)
        store.close()
        again = Journal(directory)
        assert (again.last, again.repaired) == (Cursor(1, seq + 3), "")
        assert len(again.read(NOWHERE, 1000, 1 << 20).bodies) == seq + 3


def test_a_read_only_disk_is_said_and_its_events_are_still_read(tmp_path: Path, clock: Clock) -> None:
    with small_disk(tmp_path / "disk", 256 * 1024):
        store = EventStore(tmp_path / "disk" / "journal", clock=clock)
        store.append(one(1, b"1"))
        store.close()
        make_read_only(tmp_path / "disk")
        assert not store.append(one(2, b"2"))
        assert "Read-only file system" in store.problem
        assert "mount it writable" in store.problem
        assert all_of(store) == [b"1", b"2"]
        make_read_only(tmp_path / "disk", False)
        clock.pass_retry()
        assert store.retry()
        assert store.last_on_disk == Cursor(1, 2)
        store.close()


def test_a_vm_without_a_directory_keeps_its_events_in_memory(tmp_path: Path, clock: Clock) -> None:
    store = EventStore(tmp_path / "gone" / "journal", clock=clock)
    assert store.problem == ""
    assert not store.append(one(1))
    assert "No such file or directory" in store.problem
    assert all_of(store) == [b"body"]
    assert store.first == store.last == Cursor(1, 1)
    assert store.filenos() == []
    store.close()


def test_a_journal_that_cannot_be_opened_is_opened_later(directory: Path, clock: Clock) -> None:
    directory.write_text("in the way")
    store = EventStore(directory, clock=clock)
    assert "cannot be opened: Not a directory" in store.problem
    assert (store.repaired, store.last_mark, store.truncated()) == ("", 0, None)
    store.sync()
    assert not store.append(one(1))
    directory.unlink()
    assert not store.retry()
    clock.pass_retry()
    assert store.retry()
    assert store.problem == ""
    assert store.last_on_disk == Cursor(1, 1)
    store.close()


def test_numbers_that_a_journal_opened_late_holds_already_are_told_as_lost(directory: Path, clock: Clock) -> None:
    old = Journal(directory)
    old.append(one(1, b"old 1"))
    old.append(one(2, b"old 2"))
    old.close()
    directory.rename(directory.with_name("elsewhere"))
    directory.write_text("in the way")
    store = EventStore(directory, clock=clock)
    for seq in (1, 2, 3):
        store.append(one(seq, b"new %d" % seq))
    directory.unlink()
    directory.with_name("elsewhere").rename(directory)
    clock.pass_retry()
    assert store.retry()
    assert store.lost() == (Cursor(1, 1), Cursor(1, 2))
    assert all_of(store) == [b"old 1", b"old 2", b"new 3"]
    store.close()


def test_a_disk_that_refused_is_not_tried_again_at_once(directory: Path, clock: Clock) -> None:
    store = EventStore(directory, clock=clock)
    with file_size_limit(0):
        assert not store.append(one(1))
    clock.now += RETRY_SECONDS * 0.9
    assert not store.append(one(2))
    assert not store.retry()
    assert store.waiting == 2
    clock.now += RETRY_SECONDS * 0.2
    assert store.append(one(3))
    assert store.waiting == 0
    store.close()


def test_the_backlog_drops_its_oldest_batches_and_says_which(directory: Path, clock: Clock) -> None:
    store = EventStore(directory, backlog=10 * (RECORD_OVERHEAD + 4), clock=clock)
    with file_size_limit(0):
        for seq in range(1, 31):
            store.append(one(seq))
            assert store.waiting <= 10
    assert store.lost() == (Cursor(1, 1), Cursor(1, 20))
    assert store.lost() is None
    assert (store.first, store.last) == (Cursor(1, 21), Cursor(1, 30))
    clock.pass_retry()
    assert store.retry()
    assert len(all_of(store)) == 10
    store.close()


def test_a_batch_that_the_backlog_cannot_hold_is_told_as_lost_whole(directory: Path, clock: Clock) -> None:
    store = EventStore(directory, backlog=1000, clock=clock)
    with file_size_limit(0):
        assert not store.append([*one(1, bytes(600)), *one(2, bytes(600))])
    assert (store.waiting, store.lost(), store.last) == (0, (Cursor(1, 1), Cursor(1, 2)), Cursor(1, 2))
    assert store.append(one(3))
    assert store.problem == ""
    store.close()


@pytest.mark.parametrize("refuses", [False, True])
def test_cursors_that_do_not_increase_are_a_defect_whether_the_disk_works_or_not(
    directory: Path, clock: Clock, refuses: bool
) -> None:
    store = EventStore(directory, clock=clock)
    with file_size_limit(0 if refuses else 1 << 20):
        store.append(one(2))
        for batch in (one(2), one(1), [*one(4), *one(3)], []):
            with pytest.raises(ValueError, match=r"come after|at least one"):
                store.append(batch)
    assert store.last == Cursor(1, 2)
    assert all_of(store) == [b"body"]
    store.close()


def test_what_waits_is_tried_once_more_at_the_end(directory: Path, clock: Clock) -> None:
    store = EventStore(directory, clock=clock)
    with file_size_limit(0):
        store.append(one(1))
    store.close()
    assert Journal(directory).last == Cursor(1, 1)
    assert store.filenos() == []


def test_a_store_goes_on_where_another_ended(directory: Path) -> None:
    store = EventStore(directory)
    assert store.append([Record(3, 7, 99, b"a")])
    assert len(store.filenos()) == 1
    store.sync()
    assert store.problem == ""
    store.close()
    again = EventStore(directory)
    assert (again.first, again.last, again.last_on_disk, again.last_mark) == (*[Cursor(3, 7)] * 3, 99)
    with pytest.raises(ValueError, match="does not come after"):
        again.append(one(1))
    again.close()


def test_the_segments_that_were_removed_are_told(directory: Path) -> None:
    store = EventStore(directory, 2 * MIN_SEGMENT_BYTES)
    for seq in range(1, 14):
        store.append(one(seq, bytes(200_000)))
    removed = store.truncated()
    assert removed is not None
    assert removed[0] == Cursor(1, 1)
    assert store.first == Cursor(1, removed[1].seq + 1)
    assert store.truncated() is None
    store.close()


def test_the_backlog_is_four_mebibytes_unless_said_otherwise() -> None:
    assert BACKLOG_BYTES == 4 * 1024 * 1024


def test_a_full_backlog_loses_nothing_to_an_append_that_finds_the_disk_working(directory: Path, clock: Clock) -> None:
    store = EventStore(directory, backlog=5 * (RECORD_OVERHEAD + 4), clock=clock)
    with file_size_limit(0):
        for seq in range(1, 6):
            store.append(one(seq))
    clock.pass_retry()
    assert store.append(one(6))
    assert (store.lost(), store.waiting, len(all_of(store))) == (None, 0, 6)
    store.close()


def test_numbers_given_again_after_a_late_opening_are_told_as_lost_too(directory: Path, clock: Clock) -> None:
    directory.write_text("in the way")
    store = EventStore(directory, clock=clock)
    directory.unlink()
    old = Journal(directory)
    old.append(one(5, b"old"))
    old.close()
    clock.pass_retry()
    assert store.retry()
    assert not store.append(one(1))
    assert store.lost() == (Cursor(1, 1), Cursor(1, 1))
    assert store.append(one(6, b"new"))
    assert all_of(store) == [b"old", b"new"]
    store.close()
