# SPDX-License-Identifier: Apache-2.0
"""`vmloop events` of several VMs: by time, and each VM's own in their order whatever its clock did."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmloop.client.cli.event_stream import merged
from vmloop.client.stream import Event

times = st.lists(st.integers(0, 1 << 40), max_size=20)


def events_of(vm: str, at: list[int]) -> list[Event]:
    return [Event(vm=vm, epoch=1, seq=number, time=time, event="X") for number, time in enumerate(at, 1)]


@given(times, times)
def test_each_vms_own_order_holds_whatever_its_clock_did(one: list[int], two: list[int]) -> None:
    result = merged([*events_of("one", one), *events_of("two", two)])
    for vm, count in (("one", len(one)), ("two", len(two))):
        assert [event.seq for event in result if event.vm == vm] == list(range(1, count + 1))


@given(times, times)
def test_with_clocks_that_go_forward_all_are_in_the_order_of_time(one: list[int], two: list[int]) -> None:
    result = merged([*events_of("one", sorted(one)), *events_of("two", sorted(two))])
    assert [event.time for event in result] == sorted([*one, *two])
