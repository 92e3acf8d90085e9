# SPDX-License-Identifier: Apache-2.0
"""Deadlines of many things at once: add and drop cost a dict operation, and nothing lingers for what was dropped long before its time.

Kept in slices of time. A thing falls due at the end of its slice, so up to `SLICE` seconds late and never early. The broker keeps its
requests here, each worker its waiting commands. No clock inside: the caller says what time it is.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

SLICE: Final = 0.025

T = TypeVar("T", bound=Hashable)


class Deadlines(Generic[T]):
    """A set of things, each with the time (monotonic seconds) at which it falls due."""

    def __init__(self) -> None:
        self._slices: dict[int, dict[T, None]] = {}
        self._order: list[int] = []  # heap of the slices that exist
        self._slice_of: dict[T, int] = {}

    def __len__(self) -> int:
        return len(self._slice_of)

    def add(self, thing: T, due: float) -> None:
        """Set or change when a thing falls due."""
        self.drop(thing)
        index = int(due / SLICE) + 1
        members = self._slices.get(index)
        if members is None:
            members = self._slices[index] = {}
            heapq.heappush(self._order, index)
        members[thing] = None
        self._slice_of[thing] = index

    def drop(self, thing: T) -> None:
        """Forget a thing; nothing happens if it is not there."""
        index = self._slice_of.pop(thing, None)
        if index is not None:
            del self._slices[index][thing]

    def next_due(self) -> float | None:
        """When to call `take_due` next; None if nothing waits."""
        while self._order and not self._slices[self._order[0]]:
            del self._slices[heapq.heappop(self._order)]
        return self._order[0] * SLICE if self._order else None

    def take_due(self, now: float) -> list[T]:
        """Remove and return what is due."""
        due: list[T] = []
        while self._order and self._order[0] * SLICE <= now:
            members = self._slices.pop(heapq.heappop(self._order))
            for thing in members:
                del self._slice_of[thing]
            due.extend(members)
        return due
