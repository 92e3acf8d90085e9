# SPDX-License-Identifier: Apache-2.0
"""The status page of a VM: one small file, mapped into memory by the worker that writes it and by whoever looks.

It holds what must be seen while the worker is stuck (is its loop busy, since when, in what), and what must outlive it at any
instruction: which events have been numbered, how far the monitor's bytes are read, and which commands QEMU still owes an answer (the
ledger). Every figure is one aligned 64-bit store, so a reader never sees half of one. Writers: the VM's worker alone. Readers: the
broker (`blocked` in list), and the next worker of the same VM.

    word   what
       0   magic and layout version
       1   pid of the worker               2   its start time (clock ticks after boot, /proc/PID/stat field 22)
       3   epoch of the run                4   progress: seq << 24 | bytes of the peeked chunk that are dealt with
       5   pending consumption             6   carry: which carry file, and its length
       7   the last QMP id given out       8   busy since (CLOCK_MONOTONIC, ns), 0 while the loop sleeps
       9   wake-ups of the loop           10   incarnation: workers this VM has had
      11   carry after the consumption    12   QMP id of the command that is being written, else 0
      13   state of the VM (its place in VmState)        14   facts about the run (worker/vm.py)
      15   in that state since (microseconds since 1970)      32   1 if the last worker left in order
      33   the guest's file systems are frozen until (f64, CLOCK_MONOTONIC), 0 if vmloop has not frozen them
   16-23   what the loop is busy with, UTF-8, zero padded           24-31   the reason of the VM's state, likewise
      34   seq of the newest event that was published and given to handlers (worker/events.py)
      35   agent: pending consumption     36   agent: its carry               37   agent: carry after the consumption
      38   agent: id of the command that is being written, else 0
      39   agent: what is known of the connection (worker/agent/ledger.py)
      40   epoch that is about to begin, else 0                                     41-63   free
  64-319   ledger: 16 entries of 16 words (worker/qmp/ledger.py)
 320-511   what the guest agent owes: 8 entries of 24 words (worker/agent/ledger.py)

See worker/qmp/framing.py for words 4 to 6, worker/qmp/peeking.py for 5, 6 and 11 (35 to 37), worker/qmp/ledger.py for the ledger.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Final

from .cursor import Cursor

PAGE_BYTES: Final = 4096
MAGIC: Final = int.from_bytes(b"VMLPAGE1", "little")

DONE_BITS: Final = 24  # of the progress word: bytes; above them the number of the newest event

LEDGER_SLOTS: Final = 16
LEDGER_SLOT_WORDS: Final = 16
LEDGER_AT: Final = 64

AGENT_SLOTS: Final = 8
AGENT_SLOT_WORDS: Final = 24
AGENT_LEDGER_AT: Final = 320

_TASK_AT: Final = 16 * 8
_REASON_AT: Final = 24 * 8
_TEXT_BYTES: Final = 64


class Word(IntEnum):
    """Index of each figure, in 64-bit words."""

    MAGIC = 0
    WORKER_PID = 1
    WORKER_STARTED = 2
    EPOCH = 3
    PROGRESS = 4
    PENDING = 5
    CARRY = 6
    QMP_ID = 7
    BUSY_SINCE = 8
    WAKEUPS = 9
    INCARNATION = 10
    NEXT_CARRY = 11
    SENDING = 12
    STATE = 13
    FACTS = 14
    SINCE = 15
    LEFT = 32
    FROZEN_UNTIL = 33
    TOLD = 34
    AGENT_PENDING = 35
    AGENT_CARRY = 36
    AGENT_NEXT_CARRY = 37
    AGENT_SENDING = 38
    AGENT_LINK = 39
    NEXT_EPOCH = 40


# What no worker ever comes to, and what the next one could not count on from. FROZEN_UNTIL: a time, neither infinite nor before the boot.
_LIMITS: Final = {
    Word.EPOCH: 1 << 32,
    Word.QMP_ID: 1 << 62,
    Word.PROGRESS: 1 << 62,
    Word.INCARNATION: 1 << 62,
    Word.NEXT_EPOCH: 1 << 32,
    Word.TOLD: 1 << 62,
    Word.FROZEN_UNTIL: 0x7FF << 52,
}


class PageDamaged(Exception):
    """The file is no status page of this layout: foreign, torn or of another version."""


class Page:
    """A mapped status page. `words` is the page as 64-bit figures."""

    def __init__(self, path: Path | None, *, writable: bool) -> None:
        """Map `path`; when writable it is created (zeroed, with its magic) if missing. None: a page in memory that nobody else sees.

        Raises `PageDamaged` if it is something else, OSError if it cannot be made: the file system is full, and so on.
        """
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        new = path is None
        if path is None:
            self._map = mmap.mmap(-1, PAGE_BYTES)
        else:
            flags = os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY
            fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
            try:
                size = os.fstat(fd).st_size
                new = size == 0 and writable
                if new:
                    _reserve(fd, path)
                elif size != PAGE_BYTES:
                    raise PageDamaged(f"{path}: {size} bytes instead of {PAGE_BYTES}")
                self._map = mmap.mmap(fd, PAGE_BYTES, access=access)
            finally:
                os.close(fd)
        self.unkept = ""  # why it is in memory only, said by who made it so: no next worker will see it
        self.held_up_in = (
            ""  # not in the file: the worker's newest long step, for its own report of a turn that was too long
        )
        self._view = memoryview(self._map)
        self.words = self._view.cast("Q")
        if new:
            self.words[Word.MAGIC] = MAGIC
        elif self.words[Word.MAGIC] != MAGIC:
            self.close()
            raise PageDamaged(f"{path}: not a status page of this version")
        elif damaged := [word.name for word, limit in _LIMITS.items() if self.words[word] >= limit]:
            self.close()
            raise PageDamaged(f"{path}: damaged: {', '.join(damaged)} cannot be")

    def close(self) -> None:
        self.words.release()
        self._view.release()
        self._map.close()

    def __enter__(self) -> Page:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- the loop's side -------------------------------------------------------------------------------------------------

    def busy(self, task: str = "") -> None:
        """Said by the loop when it wakes, or by a long step that names itself."""
        if task:
            self._put_text(_TASK_AT, task)
        self.words[Word.BUSY_SINCE] = time.monotonic_ns()
        self.words[Word.WAKEUPS] = (self.words[Word.WAKEUPS] + 1) & 0xFFFFFFFFFFFFFFFF

    def doing(self, task: str) -> None:
        """Name the step that follows, for whoever finds the loop held up in it, or the worker dead; "" when it is over."""
        self._put_text(_TASK_AT, task)

    def idle(self) -> None:
        """Said by the loop right before it sleeps."""
        self.words[Word.BUSY_SINCE] = 0

    # -- the looker's side -----------------------------------------------------------------------------------------------

    def blocked_seconds(self) -> float:
        """How long the worker's loop has been in one turn; 0.0 while it sleeps. For a loop at work these are microseconds."""
        since: int = self.words[Word.BUSY_SINCE]
        return max(0.0, (time.monotonic_ns() - since) / 1e9) if since else 0.0

    def task(self) -> str:
        """What the loop last said it does."""
        return self._text(_TASK_AT)

    def newest(self) -> Cursor:
        """The newest event that has a number for good."""
        return Cursor(self.words[Word.EPOCH], self.words[Word.PROGRESS] >> DONE_BITS)

    # -- the state of the VM, for the next worker ------------------------------------------------------------------------

    def put_state(self, state: int, reason: str, since: int) -> None:
        """Note the VM's state (a place in VmState) and its reason, as of `since` (microseconds since 1970)."""
        self._put_text(_REASON_AT, reason)
        self.words[Word.SINCE] = since
        self.words[Word.STATE] = state

    def state_reason(self) -> str:
        """The reason that was put last."""
        return self._text(_REASON_AT)

    def _put_text(self, at: int, text: str) -> None:
        self._map[at : at + _TEXT_BYTES] = text.encode("utf-8", "replace")[: _TEXT_BYTES - 1].ljust(_TEXT_BYTES, b"\0")

    def _text(self, at: int) -> str:
        return bytes(self._map[at : at + _TEXT_BYTES]).split(b"\0", 1)[0].decode("utf-8", "replace")

    # -- the ledger's side -----------------------------------------------------------------------------------------------

    def slot(self, index: int) -> memoryview:
        """The 16 words of one ledger entry."""
        at = LEDGER_AT + index * LEDGER_SLOT_WORDS
        return self.words[at : at + LEDGER_SLOT_WORDS]


def _reserve(fd: int, path: Path) -> None:
    """Take the page's blocks now: on a full tmpfs the first store to a hole would be a SIGBUS. Raises OSError that names the file."""
    try:
        os.posix_fallocate(fd, 0, PAGE_BYTES)
    except OSError as error:
        os.unlink(path)  # an empty file would only be in the way
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


_FLOAT = struct.Struct("<d")


def float_to_word(value: float) -> int:
    """A float as a 64-bit figure."""
    return int.from_bytes(_FLOAT.pack(value), "little")


def word_to_float(word: int) -> float:
    """The float that `float_to_word` made a figure of."""
    value: float = _FLOAT.unpack(word.to_bytes(8, "little"))[0]
    return value


def text_to_words(text: bytes, count: int) -> list[int]:
    """Bytes as so many figures, zero padded; what does not fit is cut."""
    padded = text[: count * 8].ljust(count * 8, b"\0")
    return [int.from_bytes(padded[at : at + 8], "little") for at in range(0, count * 8, 8)]


def words_to_text(words: list[int]) -> bytes:
    """The bytes that `text_to_words` made figures of, with their padding."""
    return b"".join(word.to_bytes(8, "little") for word in words)
