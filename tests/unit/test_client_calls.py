# SPDX-License-Identifier: Apache-2.0
"""What a connection has in flight: numbers, deadlines, losses, and frames that make no sense. No sockets."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest

from vmloop.client.calls import GRACE, MAX_PARTS, Call, Calls, new_call
from vmloop.client.requests import Request, plain
from vmloop.common.cursor import Cursor
from vmloop.common.errors import (
    BadRequest,
    Busy,
    DeadlineExceeded,
    Internal,
    NoBroker,
    OutcomeUnknown,
    QmpError,
    TooLarge,
    VmloopError,
)
from vmloop.common.pack import MAX_MESSAGE_BYTES, pack, unpack
from vmloop.common.wire import FLAG_REPEATED, HEADER_BYTES, Kind, Message, decode, encode


def request(
    arguments: Mapping[str, Any] | None = None, *, op: str = "qmp", reading: bool = False, key: bytes | None = None
) -> Request[Any]:
    return Request("vm/web1", op, arguments, plain, reading=reading, key=key)


def sent(calls: Calls, wanted: Request[Any], streaming: bool = False) -> Call:
    call = new_call(wanted, 30.0, streaming)
    calls.frame_of(call)
    return call


def answer(calls: Calls, call: Call, kind: Kind = Kind.REPLY, body: bytes = b"", **header: Any) -> Call | None:
    return calls.receive(encode(Message(kind, id=call.number, body=body, **header)))


def test_a_mutating_request_gets_a_random_key_and_a_reading_one_none() -> None:
    first, second = new_call(request(), 30.0), new_call(request(), 30.0)
    assert len(first.message.key) == 16
    assert first.message.key != second.message.key
    assert new_call(request(reading=True), 30.0).message.key == b""
    assert new_call(request(key=b""), 30.0).message.key == b""
    assert new_call(request(key=b"mine"), 30.0).message.key == b"mine"


def test_the_frame_carries_what_was_asked() -> None:
    calls = Calls("ipc:///x")
    message = decode(calls.frame_of(new_call(request({"command": "stop"}, key=b"k"), 12.5)))
    assert (message.kind, message.service, message.op, message.key) == (Kind.REQUEST, "vm/web1", "qmp", b"k")
    assert message.seconds == 12.5
    assert unpack(message.body) == {"command": "stop"}


def test_a_reply_finishes_its_call_with_value_and_cursor() -> None:
    calls = Calls("ipc:///x")
    call = sent(calls, request())
    assert answer(calls, call, body=pack({"a": 1}), epoch=3, seq=17, seconds=0.25) is call
    result = call.result()
    assert (result.value, result.cursor, result.seconds) == ({"a": 1}, Cursor(3, 17), 0.25)
    assert not calls


def test_an_error_is_raised_with_its_fields() -> None:
    calls = Calls("ipc:///x")
    call = sent(calls, request())
    answer(calls, call, Kind.ERROR, pack(QmpError("no", **{"class": "GenericError", "desc": "d"}).to_wire()))
    with pytest.raises(QmpError) as caught:
        call.result()
    assert caught.value.fields == {"class": "GenericError", "desc": "d"}


def test_replies_to_nobody_are_dropped() -> None:
    calls = Calls("ipc:///x")
    call = sent(calls, request())
    assert calls.receive(encode(Message(Kind.REPLY, id=999))) is None
    assert calls.receive(encode(Message(Kind.EVENT, id=call.number))) is call
    assert not call.finished


@pytest.mark.parametrize("frame", [b"", b"x", b"VML1", b"\0" * HEADER_BYTES, b"VML1" + b"\xff" * 100, b"\xff" * 4096])
def test_bytes_that_are_no_frame_are_dropped(frame: bytes) -> None:
    calls = Calls("ipc:///x")
    call = sent(calls, request())
    assert calls.receive(frame) is None
    assert not call.finished


@pytest.mark.parametrize(("at", "byte"), [(4, b"\x77"), (-1, b"\xc1"), (6, b"\xff"), (28, b"\xff")])
def test_a_malformed_reply_to_a_call_ends_it_with_a_code(at: int, byte: bytes) -> None:
    calls = Calls("ipc:///x")
    call = sent(calls, request())
    frame = bytearray(encode(Message(Kind.REPLY, id=call.number, body=pack(1))))
    frame[at] = byte[0]
    assert calls.receive(bytes(frame)) is call
    with pytest.raises(Internal, match="malformed"):
        call.result()


@pytest.mark.parametrize("body", [pack(None), pack([1]), pack({"code": "new-code", "message": "m"}), b""])
def test_an_error_body_of_any_shape_becomes_an_error(body: bytes) -> None:
    calls = Calls("ipc:///x")
    call = sent(calls, request())
    answer(calls, call, Kind.ERROR, body)
    with pytest.raises(VmloopError):
        call.result()


def test_parts_come_before_the_end() -> None:
    calls = Calls("ipc:///x")
    call = sent(calls, request(), streaming=True)
    for number in range(3):
        answer(calls, call, Kind.PARTIAL, pack(number))
    answer(calls, call, body=pack("end"))
    assert call.parts is not None
    assert list(call.parts) == [0, 1, 2]
    assert call.result().value == "end"


def test_parts_that_nobody_reads_are_bounded() -> None:
    calls = Calls("ipc:///x")
    call = sent(calls, request(), streaming=True)
    for _ in range(MAX_PARTS + 1):
        answer(calls, call, Kind.PARTIAL, pack(0))
    assert isinstance(call.error, Busy)


def test_events_that_come_again_from_the_next_worker_are_handed_out_once() -> None:
    calls = Calls("ipc:///x")
    call = sent(calls, request(op="events", reading=True), streaming=True)
    numbers = [(1, 1), (1, 2), (2, 1), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1)]
    for epoch, seq in numbers:
        answer(calls, call, Kind.PARTIAL, pack({"epoch": epoch, "seq": seq, "event": "X"}))
    assert call.parts is not None
    assert [(part["epoch"], part["seq"]) for part in call.parts] == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)]


@pytest.mark.parametrize("part", [5, None, {}, {"epoch": "1", "seq": 1}, {"epoch": 1, "seq": None}, {"left": 3.5}])
def test_parts_that_are_no_events_are_handed_out_as_they_come(part: Any) -> None:
    for op in ("events", "agent"):
        calls = Calls("ipc:///x")
        call = sent(calls, request(op=op), streaming=True)
        for _ in range(2):
            answer(calls, call, Kind.PARTIAL, pack(part))
        assert call.parts is not None
        assert list(call.parts) == [part, part]


def test_parts_of_a_plain_call_are_passed_over() -> None:
    calls = Calls("ipc:///x")
    call = sent(calls, request())
    answer(calls, call, Kind.PARTIAL, pack(1))
    answer(calls, call, body=pack(2))
    assert call.result().value == 2


def test_after_a_loss_reading_and_keyed_requests_are_to_be_sent_again_under_new_numbers() -> None:
    calls = Calls("ipc:///x")
    reading, keyed, bare = (
        sent(calls, wanted) for wanted in (request(reading=True), request(key=b"k"), request(key=b""))
    )
    old = reading.number
    assert calls.lost() == [bare]
    assert isinstance(bare.error, OutcomeUnknown)
    assert calls.unsent == (reading, keyed)
    again = decode(calls.frame_of(reading))
    assert again.id not in (0, old)
    assert decode(calls.frame_of(keyed)).key == b"k"
    assert calls.receive(encode(Message(Kind.REPLY, id=old))) is None  # the answer to the first sending


def test_a_stream_that_was_cut_off_is_not_begun_again() -> None:
    calls = Calls("ipc:///x")
    reading, mutating = (sent(calls, wanted, True) for wanted in (request(reading=True), request()))
    for call in (reading, mutating):
        answer(calls, call, Kind.PARTIAL, pack(1))
    assert calls.lost() == [reading, mutating]
    assert isinstance(reading.error, NoBroker)
    assert isinstance(mutating.error, OutcomeUnknown)


def test_the_second_sending_carries_the_time_that_is_left() -> None:
    calls = Calls("ipc:///x")
    call = sent(calls, request())
    call.due -= 20.0
    calls.lost()
    assert 0 < decode(calls.frame_of(call)).seconds <= 10.0


def test_what_is_sent_again_with_its_key_says_so() -> None:
    calls = Calls("ipc:///x")
    for first, asked in ((0, request(key=None)), (FLAG_REPEATED, request(key=b"mine"))):
        call = new_call(asked, 30.0)
        assert decode(calls.frame_of(call)).flags == first  # who brings a key may have asked before
        calls.lost()
        assert decode(calls.frame_of(call)).flags == FLAG_REPEATED
    reading = sent(calls, request(reading=True))
    calls.lost()
    assert not decode(calls.frame_of(reading)).repeated


def test_what_is_late_says_why() -> None:
    calls = Calls("ipc:///x")
    later = time.monotonic() + 30.0 + GRACE + 1

    unanswered = sent(calls, request())
    assert calls.overdue(later) == [unanswered]
    assert isinstance(unanswered.error, DeadlineExceeded)

    never_sent = new_call(request(), 30.0)
    calls.put_back(never_sent, was_sent=False)
    calls.overdue(later)
    assert isinstance(never_sent.error, NoBroker)

    reading, mutating = sent(calls, request(reading=True)), sent(calls, request())
    calls.lost()
    calls.overdue(later)
    assert isinstance(reading.error, NoBroker)
    assert isinstance(mutating.error, OutcomeUnknown)


def test_nothing_is_late_before_its_time() -> None:
    calls = Calls("ipc:///x")
    call = sent(calls, request())
    assert calls.overdue(time.monotonic() + 30.0) == []
    assert not call.finished


def test_what_cannot_be_sent_is_refused_here() -> None:
    with pytest.raises(TooLarge) as caught:
        new_call(request({"x": b"0" * MAX_MESSAGE_BYTES}), 30.0)
    assert caught.value.fields == {"limit": MAX_MESSAGE_BYTES}
    for arguments in ({"x": {1, 2}}, {"x": "\ud800"}, {"x": object()}):
        with pytest.raises(BadRequest, match="packed"):
            new_call(request(arguments), 30.0)
    for timeout in (0.0, -1.0, 3601.0, float("nan")):
        with pytest.raises(BadRequest, match="timeout"):
            new_call(request(), timeout)
    calls = Calls("ipc:///x")
    with pytest.raises(BadRequest):
        calls.frame_of(new_call(request(op="x" * 256), 30.0))
    assert not calls
