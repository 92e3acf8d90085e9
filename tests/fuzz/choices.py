# SPDX-License-Identifier: Apache-2.0
"""Reading an input as a script of choices, so that a fuzzer can steer what happens and not only what is parsed; used by the targets.

Every input is a script: what is missing at its end reads as zeros. `script` writes what `steps` reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

MAX_STEPS: Final = 64  # of one script: bounds the time of an execution
_LENGTH_BYTES: Final = 2


class Choices:
    """The input, read from its start."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> bool:
        return self._at < len(self._data)

    def number(self, limit: int) -> int:
        """One of 0 to limit - 1, from one byte, or from two if that is not enough."""
        return int.from_bytes(self._take(1 if limit <= 256 else 2), "little") % limit

    def piece(self) -> bytes:
        """Some bytes, their length before them."""
        return self._take(int.from_bytes(self._take(_LENGTH_BYTES), "little"))

    def rest(self) -> bytes:
        return self._take(len(self._data))

    def steps(self) -> Iterator[tuple[int, bytes]]:
        """A number below 256 and a piece each, up to the end or `MAX_STEPS`."""
        for _ in range(MAX_STEPS):
            if not self.left:
                return
            yield self.number(256), self.piece()

    def _take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken


def piece(data: bytes) -> bytes:
    """The bytes that `Choices.piece` reads as these."""
    return len(data).to_bytes(_LENGTH_BYTES, "little") + data


def script(*steps: tuple[int, bytes]) -> bytes:
    """The input that `Choices.steps` reads as these."""
    return b"".join(bytes([number]) + piece(data) for number, data in steps)
