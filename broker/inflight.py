# SPDX-License-Identifier: Apache-2.0
"""Everything that clients have asked and nobody has answered yet, with its deadline. Pure; used by core.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from ..common.deadlines import Deadlines
from ..common.errors import Busy
from ..common.majordomo import Envelope
from ..common.names import VmName

# Frames that wait for a worker to come up, all together. Above this new ones are refused.
MAX_HELD_BYTES: Final = 64 * 1024 * 1024
# A request up to this size is kept, to be given to the next worker if its own dies.
MAX_REPEATABLE_BYTES: Final = 64 * 1024


# A worker answers its caller's deadline itself, and knows more; the broker only speaks for a worker that does not.
WORKER_GRACE: Final = 0.25


class Entry(msgspec.Struct):
    """One request. `sent_to` is the identity of the worker that has it, None while it waits here."""

    number: int
    client: bytes
    client_id: Any  # echoed in the answer
    envelope: Envelope | None  # how a Majordomo client framed it; None: native
    vm: VmName | None
    op: str
    reading: bool
    received: float
    deadline: float = 0.0  # when it is answered at the latest
    frame: bytes = b""  # native, already with `number`; b"" when it is not kept
    sent_to: bytes | None = None
    spawns: bool = False  # an operation that may need a worker to be made for it
    waits_for: str | None = None  # state that `wait` waits for
    again: bool = False  # its client sends it again, with its key: whatever the VM is at, its worker knows what became of the first
    cancelled: bool = False  # its worker has heard that its client is gone


class InFlight:
    """The table. A number is never used again, not even by a later broker: it starts at the clock's nanoseconds."""

    def __init__(self, first_number: int, per_client: int, per_vm: int) -> None:
        self._next = first_number
        self._per_client_limit = per_client
        self._per_vm_limit = per_vm
        self._entries: dict[int, Entry] = {}
        self._of_client: dict[bytes, int] = {}
        self._of_vm: dict[VmName, dict[int, None]] = {}
        self._deadlines: Deadlines[int] = Deadlines()
        self._held_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def next_number(self) -> int:
        self._next += 1
        return self._next

    def require_room(self, client: bytes, vm: VmName | None) -> None:
        """Raises `Busy` if the client or the VM has too much in flight."""
        if client and self._of_client.get(client, 0) >= self._per_client_limit:  # b"": the broker's own
            raise Busy(f"this client has {self._per_client_limit} requests in flight; wait for answers")
        if vm is not None and len(self._of_vm.get(vm, ())) >= self._per_vm_limit:
            raise Busy(f"VM {vm} has {self._per_vm_limit} requests in flight; try again later")

    def add(self, entry: Entry, deadline: float) -> None:
        """Take a request in. The caller has asked `require_room`."""
        entry.deadline = deadline
        self._entries[entry.number] = entry
        self._of_client[entry.client] = self._of_client.get(entry.client, 0) + 1
        if entry.vm is not None:
            self._of_vm.setdefault(entry.vm, {})[entry.number] = None
        self._deadlines.add(entry.number, deadline)

    def get(self, number: int) -> Entry | None:
        return self._entries.get(number)

    def take(self, number: int) -> Entry | None:
        """Remove a request: it is answered. None if it is not here (any more)."""
        entry = self._entries.pop(number, None)
        if entry is None:
            return None
        left = self._of_client[entry.client] - 1
        if left:
            self._of_client[entry.client] = left
        else:
            del self._of_client[entry.client]
        if entry.vm is not None:
            of_vm = self._of_vm[entry.vm]
            del of_vm[number]
            if not of_vm:
                del self._of_vm[entry.vm]
        self._deadlines.drop(number)
        self.release_frame(entry)
        return entry

    def hold_frame(self, entry: Entry, frame: bytes) -> None:
        """Keep a request's frame until it is sent. Raises `Busy` if too much is kept already."""
        if not self.keep_frame(entry, frame):
            raise Busy("too many requests wait for workers to come up; try again later")

    def keep_frame(self, entry: Entry, frame: bytes) -> bool:
        """Keep a request's frame, to be sent again; False if too much is kept already."""
        if entry.client and self._held_bytes + len(frame) > MAX_HELD_BYTES:  # b"": the broker's own, few and small
            return False
        entry.frame = frame
        self._held_bytes += len(frame)
        return True

    def release_frame(self, entry: Entry) -> None:
        """The frame need not be kept any more."""
        self._held_bytes -= len(entry.frame)
        entry.frame = b""

    def sent(self, entry: Entry, identity: bytes) -> None:
        """A held request has gone to a worker; its frame stays unless it is long."""
        entry.sent_to = identity
        if not entry.spawns and len(entry.frame) > MAX_REPEATABLE_BYTES:
            self.release_frame(entry)

    def of_vm(self, vm: VmName) -> list[Entry]:
        """A VM's requests, in the order they came."""
        return [self._entries[number] for number in self._of_vm.get(vm, ())]

    def oldest_of_vm(self, vm: VmName) -> Entry | None:
        """The request of a VM that a worker has had for longest."""
        numbers = self._of_vm.get(vm, ())
        return next((entry for number in numbers if (entry := self._entries[number]).sent_to is not None), None)

    def count_of_vm(self, vm: VmName) -> int:
        return len(self._of_vm.get(vm, ()))

    def next_due(self) -> float | None:
        return self._deadlines.next_due()

    def take_due(self, now: float) -> list[Entry]:
        """Remove and return what nobody has answered in time."""
        due = [self.take(number) for number in self._deadlines.take_due(now)]
        return [entry for entry in due if entry is not None]
