# SPDX-License-Identifier: Apache-2.0
"""The journal against a plain list: appended, killed at any byte, reopened, on a disk that is full at any byte, and read from anywhere."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vmloop.common.cursor import Cursor
from vmloop.worker.journal.journal import DEFAULT_LIMIT, NOWHERE, RESUME_POINTS, Journal
from vmloop.worker.journal.record import Record, encode_batch
from vmloop.worker.journal.segments import MAGIC, SEGMENTS, segment_name

from ..fakes.disks import file_size_limit, make_read_only, small_disk

SEGMENT = 400
LIMIT = 2400


def one(seq: int, body: bytes = b"body", epoch: int = 1) -> list[Record]:
    return [Record(epoch, seq, seq % 1000, body)]


def all_of(journal: Journal, since: Cursor = NOWHERE, count: int = 7) -> list[bytes]:
    """Everything after a cursor, page by page."""
    bodies: list[bytes] = []
    while True:
        page = journal.read(since, count, 1 << 20)
        bodies += page.bodies
        since = page.last
        if not page.more:
            return bodies


def fill(journal: Journal) -> None:
    """Append until the disk refuses."""
    for seq in range(journal.last.seq + 1, 1000):
        journal.append(one(seq, bytes(900)))


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.name.endswith(".journal"))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "journal"


# -- against a model ------------------------------------------------------------------------------------------------------


class JournalMachine(RuleBasedStateMachine):
    """The model is the list of records that count; whatever happens, the journal has exactly these."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.directory = self.folder / "journal"
        self.model: list[Record] = []
        self.next = Cursor(1, 1)
        self.serial = 0
        self.open()

    def open(self) -> None:
        self.journal = Journal(self.directory, LIMIT, segment=SEGMENT)

    def batch_of(self, sizes: list[int]) -> list[Record]:
        batch = []
        for size in sizes:
            self.serial += 1
            batch.append(Record(*self.next, self.serial, bytes([self.serial % 256]) * size))
            self.next = Cursor(self.next.epoch, self.next.seq + 1)
        return batch

    def drop_what_was_removed(self) -> None:
        removed = self.journal.truncated()
        if removed is not None:
            assert self.model[0].cursor == removed[0]
            assert removed[1] in [record.cursor for record in self.model]
            self.model = [record for record in self.model if record.cursor > removed[1]]

    sizes = st.lists(st.integers(0, 90), min_size=1, max_size=4)

    @rule(sizes=sizes)
    def append(self, sizes: list[int]) -> None:
        batch = self.batch_of(sizes)
        self.journal.append(batch)
        self.model += batch
        self.drop_what_was_removed()

    @rule()
    def begin_epoch(self) -> None:
        self.next = Cursor(self.next.epoch + 1, 1)

    @rule(sizes=sizes, room=st.integers(0, SEGMENT + 500))
    def append_on_a_disk_that_is_full_at_some_byte(self, sizes: list[int], room: int) -> None:
        before, batch = self.next, self.batch_of(sizes)
        with file_size_limit(room):
            try:
                self.journal.append(batch)
            except OSError:
                self.next = before  # the caller tries the same numbers again, or others
                batch = []
        self.drop_what_was_removed()
        self.model += batch
        self.drop_nothing_twice()

    def drop_nothing_twice(self) -> None:
        assert self.journal.truncated() is None

    @rule()
    def reopen(self) -> None:
        self.journal.close()
        self.open()
        assert self.journal.repaired == ""

    @rule()
    def close_and_go_on(self) -> None:
        self.journal.close()

    @rule(sizes=sizes, data=st.data(), new=st.booleans())
    def be_killed_in_a_write(self, sizes: list[int], data: st.DataObject, new: bool) -> None:
        self.journal.close()
        before, batch = self.next, self.batch_of(sizes)
        whole = encode_batch(batch)
        present = files(self.directory) if self.directory.is_dir() else []
        if new or not present:
            self.directory.mkdir(exist_ok=True)
            path, whole = self.directory / segment_name(batch[0].cursor), MAGIC + whole
        else:
            path = present[-1]
        cut = data.draw(st.integers(0, len(whole)))
        with path.open("ab") as file:
            file.write(whole[:cut])
        self.open()
        if cut == len(whole):
            self.model += batch
        else:
            self.next = before
            assert bool(self.journal.repaired) == (cut > 0 and whole[:cut] not in (MAGIC[:cut], MAGIC))

    @rule(data=st.data(), count=st.integers(1, 5), size=st.integers(0, 200))
    def read(self, data: st.DataObject, count: int, size: int) -> None:
        known = [record.cursor for record in self.model]
        since = data.draw(
            st.sampled_from([NOWHERE, self.next, *known]) | st.builds(Cursor, st.integers(0, 3), st.integers(0, 9))
        )
        expected = [record for record in self.model if record.cursor > since]
        page = self.journal.read(since, count, size)
        given = len(page.bodies)
        assert page.bodies == [record.body for record in expected[:given]]
        assert page.more == (given < len(expected))
        assert page.last == (expected[given - 1].cursor if given else since)
        assert given == min(len(expected), count) or sum(map(len, page.bodies)) + len(expected[given].body) > size
        assert bool(given) == bool(expected)

    @invariant()
    def the_ends_are_known(self) -> None:
        if self.model:
            assert (self.journal.first, self.journal.last) == (self.model[0].cursor, self.model[-1].cursor)
            assert self.journal.last_mark == self.model[-1].mark

    @invariant()
    def the_limit_is_kept(self) -> None:
        on_disk = sum(path.stat().st_size for path in files(self.directory)) if self.directory.is_dir() else 0
        assert on_disk <= LIMIT + 100 * 4 + 200  # what a kill wrote past the journal's own count is its tail at most

    def teardown(self) -> None:
        if hasattr(self, "journal"):
            try:
                assert all_of(self.journal) == [record.body for record in self.model]
            finally:
                self.journal.close()
                shutil.rmtree(self.folder)


