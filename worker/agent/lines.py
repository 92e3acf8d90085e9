# SPDX-License-Identifier: Apache-2.0
"""Bytes from a guest to lines, in bounded memory, and the allowance for reading what nobody asked for. Pure; used by session.py.

A line ends with LF. The byte 0xFF, which no JSON text holds, throws away what came before it in its line: qemu-ga puts it before its
reply to guest-sync-delimited, so that the reply stands at the start of a line whatever half a line stands before it.
"""

from __future__ import annotations

from typing import Final

# The shortest line that can be a reply: {"return":1}
MIN_REPLY: Final = 12

# What it costs to read, in seconds of one core (measured, rounded up): the unit of the allowance.
TURN_COST: Final = 60e-6  # waking up for a read
LINE_COST: Final = 4e-6  # looking at one line
END_COST: Final = 0.1e-6  # finding the end of one, be it empty
BYTE_COST: Final = (
    1.5e-9  # moving one byte; one that is peeked at, kept in a file and then consumed is moved three times
)

SHARE: Final = 0.005  # of one core that reading unasked lines may take
MIN_CAPACITY: Final = 0.1  # seconds of one core that may be spent at once
RESUME_AT: Final = (
    0.5  # reading goes on once the allowance is filled to this part: few long pauses, not many short ones
)


class Lines:
    """Incremental framing. Holds at most `limit` bytes of an unfinished line."""

    def __init__(self, limit: int) -> None:
        """limit: bytes of one line; a longer one is dropped to its end. May be changed at any time."""
        self.limit = limit
        self.too_long = 0  # lines that were dropped for their length
        self._unfinished = bytearray()
        self._skipping = False

    @property
    def held(self) -> int:
        """Bytes of the unfinished line that are kept."""
        return len(self._unfinished)

    @property
    def unfinished(self) -> bytes:
        """These bytes."""
        return bytes(self._unfinished)

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that these bytes complete, without their ends; none is empty."""
        pieces = data.split(b"\n")
        rest = pieces.pop()
        lines = []
        if pieces:
            self._extend(pieces[0])
            first = self._take()
            lines = [line for line in (first, *map(_after_delimiter, pieces[1:])) if line]
            if any(len(line) > self.limit for line in lines):
                short = [line for line in lines if len(line) <= self.limit]
                self.too_long += len(lines) - len(short)
                lines = short
        if rest:
            self._extend(rest)
        return lines

    def _extend(self, piece: bytes) -> None:
        delimiter = piece.rfind(b"\xff")
        if delimiter >= 0:
            piece = piece[delimiter + 1 :]
            self._clear()
        if self._skipping or not piece:
            return
        if len(self._unfinished) + len(piece) > self.limit:
            self._clear()
            self._skipping = True
            self.too_long += 1
            return
        self._unfinished += piece

    def _take(self) -> bytes:
        line = bytes(self._unfinished)
        self._clear()
        return line

    def _clear(self) -> None:
        self._unfinished = bytearray()
        self._skipping = False


def _after_delimiter(line: bytes) -> bytes:
    return line[line.rfind(b"\xff") + 1 :] if b"\xff" in line else line


class Allowance:
    """A token bucket of processor time for reading what answers nothing. Empty: leave the guest's bytes where they are.

    No clock inside. The bucket may go below zero by what one read costs. It outlives sessions: a new connection brings no new allowance.
    """

    def __init__(self, now: float, *, max_reply: int) -> None:
        """max_reply: bytes of the longest answer, whose reading is paid before it is known to be one."""
        self.capacity = max(MIN_CAPACITY, 4 * BYTE_COST * max_reply)  # seconds of one core
        self._left = self.capacity
        self._at = now

    def spend(self, cost: float, now: float) -> bool:
        """Take seconds out; False if nothing is left, and reading has to pause."""
        self._refill(now)
        self._left -= cost
        return self._left > 0

    def refund(self, cost: float) -> None:
        """What was spent turned out to be an answer."""
        self._left = min(self.capacity, self._left + cost)

    def pause(self, now: float) -> float:
        """Seconds until reading may go on."""
        self._refill(now)
        return max(0.0, (self.capacity * RESUME_AT - self._left) / SHARE)

    def _refill(self, now: float) -> None:
        self._left = min(self.capacity, self._left + max(0.0, now - self._at) * SHARE)
        self._at = max(self._at, now)
