# SPDX-License-Identifier: Apache-2.0
"""Answers by key: a mutating request that comes again gets the first one's answer instead of being carried out twice. Used by app.py."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

MAX_KEYS: Final = 1024  # design, section 5
MAX_BYTES: Final = 8 * 1024 * 1024  # of remembered answers; one larger answer replaces all others


class Answers:
    """The remembered answers of one VM, the oldest forgotten first."""

    def __init__(self) -> None:
        self._answers: OrderedDict[bytes, tuple[int, bytes]] = OrderedDict()
        self._bytes = 0
        self._running: dict[bytes, list[int]] = {}

    def known(self, key: bytes) -> tuple[int, bytes] | None:
        """Kind and body of the first answer, if it has been given."""
        return self._answers.get(key)

    def begin(self, key: bytes, number: int) -> bool:
        """Note a request. False if one with this key runs already: it will be answered together with that one."""
        if key in self._running:
            self._running[key].append(number)
            return False
        self._running[key] = [number]
        return True

    def finish(self, key: bytes, kind: int, body: bytes) -> list[int]:
        """Remember the answer; the numbers of all requests that wait for it."""
        old = self._answers.pop(key, None)
        if old is not None:
            self._bytes -= len(old[1])
        self._answers[key] = (kind, body)
        self._bytes += len(body)
        while len(self._answers) > MAX_KEYS or (self._bytes > MAX_BYTES and len(self._answers) > 1):
            _, (_, forgotten) = self._answers.popitem(last=False)
            self._bytes -= len(forgotten)
        return self._running.pop(key, [])
