# SPDX-License-Identifier: Apache-2.0
"""The files of a journal: their names, their order, how they are read, and what is done about damaged ones. Used by journal.py.

EEEEEEEEEE-SSSSSSSSSSSSSSSSSSSS.journal          the cursor of its first record, padded so that names sort as cursors do
8 bytes of magic, the last of them the format's version · records (record.py)
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from ...common.cursor import Cursor
from ...common.durable import set_aside
from .frames import Tail
from .record import MAX_RECORD_BYTES, Record, may_hold_record, record_at

log = logging.getLogger(__name__)

MAGIC: Final = b"vmljrnl\x01"

# A journal has this many segments; the oldest is removed whole.
SEGMENTS: Final = 16

# The smallest segment: the largest record, and some more.
MIN_SEGMENT_BYTES: Final = 64 * 1024 + MAX_RECORD_BYTES

# One read: all that a reader keeps in memory besides a batch.
WINDOW_BYTES: Final = 64 * 1024

# Between two places that are known of the newest segment, so that its end is found without reading all of it.
MARK_BYTES: Final = 32 * 1024

# Files set aside as damaged, for whoever wants to know why; the oldest is removed.
KEEP_DAMAGED: Final = 4

_NAME: Final = re.compile(r"(\d{10})-(\d{20})\.journal", re.ASCII)
_ASIDE: Final = re.compile(r"\d{10}-\d{20}\.journal\.damaged-\d+", re.ASCII)


class Segment(msgspec.Struct):
    """One file. Its readable bytes end at `end`, its bytes on disk at `size`; `last` is None until it is known."""

    first: Cursor
    path: Path
    end: int
    size: int
    last: Cursor | None = None
    last_mark: int = 0
    sealed: bool = False  # never appended to again
    told: bool = False  # its damage is in the log
    marks: list[tuple[Cursor, int]] = []  # offsets of some batches by their first cursor; of the newest segment only


def segment_name(first: Cursor) -> str:
    """The file name of the segment that begins with a cursor."""
    return f"{first.epoch:010d}-{first.seq:020d}.journal"


def segment_bytes(limit: int) -> int:
    """How large a segment grows in a journal of at most `limit` bytes."""
    return max(limit // SEGMENTS, MIN_SEGMENT_BYTES)


def find_segments(directory: Path) -> list[Segment]:
    """The segments of a directory, oldest first; none if there is no such directory. Raises OSError if it cannot be looked at.

    Foreign files are left alone and named in the log.
    """
    found = []
    foreign = []
    try:
        entries = list(os.scandir(directory))
    except FileNotFoundError:
        return []
    for entry in entries:
        name = _NAME.fullmatch(entry.name)
        if name is not None and entry.is_file(follow_symlinks=False):
            size = entry.stat(follow_symlinks=False).st_size
            first = Cursor(int(name[1]), int(name[2]))
            found.append(Segment(first=first, path=directory / entry.name, end=size, size=size))
        elif _ASIDE.fullmatch(entry.name) is None:
            foreign.append(entry.name)
    if foreign:
        log.warning("%s holds %d files that are not the journal's, for example %r", directory, len(foreign), foreign[0])
    return sorted(found, key=lambda segment: segment.first)


class Scan:
    """Goes through the whole batches of a segment, from an offset on: each a list of (record, offset behind it).

    Stops at the first damage. Then `end` is the offset behind the last whole batch, and `tail` says what is there. Never raises, whatever
    the bytes are; bytes that the disk does not give back count as damaged.
    """

    def __init__(self, fd: int, segment: Segment, at: int = 0, after: Cursor | None = None) -> None:
        """`at` 0: from the start, magic included; else the offset of a record that comes after `after`."""
        self._fd = fd
        self._stop = segment.end
        self._name = segment.first
        self._from_start = at == 0
        self._after = after or Cursor(0, 0)
        self.end = at
        self.tail = Tail.WHOLE

    def __iter__(self) -> Iterator[list[tuple[Record, int]]]:
        if self._from_start and not self._begin():
            return
        window, base, at = b"", self.end, 0
        newest = self._after
        batch: list[tuple[Record, int]] = []
        while True:
            found = record_at(window, at)
            if isinstance(found, Tail):
                more = self._read(base + len(window)) if found is Tail.TORN else b""
                if not more:
                    self._conclude(found, window[at:], bool(batch))
                    return
                window, base, at = window[at:] + more, base + at, 0
                continue
            record, is_last, at = found
            cursor = Cursor(record.epoch, record.seq)
            if cursor <= newest or (self._from_start and newest == (0, 0) and cursor != self._name):
                self.tail = Tail.DAMAGED  # whole, but not of this place
                return
            newest = cursor
            batch.append((record, base + at))
            if is_last:
                self.end = base + at
                yield batch
                batch = []

    def _begin(self) -> bool:
        magic = self._read(0)[: len(MAGIC)]
        if magic == MAGIC:
            self.end = len(MAGIC)
            return True
        if self.tail is Tail.WHOLE:
            self.tail = Tail.TORN if MAGIC.startswith(magic) else Tail.DAMAGED
        return False

    def _read(self, at: int) -> bytes:
        try:
            return os.pread(self._fd, min(WINDOW_BYTES, max(self._stop - at, 0)), at)
        except OSError as error:
            log.warning("bytes from %d on of a journal's segment %s cannot be read: %s", at, self._name, error)
            self.tail = Tail.DAMAGED
            return b""

    def _conclude(self, found: Tail, rest: bytes, in_batch: bool) -> None:
        """What is readable ends here; `rest` is what is no record."""
        if self.tail is Tail.DAMAGED or found is Tail.DAMAGED or may_hold_record(rest):
            self.tail = Tail.DAMAGED
        elif rest or in_batch:
            self.tail = Tail.TORN


@contextlib.contextmanager
def opened(segment: Segment) -> Iterator[int]:
    """A descriptor to read a segment with. Raises OSError."""
    fd = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield fd
    finally:
        os.close(fd)


def examine(segment: Segment) -> Tail:
    """Read a whole segment, and note its last record and the places of some batches. Raises OSError if it cannot be opened."""
    segment.last, segment.marks = None, []
    with opened(segment) as fd:
        scan = Scan(fd, segment)
        start = len(MAGIC)
        for batch in scan:
            note_mark(segment, batch[0][0].cursor, start)
            newest, start = batch[-1]
            segment.last, segment.last_mark = newest.cursor, newest.mark
        segment.end = scan.end
    return scan.tail


def note_mark(segment: Segment, first: Cursor, at: int) -> None:
    """Remember where a batch begins, unless a place shortly before it is known."""
    if not segment.marks or at - segment.marks[-1][1] >= MARK_BYTES:
        segment.marks.append((first, at))


def begins_well(segment: Segment) -> bool:
    """Whether at least the first batch of a segment can be read."""
    try:
        with opened(segment) as fd:
            return next(iter(Scan(fd, segment)), None) is not None
    except OSError as error:
        log.warning("%s cannot be read: %s", segment.path, error)
        return False


def repair(segments: list[Segment]) -> str:
    """Find the newest record, and make the newest segment one that can be appended to, or seal it. Returns what was wrong, or "".

    A torn tail is cut off; a damaged segment is sealed, and its good part remains; a newest segment without a good record is set aside and
    leaves the list. Raises OSError only if a segment cannot be opened for reading.
    """
    findings = []
    while segments:
        newest = segments[-1]
        tail = examine(newest)
        if newest.last is None:
            findings.append(_discard(newest))
            segments.pop()
            continue
        if tail is not Tail.WHOLE:
            findings.append(_seal(newest) if tail is Tail.DAMAGED else _cut(newest))
        break
    for finding in filter(None, findings):
        log.warning("%s", finding)
    return "; ".join(filter(None, findings))


def _discard(segment: Segment) -> str:
    """A segment without a good record: set aside, or removed if it holds nothing."""
    try:
        if segment.size <= len(MAGIC) and MAGIC.startswith(segment.path.read_bytes()):
            segment.path.unlink()
            return ""
        aside = set_aside(segment.path)
        bound_damaged(segment.path.parent)
    except OSError as error:
        return f"{segment.path} holds no good record and could not be moved: {error}"
    return f"{segment.path} holds no good record; it was moved to {aside.name}"


def _seal(segment: Segment) -> str:
    segment.sealed = segment.told = True
    return f"{segment.path} is damaged at byte {segment.end} of {segment.size}: read up to there, not written to again"


def _cut(segment: Segment) -> str:
    torn = segment.size - segment.end
    try:
        os.truncate(segment.path, segment.end)
    except OSError as error:
        segment.sealed = segment.told = True
        return f"{segment.path} ends in a torn batch of {torn} bytes that could not be cut off: {error}"
    segment.size = segment.end
    return f"{segment.path} ended in a torn batch: its last {torn} bytes were cut off"


def bound_damaged(directory: Path) -> None:
    """Remove the oldest of the files that were set aside, by name. Raises OSError."""
    aside = sorted(name for name in os.listdir(directory) if _ASIDE.fullmatch(name))
    for name in aside[:-KEEP_DAMAGED]:
        log.warning("%s is removed: %d newer damaged segments are kept", directory / name, KEEP_DAMAGED)
        os.unlink(directory / name)
