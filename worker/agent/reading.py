# SPDX-License-Identifier: Apache-2.0
"""From the agent's socket to lines. While a command's reply is expected nothing is taken out before it is dealt with. Used by session.py.

A reply must not be lost with the worker that read it. So, as at the monitor (worker/qmp/peeking.py), a chunk is peeked at, its complete
lines are dealt with, the start of a line that is not there yet goes into a carry file, and only then is it consumed. A successor may see
a line again: by its id nobody waits for it any more, and nothing is sent before what was peeked at is consumed, so that without ids it
is not taken for a later command's. What comes while no reply is expected is read plainly and costs no file.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

from ...common.page import Page, Word
from ...common.paths import VmPaths
from ..qmp.peeking import Peeking
from .lines import Lines

log = logging.getLogger(__name__)


class AgentReader:
    """Reads one connection, a non-blocking unix stream socket."""

    def __init__(self, connection: socket.socket, page: Page, paths: VmPaths, limit: int) -> None:
        """limit: bytes of a line while nothing is owed."""
        self.lines = Lines(limit)
        self.intact = True  # a successor finds the start of the line that has begun, if it is somebody's
        self._socket = connection
        self._kept = 0  # bytes of the unfinished line that the carry file holds
        words = (Word.AGENT_PENDING, Word.AGENT_CARRY, Word.AGENT_NEXT_CARRY)
        self._peeking = Peeking(connection, page, paths.agent_carry, words, _nothing)

    def begin(self) -> None:
        """For a connection that nobody has read from."""
        self._peeking.begin()

    def take_over(self, limit: int) -> None:
        """For a connection that an earlier worker has read from. limit: bytes of a line. `intact` is False if its start is lost."""
        self._peeking.take_over()
        length = self._peeking.carry_length
        if not length:
            return
        try:
            carry = self._peeking.read_carry() if length <= limit else b""
        except OSError as error:
            log.warning("guest agent: what a line began with cannot be read again: %s", error)
            carry = b""
        lines, self.lines = self.lines, Lines(limit)
        complete = self.lines.feed(carry)
        if complete or self.lines.held != length:
            self.lines, self.intact = lines, False
            self._peeking.consume(0, 0, 0)
        else:
            self._kept = length

    def receive(self, size: int) -> bytes:
        """Up to so many bytes, which are gone then. Raises OSError."""
        if self._kept:  # nobody waits for that line any more
            self._kept = 0
            self._peeking.consume(0, 0, 0)
        self.intact = True
        return self._socket.recv(size)

    def peek(self, size: int) -> bytes:
        """Up to so many bytes, which stay until `consume`. Raises OSError."""
        return self._socket.recv(size, socket.MSG_PEEK)

    def consume(self, data: bytes, *, keep: bool, on_unkept: Callable[[], None]) -> None:
        """What was peeked at is dealt with. keep: what it leaves of a line may be the start of a reply.

        `on_unkept` is called before it is consumed if that start cannot be kept (a full disk): a successor would not know it.
        """
        held = self.lines.held
        new_line = b"\n" in data or b"\xff" in data
        index, length = self._peeking.carry_index, 0
        if keep and held and (self.intact or new_line):
            try:
                if self._kept and not new_line and self._kept + len(data) == held:
                    self._peeking.write_carry(index, data, self._kept)
                else:
                    index = 1 - index
                    self._peeking.write_carry(index, self.lines.unfinished, 0)
                length = held
            except OSError as error:
                log.warning("guest agent: the start of a reply cannot be kept for the next worker: %s", error)
        intact = length == held or not keep
        if not intact:
            self.intact = False
            on_unkept()
        self._kept = length
        self._peeking.consume(len(data), index, length)
        self.intact = intact


def _nothing() -> None:
    """No lines are counted here."""
