# SPDX-License-Identifier: Apache-2.0
"""The native frame: what goes in comes out, and no bytes raise anything but BadFrame."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.common.errors import BadRequest
from vmloop.common.pack import MAX_MESSAGE_BYTES
from vmloop.common.wire import (
    CLIENT_KINDS,
    FLAG_READING,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    MAX_KEY_BYTES,
    BadFrame,
    Kind,
    Message,
    decode,
    encode,
    with_id,
)

U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
SHORT_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)  # at most 240 bytes of UTF-8

MESSAGES = st.builds(
    Message,
    kind=st.sampled_from(Kind),
    service=SHORT_TEXT,
    op=SHORT_TEXT,
    id=U64,
    body=st.binary(max_size=300),
    key=st.binary(max_size=MAX_KEY_BYTES),
    flags=st.integers(0, 255),
    seconds=st.floats(allow_nan=False),
    epoch=U32,
    seq=U64,
)


def header(*, kind: int = 1, service: int = 0, op: int = 0, key: int = 0, magic: bytes = MAGIC) -> bytes:
    return HEADER.pack(magic, kind, 0, service, op, 7, 1.5, 0, key, 0)


@given(MESSAGES)
def test_a_message_comes_back_as_it_went_in(message: Message) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_crosses_the_wire_under_its_number(kind: Kind) -> None:
    frame = encode(Message(kind, "vm/web1", "qmp"))
    assert frame[4] == int(kind)
    assert decode(frame).kind is kind


def test_the_kinds_of_the_client_door_are_the_first_four() -> None:
    assert {int(kind) for kind in CLIENT_KINDS} == {1, 2, 3, 4}
    assert len({int(kind) for kind in Kind}) == len(Kind)


def test_the_layout_is_the_documented_one_byte_for_byte() -> None:
    frame = encode(
        Message(
            Kind.REQUEST, "vm/web1", "qmp", id=0x0102, body=b"\x80", key=b"k1", flags=1, seconds=2.0, epoch=3, seq=17
        )
    )
    assert frame == (
        b"VML1\x01\x01\x07\x03"
        b"\x02\x01\0\0\0\0\0\0"
        b"\0\0\0\0\0\0\0\x40"
        b"\x03\0\0\0\x02\0\0\0"
        b"\x11\0\0\0\0\0\0\0"
        b"vm/web1qmpk1\x80"
    )
    assert HEADER_BYTES == 40


def test_nan_seconds_survive_so_whoever_uses_them_must_check() -> None:
    assert math.isnan(decode(encode(Message(Kind.REQUEST, seconds=math.nan))).seconds)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_bad_frame(frame: bytes) -> None:
    with pytest.raises(BadFrame):
        decode(frame)  # random bytes do not start with VML1


@given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 255), U32, st.binary(max_size=600))
def test_no_header_raises_anything_but_bad_frame(kind: int, service: int, op: int, key: int, rest: bytes) -> None:
    frame = header(kind=kind, service=service, op=op, key=key) + rest
    try:
        message = decode(frame)
    except BadFrame as error:
        assert error.raw == frame[:256]
    else:
        assert encode(message) == frame


@given(MESSAGES, st.data())
def test_a_damaged_frame_is_refused_or_is_another_whole_frame(message: Message, data: st.DataObject) -> None:
    frame = bytearray(encode(message))
    at = data.draw(st.integers(0, len(frame) - 1))
    frame[at] ^= data.draw(st.integers(1, 255))
    try:
        other = decode(bytes(frame))
    except BadFrame:
        return
    assert len(encode(other)) == len(frame)


@given(MESSAGES, st.data())
def test_a_frame_cut_short_in_head_or_names_is_refused(message: Message, data: st.DataObject) -> None:
    frame = encode(message)
    cut = data.draw(st.integers(0, len(frame) - len(message.body) - 1))
    with pytest.raises(BadFrame):
        decode(frame[:cut])


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (b"", "at least 40 bytes"),
        (header()[:-1], "at least 40 bytes"),
        (header(magic=b"VML2"), "VML1"),
        (header(kind=0), "no message kind 0"),
        (header(kind=10), "no message kind 10"),
        (header(service=1), "lengths"),
        (header(key=MAX_KEY_BYTES + 1) + bytes(200), "lengths"),
        (header(key=0xFFFFFFFF), "lengths"),
        (header(service=1) + b"\xff", "UTF-8"),
        (header(op=2) + b"\xc3\x28", "UTF-8"),
        (header() + bytes(MAX_MESSAGE_BYTES), "at most"),
    ],
)
def test_what_is_wrong_is_said(frame: bytes, says: str) -> None:
    with pytest.raises(BadFrame, match=says) as caught:
        decode(frame)
    assert caught.value.raw == frame[:256]
    assert isinstance(caught.value, BadRequest)
    assert caught.value.code == "bad-request"


def test_a_message_of_exactly_the_limit_is_fine() -> None:
    frame = header() + bytes(MAX_MESSAGE_BYTES - HEADER_BYTES)
    assert len(decode(frame).body) == MAX_MESSAGE_BYTES - HEADER_BYTES


@pytest.mark.parametrize(
    "message",
    [
        Message(Kind.REQUEST, service="s" * 256),
        Message(Kind.REQUEST, service="ä" * 128),
        Message(Kind.REQUEST, op="o" * 256),
        Message(Kind.REQUEST, key=b"k" * 65),
        Message(Kind.REQUEST, service="vm/\udcff"),
        Message(Kind.REQUEST, op="\ud800"),
    ],
)
def test_parts_that_no_header_can_describe_are_not_encoded(message: Message) -> None:
    with pytest.raises(BadFrame):
        encode(message)


def test_the_longest_parts_fit() -> None:
    message = Message(Kind.REQUEST, service="s" * 255, op="o" * 255, key=b"k" * MAX_KEY_BYTES)
    assert decode(encode(message)) == message


@given(MESSAGES, U64)
def test_with_id_changes_the_id_and_nothing_else(message: Message, number: int) -> None:
    assert decode(with_id(encode(message), number)) == msgspec.structs.replace(message, id=number)


def test_with_id_there_and_back_gives_the_same_bytes() -> None:
    frame = encode(Message(Kind.REQUEST, "vm/web1", "qmp", id=5, body=b"\x80"))
    assert with_id(with_id(frame, (1 << 64) - 1), 5) == frame


def test_reading_is_the_lowest_flag() -> None:
    assert Message(Kind.REQUEST, flags=FLAG_READING).reading
    assert Message(Kind.REQUEST, flags=0xFF).reading
    assert not Message(Kind.REQUEST, flags=0xFE).reading
