# SPDX-License-Identifier: Apache-2.0
"""The journal of one VM on disk: append a batch of events, read a page of them. Used by store.py.

One writer, which holds the VM's lock. A batch is one write: after a failure nothing of it counts. The directory and its first file are made
at the first append. Once the journal would grow over its limit its oldest segment is removed, and `truncated` says so.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from ...common.cursor import Cursor
from ...common.durable import set_aside, sync_directory
from .frames import Tail
from .record import Record, encode_batch
from .segments import (
    MAGIC,
    Scan,
    Segment,
    begins_well,
    bound_damaged,
    examine,
    find_segments,
    note_mark,
    opened,
    repair,
    segment_bytes,
    segment_name,
)

log = logging.getLogger(__name__)

# What a VM's events may take on disk, unless its owner says otherwise.
DEFAULT_LIMIT: Final = 16 * 1024 * 1024

# Readers whose next page is found without a search; one more costs one scan of a segment.
RESUME_POINTS: Final = 8

NOWHERE: Final = Cursor(0, 0)


class Page(msgspec.Struct, frozen=True):
    """Some events, oldest first, as packed. `last`: where the next page begins; `more`: whether there is one."""

    bodies: list[bytes]
    more: bool
    last: Cursor


class Journal:
    """Appends to and reads from the segments of one directory."""

    def __init__(self, directory: Path, limit: int = DEFAULT_LIMIT, *, segment: int | None = None) -> None:
        """Find the newest record, and repair what a crash left.

        `limit`: bytes of all segments; at least two segments are kept, whatever it is. `segment`: bytes of one, else a sixteenth.
        Raises OSError if the directory or its newest segment cannot be opened; never for what is in them.
        """
        self._directory = directory
        self._segment_bytes = segment_bytes(limit) if segment is None else segment
        self._limit = max(limit, 2 * self._segment_bytes)
        self._segments = find_segments(directory)
        self.repaired = repair(self._segments)
        self._fd = -1
        self._first: Cursor | None = None
        self._newest = self._segments[-1].last or NOWHERE if self._segments else NOWHERE
        self._newest_mark = self._segments[-1].last_mark if self._segments else 0
        self._dropped: tuple[Cursor, Cursor] | None = None
        self._unsynced: list[Segment] = []
        self._directory_unsynced = False
        self._resume: OrderedDict[Cursor, tuple[Cursor, int]] = OrderedDict()

    @property
    def first(self) -> Cursor:
        """The oldest event that can be read; `Cursor(0, 0)` if there is none."""
        if self._first is None:
            self._first = next((segment.first for segment in self._segments if begins_well(segment)), NOWHERE)
        return self._first

    @property
    def last(self) -> Cursor:
        """The newest event; `Cursor(0, 0)` if there is none."""
        return self._newest

    @property
    def last_mark(self) -> int:
        """The mark of the newest event; 0 if there is none."""
        return self._newest_mark

    @property
    def size(self) -> int:
        """Bytes of all segments on disk."""
        return sum(segment.size for segment in self._segments)

    # -- writing ---------------------------------------------------------------------------------------------------------

    def append(self, batch: Sequence[Record]) -> None:
        """Write a batch, whole or not at all.

        Raises OSError if the disk refuses: then nothing of the batch counts, and it may be appended again. Raises ValueError, before
        anything is written, for a batch whose cursors do not increase: a defect of the caller.
        """
        data = encode_batch(batch)
        cursor = self._newest
        for record in batch:
            if (record.epoch, record.seq) <= cursor:
                raise ValueError(f"event {record.cursor} does not come after {cursor} in {self._directory}")
            cursor = record.cursor
        if self._has_room(len(data)):
            self._extend(data, batch[0])
        else:
            self._begin_segment(data, batch[0].cursor)
        segment = self._segments[-1]
        segment.last, segment.last_mark = cursor, batch[-1].mark
        self._newest, self._newest_mark = cursor, batch[-1].mark

    def _has_room(self, size: int) -> bool:
        """Whether the newest segment takes so many bytes more; opens it if it is not open yet."""
        if not self._segments:
            return False
        segment = self._segments[-1]
        if segment.sealed or segment.end + size > self._segment_bytes:
            return False
        if self._fd < 0:
            self._reopen(segment)
        return not segment.sealed

    def _reopen(self, segment: Segment) -> None:
        """Open the newest segment to append to it; one that somebody else has been at is sealed instead."""
        try:
            fd = os.open(segment.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            log.warning("%s is gone; a new segment begins", segment.path)
            segment.sealed = True
            return
        size = os.fstat(fd).st_size
        if size != segment.end:
            log.warning("%s has %d bytes where %d were written; a new segment begins", segment.path, size, segment.end)
            os.close(fd)
            segment.sealed = True
            return
        self._fd = fd

    def _extend(self, data: bytes, first: Record) -> None:
        segment = self._segments[-1]
        try:
            _write(self._fd, data)
        except OSError:
            self._take_back(segment)
            raise
        note_mark(segment, first.cursor, segment.end)
        segment.end += len(data)
        segment.size = segment.end
        if not self._unsynced or self._unsynced[-1] is not segment:
            self._unsynced.append(segment)

    def _take_back(self, segment: Segment) -> None:
        """Cut off what a failed write left; if that fails too, the segment is closed for good."""
        try:
            os.ftruncate(self._fd, segment.end)
        except OSError as error:
            log.warning("%s: a failed write cannot be cut off (%s); a new segment begins", segment.path, error)
            segment.sealed = segment.told = True
            self._close_file()

    def _begin_segment(self, data: bytes, first: Cursor) -> None:
        """Make a segment with a batch as its first; the newest one so far is left as it is until that has worked."""
        content = MAGIC + data
        self._make_room(max(self._segment_bytes, len(content)))
        if not self._directory.is_dir():
            self._directory.mkdir(mode=0o700)  # not its parents: a VM that was undefined does not come back by an event
        path = self._directory / segment_name(first)
        fd = _create(path)
        try:
            _write(fd, content)
        except OSError:
            self._discard(path, fd)
            raise
        self._close_file()
        self._fd = fd
        if self._segments:
            self._segments[-1].marks = []
        segment = Segment(first=first, path=path, end=len(content), size=len(content), marks=[(first, len(MAGIC))])
        self._segments.append(segment)
        self._unsynced.append(segment)
        self._directory_unsynced = True
        if self._first in (None, NOWHERE):
            self._first = None  # asked anew: the directory may have held nothing that can be read

    def _discard(self, path: Path, fd: int) -> None:
        """A segment whose first batch could not be written."""
        try:
            os.ftruncate(fd, 0)
            os.unlink(path)
        except OSError as error:
            log.warning("%s is left with half a batch, which will not be read: %s", path, error)
        os.close(fd)

    def _make_room(self, size: int) -> None:
        """Remove the oldest segments until one of `size` bytes fits in. Raises OSError if one cannot be removed."""
        while self._segments and self.size + size > self._limit:
            oldest = self._segments[0]
            last = self._last_of(oldest)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(oldest.path)
            if len(self._segments) == 1:
                self._close_file()
            del self._segments[0]
            self._unsynced = [segment for segment in self._unsynced if segment is not oldest]
            self._first = None
            if last is not None:
                self._dropped = (self._dropped[0] if self._dropped else oldest.first, last)

    def _last_of(self, segment: Segment) -> Cursor | None:
        """The newest record of a segment, None if it has none that can be read."""
        if segment.last is None:
            try:
                examine(segment)
            except OSError as error:
                log.warning("%s cannot be read: %s", segment.path, error)
            segment.marks = []
        return segment.last

    def truncated(self) -> tuple[Cursor, Cursor] | None:
        """The first and the last event of what was removed since this was last asked; None if nothing was."""
        dropped, self._dropped = self._dropped, None
        return dropped

    # -- reading ---------------------------------------------------------------------------------------------------------

    def read(self, since: Cursor, count: int, size: int) -> Page:
        """The events after a cursor, oldest first: at most `count`, about `size` bytes, but one at least if there is one.

        What cannot be read is left out (the cursors show the gap), and named in the log once. Never raises for the disk.
        """
        bodies: list[bytes] = []
        last = since
        total = 0
        place: tuple[Cursor, int] | None = None
        more = False
        with contextlib.closing(self._after(since)) as records:
            for record, segment, end in records:
                if bodies and (len(bodies) >= count or total + len(record.body) > size):
                    more = True
                    break
                bodies.append(record.body)
                total += len(record.body)
                last, place = Cursor(record.epoch, record.seq), (segment.first, end)
        if place is not None:
            self._resume.pop(since, None)
            self._resume[last] = place
            if len(self._resume) > RESUME_POINTS:
                self._resume.popitem(last=False)
        return Page(bodies=bodies, more=more, last=last)

    def _after(self, since: Cursor) -> Generator[tuple[Record, Segment, int], None, None]:
        """Every readable record after a cursor, its segment and the offset behind it."""
        if since >= self._newest:
            return
        index, at = self._place(since)
        newest = since
        for segment in self._segments[index:]:
            for record, end in self._records(segment, at):
                if (record.epoch, record.seq) > newest:  # one that had to be written twice is read once
                    newest = Cursor(record.epoch, record.seq)
                    yield record, segment, end
            at = 0

    def _place(self, since: Cursor) -> tuple[int, int]:
        """Where to look for what follows a cursor: the segment's index, and an offset from which on to read (0: from its start)."""
        resume = self._resume.get(since)
        index = bisect_right(self._segments, resume[0] if resume else since, key=lambda segment: segment.first) - 1
        if index < 0:
            return 0, 0
        segment = self._segments[index]
        if resume and segment.first == resume[0]:
            return index, resume[1]
        mark = bisect_right(segment.marks, since, key=lambda mark: mark[0]) - 1
        return index, segment.marks[mark][1] if mark >= 0 else 0

    def _records(self, segment: Segment, at: int) -> Iterator[tuple[Record, int]]:
        try:
            with opened(segment) as fd:
                scan = Scan(fd, segment, at)
                for batch in scan:
                    yield from batch
        except OSError as error:
            self._tell(segment, f"cannot be read: {error}")
            return
        if scan.tail is not Tail.WHOLE:
            self._tell(segment, f"is {scan.tail.value} at byte {scan.end}")

    def _tell(self, segment: Segment, what: str) -> None:
        if not segment.told:
            segment.told = True
            log.warning("%s %s; reading goes on behind it", segment.path, what)

    # -- the end ---------------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Have the disk write down what was appended. Raises OSError; takes as long as the disk takes."""
        while self._unsynced:
            segment = self._unsynced[0]
            if segment is self._segments[-1] and self._fd >= 0:
                os.fdatasync(self._fd)
            else:
                with contextlib.suppress(FileNotFoundError), opened(segment) as fd:
                    os.fdatasync(fd)
            del self._unsynced[0]
        if self._directory_unsynced:
            sync_directory(self._directory)
            sync_directory(self._directory.parent)  # the directory itself may be new
            self._directory_unsynced = False

    def close(self) -> None:
        """Close the file. The journal can still be read, and the next append opens it again."""
        self._close_file()

    def filenos(self) -> list[int]:
        """The descriptors that are open; a forked child closes them."""
        return [self._fd] if self._fd >= 0 else []

    def _close_file(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                os.close(fd)
            except (
                OSError
            ) as error:  # it is closed all the same; what it says is of bytes that were written long before
                log.warning("%s: %s", self._directory, error)


def _write(fd: int, data: bytes) -> None:
    """One write. Raises OSError also if it was short: the disk is full, or a limit on the file's size is reached."""
    written = os.write(fd, data)
    if written != len(data):
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (only {written} of {len(data)} bytes were written)")


def _create(path: Path) -> int:
    """A new file to append to. One of that name holds nothing that counts, or its name would be another: it is set aside."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o600)
    except FileExistsError:
        log.warning("%s is there already; it was moved to %s", path, set_aside(path).name)
        bound_damaged(path.parent)
    return os.open(path, flags, 0o600)
