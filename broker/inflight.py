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
# A request up to this size is kept while a worker has it, to be given to the next one if that one dies.
MAX_REPEATABLE_BYTES: Final = 64 * 1024
# Of one VM: a frozen one, whose requests all wait, takes no room from the others. Beyond it the next worker is asked about a request only.
MAX_KEPT_OF_VM_BYTES: Final = 4 * 1024 * 1024
# Of all VMs; the same beyond it.
MAX_KEPT_BYTES: Final = 64 * 1024 * 1024


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
    held: bool = False  # the frame waits for a worker; else it is only kept to be repeated
    sent_to: bytes | None = None
    given: bool = (
        False  # a worker had it, and the one it was sent to is a later one: it is never again as if nobody had had it
    )
    spawns: bool = False  # an operation that may need a worker to be made for it
    waits_for: str | None = None  # state that `wait` waits for
    again: bool = False  # its client sends it again, with its key: whatever the VM is at, its worker knows what became of the first
    cancelled: bool = False  # its client is gone, and every worker that has it hears of that


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
        self._kept_bytes = 0
        self._kept_of_vm: dict[VmName | None, int] = {}

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
        """Hold a request's frame until there is a worker for it. Raises `Busy` if too much is held already."""
        if entry.client and self._held_bytes + len(frame) > MAX_HELD_BYTES:  # b"": the broker's own, few and small
            raise Busy("too many requests wait for workers to come up; try again later")
        entry.frame, entry.held = frame, True
        self._held_bytes += len(frame)

    def keep_frame(self, entry: Entry, frame: bytes) -> bool:
        """Keep the frame of a request that a worker is given, for the next one; False if it is long, or too much is kept already.

        A `kill` always is: it may only be carried out by the next worker. So are the broker's own, which are few.
        """
        size, of_vm = len(frame), self._kept_of_vm.get(entry.vm, 0)
        full = of_vm + size > MAX_KEPT_OF_VM_BYTES or self._kept_bytes + size > MAX_KEPT_BYTES
        if not 0 < size <= MAX_REPEATABLE_BYTES or (full and entry.client and entry.op != "kill"):
            return False
        entry.frame = frame
        self._kept_bytes += size
        self._kept_of_vm[entry.vm] = of_vm + size
        return True

    def release_frame(self, entry: Entry) -> None:
        """The frame need not be kept any more."""
        size = len(entry.frame)
        if entry.held:
            self._held_bytes -= size
        elif size:
            self._kept_bytes -= size
            left = self._kept_of_vm.pop(entry.vm) - size
            if left:
                self._kept_of_vm[entry.vm] = left
        entry.frame, entry.held = b"", False

    def sent(self, entry: Entry, identity: bytes) -> None:
        """A request has gone to a worker; its frame stays as long as there is room for it, that of an operation that spawns always."""
        entry.sent_to = identity
        if entry.held and not entry.spawns:
            frame = entry.frame
            self.release_frame(entry)
            self.keep_frame(entry, frame)

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
