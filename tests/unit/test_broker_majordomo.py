# SPDX-License-Identifier: Apache-2.0
"""Majordomo at the client door: the same request gets the same answer in both dialects as at the native one. Frames: test_majordomo."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.broker.actions import ToClient, ToWorker
from vmloop.common.majordomo import FINAL, PARTIAL, REQUEST, Dialect, Envelope, build_request
from vmloop.common.pack import MAX_MESSAGE_BYTES, pack, unpack
from vmloop.common.wire import FLAG_READING, Kind, Message, decode, encode

from ..fakes.broker_desk import CLIENT, Desk

ENVELOPES = {
    "MDP/0.1": Envelope(Dialect.V01, True, ""),
    "MDP/0.1 without delimiter": Envelope(Dialect.V01, False, ""),
    "MDP/0.2": Envelope(Dialect.V02, False, ""),
    "MDP/0.2 with delimiter": Envelope(Dialect.V02, True, ""),
}
BOTH = pytest.mark.parametrize("kind", ENVELOPES.values(), ids=ENVELOPES.keys())


def ask(desk: Desk, kind: Envelope, service: str, header: dict[str, Any], payload: bytes | None = None) -> None:
    frames = build_request(Envelope(kind.dialect, kind.delimited, service), header, payload)
    desk.core.on_client(CLIENT, frames, desk.now)


def answers(desk: Desk, kind: Envelope, service: str) -> list[tuple[bytes, dict[str, Any], Any]]:
    """Command (b"" in MDP/0.1), header and payload of what went out, in the asker's own frames."""
    found = []
    for action in desk.take(ToClient):
        assert action.identity == CLIENT
        frames = list(action.frames)
        if kind.delimited:
            assert frames.pop(0) == b""
        assert frames.pop(0) == kind.dialect.value
        command = frames.pop(0) if kind.dialect is Dialect.V02 else b""
        answered_by, header, payload = frames
        assert answered_by == service.encode()
        found.append((command, unpack(header), unpack(payload)))
    return found


def final(kind: Envelope) -> bytes:
    return FINAL if kind.dialect is Dialect.V02 else b""


# -- the same request, the same answer --------------------------------------------------------------------------------------


@BOTH
def test_a_request_reaches_the_worker_as_the_native_one_does(kind: Envelope) -> None:
    desk = Desk()
    worker = desk.worker("web1")
    arguments = {"command": "stop", "arguments": {"a": [1, None]}}
    native = decode(desk.ask("qmp", "vm/web1", arguments, seconds=2.5, key=b"once", reading=True))
    ask(desk, kind, "vm/web1", {"op": "qmp", "timeout": 2.5, "key": b"once", "reading": True}, pack(arguments))
    first, second = desk.requests(worker)
    assert first.id != second.id
    assert (first.op, first.body, first.key, first.flags, first.seconds, first.service) == (
        (second.op, second.body, second.key, second.flags, second.seconds, second.service)
    )
    assert (second.body, second.flags, second.service) == (native.body, FLAG_READING, "vm/web1")


@BOTH
@pytest.mark.parametrize(
    ("service", "op", "arguments"),
    [
        ("vmloop", "list", {}),
        ("vmloop", "stats", {"names": ["web1"]}),
        ("vmloop", "stats", {"names": ["nobody"]}),
        ("vmloop", "list", {"bogus": 1}),
        ("vmloop", "bogus", {}),
        ("vm/web1", "show", {}),
        ("vm/web1", "wait", {"for": "running"}),
        ("vm/web1", "wait", {"for": "bogus"}),
        ("vm/nobody", "qmp", {"command": "stop"}),
        ("vm/off", "pause", {}),
        ("vm/../off", "pause", {}),
        ("elsewhere", "list", {}),
    ],
)
def test_what_the_broker_answers_itself_is_the_same_at_both_doors(
    kind: Envelope, service: str, op: str, arguments: dict[str, Any]
) -> None:
    desk = Desk()
    desk.worker("web1")
    desk.known("off")
    desk.ask(op, service, arguments)
    native = desk.answer()
    ask(desk, kind, service, {"op": op, "id": 7}, pack(arguments))
    [(command, header, payload)] = answers(desk, kind, service)
    assert (command, payload) == (final(kind), native.value)
    assert header["ok"] == (native.message.kind is Kind.REPLY)
    assert header["id"] == 7


