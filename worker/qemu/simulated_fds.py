# SPDX-License-Identifier: Apache-2.0
"""The file descriptors that a client has passed to a simulated VM: by name (getfd) and in sets (add-fd). Used by simulated_commands."""

from __future__ import annotations

import os
from typing import Any

from .simulated_port import close_all


class FdSets:
    """What one monitor holds. Owns every descriptor that is in here."""

    def __init__(self) -> None:
        self._passed: list[int] = []  # came with the last message, not used yet
        self._named: dict[str, int] = {}
        self._sets: dict[int, dict[int, str | None]] = {}
        self._removed: set[int] = set()

    def passed(self, fds: list[int]) -> None:
        """A message brought descriptors. They take the place of unused earlier ones, as in QEMU."""
        if fds:
            close_all(self._passed)
            self._passed = fds

    def take_passed(self) -> int | None:
        """The first unused descriptor; the others of its message are closed, as QEMU does."""
        if not self._passed:
            return None
        first, *others = self._passed
        self._passed = []
        close_all(others)
        return first

    def name(self, name: str, fd: int) -> None:
        """Keep a descriptor under a name; one that was there is closed."""
        self.forget(name)
        self._named[name] = fd

    def forget(self, name: str) -> bool:
        """Close a named descriptor; False if there is none."""
        fd = self._named.pop(name, None)
        if fd is None:
            return False
        os.close(fd)
        return True

    def add(self, fd: int, number: int | None, opaque: str | None) -> int:
        """Put a descriptor into a set, a new one if no number is given; returns the number."""
        if number is None:
            number = next(free for free in range(len(self._sets) + 1) if free not in self._sets)
        self._sets.setdefault(number, {})[fd] = opaque
        return number

    def remove(self, number: int, fd: int | None) -> bool:
        """Mark a set's descriptors, or one of them, as removed; False if there is no such thing."""
        members = self._sets.get(number)
        if members is None or (fd is not None and fd not in members):
            return False
        self._removed.update(members if fd is None else {fd})
        return True

    def sweep(self, *, everything: bool = False) -> None:
        """Close what is removed, or every set (the client is gone and nobody uses them)."""
        for number, members in list(self._sets.items()):
            for fd in [fd for fd in members if everything or fd in self._removed]:
                del members[fd]
                self._removed.discard(fd)
                os.close(fd)
            if not members:
                del self._sets[number]

    def listed(self) -> list[dict[str, Any]]:
        """The value of query-fdsets."""
        return [
            {
                "fds": [
                    {"fd": fd} if opaque is None else {"fd": fd, "opaque": opaque} for fd, opaque in members.items()
                ],
                "fdset-id": number,
            }
            for number, members in sorted(self._sets.items(), reverse=True)
        ]

    def close(self) -> None:
        """Close everything."""
        close_all(self._passed)
        close_all(list(self._named.values()))
        self._passed = []
        self._named = {}
        self.sweep(everything=True)
