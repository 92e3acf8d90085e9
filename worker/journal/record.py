# SPDX-License-Identifier: Apache-2.0
"""One event as it stands in the journal: pure codec. Used by segments.py and journal.py.

    u32 length of all that follows the checksum · u32 CRC-32 of that · u32 mark · u32 epoch · u64 seq · body         little-endian

That is a frame (frames.py) whose payload begins with mark, epoch and seq. The body is opaque here: one msgpack map, an event. The mark is
its writer's, except for the highest bit: set on the last record of a batch. A batch is what one monitor line caused; it counts as a whole
or not at all.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Final

import msgspec

from ...common.cursor import Cursor
from .frames import HEAD, Tail

LAST_OF_BATCH: Final = 1 << 31

# An event of worker/events.py is at most half as long; a length beyond it is no length.
MAX_BODY_BYTES: Final = 512 * 1024

# Places in a torn tail that are looked at more closely; a tail with more of them was made to be looked at, and is left alone.
MAX_CANDIDATES: Final = 256

_HEADER: Final = struct.Struct("<IIIIQ")
_PLACE: Final = struct.Struct("<IIQ")
_LENGTH: Final = struct.Struct("<I")
HEADER_BYTES: Final = _HEADER.size
MAX_RECORD_BYTES: Final = HEADER_BYTES + MAX_BODY_BYTES


class Record(msgspec.Struct, frozen=True, gc=False):
    """An event's place in the stream (32 and 64 bits), its writer's mark (31 bits), and its bytes."""

    epoch: int
    seq: int
    mark: int
    body: bytes

    @property
    def cursor(self) -> Cursor:
        return Cursor(self.epoch, self.seq)


def encode_batch(batch: Sequence[Record]) -> bytes:
    """The bytes of a batch. Raises ValueError for an empty batch, and for what no record can hold."""
    if not batch:
        raise ValueError("a batch has at least one record")
    last = len(batch) - 1
    return b"".join([_encode(record, LAST_OF_BATCH if index == last else 0) for index, record in enumerate(batch)])


def _encode(record: Record, flag: int) -> bytes:
    if not 0 <= record.mark < LAST_OF_BATCH or len(record.body) > MAX_BODY_BYTES:
        raise ValueError(
            f"event {record.cursor}: a mark has 31 bits ({record.mark}), a body {MAX_BODY_BYTES} bytes ({len(record.body)})"
        )
    try:
        payload = _PLACE.pack(record.mark | flag, record.epoch, record.seq) + record.body
    except struct.error as error:
        raise ValueError(f"event {record.cursor}: {error}") from error
    return HEAD.pack(len(payload), zlib.crc32(payload)) + payload


def record_at(data: bytes, at: int) -> tuple[Record, bool, int] | Tail:
    """The record at an offset, whether it is the last of its batch, and the offset behind it; else why there is none.

    `TORN`: more bytes may make a record of it. Never raises, whatever the bytes are.
    """
    if len(data) - at < HEADER_BYTES:
        return Tail.TORN
    length, checksum, mark, epoch, seq = _HEADER.unpack_from(data, at)
    if not _PLACE.size <= length <= _PLACE.size + MAX_BODY_BYTES:
        return Tail.DAMAGED
    end = at + HEAD.size + length
    if end > len(data):
        return Tail.TORN
    if zlib.crc32(data[at + HEAD.size : end]) != checksum:
        return Tail.DAMAGED
    return Record(epoch, seq, mark & ~LAST_OF_BATCH, data[at + HEADER_BYTES : end]), mark >= LAST_OF_BATCH, end


def may_hold_record(data: bytes) -> bool:
    """Whether a record begins anywhere behind the first byte of what looks like a torn tail.

    Then it is not torn: a length in front was damaged, and what follows must not be cut off. In doubt, yes.
    """
    candidates = 0
    size = len(data)
    for at in range(1, size - HEADER_BYTES + 1):
        (length,) = _LENGTH.unpack_from(data, at)
        if _PLACE.size <= length <= size - at - HEAD.size:
            candidates += 1
            if candidates > MAX_CANDIDATES or not isinstance(record_at(data, at), Tail):
                return True
    return False