TestJournalAgainstAList = JournalMachine.TestCase
TestJournalAgainstAList.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# -- appending ------------------------------------------------------------------------------------------------------------


def test_nothing_is_made_before_the_first_append(directory: Path) -> None:
    journal = Journal(directory)
    assert (journal.first, journal.last, journal.last_mark, journal.repaired) == (NOWHERE, NOWHERE, 0, "")
    assert journal.read(NOWHERE, 10, 1000).bodies == []
    journal.sync()
    journal.close()
    assert not directory.exists()


def test_directory_and_files_are_the_owners_alone(directory: Path) -> None:
    old = os.umask(0)
    try:
        journal = Journal(directory)
        journal.append(one(1))
        journal.close()
    finally:
        os.umask(old)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in files(directory)] == [0o600]


def test_a_journal_of_a_vm_whose_directory_is_gone_makes_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Journal(tmp_path / "gone" / "journal").append(one(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "batch", [one(5), one(4), one(9, epoch=0), [*one(6), *one(6)], [*one(7), *one(6)]], ids=range(5)
)
def test_cursors_that_do_not_increase_are_refused_and_nothing_is_written(directory: Path, batch: list[Record]) -> None:
    journal = Journal(directory)
    journal.append(one(5))
    before = files(directory)[0].read_bytes()
    with pytest.raises(ValueError, match="does not come after"):
        journal.append(batch)
    assert files(directory)[0].read_bytes() == before
    journal.close()


def test_one_descriptor_is_open_while_it_is_written_and_none_before_or_after(directory: Path) -> None:
    def descriptors() -> set[str]:
        return set(os.listdir("/proc/self/fd"))

    before = descriptors()
    journal = Journal(directory, LIMIT, segment=SEGMENT)
    assert journal.filenos() == []
    for seq in range(1, 40):
        journal.append(one(seq))
        journal.read(NOWHERE, 2, 1000)
    assert len(journal.filenos()) == 1
    assert len(descriptors() - before) == 1
    journal.close()
    assert descriptors() == before
    journal.append(one(40))
    assert journal.last == Cursor(1, 40)
    journal.close()
    assert descriptors() == before


def test_a_flood_stays_within_the_limit_and_what_was_removed_is_told(directory: Path) -> None:
    limit = SEGMENTS * SEGMENT
    journal = Journal(directory, limit, segment=SEGMENT)
    told: list[tuple[Cursor, Cursor]] = []
    for seq in range(1, 1001):
        journal.append(one(seq, b"x" * (seq % 60)))
        assert sum(path.stat().st_size for path in files(directory)) <= limit
        removed = journal.truncated()
        if removed is not None:
            told.append(removed)
            assert journal.first == Cursor(1, removed[1].seq + 1)
    assert told[0][0] == Cursor(1, 1)
    assert [one[1].seq + 1 for one in told[:-1]] == [other[0].seq for other in told[1:]]
    assert len(all_of(journal)) == 1000 - told[-1][1].seq
    assert journal.truncated() is None
    journal.close()


def test_what_was_removed_before_it_was_asked_for_is_one_span(directory: Path) -> None:
    journal = Journal(directory, LIMIT, segment=SEGMENT)
    for seq in range(1, 201):
        journal.append(one(seq))
    assert journal.truncated() == (Cursor(1, 1), Cursor(1, journal.first.seq - 1))
    journal.close()


def test_the_span_of_a_segment_that_another_worker_wrote_is_known(directory: Path) -> None:
    journal = Journal(directory, LIMIT, segment=SEGMENT)
    for seq in range(1, 51):
        journal.append(one(seq))
    journal.close()
    journal = Journal(directory, LIMIT, segment=SEGMENT)
    first = journal.first
    for seq in range(51, 101):
        journal.append(one(seq))
    removed = journal.truncated()
    assert removed == (first, Cursor(1, journal.first.seq - 1))
    journal.close()


def test_a_batch_larger_than_a_segment_has_one_of_its_own(directory: Path) -> None:
    journal = Journal(directory, LIMIT, segment=SEGMENT)
    journal.append(one(1))
    journal.append([*one(2, bytes(300)), *one(3, bytes(300))])
    journal.append(one(4))
    journal.close()
    assert [len(all_of(Journal(directory), since)) for since in (NOWHERE, Cursor(1, 2))] == [4, 2]
    assert len(files(directory)) == 3


WRITER = """
import os, sys
from pathlib import Path
from vmloop.worker.journal.journal import Journal
from vmloop.worker.journal.record import Record
journal = Journal(Path(sys.argv[1]), 100_000, segment=10_000)
seq = 0
while True:
    journal.append([Record(1, seq + 1, 0, b"first"), Record(1, seq + 2, 0, bytes(seq % 300))])
    seq += 2
    os.write(1, seq.to_bytes(8, "little"))
"""


@pytest.mark.parametrize("acknowledged", [1, 50, 500])
def test_a_writer_that_is_killed_has_lost_nothing_that_it_was_sure_of(directory: Path, acknowledged: int) -> None:
    command = [sys.executable, "-c", WRITER, os.fspath(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as writer:
        assert writer.stdout is not None
        for _ in range(acknowledged):
            assert len(writer.stdout.read(8)) == 8
        writer.kill()
        rest = writer.stdout.read()
    sure = (
        2 * acknowledged
        if len(rest) < 8
        else int.from_bytes(rest[len(rest) // 8 * 8 - 8 : len(rest) // 8 * 8], "little")
    )
    journal = Journal(directory, 100_000, segment=10_000)
    assert journal.repaired == ""
    assert sure <= journal.last.seq <= sure + 2
    assert journal.last.seq % 2 == 0
    assert len(all_of(journal)) == journal.last.seq - journal.first.seq + 1


# -- a disk that refuses --------------------------------------------------------------------------------------------------


def test_after_a_short_write_the_file_is_as_before(directory: Path) -> None:
    journal = Journal(directory)
    journal.append(one(1))
    before = files(directory)[0].read_bytes()
    with file_size_limit(len(before) + 10), pytest.raises(OSError, match=r"only 10 of \d+ bytes"):
        journal.append(one(2))
    assert files(directory)[0].read_bytes() == before
    assert journal.last == Cursor(1, 1)
    journal.append(one(2, b"again"))
    assert all_of(journal) == [b"body", b"again"]
    journal.close()


def test_a_first_write_that_fails_leaves_no_file(directory: Path) -> None:
    journal = Journal(directory)
    with file_size_limit(12), pytest.raises(OSError, match="only 12 of"):
        journal.append(one(1))
    assert files(directory) == []
    assert journal.filenos() == []
    journal.append(one(1))
    assert all_of(journal) == [b"body"]
    journal.close()


def test_a_failed_write_that_cannot_be_cut_off_ends_its_segment(directory: Path) -> None:
    journal = Journal(directory)
    journal.append(one(1))
    with files(directory)[0].open("ab") as file:
        file.write(encode_batch(one(2))[:-3])  # what the disk took before it refused
    full = os.open("/dev/full", os.O_WRONLY)  # writes fail there, and it cannot be cut
    os.dup2(full, journal.filenos()[0])
    os.close(full)
    with pytest.raises(OSError, match="No space"):
        journal.append(one(2))
    assert journal.filenos() == []
    journal.append(one(2, b"again"))
    journal.append(one(3))
    assert len(files(directory)) == 2
    assert all_of(journal) == [b"body", b"again", b"body"]
    journal.close()
    assert all_of(Journal(directory)) == [b"body", b"again", b"body"]


def test_a_batch_that_got_there_although_the_write_failed_is_read_once(directory: Path) -> None:
    journal = Journal(directory)
    journal.append(one(1))
    journal.close()
    (directory / segment_name(Cursor(1, 2))).write_bytes(MAGIC + encode_batch(one(2, b"again")))
    with files(directory)[0].open("ab") as file:
        file.write(encode_batch(one(2)) + encode_batch(one(3)))
    assert all_of(Journal(directory)) == [b"body", b"body", b"body"]


def test_a_file_in_the_way_is_set_aside(directory: Path) -> None:
    journal = Journal(directory)
    journal.append(one(1))
    journal._segments[-1].sealed = True
    (directory / segment_name(Cursor(1, 2))).write_bytes(b"in the way")
    journal.append(one(2))
    assert all_of(journal) == [b"body", b"body"]
    assert [path.read_bytes() for path in directory.iterdir() if ".damaged-" in path.name] == [b"in the way"]
    journal.close()


def test_a_file_that_somebody_else_wrote_to_is_not_appended_to(directory: Path) -> None:
    journal = Journal(directory)
    journal.append(one(1))
    journal.close()
    with files(directory)[0].open("ab") as file:
        file.write(b"not ours")
    journal.append(one(2))
    assert files(directory)[0].read_bytes().endswith(b"not ours")
    assert all_of(journal) == [b"body", b"body"]
    journal.close()


def test_a_newest_file_that_is_gone_costs_its_events_alone(directory: Path) -> None:
    journal = Journal(directory)
    journal.append(one(1))
    journal.close()
    files(directory)[0].unlink()
    journal.append(one(2, b"next"))
    assert all_of(journal) == [b"next"]
    assert journal.first == Cursor(1, 2)
    journal.close()


def test_a_disk_that_is_really_full_keeps_what_it_has(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64 * 1024):
        journal = Journal(tmp_path / "disk" / "journal")
        with pytest.raises(OSError, match="No space left"):
            fill(journal)
        seq = journal.last.seq
        assert seq > 30
        assert len(all_of(journal)) == seq
        journal.close()
        again = Journal(tmp_path / "disk" / "journal")
        assert (again.last, again.repaired) == (Cursor(1, seq), "")


def test_a_torn_journal_on_a_read_only_disk_can_be_read(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 256 * 1024):
        directory = tmp_path / "disk" / "journal"
        journal = Journal(directory)
        journal.append(one(1))
        journal.close()
        with files(directory)[0].open("ab") as file:
            file.write(encode_batch(one(2))[:-1])
        make_read_only(tmp_path / "disk")
        journal = Journal(directory)
        assert "could not be cut off" in journal.repaired
        assert all_of(journal) == [b"body"]
        with pytest.raises(OSError, match="Read-only"):
            journal.append(one(2))
        make_read_only(tmp_path / "disk", False)
        journal.append(one(2, b"next"))
        assert all_of(journal) == [b"body", b"next"]
        journal.close()


def test_a_journal_that_cannot_be_looked_at_is_an_error_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("a file")
    with pytest.raises(NotADirectoryError):
        Journal(tmp_path / "journal")


def test_a_close_that_fails_is_told_and_the_journal_goes_on(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(directory)
    journal.append(one(1))
    os.close(journal.filenos()[0])
    journal.close()
    assert "Bad file descriptor" in caplog.text
    journal.append(one(2))
    assert journal.last == Cursor(1, 2)
    journal.close()


def test_sync_reaches_closed_segments_and_removed_ones_do_not_matter(directory: Path) -> None:
    journal = Journal(directory, LIMIT, segment=SEGMENT)
    for seq in range(1, 200):
        journal.append(one(seq))
    assert len(journal._unsynced) == len(files(directory))
    files(directory)[0].unlink()
    journal.sync()
    assert journal._unsynced == []
    journal.close()


# -- reading --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(directory: Path) -> Iterator[Journal]:
    """A hundred events in several segments."""
    journal = Journal(directory, 100 * SEGMENT, segment=SEGMENT)
    for seq in range(1, 101):
        journal.append(one(seq, b"%d" % seq))
    yield journal
    journal.close()


def numbers(bodies: list[bytes]) -> list[int]:
    return [int(body) for body in bodies]


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_pages_from_the_start_give_everything_once(filled: Journal, count: int) -> None:
    assert numbers(all_of(filled, count=count)) == list(range(1, 101))


def test_more_readers_than_are_remembered_all_read_everything(filled: Journal) -> None:
    places = [NOWHERE] * (RESUME_POINTS * 2)
    read: list[list[int]] = [[] for _ in places]
    for _ in range(100):
        for reader, since in enumerate(places):
            page = filled.read(since, 1, 1000)
            read[reader] += numbers(page.bodies)
            places[reader] = page.last
    assert read == [list(range(1, 101))] * len(places)
    assert len(filled._resume) <= RESUME_POINTS


def test_a_vanished_segment_is_left_out_and_named_once(
    filled: Journal, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    second, third = files(directory)[1:3]
    gone = range(int(second.name[11:31]), int(third.name[11:31]))
    second.unlink()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert numbers(all_of(filled)) == [number for number in range(1, 101) if number not in gone]
    assert caplog.text.count(second.name) == 2  # in the message, and in the error's own words


def test_a_damaged_segment_gives_its_good_part_and_reading_goes_on_behind_it(filled: Journal, directory: Path) -> None:
    second, third = files(directory)[1:3]
    first, behind = int(second.name[11:31]), int(third.name[11:31])
    content = bytearray(second.read_bytes())
    content[len(MAGIC) + len(encode_batch(one(first, b"%d" % first))) + 20] ^= 1
    second.write_bytes(content)
    assert numbers(all_of(filled)) == [number for number in range(1, 101) if not first < number < behind]


def test_a_page_that_was_left_when_its_segment_was_removed_goes_on_with_the_oldest(directory: Path) -> None:
    journal = Journal(directory, LIMIT, segment=SEGMENT)
    for seq in range(1, 20):
        journal.append(one(seq, b"%d" % seq))
    since = journal.read(NOWHERE, 2, 1000).last
    for seq in range(20, 200):
        journal.append(one(seq, b"%d" % seq))
    assert numbers(all_of(journal, since)) == list(range(journal.first.seq, 200))
    journal.close()


def test_an_event_of_any_size_is_given_even_if_less_was_asked_for(directory: Path) -> None:
    journal = Journal(directory)
    journal.append(one(1, bytes(200_000)))
    journal.append(one(2))
    page = journal.read(NOWHERE, 10, 0)
    assert (list(map(len, page.bodies)), page.more, page.last) == ([200_000], True, Cursor(1, 1))
    journal.close()


def test_paging_reads_each_byte_about_once_and_the_newest_few_read_little(directory: Path) -> None:
    journal = Journal(directory)
    for seq in range(1, 16001):
        journal.append(one(seq, bytes(230)))
    size = journal.size

    def bytes_read() -> int:
        (line,) = (line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar"))
        return int(line.split()[1])

    before = bytes_read()
    assert len(all_of(journal, count=500)) == 16000
    assert bytes_read() - before < 2.5 * size
    before = bytes_read()
    assert len(journal.read(Cursor(1, 15990), 100, 1 << 20).bodies) == 10
    assert bytes_read() - before < 200_000
    journal.close()


def test_the_default_journal_is_sixteen_mebibytes() -> None:
    assert DEFAULT_LIMIT == 16 * 1024 * 1024


def test_opening_and_paging_keep_no_buffers(directory: Path) -> None:
    journal = Journal(directory)
    for seq in range(1, 4001):
        journal.append(one(seq, bytes(230)))
    journal.close()
    tracemalloc.start()
    try:
        journal = Journal(directory)
        since = NOWHERE
        while (page := journal.read(since, 50, 1 << 20)).more:
            since = page.last
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    journal.close()
    assert peak < 512 * 1024
    assert held < 64 * 1024
