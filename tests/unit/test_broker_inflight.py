# SPDX-License-Identifier: Apache-2.0
"""The table of what is in flight: numbers, limits, kept frames and deadlines, and nothing left of what is answered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.broker.inflight import (
    MAX_HELD_BYTES,
    MAX_KEPT_BYTES,
    MAX_KEPT_OF_VM_BYTES,
    MAX_REPEATABLE_BYTES,
    Entry,
    InFlight,
)
from vmloop.common.deadlines import SLICE
from vmloop.common.errors import Busy
from vmloop.common.names import VmName

WEB1 = VmName("web1")
WEB2 = VmName("web2")


def put(
    table: InFlight,
    client: bytes = b"c",
    vm: VmName | None = WEB1,
    *,
    due: float = 10.0,
    reading: bool = False,
    spawns: bool = False,
) -> Entry:
    """A request, entered as the core does it."""
    table.require_room(client, vm)
    entry = Entry(table.next_number(), client, 1, None, vm, "qmp", reading, 0.0, spawns=spawns)
    table.add(entry, due)
    return entry


def table(per_client: int = 100, per_vm: int = 100) -> InFlight:
    return InFlight(5000, per_client, per_vm)


def test_numbers_rise_from_the_first_and_never_come_again() -> None:
    subject = table()
    numbers = [put(subject).number for _ in range(5)]
    for number in numbers:
        subject.take(number)
    numbers += [put(subject).number for _ in range(5)]
    assert numbers == sorted(set(numbers))
    assert numbers[0] > 5000


def test_what_is_taken_is_there_no_more() -> None:
    subject = table()
    entry = put(subject)
    assert subject.get(entry.number) is entry
    assert subject.take(entry.number) is entry
    assert subject.take(entry.number) is None
    assert subject.get(entry.number) is None
    assert (len(subject), list(subject), subject.of_vm(WEB1), subject.next_due()) == (0, [], [], None)


def test_a_vms_requests_come_in_the_order_they_came() -> None:
    subject = table()
    first, other, second, third = put(subject), put(subject, vm=WEB2), put(subject), put(subject)
    subject.take(second.number)
    assert subject.of_vm(WEB1) == [first, third]
    assert (subject.count_of_vm(WEB1), subject.count_of_vm(WEB2), subject.count_of_vm(VmName("x"))) == (2, 1, 0)
    assert list(subject) == [first, other, third]


def test_requests_may_be_taken_while_going_through_them() -> None:
    subject = table()
    for _ in range(5):
        put(subject)
    for entry in subject:
        subject.take(entry.number)
    for entry in subject.of_vm(WEB1):
        subject.take(entry.number)
    assert len(subject) == 0


def test_a_client_and_a_vm_have_each_their_limit() -> None:
    subject = table(per_client=2, per_vm=3)
    for client in (b"a", b"a", b"b"):
        put(subject, client)
    with pytest.raises(Busy, match="this client has 2 requests"):
        subject.require_room(b"a", WEB2)
    with pytest.raises(Busy, match="VM web1 has 3 requests"):
        subject.require_room(b"b", WEB1)
    subject.require_room(b"b", WEB2)
    subject.require_room(b"b", None)


def test_an_answer_makes_room_for_client_and_vm() -> None:
    subject = table(per_client=1, per_vm=1)
    entry = put(subject)
    subject.take(entry.number)
    put(subject)


def test_the_brokers_own_requests_have_no_client_that_could_be_full() -> None:
    subject = table(per_client=1)
    put(subject, b"")
    put(subject, b"", WEB2)
    assert len(subject) == 2


def test_what_is_kept_is_bounded_and_let_go_with_its_request() -> None:
    subject = table()
    first, second = put(subject), put(subject)
    subject.hold_frame(first, bytes(MAX_HELD_BYTES))
    with pytest.raises(Busy, match="try again later"):
        subject.hold_frame(second, b"x")
    assert second.frame == b""
    subject.take(first.number)
    subject.hold_frame(second, bytes(MAX_HELD_BYTES))


def test_the_brokers_own_requests_are_kept_even_then() -> None:
    subject = table()
    subject.hold_frame(put(subject), bytes(MAX_HELD_BYTES))
    own = put(subject, b"")
    subject.hold_frame(own, b"kill")
    assert own.frame == b"kill"


@pytest.mark.parametrize(
    ("reading", "spawns", "size", "kept"),
    [
        (True, False, MAX_REPEATABLE_BYTES, True),
        (True, False, MAX_REPEATABLE_BYTES + 1, False),
        (False, False, MAX_REPEATABLE_BYTES, True),
        (False, False, MAX_REPEATABLE_BYTES + 1, False),
        (False, True, MAX_REPEATABLE_BYTES + 1, True),
    ],
)
def test_a_sent_frame_is_kept_for_the_next_worker_unless_it_is_long(
    reading: bool, spawns: bool, size: int, kept: bool
) -> None:
    subject = table()
    entry = put(subject, reading=reading, spawns=spawns)
    subject.hold_frame(entry, bytes(size))
    subject.sent(entry, b"worker")
    assert entry.sent_to == b"worker"
    assert len(entry.frame) == (size if kept else 0)
    held = size if spawns else 0
    room = put(subject)
    with pytest.raises(Busy):
        subject.hold_frame(room, bytes(MAX_HELD_BYTES - held + 1))
    subject.hold_frame(room, bytes(MAX_HELD_BYTES - held))


def kept(subject: InFlight, vm: VmName, op: str = "qmp", client: bytes = b"c") -> bool:
    """Whether the frame of one more request, of the longest that are kept, is kept."""
    entry = put(subject, client, vm)
    entry.op = op
    return subject.keep_frame(entry, bytes(MAX_REPEATABLE_BYTES))


def test_each_vm_has_its_share_of_what_is_kept_for_the_next_worker_and_all_together_have_theirs() -> None:
    subject = table(per_client=10_000)
    share = MAX_KEPT_OF_VM_BYTES // MAX_REPEATABLE_BYTES
    for number in range(MAX_KEPT_BYTES // MAX_KEPT_OF_VM_BYTES):
        vm = VmName(f"vm{number}")
        assert [kept(subject, vm) for _ in range(share + 1)] == [True] * share + [False]
    assert not kept(subject, WEB1)
    assert kept(subject, VmName("vm0"), "kill"), "the next worker may be the first that can carry it out"
    assert kept(subject, WEB1, client=b"")
    for entry in subject.of_vm(VmName("vm1")):
        subject.take(entry.number)
    assert kept(subject, WEB1)
    subject.hold_frame(put(subject), bytes(MAX_HELD_BYTES))


def test_what_is_due_is_taken_out_and_the_rest_stays() -> None:
    subject = table()
    early, late = put(subject, due=1.0), put(subject, due=5.0)
    due = subject.next_due()
    assert due is not None
    assert 1.0 <= due <= 1.0 + SLICE + 1e-6
    assert subject.take_due(0.99) == []
    assert subject.take_due(due) == [early]
    assert list(subject) == [late]
    assert subject.take(early.number) is None


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 3), st.booleans()), max_size=40))
def test_nothing_is_left_of_requests_that_are_answered(steps: list[tuple[int, int, int, bool]]) -> None:
    subject = table()
    fresh = {name: repr(value) for name, value in vars(subject).items() if name not in ("_next", "_deadlines")}
    for client, vm, due, reading in steps:
        entry = put(subject, b"%d" % client, [WEB1, WEB2, None][vm], due=float(due), reading=reading)
        subject.hold_frame(entry, b"frame")
        if due == 0:
            subject.take(entry.number)
        elif due == 1:
            subject.sent(entry, b"w")
    subject.take_due(2.5)
    for entry in subject:
        subject.take(entry.number)
    assert {name: repr(vars(subject)[name]) for name in fresh} == fresh
    assert subject.next_due() is None
