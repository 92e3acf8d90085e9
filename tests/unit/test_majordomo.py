# SPDX-License-Identifier: Apache-2.0
"""Majordomo's frames, both dialects, with and without the empty frame: round trips, every malformed shape, and anything at all."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.common.majordomo import (
    FINAL,
    MMI_SERVICE,
    PARTIAL,
    REQUEST,
    BadMajordomo,
    Dialect,
    Envelope,
    MajordomoRequest,
    MmiRequest,
    build_mmi_reply,
    build_reply,
    build_request,
    is_majordomo,
    parse_request,
)
from vmloop.common.pack import pack, unpack
from vmloop.common.wire import MAX_KEY_BYTES

ENVELOPES = [Envelope(dialect, delimited, "vm/web1") for dialect in Dialect for delimited in (True, False)]
V01 = Envelope(Dialect.V01, True, "vm/web1")

every_envelope = pytest.mark.parametrize("envelope", ENVELOPES, ids=lambda e: f"{e.dialect.name}-{e.delimited}")


def request(parts: list[bytes]) -> MajordomoRequest:
    parsed = parse_request(parts)
    assert isinstance(parsed, MajordomoRequest)
    return parsed


def refused(parts: list[bytes]) -> BadMajordomo:
    with pytest.raises(BadMajordomo) as caught:
        parse_request(parts)
    return caught.value


# -- what is well formed --------------------------------------------------------------------------------------------------


@every_envelope
def test_a_request_with_everything_comes_back(envelope: Envelope) -> None:
    head = {"op": "qmp", "id": [1, "a"], "timeout": 2, "key": b"k", "reading": True}
    parts = build_request(envelope, head, b"payload")
    assert is_majordomo(parts)
    assert request(parts) == MajordomoRequest(envelope, "qmp", b"payload", [1, "a"], 2.0, b"k", True)


@every_envelope
def test_only_op_is_needed_and_the_payload_may_be_left_out(envelope: Envelope) -> None:
    parsed = request(build_request(envelope, {"op": "list"}))
    assert parsed == MajordomoRequest(envelope, "list", b"")
    assert (parsed.client_id, parsed.timeout, parsed.key, parsed.reading) == (None, None, b"", False)


def test_the_frames_are_those_of_the_rfcs() -> None:
    head = pack({"op": "list"})
    assert build_request(V01, {"op": "list"}, b"x") == [b"", b"MDPC01", b"vm/web1", head, b"x"]
    assert build_request(Envelope(Dialect.V02, False, "vm/web1"), {"op": "list"}) == [
        b"MDPC02",
        b"\x01",
        b"vm/web1",
        head,
    ]


def test_a_key_may_be_text() -> None:
    assert request(build_request(V01, {"op": "stop", "key": "abc"})).key == b"abc"


@every_envelope
def test_a_reply_repeats_the_askers_envelope(envelope: Envelope) -> None:
    parts = build_reply(envelope, ok=True, body=b"result", client_id=7, cursor="3.17", seconds=0.0123456)
    assert parts[-1] == b"result"
    assert unpack(parts[-2]) == {"ok": True, "id": 7, "cursor": "3.17", "ms": 12.346}
    asked = build_request(envelope, {"op": "x"})
    command = [] if envelope.dialect is Dialect.V01 else [FINAL]
    assert parts[:-2] == [*(part for part in asked[:-2] if part != REQUEST), *command, b"vm/web1"]


@every_envelope
def test_a_reply_without_id_and_cursor_has_neither(envelope: Envelope) -> None:
    head = unpack(build_reply(envelope, ok=False, body=b"")[-2])
    assert head == {"ok": False, "ms": 0.0}


def test_parts_and_the_last_part_differ_in_the_command_of_the_second_dialect() -> None:
    envelope = Envelope(Dialect.V02, False, "vm/web1")
    assert build_reply(envelope, ok=True, body=b"", final=False)[1] == PARTIAL == b"\x02"
    assert build_reply(envelope, ok=True, body=b"", final=True)[1] == FINAL == b"\x03"


# -- mmi ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize("delimited", [True, False])
def test_mmi_asks_for_a_service_and_is_answered_with_a_status_alone(dialect: Dialect, delimited: bool) -> None:
    envelope = Envelope(dialect, delimited, MMI_SERVICE)
    prefix = [b""] if delimited else []
    command = [REQUEST] if dialect is Dialect.V02 else []
    parsed = parse_request([*prefix, dialect.value, *command, b"mmi.service", b"vm/web1"])
    assert parsed == MmiRequest(envelope, "vm/web1")
    answer_command = [FINAL] if dialect is Dialect.V02 else []
    assert build_mmi_reply(envelope, "404") == [*prefix, dialect.value, *answer_command, b"mmi.service", b"404"]


@pytest.mark.parametrize(("rest", "asked"), [([], ""), ([b"\xff"], "\ufffd"), ([b"a", b"b"], "a")])
def test_mmi_with_odd_bodies_still_is_a_question(rest: list[bytes], asked: str) -> None:
    parsed = parse_request([b"", b"MDPC01", b"mmi.service", *rest])
    assert isinstance(parsed, MmiRequest)
    assert parsed.asked == asked


# -- what is malformed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [b""],
        [b"", b""],
        [b"", b"", b"MDPC01", b"vmloop"],
        [b"MDPC03", b"vmloop"],
        [b"MDPW01", b"\x01", b"vmloop"],
        [b"", b"MDPC01"],
        [b"MDPC02"],
        [b"MDPC02", b"\x01"],
        [b"MDPC02", b"\x02", b"vmloop", pack({"op": "list"})],
        [b"MDPC02", b"vmloop", pack({"op": "list"})],
        [b"", b"MDPC01", b"\xff\xfe", pack({"op": "list"})],
    ],
)
def test_without_a_service_nobody_can_be_answered(parts: list[bytes]) -> None:
    error = refused(parts)
    assert error.envelope is None
    assert error.code == "bad-request"


@every_envelope
@pytest.mark.parametrize("frames", [0, 3, 4])
def test_the_wrong_number_of_frames_is_answered(envelope: Envelope, frames: int) -> None:
    parts = [*build_request(envelope, {"op": "list"})[:-1], *[b"\x80"] * frames]
    error = refused(parts)
    assert error.envelope == envelope
    assert f"{frames} frames" in str(error)


@pytest.mark.parametrize("packed", [b"\xc1", b"\x81", pack([1]), pack(7), pack({1: 2}), pack({"op": "x"}) + b"\x00"])
def test_a_header_that_is_no_map_is_answered(packed: bytes) -> None:
    error = refused([b"", b"MDPC01", b"vm/web1", packed, b""])
    assert error.envelope == V01
    assert str(error).startswith("header: ")


@pytest.mark.parametrize(
    ("head", "names"),
    [
        ({}, "op"),
        ({"op": ""}, "op"),
        ({"op": 7}, "op"),
        ({"op": b"list"}, "op"),
        ({"op": "x" * 256}, "op"),
        ({"op": "ä" * 128}, "op"),
        ({"op": "x", "timeout": "5"}, "timeout"),
        ({"op": "x", "timeout": True}, "timeout"),
        ({"op": "x", "timeout": [1]}, "timeout"),
        ({"op": "x", "key": 5}, "key"),
        ({"op": "x", "key": None}, "key"),
        ({"op": "x", "key": b"k" * (MAX_KEY_BYTES + 1)}, "key"),
        ({"op": "x", "key": "ä" * MAX_KEY_BYTES}, "key"),
        ({"op": "x", "reading": 1}, "reading"),
        ({"op": "x", "reading": None}, "reading"),
        ({"op": "x", "timeuot": 1}, "timeuot"),
    ],
)
def test_a_wrong_header_field_is_named_and_the_id_is_kept(head: dict[str, Any], names: str) -> None:
    error = refused(build_request(V01, {**head, "id": "mine"}))
    assert error.envelope == V01
    assert error.client_id == "mine"
    assert f"'{names}'" in str(error)


# -- anything -------------------------------------------------------------------------------------------------------------

FRAMES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"", b"MDPC01", b"MDPC02", REQUEST, b"vmloop", b"mmi.service", pack({"op": "list"})]),
)


@given(st.lists(FRAMES, max_size=7))
def test_arbitrary_frames_give_a_request_or_bad_majordomo(parts: list[bytes]) -> None:
    try:
        parsed = parse_request(parts)
    except BadMajordomo as error:
        if error.envelope is not None:
            build_reply(error.envelope, ok=False, body=b"", client_id=error.client_id)
    else:
        assert is_majordomo(parts)
        assert build_reply(parsed.envelope, ok=True, body=b"")[-1] == b""


@given(st.dictionaries(st.sampled_from(["op", "id", "timeout", "key", "reading", "other"]), st.integers() | st.text()))
def test_arbitrary_headers_give_a_request_or_bad_majordomo_with_an_envelope(head: dict[str, Any]) -> None:
    try:
        packed = pack(head)
        parsed = request([b"", b"MDPC01", b"vm/web1", packed, b""])
    except UnicodeEncodeError:
        return  # lone surrogates cannot be packed, so nobody can send them
    except BadMajordomo as error:
        assert error.envelope == V01
    else:
        assert parsed.op == head["op"]
