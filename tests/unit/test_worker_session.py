# SPDX-License-Identifier: Apache-2.0
"""A QMP session against a peer in the test's hands: negotiation, ids, windows, large and strange lines.

Deadlines, descriptors and the ways to end are in test_worker_session_ends.py, take-overs in test_worker_successor.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vmloop.common.errors import DeadlineExceeded, MonitorLost, QmpError
from vmloop.common.states import MonitorState
from vmloop.worker.qmp.session import IN_BAND_WINDOW, MAX_WAITING, OOB_WINDOW

from ..fakes.qmp_peer import QmpPeer
from ..fakes.session_bench import Life, SessionBench


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[SessionBench]:
    with SessionBench(tmp_path) as bench:
        yield bench


# -- negotiation ----------------------------------------------------------------------------------------------------------


def test_oob_is_negotiated_where_it_is_offered(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        peer.greet("oob")
        negotiation = asyncio.create_task(life.session.negotiate(5))
        request = await peer.request()
        assert (request["execute"], request["arguments"]) == ("qmp_capabilities", {"enable": ["oob"]})
        assert life.vm.states == []
        peer.answer(request)
        await negotiation
        assert life.session.oob
        assert life.session.greeting is not None
        assert life.session.greeting.version == (7, 2, 19)
        assert life.vm.states == [MonitorState.READY]

    bench.run(live)
    assert bench.owed() == []


def test_where_it_is_not_offered_oob_commands_are_refused(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        peer.greet("future-capability")
        negotiation = asyncio.create_task(life.session.negotiate(5))
        request = await peer.request()
        assert "arguments" not in request
        peer.answer(request)
        await negotiation
        assert life.submit("query-yank", oob=True).code == "qmp-error"
        assert peer.waiting() == b""

    bench.run(live)


def test_no_greeting_is_a_deadline(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        with pytest.raises(DeadlineExceeded, match="greeting"):
            await life.session.negotiate(0.01)

    bench.run(live)


def test_an_end_before_the_greeting_is_a_lost_monitor(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        peer.hang_up()
        with pytest.raises(MonitorLost, match="closed the connection"):
            await life.session.negotiate(5)
        assert len(life.vm.ends) == 1

    bench.run(live)


def test_refused_capabilities_are_told(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        peer.greet("oob")
        negotiation = asyncio.create_task(life.session.negotiate(5))
        peer.refuse(await peer.request(), "not today")
        with pytest.raises(QmpError, match="not today"):
            await negotiation
        assert life.vm.states == []

    bench.run(live)


@pytest.mark.parametrize("content", [None, [], {}, {"version": 5, "capabilities": "oob"}, {"version": {"qemu": []}}])
def test_a_strange_greeting_is_a_greeting(bench: SessionBench, content: Any) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        peer.say({"QMP": content})
        negotiation = asyncio.create_task(life.session.negotiate(5))
        peer.answer(await peer.request())
        await negotiation
        assert life.session.greeting is not None
        assert life.session.greeting.version == (0, 0, 0)
        assert not life.session.oob

    bench.run(live)


# -- commands and their replies -------------------------------------------------------------------------------------------


def test_replies_find_their_commands_by_id(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer, "oob")
        outcomes = [life.submit(f"c{number}") for number in range(3)]
        outcomes += [life.submit(f"c{number}", oob=True) for number in range(3, 6)]
        requests = await peer.requests(6)
        assert [request.get("execute") or request["exec-oob"] for request in requests] == [f"c{n}" for n in range(6)]
        for number in (4, 0, 5, 1, 2, 3):  # QEMU keeps the order in band, and none out of it
            peer.answer(requests[number], {"of": number})
        await life.told(*outcomes)
        assert [outcome.value for outcome in outcomes] == [{"of": number} for number in range(6)]
        assert life.session.in_flight == 0

    bench.run(live)
    assert bench.owed() == []


def test_commands_whose_replies_were_passed_over_are_not_waited_for(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer, "oob")
        oob = life.submit("query-yank", oob=True)
        looking, changing = life.submit("query-name", reading=True), life.submit("stop")
        late = life.submit("cont", deadline=life.loop.time())
        await life.told(late)
        last = life.submit("query-kvm")
        requests = await peer.requests(5)
        peer.say(b'{"return": {"dama')
        peer.say(b"ged\n" * 3)
        peer.answer(requests[4])
        await life.told(last)
        assert (looking.code, changing.code) == ("monitor-lost", "outcome-unknown")
        assert (late.told, oob.told, life.session.in_flight) == (1, 0, 1)
        peer.answer(requests[0])
        await life.told(oob)

    bench.run(live)
    assert bench.owed() == []


def test_arguments_go_as_they_are_and_errors_come_as_they_are(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        outcome = life.submit("device_del", {"id": "grün", "nested": [1, {"a": None}]})
        request = await peer.request()
        assert request["arguments"] == {"id": "grün", "nested": [1, {"a": None}]}
        peer.refuse(request, "Device 'grün' not found", "DeviceNotFound")
        await life.told(outcome)
        assert outcome.code == "qmp-error"
        assert outcome.error is not None
        assert outcome.error.fields == {"class": "DeviceNotFound", "desc": "Device 'grün' not found"}

    bench.run(live)


def test_a_command_is_in_the_ledger_before_it_is_sent_and_until_it_is_answered(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        outcome = life.submit("stop", request=77, key=b"once")
        request = await peer.request()
        (owed,) = bench.owed()
        assert (owed.qmp_id, owed.request, owed.key, owed.reading) == (request["id"], 77, b"once", False)
        peer.answer(request)
        await life.told(outcome)
        assert bench.owed() == []

    bench.run(live)


def test_at_most_seven_in_band_are_on_the_wire_and_oob_goes_beside_them(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer, "oob")
        outcomes = [life.submit(f"c{number}") for number in range(20)]
        requests = await peer.requests(IN_BAND_WINDOW)
        assert IN_BAND_WINDOW == 7
        assert peer.waiting() == b""
        assert (life.session.in_flight, life.session.queued) == (7, 13)
        oob = [life.submit("query-yank", oob=True) for _ in range(OOB_WINDOW + 1)]
        oob_requests = await peer.requests(OOB_WINDOW)
        assert all("exec-oob" in request for request in oob_requests)
        assert peer.waiting() == b""
        peer.answer(oob_requests[0])
        last = await peer.request()
        assert "exec-oob" in last
        assert peer.waiting() == b""
        for request in [*oob_requests[1:], last]:
            peer.answer(request)
        await life.told(*oob)
        for number in range(20):
            peer.answer(requests[number], {"of": number})
            if number + IN_BAND_WINDOW < 20:
                requests.append(await peer.request())
            assert peer.waiting() == b""
        await life.told(*outcomes)
        assert [request["execute"] for request in requests] == [f"c{number}" for number in range(20)]
        assert [outcome.value["of"] for outcome in outcomes] == list(range(20))

    bench.run(live)


def test_too_many_commands_in_line_are_refused(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        outcomes = [life.submit("stop") for _ in range(MAX_WAITING)]
        assert life.submit("stop").code == "busy"
        peer.answer(await peer.request())
        await life.told(outcomes[0])
        assert life.submit("stop").told == 0

    bench.run(live)


def test_commands_larger_than_the_socket_arrive_whole_and_one_after_the_other(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer, "oob")
        big = "x" * 1_000_000
        outcomes = [life.submit(f"c{number}", {"big": big}) for number in range(3)]
        outcomes.append(life.submit("query-yank", oob=True))
        requests = await peer.requests(4)
        assert sorted(request.get("execute", "oob") for request in requests) == ["c0", "c1", "c2", "oob"]
        assert [request["execute"] for request in requests if "execute" in request] == ["c0", "c1", "c2"]
        assert all(request["arguments"] == {"big": big} for request in requests if "execute" in request)
        for request in requests:
            peer.answer(request)
        await life.told(*outcomes)

    bench.run(live)


def test_a_reply_of_megabytes_comes_whole(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        outcome = life.submit("query-block", reading=True)
        request = await peer.request()
        reply = msgspec.json.encode({"return": ["y" * 3_000_000], "id": request["id"]})
        await peer.say_much(b'{"event": "STOP"}\n' + reply + b'\r\n{"event": "RESUME"}\n')
        await life.until(lambda: len(life.vm.events) == 2)
        assert outcome.value == ["y" * 3_000_000]

    bench.run(live)


@pytest.mark.parametrize("arguments", [{"x": object()}, {"x": {1: 2, "a": object()}}, {"x": "\ud800"}])
def test_arguments_that_are_no_json_are_refused(bench: SessionBench, arguments: dict[str, Any]) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        assert life.submit("stop", arguments).code == "bad-request"
        assert peer.waiting() == b""

    bench.run(live)


def test_execute_waits_for_the_value(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        task = asyncio.create_task(life.session.execute("query-status", seconds=5))
        peer.answer(await peer.request(), {"status": "running"})
        assert await task == {"status": "running"}
        task = asyncio.create_task(life.session.execute("stop", seconds=5))
        request = await peer.request()
        task.cancel()
        await asyncio.wait([task])
        peer.answer(request)  # nobody is there any more
        peer.event("STOP")
        await life.until(lambda: len(life.vm.events) == 1)

    bench.run(live)


# -- events ---------------------------------------------------------------------------------------------------------------


def test_events_come_with_their_data_and_qemus_time(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        peer.event("BLOCK_IO_ERROR", device="disk0")
        peer.say({"event": "STOP", "timestamp": {"seconds": -1, "microseconds": -1}})
        await life.until(lambda: len(life.vm.events) == 2)
        assert life.vm.events[0] == ("BLOCK_IO_ERROR", {"device": "disk0"}, 5_000_250)
        name, data, at = life.vm.events[1]
        assert (name, data) == ("STOP", {})
        assert at > 1_600_000_000_000_000  # its clock failed: ours

    bench.run(live)


GARBAGE = {
    "no JSON": b"%%%",
    "binary": b'{"return": "\xff\xfe"}',
    "empty": b"",
    "a list": b"[1]",
    "a number": b"5",
    "deep": b"[" * 100_000,
    "neither": b'{"neither": 1}',
    "reply without id": b'{"return": {}}',
    "reply with an id nobody asked": b'{"return": {}, "id": 999999}',
    "reply with a list for an id": b'{"return": {}, "id": [1]}',
    "reply with true for an id": b'{"error": {}, "id": true}',
    "reply with a float for an id": b'{"return": {}, "id": 2.0}',
    "event without a name": b'{"event": null}',
    "event with an empty name": b'{"event": ""}',
    "event with a long name": b'{"event": "' + b"x" * 300 + b'"}',
    "event with a list for data": b'{"event": "STOP", "data": []}',
    "two replies in one line": b'{"return": {}}{"return": {}}',
}


@pytest.mark.parametrize("line", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_counted_and_disturbs_nothing(bench: SessionBench, line: bytes) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        outcome = life.submit("stop")
        request = await peer.request()
        await peer.say_much(line + b"\n")
        peer.event("STOP")
        peer.answer(request)
        await life.told(outcome)
        assert outcome.error is None
        assert life.session.garbled == 1
        assert [name for name, *_ in life.vm.events] == ["STOP"]

    bench.run(live)


def test_an_error_reply_without_any_shape_is_an_error_all_the_same(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        shapes: list[Any] = [None, 5, [], {"class": None}, {"desc": {"a": 1}}]
        for error in shapes:
            outcome = life.submit("stop")
            request = await peer.request()
            peer.say({"error": error, "id": request["id"]})
            await life.told(outcome)
            assert outcome.code == "qmp-error"

    bench.run(live)


def test_a_reply_that_comes_twice_is_told_once(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        outcome = life.submit("stop")
        request = await peer.request()
        peer.answer(request, 1)
        peer.answer(request, 2)
        peer.event("STOP")
        await life.until(lambda: len(life.vm.events) == 1)
        assert (outcome.told, outcome.value) == (1, 1)
        assert life.session.garbled == 1

    bench.run(live)
