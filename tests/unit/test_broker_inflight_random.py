# SPDX-License-Identifier: Apache-2.0
"""The table of requests in flight against a list of them: who has how many, what is kept, what is due, in any order of what happens."""

from __future__ import annotations

import contextlib

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vmloop.broker.inflight import MAX_HELD_BYTES, MAX_KEPT_OF_VM_BYTES, MAX_REPEATABLE_BYTES, Entry, InFlight
from vmloop.common.deadlines import SLICE
from vmloop.common.errors import Busy
from vmloop.common.names import VmName

PER_CLIENT, PER_VM = 3, 4
ROUNDING = 1e-6
VMS = [VmName("web1"), VmName("web2"), None]
SIZES = [0, 1, MAX_REPEATABLE_BYTES, MAX_REPEATABLE_BYTES + 1, MAX_HELD_BYTES // 2, MAX_HELD_BYTES]
FRAMES = {size: bytes(size) for size in SIZES}


class Model(RuleBasedStateMachine):
    """Requests that come, are kept, sent, answered and overdue, beside a dict of them."""

    @initialize()
    def begin(self) -> None:
        self.now = 1000.0
        self.subject = InFlight(500, PER_CLIENT, PER_VM)
        self.entries: dict[int, Entry] = {}
        self.due: dict[int, float] = {}
        self.last = 500

    @rule(
        client=st.sampled_from([b"", b"a", b"b"]),
        vm=st.sampled_from(VMS),
        ahead=st.floats(0, 5),
        reading=st.booleans(),
        spawns=st.booleans(),
        size=st.sampled_from([None, *SIZES]),
    )
    def ask(
        self, client: bytes, vm: VmName | None, ahead: float, reading: bool, spawns: bool, size: int | None
    ) -> None:
        of_client = sum(entry.client == client for entry in self.entries.values())
        of_vm = sum(entry.vm == vm for entry in self.entries.values())
        full = (client != b"" and of_client >= PER_CLIENT) or (vm is not None and of_vm >= PER_VM)
        try:
            self.subject.require_room(client, vm)
        except Busy:
            assert full
            return
        assert not full
        number = self.subject.next_number()
        assert number > self.last, "a number was used again"
        self.last = number
        entry = Entry(number, client, 7, None, vm, "qmp", reading, self.now, spawns=spawns)
        self.subject.add(entry, self.now + ahead)
        self.entries[number] = entry
        self.due[number] = self.now + ahead
        if size is not None:
            self.hold(entry, size)

    def hold(self, entry: Entry, size: int) -> None:
        room = MAX_HELD_BYTES - self.held()
        try:
            self.subject.hold_frame(entry, FRAMES[size])
        except Busy:
            assert entry.client
            assert size > room
            assert entry.frame == b""
        else:
            assert size <= room or not entry.client
            assert len(entry.frame) == size

    def held(self) -> int:
        return sum(len(entry.frame) for entry in self.entries.values() if entry.held)

    def kept(self, vm: VmName | None) -> int:
        return sum(len(entry.frame) for entry in self.entries.values() if entry.vm == vm and not entry.held)

    @rule(choice=st.integers(0, 100))
    def send(self, choice: int) -> None:
        if waiting := [entry for entry in self.entries.values() if entry.sent_to is None]:
            entry = waiting[choice % len(waiting)]
            before, of_vm = len(entry.frame), self.kept(entry.vm)
            self.subject.sent(entry, b"worker")
            room = of_vm + before <= MAX_KEPT_OF_VM_BYTES or not entry.client
            keeps = entry.spawns or (before <= MAX_REPEATABLE_BYTES and room)
            assert len(entry.frame) == (before if keeps else 0)
            assert not before or entry.held == entry.spawns

    @rule(choice=st.integers(0, 100))
    def answer(self, choice: int) -> None:
        if self.entries:
            number = list(self.entries)[choice % len(self.entries)]
            assert self.subject.take(number) is self.entries[number]
            self.forget(number)

    def forget(self, number: int) -> None:
        entry = self.entries.pop(number)
        del self.due[number]
        assert entry.frame == b""
        assert self.subject.take(number) is None
        assert self.subject.get(number) is None

    @rule(ahead=st.floats(0, 3))
    def time_passes(self, ahead: float) -> None:
        self.now += ahead
        overdue = self.subject.take_due(self.now)
        for entry in overdue:
            assert self.due[entry.number] <= self.now + ROUNDING
            self.forget(entry.number)
        assert all(due > self.now - SLICE - ROUNDING for due in self.due.values())

    @invariant()
    def it_holds_what_it_was_given(self) -> None:
        assert [entry.number for entry in self.subject] == list(self.entries)
        assert len(self.subject) == len(self.entries)
        for vm in VMS:
            if vm is not None:
                mine = [entry for entry in self.entries.values() if entry.vm == vm]
                assert self.subject.of_vm(vm) == mine
                assert self.subject.count_of_vm(vm) == len(mine)
                oldest = next((entry for entry in mine if entry.sent_to is not None), None)
                assert self.subject.oldest_of_vm(vm) is oldest
        assert (self.subject.next_due() is None) == (not self.entries)

    @invariant()
    def there_is_room_for_just_what_is_left(self) -> None:
        """Told through the table's own words: one byte over what is left is refused, unless the broker's own requests took more."""
        left = MAX_HELD_BYTES - self.held()
        probe = Entry(0, b"probe", 0, None, None, "", False, self.now)
        with contextlib.suppress(Busy):
            self.subject.hold_frame(probe, _Long(left + 1))
            raise AssertionError("more was kept than there is room for")
        if left >= 0:
            self.subject.hold_frame(probe, _Long(left))
            self.subject.release_frame(probe)


class _Long(bytes):
    """Says that it is long, and takes no memory."""

    def __new__(cls, _: int) -> _Long:
        return super().__new__(cls)

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return max(0, self.length)


TestInFlight = Model.TestCase
TestInFlight.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