@BOTH
def test_the_workers_answer_comes_back_with_ok_id_cursor_and_time(kind: Envelope) -> None:
    desk = Desk()
    worker = desk.worker("web1")
    ask(desk, kind, "vm/web1", {"op": "qmp", "id": [1, "mine"]}, pack({"command": "query-status"}))
    [request] = desk.requests(worker)
    desk.reply(worker, request, {"return": 5}, epoch=3, seq=17)
    assert answers(desk, kind, "vm/web1") == [
        (final(kind), {"ok": True, "id": [1, "mine"], "cursor": "3.17", "ms": 500.0}, {"return": 5})
    ]
    assert len(desk.core.inflight) == 0


@BOTH
def test_the_workers_error_comes_back_as_not_ok(kind: Envelope) -> None:
    desk = Desk()
    worker = desk.worker("web1")
    ask(desk, kind, "vm/web1", {"op": "qmp"})
    [request] = desk.requests(worker)
    error = {"code": "qmp-error", "message": "no", "class": "GenericError"}
    desk.reply(worker, request, error, kind=Kind.ERROR)
    [(_, header, payload)] = answers(desk, kind, "vm/web1")
    assert (header["ok"], payload) == (False, error)
    assert "id" not in header, "none was given"


def test_partial_answers_are_for_those_who_can_tell_them_apart() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    for kind, parts in ((ENVELOPES["MDP/0.2"], [PARTIAL, FINAL]), (ENVELOPES["MDP/0.1"], [b""])):
        ask(desk, kind, "vm/web1", {"op": "events"})
        [request] = desk.requests(worker)
        desk.reply(worker, request, {"event": "STOP"}, kind=Kind.PARTIAL)
        desk.reply(worker, request, {"count": 1})
        got = answers(desk, kind, "vm/web1")
        assert [command for command, _, _ in got] == parts
        assert got[-1][2] == {"count": 1}


@BOTH
def test_a_deadline_and_a_lost_worker_are_told_in_the_askers_frames(kind: Envelope) -> None:
    desk = Desk()
    worker = desk.worker("web1")
    ask(desk, kind, "vm/web1", {"op": "stop", "timeout": 1, "id": "a"})
    desk.requests(worker)
    desk.tick(2.0)
    [(_, header, payload)] = answers(desk, kind, "vm/web1")
    assert (header["ok"], header["id"], payload["code"]) == (False, "a", "deadline")


def test_a_payload_left_out_is_no_arguments() -> None:
    desk = Desk()
    desk.core.on_client(CLIENT, [b"", b"MDPC01", b"vmloop", pack({"op": "list"})], desk.now)
    [(_, header, payload)] = answers(desk, ENVELOPES["MDP/0.1"], "vmloop")
    assert (header["ok"], payload) == (True, [])


def test_a_host_has_no_cursor() -> None:
    desk = Desk()
    ask(desk, ENVELOPES["MDP/0.1"], "vmloop", {"op": "ping"})
    [(_, header, _)] = answers(desk, ENVELOPES["MDP/0.1"], "vmloop")
    assert set(header) == {"ok", "ms"}


# -- what is wrong ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [-1, 3601, float("nan"), float("inf"), 2**63])
def test_a_timeout_that_is_none_is_refused(timeout: float) -> None:
    desk = Desk()
    desk.worker("web1")
    ask(desk, ENVELOPES["MDP/0.2"], "vm/web1", {"op": "qmp", "timeout": timeout, "id": 1})
    [(_, header, payload)] = answers(desk, ENVELOPES["MDP/0.2"], "vm/web1")
    assert (header["ok"], header["id"], payload["code"]) == (False, 1, "bad-request")


@BOTH
@pytest.mark.parametrize(
    "body",
    [[], [b"\xc1"], [pack([1])], [pack({})], [pack({"op": "list", "bogus": 1})], [pack({"op": "list"}), b"", b""]],
)
def test_a_header_that_makes_no_sense_is_answered_where_it_can_be(kind: Envelope, body: list[bytes]) -> None:
    desk = Desk()
    parts = build_request(Envelope(kind.dialect, kind.delimited, "vmloop"), {})[:-1]
    desk.core.on_client(CLIENT, [*parts, *body], desk.now)
    [(_, header, payload)] = answers(desk, kind, "vmloop")
    assert (header["ok"], payload["code"]) == (False, "bad-request")


