# SPDX-License-Identifier: Apache-2.0
"""Consuming what was peeked, so that a successor can finish it wherever this worker is killed. Used by framing.py and agent/reading.py.

Bytes stay in the socket until they have been dealt with; what is left of them, the start of a line, goes into one of two carry files.
Three words of the page say how far that has come:

    next carry   what the carry will be        pending   so many bytes are being consumed        carry   what it is

The kernel's peek offset (SO_PEEK_OFF) belongs to the connection, not to the process: it says how much of a consumption was left.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ...common.page import Page, Word

# asm-generic/socket.h; Python has no name for it. Unix sockets only (unix(7)).
SO_PEEK_OFF: Final = 42

# One peek. Below the allocator's mmap threshold (128 KiB), and what QEMU gets into a unix socket in two or three writes.
CHUNK_BYTES: Final = 64 * 1024

_INDEX_SHIFT: Final = 56  # carry word: index of the carry file << 56 | its length
_LENGTH_MASK: Final = (1 << _INDEX_SHIFT) - 1


class Peeking:
    """One connection, its three words and its two carry files."""

    def __init__(
        self,
        connection: socket.socket,
        page: Page,
        carry_path: Callable[[int], Path],
        words: tuple[Word, Word, Word],
        on_consumed: Callable[[], None],
    ) -> None:
        """`words`: pending, carry, next carry. `on_consumed` is called when the bytes are out of the socket, before the page says so."""
        self._socket = connection
        self._words = page.words
        self._path = carry_path
        self._pending, self._carry, self._next = words
        self._on_consumed = on_consumed
        self._scratch = memoryview(bytearray(CHUNK_BYTES))

    @property
    def peeked(self) -> int:
        """Bytes between the start of what is unread and the kernel's peek offset."""
        return max(self._socket.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF), 0)

    @property
    def carry_index(self) -> int:
        """Which file the carry is in."""
        return self._words[self._carry] >> _INDEX_SHIFT & 1

    @property
    def carry_length(self) -> int:
        length: int = self._words[self._carry] & _LENGTH_MASK
        return length

    def begin(self) -> None:
        """For a connection that nobody has read from: forget what the page says about an older one."""
        self._words[self._pending] = 0
        self._words[self._carry] = 0
        self._on_consumed()
        self._socket.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)

    def take_over(self) -> None:
        """For a connection that a predecessor has read from: finish its last step."""
        if self._words[self._pending]:
            self._consume_bytes(self.peeked)
            self._settle()
        self._socket.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)

    def read_carry(self) -> bytes:
        """What the carry file holds of the line that has begun; shorter than `carry_length` if it is damaged. Raises OSError."""
        with self._path(self.carry_index).open("rb") as file:
            return file.read(self.carry_length)

    def write_carry(self, index: int, data: bytes, at: int) -> None:
        """Put bytes into a carry file. Raises OSError.

        What the current one holds must stay valid until the consumption is settled: another line's start goes to the other file.
        """
        fd = os.open(self._path(index), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            written = 0
            while written < len(data):  # a full disk takes a part first, and says so only when asked again
                written += os.pwrite(fd, data[written:], at + written)
        finally:
            os.close(fd)

    def consume(self, count: int, index: int, length: int) -> None:
        """Take bytes that are dealt with out of the socket; the carry is from now on `length` bytes of file `index`."""
        self._words[self._next] = index << _INDEX_SHIFT | length
        self._words[self._pending] = count
        self._consume_bytes(count)
        self._settle()

    def _consume_bytes(self, count: int) -> None:
        while count:
            got = self._socket.recv_into(self._scratch[: min(count, CHUNK_BYTES)])
            if not got:
                return
            count -= got

    def _settle(self) -> None:
        self._on_consumed()
        self._words[self._carry] = self._words[self._next]
        self._words[self._pending] = 0
