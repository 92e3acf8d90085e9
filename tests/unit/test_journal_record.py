# SPDX-License-Identifier: Apache-2.0
"""Frames and records: what was written is found again, and in any other bytes nothing is found that was not written."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.common.cursor import Cursor
from vmloop.worker.events import MAX_EVENT_BYTES
from vmloop.worker.journal.frames import MAX_PAYLOAD_BYTES, Tail, frame, frames
from vmloop.worker.journal.record import (
    HEADER_BYTES,
    LAST_OF_BATCH,
    MAX_BODY_BYTES,
    MAX_CANDIDATES,
    Record,
    encode_batch,
    may_hold_record,
    record_at,
)

payloads = st.lists(st.binary(min_size=1, max_size=60), max_size=5)
records = st.builds(
    Record,
    epoch=st.integers(0, 2**32 - 1),
    seq=st.integers(0, 2**64 - 1),
    mark=st.integers(0, LAST_OF_BATCH - 1),
    body=st.binary(max_size=60),
)


def decode(data: bytes) -> tuple[list[tuple[Record, bool]], Tail, int]:
    """All records from the start, and why and where they end."""
    found: list[tuple[Record, bool]] = []
    at = 0
    while True:
        one = record_at(data, at)
        if isinstance(one, Tail):
            return found, one, at
        record, is_last, at = one
        found.append((record, is_last))


# -- frames ---------------------------------------------------------------------------------------------------------------


@given(payloads)
def test_frames_come_back_as_they_were_made(made: list[bytes]) -> None:
    data = b"".join(map(frame, made))
    found = frames(data)
    assert [payload for payload, _ in found] == made
    assert (found.end, found.tail) == (len(data), Tail.WHOLE)


@given(payloads, st.binary(min_size=1, max_size=40), st.data())
def test_a_frame_cut_anywhere_is_torn_and_those_before_it_are_found(
    before: list[bytes], last: bytes, data: st.DataObject
) -> None:
    good = b"".join(map(frame, before))
    whole = frame(last)
    cut = data.draw(st.integers(1, len(whole) - 1))
    found = frames(good + whole[:cut])
    assert [payload for payload, _ in found] == before
    assert (found.end, found.tail) == (len(good), Tail.TORN)


@given(payloads, st.binary(min_size=1, max_size=40), st.binary(max_size=40), st.data())
def test_a_changed_byte_in_a_payload_or_checksum_is_damage(
    before: list[bytes], hit: bytes, behind: bytes, data: st.DataObject
) -> None:
    good = b"".join(map(frame, before))
    bad = bytearray(frame(hit))
    bad[data.draw(st.integers(4, len(bad) - 1))] ^= data.draw(st.integers(1, 255))
    found = frames(good + bytes(bad) + behind)
    assert [payload for payload, _ in found] == before
    assert (found.end, found.tail) == (len(good), Tail.DAMAGED)


@given(st.binary(max_size=200))
def test_any_bytes_are_frames_up_to_some_place_and_never_an_exception(data: bytes) -> None:
    found = frames(data)
    assert b"".join(frame(payload) for payload, _ in found) == data[: found.end]


def test_zeros_are_no_frame() -> None:
    found = frames(frame(b"x") + bytes(64))
    assert [payload for payload, _ in found] == [b"x"]
    assert found.tail is Tail.DAMAGED


def test_a_frame_of_nothing_or_of_too_much_is_refused() -> None:
    with pytest.raises(ValueError, match="not 0"):
        frame(b"")
    with pytest.raises(ValueError, match=f"not {MAX_PAYLOAD_BYTES + 1}"):
        frame(bytes(MAX_PAYLOAD_BYTES + 1))


# -- records --------------------------------------------------------------------------------------------------------------


@given(st.lists(records, min_size=1, max_size=5))
def test_a_batch_comes_back_and_its_last_record_alone_is_marked(batch: list[Record]) -> None:
    data = encode_batch(batch)
    found, tail, end = decode(data)
    assert [record for record, _ in found] == batch
    assert [is_last for _, is_last in found] == [False] * (len(batch) - 1) + [True]
    assert (tail, end) == (Tail.TORN, len(data))


def test_a_record_has_the_bytes_that_are_documented_and_is_a_frame() -> None:
    data = encode_batch([Record(3, 17, 5, b"body")])
    rest = struct.pack("<IIQ", 5 | 1 << 31, 3, 17) + b"body"
    assert data == struct.pack("<II", len(rest), zlib.crc32(rest)) + rest
    assert [payload for payload, _ in frames(data)] == [rest]
    assert len(data) == HEADER_BYTES + 4


@given(st.lists(records, min_size=1, max_size=4), st.data())
def test_a_changed_byte_anywhere_ends_the_records_there(batch: list[Record], data: st.DataObject) -> None:
    whole = bytearray(encode_batch(batch))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    found, _, end = decode(bytes(whole))
    assert end <= at
    assert [record for record, _ in found] == batch[: len(found)]


@given(st.lists(records, min_size=1, max_size=3) | st.just([]), st.binary(max_size=100))
def test_any_bytes_hold_only_records_that_encode_to_them(good: list[Record], behind: bytes) -> None:
    data = (encode_batch(good) if good else b"") + behind
    found, _, end = decode(data)
    assert b"".join(encoded(record, is_last) for record, is_last in found) == data[:end]
    assert [record for record, _ in found][: len(good)] == good


def encoded(record: Record, is_last: bool) -> bytes:
    twice = encode_batch([record, record])
    return twice[len(twice) // 2 :] if is_last else twice[: len(twice) // 2]


@pytest.mark.parametrize(
    "batch",
    [
        [],
        [Record(1, 1, LAST_OF_BATCH, b"")],
        [Record(1, 1, -1, b"")],
        [Record(1 << 32, 1, 0, b"")],
        [Record(1, 1 << 64, 0, b"")],
        [Record(1, 1, 0, bytes(MAX_BODY_BYTES + 1))],
    ],
    ids=["empty", "mark too large", "mark negative", "epoch", "seq", "body"],
)
def test_what_no_record_can_hold_is_refused(batch: list[Record]) -> None:
    with pytest.raises(ValueError, match=r"batch|event"):
        encode_batch(batch)


def test_the_largest_event_fits_into_a_record() -> None:
    assert MAX_EVENT_BYTES <= MAX_BODY_BYTES


def test_a_record_knows_its_cursor() -> None:
    assert Record(3, 17, 0, b"").cursor == Cursor(3, 17)


# -- torn or damaged ------------------------------------------------------------------------------------------------------


@given(records, st.data())
def test_a_record_behind_a_damaged_length_is_seen(record: Record, data: st.DataObject) -> None:
    hit = encode_batch([Record(1, 1, 0, b"hit")])
    length = data.draw(st.integers(2 * HEADER_BYTES + 200, MAX_BODY_BYTES))
    assert may_hold_record(struct.pack("<I", length) + hit[4:] + encode_batch([record]))


@given(st.binary(max_size=200).filter(lambda body: b"\0\0" not in body), st.data())
def test_a_torn_record_is_not_taken_for_damage(body: bytes, data: st.DataObject) -> None:
    whole = encode_batch([Record(0x01020304, 0x0102030405060708, 0x01010101, body)])
    assert not may_hold_record(whole[: data.draw(st.integers(0, len(whole) - 1))])


def test_a_tail_made_to_take_long_is_left_alone() -> None:
    assert may_hold_record(bytes([32, 0, 0, 0]) * (MAX_CANDIDATES + 20))
