# SPDX-License-Identifier: Apache-2.0
"""A QMP session against a peer in the test's hands: negotiation, ids, windows, deadlines, garbage, descriptors, and every way to end.

What a new worker makes of a session that was cut short is in test_worker_successor.py.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vmloop.common.errors import DeadlineExceeded, MonitorLost, QmpError
from vmloop.common.settings import WorkerSettings
from vmloop.common.states import MonitorState
from vmloop.worker.qmp.commands import MAX_COMMAND_BYTES
from vmloop.worker.qmp.session import IN_BAND_WINDOW, MAX_WAITING, OOB_WINDOW

from ..fakes.qmp_peer import QmpPeer
from ..fakes.session_bench import Life, SessionBench

IMPATIENT = msgspec.structs.replace(WorkerSettings(), probe_after=0.05, frozen_after=0.05)


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
        for error in (None, 5, [], {"class": None}, {"desc": {"a": 1}}):
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


# -- deadlines ------------------------------------------------------------------------------------------------------------


def test_a_deadline_ends_the_wait_of_a_sent_command_and_its_late_reply_is_told_to_the_vm(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        outcome = life.submit("stop", deadline=life.loop.time(), request=9)
        request = await peer.request()
        await life.told(outcome)
        assert outcome.code == "deadline"
        assert "COMMAND_LATE" in str(outcome.error)
        assert (life.session.in_flight, life.vm.late) == (1, [])
        peer.answer(request, {"done": True})
        await life.until(lambda: len(life.vm.late) == 1)
        assert life.vm.late == [("stop", 9, {"return": {"done": True}, "id": request["id"]})]
        assert (life.session.in_flight, outcome.told) == (0, 1)

    bench.run(live)
    assert bench.owed() == []


def test_a_command_whose_deadline_passes_in_line_is_never_sent(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        sent = [life.submit("stop") for _ in range(IN_BAND_WINDOW)]
        doomed = life.submit("doomed", deadline=life.loop.time())
        after = life.submit("after")
        await life.told(doomed)
        assert doomed.code == "deadline"
        assert "not sent" in str(doomed.error)
        requests = await peer.requests(IN_BAND_WINDOW)
        for request in requests:
            peer.answer(request)
        last = await peer.request()
        assert last["execute"] == "after"
        peer.answer(last)
        await life.told(*sent, after)
        assert life.session.queued == 0

    bench.run(live)


def test_deadlines_end_each_wait_for_itself(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        now = life.loop.time()
        later, soon = life.submit("later", deadline=now + 0.2), life.submit("soon", deadline=now + 0.05)
        await life.told(soon)
        assert later.told == 0
        await life.told(later)
        assert (soon.code, later.code) == ("deadline", "deadline")
        assert life.loop.time() >= now + 0.2

    bench.run(live)


def test_who_is_told_of_a_deadline_may_close_the_session(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        failures: list[object] = []
        life.loop.set_exception_handler(lambda _, context: failures.append(context))
        await life.negotiate(peer)
        now = life.loop.time()
        life.session.submit("a", None, done=lambda *_: life.session.close("enough"), deadline=now, reading=True)
        other = life.submit("b", deadline=now)
        await life.told(other)
        assert failures == []

    bench.run(live)


# -- descriptors ----------------------------------------------------------------------------------------------------------


def a_pipe() -> tuple[int, int]:
    return os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)


def is_open(fd: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{fd}")


def test_descriptors_go_with_their_command_and_are_closed_here(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        reading, writing = a_pipe()
        life.submit("getfd", {"fdname": "x"}, fds=(writing,))
        assert not is_open(writing)
        assert (await peer.request())["execute"] == "getfd"
        os.write(peer.fds[0], b"through")
        assert os.read(reading, 10) == b"through"
        os.close(reading)

    bench.run(live)


def test_descriptors_of_a_command_that_is_not_sent_are_closed(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        pipes = [a_pipe() for _ in range(5)]
        refused = life.submit("getfd", {"x": object()}, fds=pipes[0])
        too_large = life.submit("getfd", {"x": "x" * MAX_COMMAND_BYTES}, fds=pipes[1])
        for _ in range(IN_BAND_WINDOW):
            life.submit("stop")
        doomed = life.submit("getfd", deadline=life.loop.time(), fds=pipes[2])
        await life.told(doomed)
        waiting = life.submit("getfd", fds=pipes[3])
        assert [is_open(fd) for fd in pipes[3]] == [True, True]
        life.session.close("over")
        closed = life.submit("getfd", fds=pipes[4])
        codes = [outcome.code for outcome in (refused, too_large, doomed, waiting, closed)]
        assert codes == ["bad-request", "too-large", "deadline", "not-running", "monitor-lost"]
        assert not any(is_open(fd) for pair in pipes for fd in pair)
        assert peer.fds == []

    bench.run(live)


# -- busy and frozen ------------------------------------------------------------------------------------------------------


def test_a_frozen_monitor_refuses_new_commands_at_once_unless_asked_to_wait(tmp_path: Path) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer, "oob")
        first = life.submit("stop")
        stop, question = await peer.requests(2)
        assert question["exec-oob"] == "query-yank"
        await life.until(lambda: life.vm.states[-1] is MonitorState.FROZEN)
        assert life.submit("cont").code == "monitor-frozen"
        patient = life.submit("cont", wait_frozen=True)
        cont = await peer.request()
        assert first.told == patient.told == 0
        for request in (question, stop, cont):
            peer.answer(request)
        await life.told(first, patient)
        assert life.vm.states[-1] is MonitorState.READY
        assert life.submit("cont").told == 0

    with SessionBench(tmp_path, IMPATIENT) as bench:
        bench.run(live)


def test_a_busy_monitor_takes_new_commands(tmp_path: Path) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer, "oob")
        life.submit("migrate")
        await peer.request()
        peer.answer(await peer.request())
        await life.until(lambda: life.vm.states[-1] is MonitorState.BUSY)
        assert life.submit("query-migrate").told == 0

    with SessionBench(tmp_path, IMPATIENT) as bench:
        bench.run(live)


def test_questions_that_are_never_answered_do_not_fill_the_ledger(tmp_path: Path) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer, "oob")
        for _ in range(4):
            outcome = life.submit("stop", wait_frozen=True)
            stop = await peer.request()
            question = await peer.request()
            assert question["exec-oob"] == "query-yank"
            peer.answer(stop)
            await life.told(outcome)
        assert len(bench.owed()) == 1

    with SessionBench(tmp_path, IMPATIENT) as bench:
        bench.run(live)


# -- the end --------------------------------------------------------------------------------------------------------------


def test_a_close_tells_everybody_what_is_known_of_their_command(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        looking = life.submit("query-status", reading=True)
        changing = life.submit("stop", reading=False)
        late = life.submit("cont", deadline=life.loop.time())
        await life.told(late)
        for _ in range(IN_BAND_WINDOW - 3):
            life.submit("stop")
        never_sent = life.submit("stop")
        life.session.close("the VM was let go")
        life.session.close("again")
        assert (looking.code, changing.code, never_sent.code) == ("monitor-lost", "outcome-unknown", "not-running")
        assert late.told == 1
        for outcome in (looking, changing, never_sent):
            assert "the VM was let go" in str(outcome.error)
        assert life.submit("stop").code == "monitor-lost"
        assert life.vm.ends == []  # who closes knows

    bench.run(live)
    assert bench.owed() == []


def test_a_connection_that_ends_tells_everybody_and_the_vm_after_its_last_line(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        answered, lost = life.submit("quit"), life.submit("stop")
        request = await peer.request()
        peer.answer(request)
        peer.event("SHUTDOWN", guest=False)
        peer.hang_up()
        await life.until(lambda: len(life.vm.ends) == 1)
        assert (answered.told, answered.error) == (1, None)
        assert lost.code == "outcome-unknown"
        assert [name for name, *_ in life.vm.events] == ["SHUTDOWN"]

    bench.run(live)


def test_drain_reads_all_that_a_dead_qemu_has_left(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        lines = [b'{"event": "E%d", "data": {"pad": "%s"}}\n' % (number, b"x" * 40) for number in range(2000)]
        peer.say(b"".join(lines))  # more than one turn takes
        peer.hang_up()
        life.session.drain()
        assert [name for name, *_ in life.vm.events] == [f"E{number}" for number in range(2000)]
        assert len(life.vm.ends) == 1

    bench.run(live)


def test_drain_ends_even_where_somebody_still_holds_the_other_end(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        peer.event("SHUTDOWN")
        life.session.drain()
        assert [name for name, *_ in life.vm.events] == ["SHUTDOWN"]
        assert len(life.vm.ends) == 1

    bench.run(live)


def test_a_line_over_the_limit_ends_the_session(tmp_path: Path) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        outcome = life.submit("query-block", reading=True)
        peer.say(b"x" * 150_000)
        await life.told(outcome)
        assert outcome.code == "monitor-lost"
        assert "100000 bytes" in life.vm.ends[0]

    with SessionBench(tmp_path, max_line=100_000) as bench:
        bench.run(live)


def test_a_carry_file_that_cannot_be_written_ends_the_session_with_the_reason(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        for index in (0, 1):
            bench.paths.carry(index).mkdir()
        peer.say(b'{"event": "STOP"}\n{"event": "RES')
        await life.until(lambda: len(life.vm.ends) == 1)
        assert "carry" in life.vm.ends[0]
        assert [name for name, *_ in life.vm.events] == ["STOP"]

    bench.run(live)


def test_who_is_told_of_a_reply_may_close_the_session(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        failures: list[object] = []
        life.loop.set_exception_handler(lambda _, context: failures.append(context))
        now = life.loop.time()
        life.session.submit("a", None, done=lambda *_: life.session.close("enough"), deadline=now + 5, reading=True)
        other = life.submit("b")
        request = await peer.request()
        peer.answer(request)
        await life.told(other)
        assert other.code == "outcome-unknown"
        await asyncio.sleep(0)
        assert failures == []

    bench.run(live)
