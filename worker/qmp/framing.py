# SPDX-License-Identifier: Apache-2.0
"""From the monitor's bytes to lines, so that a successor can go on wherever this worker is killed. Used by session.py.

Reading is peeking: bytes stay in the socket until what they say has been dealt with.

    1  recv(MSG_PEEK)        the kernel's peek offset (SO_PEEK_OFF) moves forward by n; it belongs to the connection, not to the process
    2  each complete line    is handed out; its events and its end are settled on the page in one store (EventLog.end_line)
    3  the rest, if any      the start of a line that is not there yet goes into a carry file
    4  page: PENDING = n     from here on these n bytes are to be consumed
    5  recv(n)               the peek offset moves back by n
    6  page: carry, PENDING = 0

A successor holds the same connection. PENDING says whether steps 4 to 6 had begun, the peek offset how much of step 5 was left, and the
progress word which lines of an unconsumed chunk are dealt with already. Everything is consumed before the next peek, so the socket is
only readable when something is new, and a line longer than the socket's buffer cannot wedge it.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

from ...common.page import Page, Word
from ...common.paths import VmPaths
from ..events import EventLog
from .peeking import CHUNK_BYTES, Peeking

log = logging.getLogger(__name__)


class LineTooLong(Exception):
    """The peer sent more than the limit without an end of line; the connection is of no use any more."""


class LineReader:
    """Reads one connection. The socket must be a non-blocking unix stream socket."""

    def __init__(self, connection: socket.socket, page: Page, paths: VmPaths, events: EventLog, max_line: int) -> None:
        self._socket = connection
        self._events = events
        words = (Word.PENDING, Word.CARRY, Word.NEXT_CARRY)
        self._peeking = Peeking(connection, page, paths.carry, words, lambda: events.end_line(0))
        self._max_line = max_line
        self._carry: list[bytes] = []  # the same bytes as in the carry file
        self._carry_length = 0
        self._skip = 0  # bytes of the next chunk that a predecessor has dealt with
        self.with_line = events.with_line
        self._closed = False
        self.taken = 0  # chunks consumed so far

    # -- start ------------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """For a connection that nobody has read from: forget what the page says about an older one."""
        self._peeking.begin()

    def take_over(self) -> None:
        """For a connection that a predecessor has read from: finish its last step, and know what it had dealt with."""
        self._peeking.take_over()
        self._skip = self._events.done
        self._carry_length = self._peeking.carry_length
        if self._carry_length:
            self._carry = [self._read_carry()]

    def _read_carry(self) -> bytes:
        """What a predecessor has kept of an unfinished line. Where that is gone the line makes no sense, and is dropped as such."""
        try:
            carried = self._peeking.read_carry()
        except OSError as error:
            log.error("the beginning of a monitor line is lost: %s", error)
            carried = b""
        if len(carried) < self._carry_length:
            log.error("of the beginning of a monitor line %d bytes are lost", self._carry_length - len(carried))
            carried += b"\0"
        self._carry_length = len(carried)
        return carried

    def close(self) -> None:
        """Hand out no further line, not even from a chunk at hand."""
        self._closed = True

    # -- run --------------------------------------------------------------------------------------------------------------

    def read(self, on_line: Callable[[bytes], None]) -> bool:
        """One turn: hand every complete line, without its end, to `on_line`, which must not raise. False at the end of the stream.

        Raises `LineTooLong`, and OSError if the carry file cannot be written; then this reader is of no use any more. Never blocks.
        """
        try:
            data = self._socket.recv(CHUNK_BYTES, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except ConnectionError:  # QEMU closed with something of ours unread: as much an end as an empty read
            return False
        if not data:
            return False
        start = 0
        skip, self._skip = self._skip, 0
        while (newline := data.find(b"\n", start)) >= 0:
            end = newline + 1
            if end > skip:
                line = self._whole_line(data[start:newline])
                self._events.begin_line()
                on_line(line)
                self._events.end_line(end)
                if self._closed:
                    return True
            else:
                self._carry.clear()
                self._carry_length = 0
            start = end
        self._consume(len(data), data[start:], continues=start == 0)
        self.taken += 1
        return True

    def _whole_line(self, last: bytes) -> bytes:
        if not self._carry:
            return last
        line = b"".join((*self._carry, last))
        self._carry.clear()
        self._carry_length = 0
        return line

    def _consume(self, count: int, rest: bytes, *, continues: bool) -> None:
        index = self._peeking.carry_index
        if rest:
            if self._carry_length + len(rest) > self._max_line:
                raise LineTooLong(f"a line of more than {self._max_line} bytes")
            index = index if continues else 1 - index
            self._peeking.write_carry(index, rest, self._carry_length)
            self._carry.append(rest)
            self._carry_length += len(rest)
        self._peeking.consume(count, index, self._carry_length)
