# SPDX-License-Identifier: Apache-2.0
"""Event streams of the blocking client, over a real PUB socket that drops what the tests want dropped."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vmloop.client import connect
from vmloop.client.session import Host
from vmloop.client.stream import EVENTS_LOST, Event
from vmloop.client.subscription import Events
from vmloop.common.errors import BadRequest, DeadlineExceeded, NoSuchVm
from vmloop.common.pack import unpack_map

from ..fakes.native_broker import NativeBroker, event_map, partial

SOON = 10.0


@pytest.fixture
def kept() -> list[dict[str, Any]]:
    """What the worker keeps; the tests append."""
    return [event_map("web1", 1, seq) for seq in range(1, 4)]


@pytest.fixture
def broker(tmp_path: Path, kept: list[dict[str, Any]]) -> Iterator[NativeBroker]:
    with NativeBroker(tmp_path) as broker:
        broker.serve_events("web1", kept)
        yield broker


@pytest.fixture
def host(broker: NativeBroker) -> Iterator[Host]:
    with connect(broker.endpoint, timeout=SOON) as host:
        yield host


def take(events: Events, count: int) -> list[Event]:
    taken = [events.get(SOON) for _ in range(count)]
    return [event for event in taken if event is not None]


def seqs(events: Events, count: int) -> list[int]:
    return [event.seq for event in take(events, count)]


def test_from_now_on(host: Host, broker: NativeBroker, kept: list[dict[str, Any]]) -> None:
    with host.vm("web1").events() as events:
        kept.append(event_map("web1", 1, 4, "RESUME"))
        broker.publish(kept[-1])
        (event,) = take(events, 1)
        assert (event.vm, event.seq, event.event) == ("web1", 4, "RESUME")


def test_from_a_cursor_without_a_gap_or_a_repetition(
    host: Host, broker: NativeBroker, kept: list[dict[str, Any]]
) -> None:
    with host.vm("web1").events(since="1.1") as events:
        assert seqs(events, 2) == [2, 3]
        kept.append(event_map("web1", 1, 4))
        for event in kept:
            broker.publish(event)
        broker.publish(event_map("web1", 1, 5))
        assert seqs(events, 2) == [4, 5]


def test_what_pub_dropped_is_fetched(host: Host, broker: NativeBroker, kept: list[dict[str, Any]]) -> None:
    with host.events("web1") as events:
        kept += [event_map("web1", 1, seq) for seq in range(4, 8)]
        broker.publish(kept[-1])
        assert seqs(events, 4) == [4, 5, 6, 7]


def test_the_last_event_is_not_lost_when_pub_dropped_it(host: Host, kept: list[dict[str, Any]]) -> None:
    with host.events("web1") as events:
        kept.append(event_map("web1", 1, 4))  # never published
        assert seqs(events, 1) == [4]


def test_what_nobody_has_is_said(host: Host, broker: NativeBroker, kept: list[dict[str, Any]]) -> None:
    with host.events("web1") as events:
        kept[:] = [event_map("web1", 1, 9)]
        broker.publish(kept[-1])
        lost, event = take(events, 2)
        assert (lost.event, lost.vm, lost.data) == (EVENTS_LOST, "web1", {"after": "1.3", "last": "1.8", "count": 5})
        assert event.seq == 9


def test_without_follow_the_stream_ends(host: Host) -> None:
    assert [event.seq for event in host.events("web1", follow=False)] == [1, 2, 3]
    assert [event.seq for event in host.events(follow=False)] == [1, 2, 3]
    assert [event.seq for event in host.events("web1", since="1.2", follow=False)] == [3]


def test_malformed_messages_do_no_harm(host: Host, broker: NativeBroker) -> None:
    with host.events() as events:
        for body in (b"", b"\xc1\xc1", b"\x01"):
            broker.publish(body)
        broker.publish(event_map("web1", 1, 4))
        assert seqs(events, 1) == [4]


def test_get_and_wait_for_have_deadlines(host: Host, broker: NativeBroker) -> None:
    with host.events("web1") as events:
        assert events.get(0.01) is None
        with pytest.raises(DeadlineExceeded):
            events.wait_for("STOP", 0.01)
        broker.publish(event_map("web1", 1, 4, "RESUME"))
        broker.publish(event_map("web1", 1, 5, "STOP"))
        assert events.wait_for("STOP", SOON).seq == 5


def test_a_stream_survives_a_restart_of_the_broker(tmp_path: Path, kept: list[dict[str, Any]]) -> None:
    first = NativeBroker(tmp_path)
    first.serve_events("web1", kept)
    with connect(first.endpoint, timeout=SOON) as host, host.events("web1") as events:
        first.stop()
        with NativeBroker(tmp_path) as second:
            second.serve_events("web1", kept)
            kept.append(event_map("web1", 1, 4))  # while nobody was subscribed
            assert seqs(events, 1) == [4]


def test_a_page_cut_off_by_a_lost_broker_is_asked_for_again(tmp_path: Path, kept: list[dict[str, Any]]) -> None:
    first = NativeBroker(tmp_path)
    first.serve_events("web1", kept)
    first.answer("vm/web1", "events", lambda request: [partial(request, kept[0])])
    with (
        connect(first.endpoint, timeout=SOON) as host,
        host.events("web1", since="1.0") as events,
        ThreadPoolExecutor(1) as pool,
    ):
        taking = pool.submit(seqs, events, 3)
        while first.requests.get(timeout=SOON).op != "events":
            pass
        first.stop()
        with NativeBroker(tmp_path) as second:
            second.serve_events("web1", kept)
            assert taking.result(SOON) == [1, 2, 3]


def test_a_vm_that_does_not_exist(host: Host, broker: NativeBroker) -> None:
    for op in ("stats", "list"):
        broker.refuse("vmloop", op, NoSuchVm("no such"))
    broker.refuse("vm/nosuch", "events", NoSuchVm("no such"))
    with pytest.raises(NoSuchVm):
        list(host.events("nosuch", follow=False))
    with host.events("nosuch") as events:  # it may be made later
        broker.publish(event_map("nosuch", 1, 1))
        assert seqs(events, 1) == [1]


def test_a_failed_subscription_leaves_nothing_open(host: Host, broker: NativeBroker) -> None:
    broker.answer_with("vmloop", "list", "nonsense")
    with pytest.raises(Exception, match="does not fit"):
        host.events()
    with pytest.raises(BadRequest):
        host.events("a", "b", since="1.1")


def test_closing_the_host_ends_a_stream_that_another_thread_waits_in(broker: NativeBroker) -> None:
    host = connect(broker.endpoint, timeout=SOON)
    events = host.events("web1")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(list, events)
        broker.publish(event_map("web1", 1, 4))
        host.close()
        assert [event.seq for event in waiting.result(SOON)] in ([], [4])


def test_the_events_op_is_asked_as_operations_md_says(host: Host, broker: NativeBroker) -> None:
    list(host.events("web1", since="1.2", follow=False))
    request = next(request for request in broker.seen if request.op == "events")
    assert unpack_map(request.body) == {"since": "1.2", "limit": 500}
    assert request.reading
