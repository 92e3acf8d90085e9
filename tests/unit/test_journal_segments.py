# SPDX-License-Identifier: Apache-2.0
"""The files of a journal: names sort as cursors do, foreign files stay, and whatever a segment holds its good batches are found."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.common.cursor import Cursor
from vmloop.worker.journal.frames import Tail
from vmloop.worker.journal.journal import Journal
from vmloop.worker.journal.record import Record, encode_batch
from vmloop.worker.journal.segments import (
    KEEP_DAMAGED,
    MAGIC,
    MARK_BYTES,
    MIN_SEGMENT_BYTES,
    Scan,
    Segment,
    examine,
    find_segments,
    repair,
    segment_bytes,
    segment_name,
)

FIRST = Cursor(1, 1)

cursors = st.builds(Cursor, st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
bodies = st.lists(st.lists(st.binary(max_size=40), min_size=1, max_size=3), max_size=4)


def batches_of(parts: list[list[bytes]]) -> list[list[Record]]:
    """Batches with these bodies, numbered from 1.1 on."""
    made, seq = [], 0
    for part in parts:
        made.append([Record(1, seq + index, 7, body) for index, body in enumerate(part, 1)])
        seq += len(part)
    return made


def content_of(batches: list[list[Record]]) -> bytes:
    return MAGIC + b"".join(map(encode_batch, batches))


def segment_with(directory: Path, content: bytes, first: Cursor = FIRST) -> Segment:
    (directory / segment_name(first)).write_bytes(content)
    return find_segments(directory)[-1]


def batches_in(segment: Segment) -> tuple[list[list[Record]], Scan]:
    fd = os.open(segment.path, os.O_RDONLY)
    try:
        scan = Scan(fd, segment)
        return [[record for record, _ in batch] for batch in scan], scan
    finally:
        os.close(fd)


# -- names ----------------------------------------------------------------------------------------------------------------


@given(cursors, cursors)
def test_names_sort_as_cursors_do(one: Cursor, other: Cursor) -> None:
    assert (segment_name(one) < segment_name(other)) == (one < other)


def test_segments_are_found_in_the_order_of_their_cursors(tmp_path: Path) -> None:
    for cursor in (Cursor(2, 1), Cursor(1, 9), Cursor(10, 3), Cursor(1, 10)):
        (tmp_path / segment_name(cursor)).write_bytes(b"")
    found = find_segments(tmp_path)
    assert [segment.first for segment in found] == [Cursor(1, 9), Cursor(1, 10), Cursor(2, 1), Cursor(10, 3)]


def test_a_directory_that_is_not_there_has_no_segments(tmp_path: Path) -> None:
    assert find_segments(tmp_path / "none") == []


def test_foreign_files_are_left_alone_and_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / segment_name(Cursor(1, 5))).mkdir()
    (tmp_path / segment_name(Cursor(1, 6))).symlink_to("notes.txt")
    with caplog.at_level(logging.WARNING):
        assert find_segments(tmp_path) == []
    assert "3 files that are not the journal's" in caplog.text
    assert len(list(tmp_path.iterdir())) == 3


def test_a_segment_is_a_sixteenth_of_the_journal_but_holds_the_largest_record() -> None:
    assert segment_bytes(16 * 1024 * 1024) == 1024 * 1024
    assert segment_bytes(1) == MIN_SEGMENT_BYTES


# -- what a segment holds -------------------------------------------------------------------------------------------------


@given(bodies, st.binary(max_size=80))
def test_any_bytes_behind_good_batches_hide_none_and_add_none(parts: list[list[bytes]], behind: bytes) -> None:
    batches = batches_of(parts)
    with tempfile.TemporaryDirectory() as folder:
        segment = segment_with(Path(folder), content_of(batches) + behind)
        found, scan = batches_in(segment)
        assert found == batches
        assert scan.end == len(content_of(batches))
        assert (scan.tail is Tail.WHOLE) == (not behind)


@given(bodies.filter(bool), st.data())
def test_a_segment_cut_anywhere_keeps_its_whole_batches(parts: list[list[bytes]], data: st.DataObject) -> None:
    batches = batches_of(parts)
    content = content_of(batches)
    cut = data.draw(st.integers(0, len(content) - 1))
    whole = [batch for index, batch in enumerate(batches) if len(content_of(batches[: index + 1])) <= cut]
    with tempfile.TemporaryDirectory() as folder:
        found, scan = batches_in(segment_with(Path(folder), content[:cut]))
        assert found == whole
        assert scan.end == (0 if cut < len(MAGIC) else len(content_of(whole)))


@given(bodies.filter(bool), st.data())
def test_a_changed_byte_costs_its_batch_and_what_is_behind_it_alone(
    parts: list[list[bytes]], data: st.DataObject
) -> None:
    batches = batches_of(parts)
    content = bytearray(content_of(batches))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    whole = [batch for index, batch in enumerate(batches) if len(content_of(batches[: index + 1])) <= at]
    with tempfile.TemporaryDirectory() as folder:
        found, scan = batches_in(segment_with(Path(folder), bytes(content)))
        assert found == whole
        assert scan.tail is not Tail.WHOLE


@given(bodies, st.binary(max_size=200))
def test_a_journal_opens_on_any_bytes_and_can_be_written_and_read_again(
    parts: list[list[bytes]], behind: bytes
) -> None:
    batches = batches_of(parts)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        segment_with(directory, content_of(batches) + behind)
        expected = [record.body for batch in batches for record in batch]
        journal = Journal(directory)
        assert journal.read(Cursor(0, 0), 1000, 1 << 20).bodies == expected
        assert bool(journal.repaired) == bool(
            behind
        )  # a segment with its magic alone holds nothing that could be wrong
        journal.append([Record(2, 1, 1, b"next")])
        journal.close()
        again = Journal(directory)
        assert again.repaired == ""
        assert again.read(Cursor(0, 0), 1000, 1 << 20).bodies == [*expected, b"next"]


def test_records_that_do_not_come_in_order_are_damage(tmp_path: Path) -> None:
    batches = [[Record(1, 1, 0, b"a")], [Record(1, 2, 0, b"b")], [Record(1, 2, 0, b"c")], [Record(1, 3, 0, b"d")]]
    found, scan = batches_in(segment_with(tmp_path, content_of(batches)))
    assert (found, scan.tail) == (batches[:2], Tail.DAMAGED)


def test_a_segment_under_another_ones_name_is_damage(tmp_path: Path) -> None:
    segment = segment_with(tmp_path, content_of([[Record(1, 1, 0, b"a")]]), Cursor(1, 2))
    assert batches_in(segment)[0] == []


def test_a_segment_of_another_version_is_not_read(tmp_path: Path) -> None:
    content = content_of([[Record(1, 1, 0, b"a")]])
    segment = segment_with(tmp_path, MAGIC[:-1] + b"\x02" + content[len(MAGIC) :])
    found, scan = batches_in(segment)
    assert (found, scan.tail) == ([], Tail.DAMAGED)


def test_bytes_that_the_disk_does_not_give_back_count_as_damaged(tmp_path: Path) -> None:
    segment = segment_with(tmp_path, content_of([[Record(1, 1, 0, b"a")]]))
    fd = os.open(segment.path, os.O_WRONLY)  # cannot be read: EBADF
    try:
        scan = Scan(fd, segment)
        assert list(scan) == []
        assert scan.tail is Tail.DAMAGED
    finally:
        os.close(fd)


def test_places_are_noted_along_a_segment(tmp_path: Path) -> None:
    batches = [[Record(1, seq, 0, bytes(MARK_BYTES // 4))] for seq in range(1, 21)]
    segment = segment_with(tmp_path, content_of(batches))
    assert examine(segment) is Tail.WHOLE
    assert [cursor.seq for cursor, _ in segment.marks] == [1, 5, 9, 13, 17]
    assert segment.marks[1][1] == len(content_of(batches[:4]))
    assert (segment.last, segment.last_mark) == (Cursor(1, 20), 0)


# -- repair ---------------------------------------------------------------------------------------------------------------


def test_a_torn_tail_is_cut_off(tmp_path: Path) -> None:
    content = content_of([[Record(1, 1, 4, b"a")]])
    segment = segment_with(tmp_path, content + encode_batch([Record(1, 2, 0, b"b"), Record(1, 3, 0, b"c")])[:-1])
    segments = [segment]
    assert "were cut off" in repair(segments)
    assert segment.path.read_bytes() == content
    assert not segment.sealed
    assert (segment.last, segment.last_mark) == (Cursor(1, 1), 4)


def test_a_batch_whose_last_record_is_missing_is_torn(tmp_path: Path) -> None:
    content = content_of([[Record(1, 1, 0, b"a")]])
    whole = encode_batch([Record(1, 2, 0, b"b"), Record(1, 3, 0, b"c")])
    segment = segment_with(tmp_path, content + whole[: len(whole) // 2])
    assert "were cut off" in repair([segment])
    assert segment.path.read_bytes() == content


def test_a_damaged_segment_is_sealed_and_left_as_it_is(tmp_path: Path) -> None:
    content = bytearray(content_of([[Record(1, seq, 0, b"body")] for seq in (1, 2, 3)]))
    content[-1 - len(encode_batch([Record(1, 3, 0, b"body")]))] ^= 1
    segment = segment_with(tmp_path, bytes(content))
    assert "is damaged at byte" in repair([segment])
    assert segment.sealed
    assert segment.path.read_bytes() == content
    assert segment.last == Cursor(1, 1)


def test_a_damaged_length_with_good_records_behind_it_is_not_taken_for_a_torn_tail(tmp_path: Path) -> None:
    content = bytearray(content_of([[Record(1, seq, 0, b"body")] for seq in (1, 2, 3)]))
    content[len(content_of([[Record(1, 1, 0, b"body")]])) + 1] ^= 0x10  # 4096 more than it was: beyond the file's end
    segment = segment_with(tmp_path, bytes(content))
    assert "is damaged at byte" in repair([segment])
    assert segment.path.read_bytes() == content


def test_a_newest_segment_without_a_good_record_is_set_aside_and_the_one_before_it_goes_on(tmp_path: Path) -> None:
    segment_with(tmp_path, content_of([[Record(1, 1, 0, b"a")]]))
    segment_with(tmp_path, b"what is this", Cursor(1, 2))
    segments = find_segments(tmp_path)
    assert "it was moved to" in repair(segments)
    assert [segment.first for segment in segments] == [Cursor(1, 1)]
    (aside,) = (path for path in tmp_path.iterdir() if ".damaged-" in path.name)
    assert aside.read_bytes() == b"what is this"


@pytest.mark.parametrize("content", [b"", MAGIC[:3], MAGIC])
def test_a_newest_segment_that_holds_nothing_is_removed(tmp_path: Path, content: bytes) -> None:
    segments = [segment_with(tmp_path, content)]
    assert repair(segments) == ""
    assert segments == []
    assert list(tmp_path.iterdir()) == []


def test_damaged_segments_do_not_pile_up(tmp_path: Path) -> None:
    for seq in range(1, KEEP_DAMAGED + 4):
        repair([segment_with(tmp_path, b"no segment", Cursor(1, seq))])
    left = sorted(path.name.split(".")[0] for path in tmp_path.iterdir())
    assert left == [segment_name(Cursor(1, seq)).split(".")[0] for seq in range(4, KEEP_DAMAGED + 4)]
