# SPDX-License-Identifier: Apache-2.0
"""Bytes with their length and checksum in front, one after the other: pure codec. Used by record.py, and by other files that only grow.

    u32 length of the payload · u32 CRC-32 (zlib) of the payload · payload           little-endian

A payload is never empty: eight zero bytes, which a disk may leave where it lost power, are no frame.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from enum import Enum
from typing import Final

# More than any event or answer that is kept; a length beyond it is no length.
MAX_PAYLOAD_BYTES: Final = 32 * 1024 * 1024

HEAD: Final = struct.Struct("<II")


class Tail(Enum):
    """How a run of frames ends."""

    WHOLE = "whole"  # just behind a frame
    TORN = "torn"  # inside a frame: what is missing was never written, or is not read yet
    DAMAGED = "damaged"  # bytes are there, and they are wrong


def frame(payload: bytes) -> bytes:
    """One frame. Raises ValueError for a payload that is empty or over `MAX_PAYLOAD_BYTES`."""
    if not 0 < len(payload) <= MAX_PAYLOAD_BYTES:
        raise ValueError(f"a frame holds 1 to {MAX_PAYLOAD_BYTES} bytes, not {len(payload)}")
    return HEAD.pack(len(payload), zlib.crc32(payload)) + payload


class Frames:
    """Goes through the frames of some bytes: (payload, offset just behind it), up to the first that is torn or damaged.

    Once it has come to its end, `end` is the offset behind the last good frame and `tail` says what is there.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.end = 0
        self.tail = Tail.WHOLE

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        data, at = self._data, 0
        self.end, self.tail = 0, Tail.WHOLE
        while at < len(data):
            found = frame_at(data, at)
            if isinstance(found, Tail):
                self.tail = found
                return
            at = self.end = found[1]
            yield found


def frames(data: bytes) -> Frames:
    """The frames of `data`, from its first byte on. Never raises, whatever the bytes are."""
    return Frames(data)


def frame_at(data: bytes, at: int) -> tuple[bytes, int] | Tail:
    """The payload of the frame at an offset and the offset behind it; else why there is none (`TORN` also at the very end)."""
    if len(data) - at < HEAD.size:
        return Tail.TORN
    length, checksum = HEAD.unpack_from(data, at)
    if not 0 < length <= MAX_PAYLOAD_BYTES:
        return Tail.DAMAGED
    end = at + HEAD.size + length
    if end > len(data):
        return Tail.TORN
    payload = data[at + HEAD.size : end]
    return (payload, end) if zlib.crc32(payload) == checksum else Tail.DAMAGED
