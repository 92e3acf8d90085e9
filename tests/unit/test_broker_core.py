# SPDX-License-Identifier: Apache-2.0
"""The broker's core at its native door: what goes through unchanged, what is refused, and that it survives any bytes."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.broker.actions import Publish, ToClient, ToWorker
from vmloop.common.pack import MAX_MESSAGE_BYTES, pack
from vmloop.common.wire import (
    FLAG_READING,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    Kind,
    Message,
    decode,
    encode,
    forwarded,
    with_id,
)

from ..fakes.broker_desk import CLIENT, FIRST_NUMBER, Desk, same_but

OTHER = b"client-2"


# -- through ----------------------------------------------------------------------------------------------------------------


def test_a_request_goes_to_the_worker_with_another_id_and_nothing_else_changed() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    frame = desk.ask("qmp", "vm/web1", {"command": "stop"}, id=7, seconds=2.5, key=b"once", reading=True)
    [action] = desk.take(ToWorker)
    assert action == ToWorker(worker.identity, with_id(frame, action.number), action.number)
    assert action.number > FIRST_NUMBER
    assert desk.core.actions == []


def test_a_timeout_of_zero_reaches_the_worker_as_the_default() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    frame = desk.ask("qmp", "vm/web1", seconds=0.0)
    [request] = desk.requests(worker)
    assert request == same_but(frame, id=request.id, seconds=30.0)


def test_flags_and_bytes_that_the_broker_does_not_know_go_through() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    frame = (
        HEADER.pack(MAGIC, 1, 0xFE, 7, 3, 5, 2.0, 77, 2, 88) + b"vm/web1" + b"qmp" + b"\xff\x00" + b"no msgpack \xc1"
    )
    desk.core.on_client(CLIENT, [frame], desk.now)
    [action] = desk.take(ToWorker)
    assert action.frame == forwarded(frame, action.number, 2.0)
    assert action.identity == worker.identity


def test_the_reply_goes_back_to_who_asked_with_its_own_id_and_nothing_else_changed() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("qmp", "vm/web1", id=2**64 - 1)
    [request] = desk.requests(worker)
    sent = desk.reply(worker, request, {"status": "running"}, epoch=3, seq=17)
    assert desk.take(ToClient) == [ToClient(CLIENT, [with_id(sent, 2**64 - 1)])]
    assert len(desk.core.inflight) == 0


def test_clients_with_the_same_id_get_each_their_own_answer() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("qmp", "vm/web1", {"n": 1}, id=1, client=CLIENT)
    desk.ask("qmp", "vm/web1", {"n": 2}, id=1, client=OTHER)
    first, second = desk.requests(worker)
    desk.reply(worker, second, "second")
    desk.reply(worker, first, "first")
    assert [(answer.client, answer.message.id, answer.value) for answer in desk.answers()] == [
        (OTHER, 1, "second"),
        (CLIENT, 1, "first"),
    ]


def test_partial_answers_come_before_the_reply_which_ends_the_request() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("events", "vm/web1")
    [request] = desk.requests(worker)
    desk.reply(worker, request, {"event": "STOP"}, kind=Kind.PARTIAL)
    desk.reply(worker, request, {"event": "RESUME"}, kind=Kind.PARTIAL)
    desk.reply(worker, request, {"count": 2})
    desk.reply(worker, request, {"event": "too late"}, kind=Kind.PARTIAL)
    assert [answer.message.kind for answer in desk.answers()] == [Kind.PARTIAL, Kind.PARTIAL, Kind.REPLY]


def test_an_error_of_the_workers_ends_the_request() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("qmp", "vm/web1")
    [request] = desk.requests(worker)
    desk.reply(worker, request, {"code": "qmp-error", "message": "no"}, kind=Kind.ERROR)
    assert desk.answer().code == "qmp-error"
    assert len(desk.core.inflight) == 0


def test_a_second_answer_to_the_same_request_goes_nowhere() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("qmp", "vm/web1")
    [request] = desk.requests(worker)
    desk.reply(worker, request, 1)
    desk.reply(worker, request, 2)
    assert desk.answer().value == 1


def test_an_answer_to_a_number_of_an_earlier_broker_goes_nowhere() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.reply(worker, Message(Kind.REQUEST, id=FIRST_NUMBER - 1), "old")
    assert desk.core.actions == []


def test_what_a_vm_does_not_have_is_for_its_worker_to_say() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("no-such-operation", "vm/web1")
    assert [request.op for request in desk.requests(worker)] == ["no-such-operation"]


def test_every_answer_tells_the_broker_where_the_vm_is() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("qmp", "vm/web1")
    [request] = desk.requests(worker)
    desk.reply(worker, request, epoch=4, seq=9)
    assert (desk.vm("web1").epoch, desk.vm("web1").seq) == (4, 9)


# -- events -----------------------------------------------------------------------------------------------------------------


def test_an_event_is_published_under_its_vm_and_name() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    event = Message(Kind.EVENT, service="vm/web1", op="STOP", body=b"packed", epoch=2, seq=5)
    desk.core.on_worker(worker.identity, [encode(event)], desk.now)
    assert desk.core.actions == [Publish(b"vm/web1/STOP", b"packed")]
    assert (desk.vm("web1").epoch, desk.vm("web1").seq) == (2, 5)


# -- refused ----------------------------------------------------------------------------------------------------------------

GOOD = encode(Message(Kind.REQUEST, service="vm/web1", op="qmp", id=7, body=pack({}), seconds=5.0))


def changed(at: int, new: bytes) -> bytes:
    return GOOD[:at] + new + GOOD[at + len(new) :]


MALFORMED = {
    "a kind that does not exist": changed(4, b"\x00"),
    "a reply": changed(4, b"\x02"),
    "a worker's greeting": changed(4, b"\x06"),
    "a goodbye": changed(4, b"\x08"),
    "a service longer than the frame": changed(6, b"\xff"),
    "an operation longer than the frame": changed(7, b"\xff"),
    "a key longer than the frame": changed(28, struct.pack("<I", 60)),
    "a key longer than allowed": changed(28, struct.pack("<I", 65)) + b"x" * 200,
    "a key that would wrap around": changed(28, struct.pack("<I", 2**32 - 1)),
    "a service that is no text": changed(40, b"\xff"),
    "an operation that is no text": changed(47, b"\xff"),
    "a timeout that is no number": changed(16, struct.pack("<d", math.nan)),
    "an endless timeout": changed(16, struct.pack("<d", math.inf)),
    "a negative timeout": changed(16, struct.pack("<d", -1.0)),
    "a timeout over the limit": changed(16, struct.pack("<d", 3600.5)),
    "a service that is not there": encode(Message(Kind.REQUEST, service="vmloopx", op="list", id=7)),
    "no service": encode(Message(Kind.REQUEST, op="list", id=7)),
    "a VM without a name": encode(Message(Kind.REQUEST, service="vm/", op="show", id=7)),
    "a VM's name that is a path": encode(Message(Kind.REQUEST, service="vm/../web1", op="show", id=7)),
    "no operation": encode(Message(Kind.REQUEST, service="vmloop", id=7)),
    "arguments that are no map": encode(Message(Kind.REQUEST, service="vmloop", op="list", id=7, body=pack([1]))),
    "arguments that are no msgpack": encode(Message(Kind.REQUEST, service="vmloop", op="list", id=7, body=b"\xc1")),
}


@pytest.mark.parametrize("frame", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_request_is_answered_with_bad_request_and_its_id(frame: bytes) -> None:
    desk = Desk()
    desk.worker("web1")
    desk.core.on_client(CLIENT, [frame], desk.now)
    answer = desk.answer()
    assert (answer.client, answer.message.id, answer.code) == (CLIENT, 7, "bad-request")
    assert desk.core.actions == []
    assert len(desk.core.inflight) == 0
    assert desk.core.dropped == 0


@pytest.mark.parametrize(
    "parts",
    [[], [b""], [b"", b""], [b"VML1"], [GOOD[: HEADER_BYTES - 1]], [b"XML1" + GOOD[4:]], [GOOD, b""], [b"", GOOD]],
    ids=["nothing", "empty", "two empty", "magic", "a cut header", "other magic", "a frame more", "a delimiter"],
)
def test_what_cannot_be_answered_is_counted_and_dropped(parts: list[bytes]) -> None:
    desk = Desk()
    desk.worker("web1")
    desk.core.on_client(CLIENT, parts, desk.now)
    assert desk.core.actions == []
    assert desk.core.dropped == 1


def test_a_message_over_the_limit_is_refused_and_one_at_it_goes_through() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    largest = GOOD + bytes(MAX_MESSAGE_BYTES - len(GOOD))
    desk.core.on_client(CLIENT, [largest + b"\0"], desk.now)
    assert (answer := desk.answer()).code == "too-large"
    assert answer.value["limit"] == MAX_MESSAGE_BYTES
    desk.core.on_client(CLIENT, [largest], desk.now)
    [action] = desk.take(ToWorker)
    assert (action.identity, len(action.frame)) == (worker.identity, MAX_MESSAGE_BYTES)


def test_a_vm_that_nobody_knows_is_no_such_vm() -> None:
    desk = Desk()
    assert desk.code("qmp", service="vm/web1") == "no-such-vm"
    assert desk.code("show", service="vm/web1") == "no-such-vm"


def test_a_vm_that_does_not_run_says_so_with_its_state_and_reason() -> None:
    desk = Desk()
    desk.known("web1", state="crashed", reason="panic")
    desk.ask("pause", "vm/web1")
    answer = desk.answer()
    assert answer.code == "not-running"
    assert "crashed: panic" in answer.value["message"]
    assert desk.core.actions == []


@pytest.mark.parametrize("op", ["events", "detach"])
def test_some_operations_have_a_worker_made_for_a_vm_that_does_not_run(op: str) -> None:
    desk = Desk()
    desk.known("web1")
    desk.ask(op, "vm/web1")
    worker = desk.forked("web1")
    desk.hello(worker, alive=False, state="shutoff")
    assert [request.op for request in desk.requests(worker)] == [op]


# -- what a worker may not send ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"VML1",
        HEADER.pack(MAGIC, Kind.EVENT, 0, 255, 0, 0, 0.0, 0, 0, 0),
        HEADER.pack(MAGIC, Kind.STATUS, 0, 0, 0, 0, 0.0, 0, 0, 0),
        encode(Message(Kind.STATUS, service="vm/web1", body=b"\xc1")),
        encode(Message(Kind.STATUS, service="vm/other", body=pack({}))),
        encode(Message(Kind.BYE, service="vmloop", body=pack({}))),
        encode(Message(Kind.REQUEST, service="vm/web1", op="list", body=pack({"state": "crashed"}))),
        encode(Message(Kind.CONTROL, service="vm/web1", op="leave", body=pack({"state": "crashed"}))),
        encode(Message(Kind.HELLO, service="vm/web1", body=pack({"state": "crashed"}))),
        encode(Message(Kind.HELLO, service="vm/web1", body=pack({"state": "crashed", "worker_pid": -1}))),
        encode(Message(Kind.HELLO, service="vm/web1", body=pack({"state": "crashed", "worker_pid": 1 << 40}))),
        HEADER.pack(MAGIC, 77, 0, 7, 0, 0, 0.0, 0, 0, 0) + b"vm/web1" + pack({"state": "crashed"}),
    ],
)
def test_nonsense_from_a_worker_is_dropped_and_changes_nothing(frame: bytes) -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.core.on_worker(worker.identity, [frame], desk.now)
    assert desk.core.actions == []
    assert desk.core.dropped == 1
    assert desk.vm("web1").state == "running"
    assert desk.vm("web1").identity == worker.identity


def test_who_has_not_presented_himself_speaks_for_no_vm() -> None:
    desk = Desk()
    desk.worker("web1")
    message = Message(Kind.STATUS, service="vm/web1", body=pack({"state": "crashed"}))
    desk.core.on_worker(b"stranger", [encode(message)], desk.now)
    assert desk.core.dropped == 1
    assert desk.vm("web1").state == "running"


def test_an_answer_whose_lengths_do_not_fit_leaves_the_request_in_flight() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("qmp", "vm/web1")
    [request] = desk.requests(worker)
    torn = HEADER.pack(MAGIC, Kind.REPLY, 0, 200, 0, request.id, 0.0, 0, 0, 0)
    desk.core.on_worker(worker.identity, [torn], desk.now)
    assert desk.core.actions == []
    desk.reply(worker, request, "whole")
    assert desk.answer().value == "whole"


# -- any bytes --------------------------------------------------------------------------------------------------------------

headers = st.builds(
    HEADER.pack,
    st.just(MAGIC),
    st.integers(0, 12) | st.integers(0, 255),
    st.integers(0, 255),
    st.sampled_from([0, 6, 7]) | st.integers(0, 255),
    st.sampled_from([0, 3, 4]) | st.integers(0, 255),
    st.sampled_from([7, 2**64 - 1]) | st.integers(0, 500),
    st.floats(),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 0, 1, 64, 65]) | st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
)
maps = st.dictionaries(
    st.sampled_from(
        ["name", "definition", "for", "vms", "names", "worker_pid", "incarnation", "inherited", "alive", "state"]
    ),
    st.none()
    | st.booleans()
    | st.integers(-1, 2**40)
    | st.text(max_size=5)
    | st.lists(st.integers(-1, 2**20), max_size=3),
)
tails = st.binary(max_size=40) | st.builds(
    lambda service, op, body: service + op + pack(body),
    st.sampled_from([b"vm/web1", b"vm/web2", b"vmloop", b"vm/"]),
    st.sampled_from([b"", b"qmp", b"list", b"show", b"wait", b"stop", b"shutdown", b"define", b"start", b"attach"]),
    maps,
)
frames = st.binary(max_size=60) | st.builds(lambda head, tail: head + tail, headers, tails)
mdp = st.sampled_from([b"", b"MDPC01", b"MDPC02", b"\x01", b"vm/web1", b"vmloop", b"mmi.service"]) | st.builds(
    pack, maps
)
messages = st.lists(frames, max_size=3) | frames.map(lambda frame: [frame]) | st.lists(mdp | frames, max_size=6)


@given(st.lists(st.tuples(st.sampled_from(["client", "worker", "stranger"]), messages), min_size=1, max_size=6))
def test_no_bytes_at_either_door_raise_or_touch_another_request(traffic: list[tuple[str, list[bytes]]]) -> None:
    desk = Desk()
    desk.worker("web2")
    worker = desk.worker("web1")
    desk.ask("qmp", "vm/web1", client=OTHER, id=99)
    [request] = desk.requests(worker)
    for door, parts in traffic:
        if door == "client":
            desk.core.on_client(CLIENT, parts, desk.now)
        else:
            desk.core.on_worker(worker.identity if door == "worker" else b"stranger", parts, desk.now)
    desk.tick()
    desk.reply(worker, request, "mine")
    to_others = [action for action in desk.take(ToClient) if action.identity == OTHER]
    mine = [decode(action.frames[0]) for action in to_others]
    assert len(mine) == 1
    assert mine[0].id == 99
    if not any(presents(parts) for door, parts in traffic if door != "client"):
        assert mine[0].body == pack("mine")


def presents(parts: list[bytes]) -> bool:
    """Whether this may be a worker that takes another one's place: then what that one had may end as outcome-unknown."""
    return len(parts) == 1 and len(parts[0]) >= HEADER_BYTES and parts[0][4] == Kind.HELLO


@given(st.integers(0, 255), st.binary(max_size=30), st.floats(0, 3600), st.binary(max_size=64))
def test_whatever_a_request_carries_reaches_the_worker_as_it_is(
    flags: int, body: bytes, seconds: float, key: bytes
) -> None:
    desk = Desk()
    desk.worker("web1")
    message = Message(Kind.REQUEST, service="vm/web1", op="qmp", id=1, body=body, key=key, flags=flags, seconds=seconds)
    desk.core.on_client(CLIENT, [encode(message)], desk.now)
    [action] = desk.take(ToWorker)
    assert action.frame == forwarded(encode(message), action.number, seconds or 30.0)
    entry = desk.core.inflight.get(action.number)
    assert entry is not None
    assert entry.reading == bool(flags & FLAG_READING)


def test_an_answer_with_the_cursor_of_an_earlier_time_does_not_take_the_vm_back() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    for cursor in ((2, 9), (1, 30)):
        frame = encode(Message(kind=Kind.REPLY, id=1, epoch=cursor[0], seq=cursor[1], body=pack({})))
        desk.core.on_worker(worker.identity, [frame], desk.now)
    assert (desk.vm("web1").epoch, desk.vm("web1").seq) == (2, 9)
