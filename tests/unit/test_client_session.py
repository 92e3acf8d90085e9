# SPDX-License-Identifier: Apache-2.0
"""The blocking client against a scripted broker on real sockets."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vmloop.client import connect, requests
from vmloop.client.calls import Answer
from vmloop.client.session import Host
from vmloop.common.cursor import Cursor
from vmloop.common.errors import (
    BadRequest,
    ConfigError,
    DeadlineExceeded,
    Internal,
    NoBroker,
    NoSuchVm,
    OutcomeUnknown,
    TooLarge,
)
from vmloop.common.pack import MAX_MESSAGE_BYTES, unpack_map
from vmloop.common.paths import paths_under
from vmloop.common.wire import FLAG_READING, Kind, Message, encode

from ..fakes.native_broker import NativeBroker, partial, refusal, reply

SOON = 10.0  # seconds; for what must happen, and does at once


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[NativeBroker]:
    with NativeBroker(tmp_path) as broker:
        yield broker


@pytest.fixture
def host(broker: NativeBroker) -> Iterator[Host]:
    with connect(broker.endpoint, timeout=SOON) as host:
        yield host


# -- connecting -----------------------------------------------------------------------------------------------------------


def test_without_a_broker_connect_fails_at_once_and_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NoBroker, match=r"run/client.sock .*vmloop broker"):
        connect(root=tmp_path)


def test_a_socket_left_by_a_dead_broker_is_no_broker(tmp_path: Path) -> None:
    with NativeBroker(tmp_path) as broker:
        pass
    if not broker.client_socket.exists():
        broker.client_socket.touch()
    with pytest.raises(NoBroker):
        connect(broker.endpoint)


def test_connect_waits_for_a_broker_that_is_starting(tmp_path: Path) -> None:
    with pytest.raises(NoBroker):
        connect(f"ipc://{tmp_path}/client.sock", wait=0.05)
    with ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(connect, f"ipc://{tmp_path}/client.sock", wait=SOON)
        with NativeBroker(tmp_path) as broker:
            broker.answer_with("vmloop", "ping", {"time": 2.5})
            with connecting.result(SOON) as host:
                assert host.ping() == 2.5


def test_the_root_leads_to_the_broker(tmp_path: Path) -> None:
    paths = paths_under(tmp_path)
    paths.create()
    with NativeBroker(paths.run) as broker, connect(root=tmp_path) as host:
        broker.answer_with("vmloop", "list", [])
        assert host.list() == []


def test_endpoints_that_cannot_be() -> None:
    for endpoint in ("tcp://127.0.0.1:1", "client.sock", "ipc://relative"):
        with pytest.raises(BadRequest):
            connect(endpoint)
    with pytest.raises(BadRequest):
        connect("ipc:///x", root="/y")
    with pytest.raises(ConfigError):
        connect("ipc:///" + "x" * 200)


def test_a_closed_host_says_so(broker: NativeBroker) -> None:
    host = connect(broker.endpoint)
    host.close()
    host.close()
    with pytest.raises(BadRequest, match="closed"):
        host.ping()


# -- requests and answers -------------------------------------------------------------------------------------------------


def test_every_operation_sends_what_operations_md_says(broker: NativeBroker, host: Host) -> None:
    started = {"name": "web1", "state": "running", "reason": "booted", "epoch": 2, "pid": 7, "later": 1}
    changed = {"state": "paused", "reason": "user"}
    entry = {"name": "web1", "state": "running", "reason": "", "epoch": 2, "seq": 5, "new_field": [1]}
    vm = host.vm("web1")
    cases = [
        ("vmloop", "version", {}, {"version": "1", "pid": 1, "started": 1.5}, host.version, True),
        ("vmloop", "list", {}, [entry], host.list, True),
        ("vmloop", "stats", {"names": ["web1"]}, [entry], lambda: host.stats("web1"), True),
        ("vmloop", "define", {"definition": {"name": "x"}}, {"name": "x"}, lambda: host.define({"name": "x"}), False),
        ("vmloop", "undefine", {"name": "web1"}, {"name": "web1"}, lambda: host.undefine("web1"), False),
        ("vmloop", "start", {"name": "web1", "paused": True}, started, lambda: host.start("web1", paused=True), False),
        ("vmloop", "start", {"name": "web1"}, started, vm.start, False),
        (
            "vmloop",
            "attach",
            {"name": "a", "qmp": "/q", "pid": 3},
            started,
            lambda: host.attach("a", "/q", pid=3),
            False,
        ),
        ("vmloop", "capabilities", {}, {"format": 1}, host.capabilities, True),
        ("vmloop", "capabilities", {"binary": "q"}, {"format": 1}, lambda: host.capabilities("q"), True),
        (
            "vmloop",
            "capabilities",
            {"binary": str(Path("b/q").absolute()), "refresh": True},
            {"format": 1},
            lambda: host.capabilities(Path("b/q"), refresh=True),
            True,
        ),
        ("vm/web1", "capabilities", {}, {"format": 1}, vm.capabilities, True),
        ("vm/web1", "capabilities", {"command": "c"}, {"format": 1}, lambda: vm.capabilities("c"), True),
        ("vmloop", "shutdown", {"vms": "leave"}, {"vms": "leave", "count": 1}, host.shutdown, False),
        ("vm/web1", "show", {}, entry, vm.show, True),
        ("vm/web1", "stop", {"timeout": 60.0, "force": False}, changed, vm.stop, False),
        ("vm/web1", "kill", {}, changed, vm.kill, False),
        ("vm/web1", "pause", {}, changed, vm.pause, False),
        ("vm/web1", "resume", {}, changed, vm.resume, False),
        ("vm/web1", "reset", {}, changed, vm.reset, False),
        ("vm/web1", "detach", {}, {"name": "web1"}, vm.detach, False),
        ("vm/web1", "wait", {"for": "paused"}, changed, lambda: vm.wait("paused", 5), True),
        ("vm/web1", "qmp", {"command": "query-status"}, {"running": True}, lambda: vm.qmp("query-status"), True),
        ("vm/web1", "qmp", {"command": "cont", "oob": True}, {}, lambda: vm.qmp("cont", oob=True), False),
        ("vm/web1", "hmp", {"line": "info status"}, "VM status: running\r\n", lambda: vm.hmp("info status"), False),
    ]
    for service, op, arguments, value, method, reading in cases:
        broker.answer_with(service, op, value)
        method()
        seen = broker.seen[-1]
        assert (seen.service, seen.op, unpack_map(seen.body)) == (service, op, arguments)
        assert seen.reading is reading, op
        assert bool(seen.key) is not reading, op


def test_answers_are_typed_and_new_fields_do_no_harm(broker: NativeBroker, host: Host) -> None:
    broker.answer_with("vmloop", "list", [{"name": "a", "state": "levitating", "epoch": 2, "seq": 5, "aura": {"x": 1}}])
    (vm,) = host.list()
    assert (vm.name, vm.state, vm.cursor, vm.pid) == ("a", "levitating", Cursor(2, 5), None)


def test_an_answer_of_the_wrong_shape_is_a_coded_error(broker: NativeBroker, host: Host) -> None:
    for value in (None, 5, [5], [{"name": 5}], {"name": "a"}):
        broker.answer_with("vmloop", "list", value)
        with pytest.raises(Internal):
            host.list()
    broker.answer_with("vmloop", "capabilities", {"format": 2})
    with pytest.raises(Internal, match="format"):
        host.capabilities()
    broker.answer_with("vmloop", "ping", {"clock": 1})
    with pytest.raises(Internal):
        host.ping()


def test_a_vm_keeps_the_cursor_of_its_last_answer(broker: NativeBroker, host: Host) -> None:
    vm = host.vm("web1")
    broker.answer_with("vm/web1", "pause", {"state": "paused", "reason": "user"}, epoch=3, seq=17)
    vm.pause()
    assert vm.last_cursor == Cursor(3, 17)
    broker.answer_with("vm/web1", "show", {"name": "web1", "state": "paused", "epoch": 3, "seq": 19}, epoch=3, seq=18)
    assert vm.cursor() == Cursor(3, 19)


def test_errors_arrive_as_their_own_type(broker: NativeBroker, host: Host) -> None:
    broker.refuse("vm/web1", "pause", NoSuchVm("there is no web1"))
    with pytest.raises(NoSuchVm, match="there is no web1"):
        host.vm("web1").pause()


def test_names_are_checked_before_anything_is_sent(broker: NativeBroker, host: Host) -> None:
    for name in ("", "../x", "a b", "x" * 65):
        with pytest.raises(BadRequest):
            host.vm(name)
    assert broker.seen == []


def test_a_request_over_the_limit_is_refused_here(broker: NativeBroker, host: Host) -> None:
    with pytest.raises(TooLarge):
        host.vm("web1").qmp("x", {"data": "0" * MAX_MESSAGE_BYTES})
    assert broker.seen == []


def test_timeouts_of_long_operations_are_longer_than_the_operation(broker: NativeBroker, host: Host) -> None:
    vm = host.vm("web1")
    broker.answer_with("vm/web1", "stop", {"state": "shutoff", "reason": "shutdown"})
    vm.stop(timeout=100)
    assert broker.seen[-1].seconds > 100
    broker.answer_with("vm/web1", "wait", {"state": "shutoff", "reason": "x"})
    vm.wait("shutoff", 77)
    assert broker.seen[-1].seconds == 77


# -- deadlines ------------------------------------------------------------------------------------------------------------


def test_a_silent_broker_is_given_up_shortly_after_the_deadline(broker: NativeBroker, host: Host) -> None:
    broker.answer("vmloop", "ping", lambda request: [])
    with pytest.raises(DeadlineExceeded):
        host.call("vmloop", "ping", timeout=0.01, reading=True)
    assert broker.requests.get(timeout=SOON).seconds == 0.01


def test_a_late_reply_is_not_taken_for_the_next_one(broker: NativeBroker, host: Host) -> None:
    broker.answer("vmloop", "ping", lambda request: [])
    with pytest.raises(DeadlineExceeded):
        host.call("vmloop", "ping", timeout=0.01, reading=True)
    late = broker.requests.get(timeout=SOON)
    broker.answer("vmloop", "ping", lambda request: [reply(late, {"time": 1.0}), reply(request, {"time": 2.0})])
    assert host.ping() == 2.0


# -- malformed answers ----------------------------------------------------------------------------------------------------


def test_malformed_answers_never_harm_the_next_request(broker: NativeBroker, host: Host) -> None:
    def spoilt(request: Message) -> list[Message | bytes]:
        good = encode(reply(request, {"time": 1.0}))
        return [b"", b"rubbish", b"VML1" + bytes(10), good[:4] + b"\x63" + good[5:]]

    broker.answer("vmloop", "ping", spoilt)
    with pytest.raises(Internal, match="malformed"):
        host.ping()
    broker.answer("vmloop", "ping", lambda request: [b"rubbish", reply(request, {"time": 1.0})])
    assert host.ping() == 1.0


# -- answers in several parts, several requests ---------------------------------------------------------------------------


def test_streaming_yields_each_part_and_returns_the_end(broker: NativeBroker, host: Host) -> None:
    broker.answer("vm/a", "events", lambda request: [*(partial(request, n) for n in range(5)), reply(request, "end")])
    parts = host.call_streaming("vm/a", "events", reading=True)
    got = []
    while True:
        try:
            got.append(next(parts))
        except StopIteration as end:
            assert end.value == "end"
            break
    assert got == [0, 1, 2, 3, 4]


def test_a_stream_left_unread_does_not_disturb_other_requests(broker: NativeBroker, host: Host) -> None:
    broker.answer("vm/a", "events", lambda request: [*(partial(request, n) for n in range(5)), reply(request, "end")])
    broker.answer_with("vmloop", "ping", {"time": 1.0})
    parts = host.call_streaming("vm/a", "events", reading=True)
    assert next(parts) == 0
    assert host.ping() == 1.0  # while the stream is open
    parts.close()
    assert host.ping() == 1.0  # and on its lane, which has its other parts in the way


def test_an_error_in_the_middle_of_a_stream_is_raised_after_its_parts(broker: NativeBroker, host: Host) -> None:
    broker.answer("vm/a", "events", lambda request: [partial(request, 1), refusal(request, NoSuchVm("gone"))])
    parts = host.call_streaming("vm/a", "events", reading=True)
    assert next(parts) == 1
    with pytest.raises(NoSuchVm):
        next(parts)


def test_many_requests_are_in_flight_at_once_from_one_thread(broker: NativeBroker, host: Host) -> None:
    waiting: list[Message] = []

    def answer_in_fours(request: Message) -> list[Message]:
        waiting.append(request)
        if len(waiting) < 4:
            return []
        answers = [reply(request, request.op) for request in reversed(waiting)]
        waiting.clear()
        return answers

    broker.answer("vmloop", "ping", answer_in_fours)
    broker.refuse("vmloop", "stats", NoSuchVm("x"))
    many = [requests.ping()] * 8 + [requests.stats(("x",))]
    ended = dict(host.call_many(many, in_flight=4))
    assert sorted(ended) == list(range(9))
    assert all(isinstance(ended[place], Answer) for place in range(8))
    assert isinstance(ended[8], NoSuchVm)


def test_threads_do_not_wait_for_each_other(broker: NativeBroker, host: Host) -> None:
    broker.answer("vm/slow", "qmp", lambda request: [])
    broker.answer("vm/fast", "qmp", lambda request: [reply(request, request.service)])
    with ThreadPoolExecutor(8) as pool:
        slow = pool.submit(host.vm("slow").qmp, "query-x")
        while broker.requests.get(timeout=SOON).service != "vm/slow":
            pass
        fast = [pool.submit(host.vm("fast").qmp, "query-x") for _ in range(200)]
        assert {future.result(SOON) for future in fast} == {"vm/fast"}
        assert not slow.done()
        stuck = next(message for message in broker.seen if message.service == "vm/slow")
        parked = next(place for place, message in enumerate(broker.seen) if message is stuck)
        broker.send_to(parked, reply(stuck, "at last"))
        assert slow.result(SOON) == "at last"


def test_close_lets_another_thread_have_its_answer(broker: NativeBroker) -> None:
    host = connect(broker.endpoint, timeout=SOON)
    broker.answer("vmloop", "ping", lambda request: [])
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(host.ping)
        request = broker.requests.get(timeout=SOON)
        host.close()
        broker.send_to(0, reply(request, {"time": 4.0}))
        assert asking.result(SOON) == 4.0


# -- a broker that goes away ----------------------------------------------------------------------------------------------


def restart(broker: NativeBroker, directory: Path) -> NativeBroker:
    broker.stop()
    return NativeBroker(directory)


def test_reading_and_keyed_requests_survive_a_restart_of_the_broker(tmp_path: Path) -> None:
    first = NativeBroker(tmp_path)
    first.answer("vm/web1", "qmp", lambda request: [])
    with connect(first.endpoint, timeout=SOON) as host, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(host.vm("web1").qmp, command) for command in ("query-status", "cont")]
        before = [first.requests.get(timeout=SOON) for _ in asked]
        first.stop()
        with NativeBroker(tmp_path) as second:
            second.answer("vm/web1", "qmp", lambda request: [reply(request, unpack_map(request.body)["command"])])
            assert [future.result(SOON) for future in asked] == ["query-status", "cont"]
        # Sent again: the same keys, so that the worker answers once; no second random one.
        assert {message.key for message in second.seen} == {message.key for message in before}
        assert all(message.seconds <= SOON for message in second.seen)


def test_a_request_without_a_key_ends_as_outcome_unknown(tmp_path: Path) -> None:
    first = NativeBroker(tmp_path)
    first.answer("vm/web1", "qmp", lambda request: [])
    with connect(first.endpoint, timeout=SOON) as host, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(host.call, "vm/web1", "qmp", {"command": "cont"}, key=b"")
        first.requests.get(timeout=SOON)
        first.stop()
        with pytest.raises(OutcomeUnknown):
            asked.result(SOON)
        # With a new broker the next request without a key is not ended by the old loss.
        with NativeBroker(tmp_path) as second:
            second.answer_with("vm/web1", "qmp", "done")
            assert host.call("vm/web1", "qmp", {"command": "cont"}, key=b"") == "done"
            assert len(second.seen) == 1


def test_many_requests_without_keys_end_one_by_one_when_the_broker_is_lost(tmp_path: Path) -> None:
    first = NativeBroker(tmp_path)
    first.answer("vm/web1", "pause", lambda request: [])
    many = [requests.Request("vm/web1", "pause", None, requests.plain, key=b"")] * 3
    with connect(first.endpoint, timeout=1.0) as host:
        ended = host.call_many(many, in_flight=2)
        with ThreadPoolExecutor(1) as pool:
            first_end = pool.submit(next, ended)
            for _ in range(2):
                first.requests.get(timeout=SOON)
            first.stop()
            assert isinstance(first_end.result(SOON)[1], OutcomeUnknown)
        assert isinstance(next(ended)[1], OutcomeUnknown)
        assert isinstance(next(ended)[1], NoBroker)  # never sent


def test_a_stream_that_the_broker_leaves_in_the_middle_ends_with_an_error(tmp_path: Path) -> None:
    first = NativeBroker(tmp_path)
    first.answer("vm/a", "events", lambda request: [partial(request, 1)])
    with connect(first.endpoint, timeout=SOON) as host:
        parts = host.call_streaming("vm/a", "events", reading=True)
        assert next(parts) == 1
        first.stop()
        with pytest.raises(NoBroker, match="in the middle"):
            next(parts)


def test_while_the_broker_is_away_a_request_waits_and_then_says_so(tmp_path: Path) -> None:
    first = NativeBroker(tmp_path)
    first.answer_with("vmloop", "ping", {"time": 1.0})
    with connect(first.endpoint, timeout=SOON) as host:
        host.ping()
        first.stop()
        with pytest.raises(NoBroker):
            host.call("vmloop", "ping", timeout=0.01, reading=True)
        back = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(host.ping)
            with NativeBroker(tmp_path) as second:
                second.answer_with("vmloop", "ping", {"time": 2.0})
                back.set()
                assert asked.result(SOON) == 2.0


def test_an_idle_client_does_not_mind_a_restart(tmp_path: Path) -> None:
    broker = NativeBroker(tmp_path)
    with connect(broker.endpoint, timeout=SOON) as host:
        for round_ in range(5):
            broker.answer_with("vm/web1", "qmp", round_)
            assert host.call("vm/web1", "qmp", {"command": "cont"}, key=b"") == round_
            broker = restart(broker, tmp_path)
            [lane] = host._idle  # libzmq's thread may be slow to see it: what is sent before is truly lost
            assert lane._watch.poll(int(SOON * 1000)), "it has not heard of the restart"
        broker.stop()


def test_the_client_door_only_ever_sees_requests(broker: NativeBroker, host: Host) -> None:
    broker.answer_with("vmloop", "ping", {"time": 1.0})
    host.ping()
    assert [(message.kind, message.flags) for message in broker.seen] == [(Kind.REQUEST, FLAG_READING)]
