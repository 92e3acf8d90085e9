# SPDX-License-Identifier: Apache-2.0
"""The journal, and memory for as long as the disk refuses: nothing here raises because of the disk. Used by worker/events.py.

While the disk takes what it is given the memory is empty. When it does not (full, read-only, broken) batches wait in the backlog, are read
from there, and are written in order once the disk takes them again.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Final

from ...common.cursor import Cursor
from .journal import DEFAULT_LIMIT, NOWHERE, Journal, Page
from .record import Record, encode_batch

log = logging.getLogger(__name__)

# Events that wait for the disk in memory: many times what a VM emits while somebody makes room.
BACKLOG_BYTES: Final = 4 * 1024 * 1024

# What a record costs in memory besides its body.
RECORD_OVERHEAD: Final = 256

# Between two tries of a disk that has refused: it seldom has room again sooner, and a refused write costs little more than a good one.
RETRY_SECONDS: Final = 1.0

_ADVICE: Final = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "raise the quota",
    errno.EFBIG: "raise the limit on a file's size",
    errno.EROFS: "mount it writable",
    errno.EACCES: "check its owner and mode",
    errno.EPERM: "check its owner and mode",
    errno.EIO: "look for the disk's errors in the kernel's log",
}


class EventStore:
    """Keeps the events of one VM: on disk, or in memory until the disk takes them."""

    def __init__(
        self,
        directory: Path,
        limit: int = DEFAULT_LIMIT,
        backlog: int = BACKLOG_BYTES,
        clock: Callable[[], float] = time.monotonic,
        *,
        segment: int | None = None,
    ) -> None:
        """`limit`: bytes on disk; `backlog`: bytes in memory; `clock`: seconds, for the retries; `segment`: as of `Journal`.

        A journal that cannot be opened is tried again like a disk that refuses; `problem` says so meanwhile.
        """
        self._directory = directory
        self._limit = limit
        self._segment = segment
        self._backlog_limit = backlog
        self._clock = clock
        self._backlog: deque[tuple[Record, ...]] = deque()
        self._backlog_bytes = 0
        self._lost: tuple[Cursor, Cursor] | None = None
        self._journal: Journal | None = None
        self._try_at = 0.0
        self.problem = ""
        self._open()
        self._given = self.last_on_disk

    # -- what is there ---------------------------------------------------------------------------------------------------

    @property
    def first(self) -> Cursor:
        """The oldest event that can be read; `Cursor(0, 0)` if there is none."""
        on_disk = self._journal.first if self._journal else NOWHERE
        if on_disk == NOWHERE and self._backlog:
            return self._backlog[0][0].cursor
        return on_disk

    @property
    def last(self) -> Cursor:
        """The newest event that was appended, be it on disk or not; `Cursor(0, 0)` if there is none."""
        return max(self._given, self.last_on_disk)

    @property
    def last_on_disk(self) -> Cursor:
        """The newest event on disk; `Cursor(0, 0)` if there is none, or if the journal could not be opened."""
        return self._journal.last if self._journal else NOWHERE

    @property
    def last_mark(self) -> int:
        """The mark of the newest event on disk; 0 if there is none."""
        return self._journal.last_mark if self._journal else 0

    @property
    def repaired(self) -> str:
        """What was wrong with the journal when it was opened; "" if nothing."""
        return self._journal.repaired if self._journal else ""

    @property
    def waiting(self) -> int:
        """Batches in memory that wait for the disk."""
        return len(self._backlog)

    def lost(self) -> tuple[Cursor, Cursor] | None:
        """The first and the last event that the backlog had no room for since this was last asked; None if there is none."""
        lost, self._lost = self._lost, None
        return lost

    def truncated(self) -> tuple[Cursor, Cursor] | None:
        """The first and the last event of the segments that were removed since this was last asked; None if there is none."""
        return self._journal.truncated() if self._journal else None

    # -- writing ---------------------------------------------------------------------------------------------------------

    def append(self, batch: Sequence[Record]) -> bool:
        """Keep a batch; True if it is on disk now, and all before it. Raises ValueError as `Journal.append` does."""
        ready = self.retry()
        if ready and self._may_follow(batch):
            if self._write(batch):
                self._given = batch[-1].cursor
                return True
        else:
            self._check(batch)
        self._given = batch[-1].cursor
        if self._may_follow(batch):
            self._push(tuple(batch))
        else:
            self._lose(batch)
        return False

    def retry(self) -> bool:
        """Try the disk again if it is time; True if nothing waits in memory now. The owner's timer calls it."""
        if not self._backlog and self._journal is not None:
            return True
        if self._clock() < self._try_at:
            return False
        if self._journal is None and not self._open():
            return False
        while self._backlog:
            if not self._may_follow(self._backlog[0]):  # the journal was opened only now
                self._lose(self._shift())
            elif self._write(self._backlog[0]):
                self._shift()
            else:
                return False
        log.info("%s takes events again", self._directory)
        return True

    def _open(self) -> bool:
        try:
            self._journal = Journal(self._directory, self._limit, segment=self._segment)
        except OSError as error:
            self._refused("opened", error)
            return False
        self.problem = ""
        return True

    def _may_follow(self, batch: Sequence[Record]) -> bool:
        """Whether a batch comes after what is on disk.

        One may not if the journal could be opened only after numbers that it holds were given again: what it has stands.
        """
        return bool(batch) and batch[0].cursor > self.last_on_disk

    def _write(self, batch: Sequence[Record]) -> bool:
        """One batch to the disk; False, with the problem noted, if it refuses."""
        assert self._journal is not None
        try:
            self._journal.append(batch)
        except OSError as error:
            self._refused("written", error)
            return False
        self.problem = ""
        return True

    def _refused(self, what: str, error: OSError) -> None:
        reason = error.strerror or str(error)
        advice = _ADVICE.get(error.errno or 0, "see the worker's log")
        problem = (
            f"the journal {self._directory} cannot be {what}: {reason}; events wait in memory until it can: {advice}"
        )
        if problem != self.problem:
            log.warning("%s", problem)
        self.problem = problem
        self._try_at = self._clock() + RETRY_SECONDS

    # -- the backlog -----------------------------------------------------------------------------------------------------

    def _check(self, batch: Sequence[Record]) -> None:
        """What the journal would refuse is refused now, not when the disk is back."""
        encode_batch(batch)
        cursor = self._given
        for record in batch:
            if record.cursor <= cursor:
                raise ValueError(f"event {record.cursor} does not come after {cursor} in {self._directory}")
            cursor = record.cursor

    def _push(self, batch: tuple[Record, ...]) -> None:
        self._backlog.append(batch)
        self._backlog_bytes += _cost(batch)
        while self._backlog and self._backlog_bytes > self._backlog_limit:
            self._lose(self._shift())

    def _shift(self) -> tuple[Record, ...]:
        batch = self._backlog.popleft()
        self._backlog_bytes -= _cost(batch)
        return batch

    def _lose(self, batch: Sequence[Record]) -> None:
        self._lost = (self._lost[0] if self._lost else batch[0].cursor, batch[-1].cursor)

    # -- reading ---------------------------------------------------------------------------------------------------------

    def read(self, since: Cursor, count: int, size: int) -> Page:
        """The events after a cursor from disk and memory, as `Journal.read` gives them: in order, none twice."""
        page = self._journal.read(since, count, size) if self._journal else Page([], False, since)
        if page.more or not self._backlog:
            return page
        bodies, last = page.bodies, page.last
        total = sum(map(len, bodies))
        for record in self._waiting_after(last):
            if bodies and (len(bodies) >= count or total + len(record.body) > size):
                return Page(bodies, True, last)
            bodies.append(record.body)
            total += len(record.body)
            last = record.cursor
        return Page(bodies, False, last)

    def _waiting_after(self, since: Cursor) -> Iterator[Record]:
        batches = (batch for batch in self._backlog if (batch[-1].epoch, batch[-1].seq) > since)
        return (record for record in chain.from_iterable(batches) if (record.epoch, record.seq) > since)

    # -- the end ---------------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Have the disk write down what was appended; if it cannot, `problem` says so until something is appended again."""
        if self._journal is not None:
            try:
                self._journal.sync()
            except OSError as error:
                self.problem = f"the journal {self._directory} may not outlive a power cut: {error.strerror or error}"
                log.warning("%s", self.problem)

    def close(self) -> None:
        """Close the file; what still waits in memory is tried once more."""
        self._try_at = min(self._try_at, self._clock())
        if not self.retry():
            log.warning("%d batches of events were never written to %s", len(self._backlog), os.fspath(self._directory))
        if self._journal is not None:
            self._journal.close()

    def filenos(self) -> list[int]:
        """The descriptors that are open; a forked child closes them."""
        return self._journal.filenos() if self._journal else []


def _cost(batch: tuple[Record, ...]) -> int:
    return sum(len(record.body) + RECORD_OVERHEAD for record in batch)
