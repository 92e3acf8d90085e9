# SPDX-License-Identifier: Apache-2.0
"""What one turn of reading takes from a guest agent's socket, and what it may cost. Used by session.py, which says what the lines mean."""

from __future__ import annotations

import asyncio
import socket
from functools import partial
from typing import Final, Protocol

from .lines import BYTE_COST, END_COST, LINE_COST, TURN_COST
from .reading import AgentReader
from .standing import Standing

CHUNK: Final = 64 * 1024  # bytes of one read while an answer is owed
CHUNKS: Final = 4  # in one turn of the loop
IDLE_CHUNK: Final = 4 * 1024  # bytes of one turn while nothing is owed: nobody waits for what comes
IDLE_LINE: Final = 64 * 1024  # bytes of a line that are kept then

_MOVED_WHEN_KEPT: Final = 3  # peeked at, written to the carry file, consumed


class Hearer(Protocol):
    """The session. None of these may raise; any of them may stop the intake."""

    def on_line(self, line: bytes) -> bool: ...  # False for what nobody asked for
    def on_too_long(self) -> None: ...  # a line was dropped for its length
    def on_flood(self, now: float) -> None: ...  # the allowance is used up
    def on_consumed(self) -> None: ...  # a chunk is dealt with, and out of the socket
    def on_closed(self, reason: str) -> None: ...  # there is nothing more to read


class Intake:
    """Life: made → `begin` or `take_over` → `turn` whenever the socket is readable → `drain` if it ends in order → `stop`."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, connection: socket.socket, standing: Standing, hearer: Hearer
    ) -> None:
        self.reader = AgentReader(connection, standing.page, standing.paths, IDLE_LINE)
        self.inside = False  # a chunk is being dealt with: nothing may be sent before it is consumed
        self.draining = False  # towards the end: nothing may be sent any more
        self._loop = loop
        self._standing = standing
        self._hearer = hearer
        self._stopped = False
        self._unsettled = 0.0  # what was spent on the unfinished line

    def turn(self) -> None:
        """The socket is readable."""
        self.take(CHUNKS)

    def take_left(self) -> None:
        """What an earlier worker had read and not consumed: a chunk at most, also where one turn takes less, for nothing is owed."""
        for _ in range(CHUNK // IDLE_CHUNK):
            if not self.take(1):
                return

    def drain(self) -> None:
        """Read what is in the socket, as long as a reply to a command is expected. Bounded by the longest answer."""
        self.inside = self.draining = True
        for _ in range(self._standing.max_reply // CHUNK + CHUNKS):
            if not self._standing.conversation.expects_reply or not self.take(1):
                return

    def stop(self) -> None:
        """Hand out no further line, not even from a chunk at hand."""
        self._stopped = True

    def refund(self) -> None:
        """What was spent on the line that was too long was for an answer."""
        self._standing.allowance.refund(self._unsettled)
        self._unsettled = 0.0

    def take(self, chunks: int) -> bool:
        """Deal with so many chunks at most; False if there is nothing more to read now."""
        spent = TURN_COST
        conversation, reader = self._standing.conversation, self.reader
        for _ in range(chunks):
            owed, kept = conversation.owed, conversation.expects_reply
            reader.lines.limit = self._standing.max_reply if owed else IDLE_LINE
            try:
                data = reader.peek(CHUNK) if kept else reader.receive(CHUNK if owed else IDLE_CHUNK)
            except BlockingIOError:
                return False
            except OSError as error:
                self._hearer.on_closed(f"reading from the agent's socket failed: {error.strerror}")
                return False
            if not data:
                self._hearer.on_closed("the agent's socket was closed")
                return False
            spent += len(data) * BYTE_COST * (_MOVED_WHEN_KEPT if kept else 1) + data.count(b"\n") * END_COST
            go_on = self._deal_with(data, spent, kept=kept)
            if self._stopped or not go_on:
                return False
            if not owed:
                return True
            spent = 0.0
        return True

    def _deal_with(self, data: bytes, spent: float, *, kept: bool) -> bool:
        """One chunk; False if reading has to pause."""
        self.inside = True
        go_on = self._feed(data, spent)
        if self._stopped:
            return False
        conversation = self._standing.conversation
        if kept:
            unkept = partial(self._standing.ledger.note, synced=False, repeats_ids=conversation.repeats_ids)
            self.reader.consume(data, keep=conversation.expects_reply, on_unkept=unkept)
        self.inside = self.draining
        self._hearer.on_consumed()
        return go_on

    def _feed(self, data: bytes, spent: float) -> bool:
        allowance, lines = self._standing.allowance, self.reader.lines
        too_long = lines.too_long
        now = self._loop.time()
        allowance.spend(spent, now)
        self._unsettled += spent
        for line in lines.feed(data):
            if self._hearer.on_line(line):
                allowance.refund(self._unsettled)
            else:
                self._standing.noise += 1
                allowance.spend(LINE_COST, now)
            self._unsettled = 0.0
            if self._stopped:
                return False
        if lines.too_long > too_long:
            self._hearer.on_too_long()
        if self._stopped or self.draining or allowance.spend(0.0, now):
            return True
        self._hearer.on_flood(now)
        return False