@pytest.mark.parametrize(
    "parts",
    [
        [b"MDPC01"],
        [b"", b"MDPC02"],
        [b"MDPC02", b"\x09", b"vmloop", pack({"op": "list"})],
        [b"MDPW01", REQUEST, b"vmloop"],
        [b"", b"MDPC01", b"\xff", pack({"op": "list"})],
        [b"", b"", b"MDPC01", b"vmloop", pack({"op": "list"})],
    ],
)
def test_frames_that_name_nobody_to_answer_for_are_dropped(parts: list[bytes]) -> None:
    desk = Desk()
    desk.core.on_client(CLIENT, parts, desk.now)
    assert (desk.core.actions, desk.core.dropped) == ([], 1)


def test_a_service_longer_than_the_native_form_can_hold_is_refused() -> None:
    desk = Desk()
    ask(desk, ENVELOPES["MDP/0.1"], "vm/" + "a" * 300, {"op": "show"})
    [(_, header, payload)] = answers(desk, ENVELOPES["MDP/0.1"], "vm/" + "a" * 300)
    assert (header["ok"], payload["code"]) == (False, "bad-request")


def test_a_message_over_the_limit_is_too_large() -> None:
    desk = Desk()
    desk.worker("web1")
    ask(desk, ENVELOPES["MDP/0.1"], "vm/web1", {"op": "qmp"}, bytes(MAX_MESSAGE_BYTES))
    [(_, header, payload)] = answers(desk, ENVELOPES["MDP/0.1"], "vm/web1")
    assert (header["ok"], payload["code"]) == (False, "too-large")
    assert desk.take(ToWorker) == []


def test_an_answer_of_a_worker_that_makes_no_sense_leaves_the_request_to_its_deadline() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    ask(desk, ENVELOPES["MDP/0.1"], "vm/web1", {"op": "qmp", "timeout": 1})
    [request] = desk.requests(worker)
    torn = encode(Message(Kind.REPLY, id=request.id, service="xx", body=pack(1))).replace(b"xx", b"\xff\xff")
    desk.core.on_worker(worker.identity, [torn], desk.now)
    assert (desk.core.actions, desk.core.dropped) == ([], 1)
    desk.tick(2.0)
    assert len(answers(desk, ENVELOPES["MDP/0.1"], "vm/web1")) == 1


# -- mmi --------------------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("service", "asked", "status"),
    [
        ("mmi.service", b"vmloop", b"200"),
        ("mmi.service", b"vm/web1", b"200"),
        ("mmi.service", b"vm/off", b"200"),
        ("mmi.service", b"vm/nobody", b"404"),
        ("mmi.service", b"", b"404"),
        ("mmi.service", b"\xff\xfe", b"404"),
        ("mmi.discovery", b"vmloop", b"501"),
    ],
)
def test_mmi_says_whether_a_service_is_there(kind: Envelope, service: str, asked: bytes, status: bytes) -> None:
    desk = Desk()
    desk.worker("web1")
    desk.known("off")
    parts = build_request(Envelope(kind.dialect, kind.delimited, service), {})[:-1]
    desk.core.on_client(CLIENT, [*parts, asked], desk.now)
    answered = [*parts[:-1], parts[-1], status]
    if kind.dialect is Dialect.V02:
        answered[answered.index(REQUEST)] = FINAL
    assert desk.core.actions == [ToClient(CLIENT, answered)]


# -- anything ---------------------------------------------------------------------------------------------------------------

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(client_id=values, payload=st.binary(max_size=20), dialect=st.sampled_from(Dialect), delimited=st.booleans())
def test_any_id_is_echoed_and_any_payload_goes_through_unpacked(
    client_id: Any, payload: bytes, dialect: Dialect, delimited: bool
) -> None:
    desk = Desk()
    worker = desk.worker("web1")
    kind = Envelope(dialect, delimited, "")
    ask(desk, kind, "vm/web1", {"op": "qmp", "id": client_id}, payload)
    [request] = desk.requests(worker)
    assert request.body == payload
    desk.reply(worker, request, None)
    [action] = desk.take(ToClient)
    header = unpack(action.frames[-2])
    assert pack(header.get("id")) == pack(client_id)


def test_an_id_nested_as_deeply_as_can_be_sent_is_echoed() -> None:
    desk = Desk()
    desk.worker("web1")
    for depth in (100, 1000, 1022, 1023, 1024, 5000):
        header = b"\x82" + pack("op") + pack("qmp") + pack("id") + b"\x91" * depth + b"\x01"
        desk.core.on_client(CLIENT, [b"", b"MDPC01", b"vm/web1", header], desk.now)
        desk.tick(60.0)
        [action] = desk.take(ToClient)
        assert unpack(action.frames[-1])["code"] in ("deadline", "bad-request")
        desk.take(ToWorker)
