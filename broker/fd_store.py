# SPDX-License-Identifier: Apache-2.0
"""The service manager's copy of what the zygote keeps: with it a connection outlives even the death of all of vmloop at once.

Filled by spawner.py as the zygote tells, and given back by the manager to a broker that it starts: `take_stored`, used by __main__.py.
Without a service manager nothing of this happens. Never waits: what the manager does not take now is told again by the loop's clock.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Final, NamedTuple

from ..common.errors import BadRequest
from ..common.names import VmName, vm_name
from ..common.systemd import Notifier

log = logging.getLogger(__name__)

PREFIX: Final = "vmloop."  # of the fds' names; then the slot and the VM
# The manager reads at most a few messages behind; it is told again after this long.
RETRY_SECONDS: Final = 0.05
# Things to tell it that may wait: as many as the unit lets it store (FileDescriptorStoreMax). Beyond that they are not stored, and logged.
MAX_PENDING: Final = 8192

MAX_SLOT: Final = 32  # letters

Place = tuple[VmName, str]  # a VM, and a slot of it


class Stored(NamedTuple):
    """A connection that an earlier broker had stored."""

    vm: VmName
    slot: str
    fd: int


class FdStore:
    """What is stored, and what has yet to be told. Owns the fds that are given to it."""

    def __init__(self, notifier: Notifier, clock: Callable[[], float]) -> None:
        self._notifier = notifier
        self._clock = clock
        self._stored: dict[Place, tuple[int, int]] = {}  # what the manager has, and which socket that is
        self._pending: dict[Place, int] = {}  # → fd to store; -1: to remove
        self._due: float | None = None
        self._failed = False

    @property
    def there(self) -> bool:
        """Whether there is anybody to store anything."""
        return self._notifier.there

    def has(self, stored: Stored) -> None:
        """The manager has passed this: it still has it."""
        self._stored[stored.vm, stored.slot] = _socket_of(stored.fd)

    def keep(self, vm: str, slot: str, fd: int) -> None:
        """Have a connection stored, in the place of the one before. `fd` is closed here.

        The names are as the zygote was told them by whoever can connect to it; what is none is not stored.
        """
        try:
            place = (vm_name(vm), _slot(slot))
        except BadRequest as error:
            log.warning("a connection is not stored: %s", error)
            os.close(fd)
            return
        self._take_back(place)
        if not self.there or self._stored.get(place) == _socket_of(fd):
            os.close(fd)
            return
        if len(self._pending) >= MAX_PENDING:
            log.error("VM %s: its %s is not stored: %d others wait for the service manager", vm, slot, MAX_PENDING)
            os.close(fd)
            return
        self._pending[place] = fd
        self._tell()

    def drop(self, vm: str, slot: str = "") -> None:
        """Have it removed: one slot, or all of a VM's."""
        for place in {*self._stored, *self._pending}:
            if place[0] == vm and slot in ("", place[1]):
                self._take_back(place)
                if place in self._stored:
                    self._pending[place] = -1
        self._tell()

    def next_due(self) -> float | None:
        """When `on_tick` has something to do."""
        return self._due

    def on_tick(self, now: float) -> None:
        if self._due is not None and self._due <= now:
            self._tell()

    def close(self) -> None:
        """Let go of what was not told."""
        for place in tuple(self._pending):
            self._take_back(place)
        self._due = None

    def _take_back(self, place: Place) -> None:
        fd = self._pending.pop(place, -1)
        if fd >= 0:
            os.close(fd)

    def _tell(self) -> None:
        self._due = None
        while self._pending:
            place = next(iter(self._pending))
            try:
                self._tell_one(place, self._pending[place])
                self._failed = False
            except BlockingIOError:
                self._due = self._clock() + RETRY_SECONDS
                return
            except OSError as error:  # the manager's socket is gone; it may come back with another connection to store
                if not self._failed:
                    log.error("the service manager cannot be told of connections: %s", error)
                self._failed = True
            self._take_back(place)

    def _tell_one(self, place: Place, fd: int) -> None:
        name = name_of(*place)
        if place in self._stored:  # the manager would keep both under the name
            self._notifier.unstore(name)
            del self._stored[place]
        if fd >= 0:
            self._notifier.store(name, fd)
            self._stored[place] = _socket_of(fd)


class Offer:
    """What the service manager gave back, for a zygote that does not have it."""

    def __init__(self) -> None:
        self.held: set[tuple[str, str]] = set()  # VM and slot of what the zygote has told that it keeps
        self._stored: list[Stored] = []

    def add(self, stored: list[Stored]) -> None:
        self._stored += stored

    def take_missing(self) -> list[Stored]:
        """What the zygote does not have, which is the caller's to close from now on; the rest is closed."""
        stored, self._stored = self._stored, []
        for vm, slot, fd in stored:
            if (vm, slot) in self.held:
                os.close(fd)
        return [one for one in stored if (one.vm, one.slot) not in self.held]

    def close(self) -> None:
        for stored in self._stored:
            os.close(stored.fd)
        self._stored.clear()


def name_of(vm: VmName, slot: str) -> str:
    """FDNAME: at most 255 printable characters, no colon; a VM's name and a slot fit."""
    return f"{PREFIX}{slot}.{vm}"


def take_stored(passed: list[tuple[str, int]], store: FdStore, wanted: Callable[[VmName], bool]) -> list[Stored]:
    """Of the fds that a service manager has passed, those of VMs that are `wanted`; the others are closed, ours removed from the store."""
    kept = []
    for name, fd in passed:
        prefix, _, rest = name.partition(".")
        slot, _, vm = rest.partition(".")
        try:
            if prefix + "." != PREFIX:
                raise BadRequest("it is not one of vmloop's")
            stored = Stored(vm_name(vm), _slot(slot), fd)
        except BadRequest as error:
            log.warning("the service manager has passed fd %d as %r, which is closed: %s", fd, name, error)
            os.close(fd)
            continue
        store.has(stored)
        if wanted(stored.vm):
            kept.append(stored)
        else:
            log.info("VM %s does not run: its stored %s is removed", stored.vm, slot)
            os.close(fd)
            store.drop(stored.vm, slot)
    return kept


def _slot(slot: str) -> str:
    """The slot itself; `BadRequest` for what is none: it would be part of a message to the service manager."""
    if not (slot.isascii() and slot.isalpha() and len(slot) <= MAX_SLOT):
        raise BadRequest(f"{slot!r:.60} is no slot of a VM")
    return slot


def _socket_of(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino
