# SPDX-License-Identifier: Apache-2.0
"""Targets for what crosses ZeroMQ and the zygote's socket: frames, bodies, Majordomo, names, cursors, packets."""

from __future__ import annotations

import contextlib
import math
import socket
from typing import Final

import msgspec

from vmloop.common.cursor import Cursor, parse_cursor
from vmloop.common.errors import BadRequest, VmloopError, error_from_wire
from vmloop.common.majordomo import (
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
from vmloop.common.names import VmName, vm_of_service, vm_service
from vmloop.common.pack import pack, unpack, unpack_map
from vmloop.common.settings import Settings
from vmloop.common.wire import BadFrame, Kind, Message, decode, encode, forwarded, with_id
from vmloop.common.zygote_wire import Drop, Exited, Fork, Forked, Keep, NotForked, Quit, WorkerSpec, receive_packet

from .choices import Choices, piece
from .values import HOSTILE_MSGPACK

MAX_PARTS: Final = 8


def same(one: object, other: object) -> bool:
    """Equal, where a NaN equals itself."""
    return msgspec.msgpack.encode(one) == msgspec.msgpack.encode(other)


# -- native frames ----------------------------------------------------------------------------------------------------------


def frame(data: bytes) -> None:
    """A frame is refused as `BadFrame`, or is the very bytes that its message encodes to."""
    try:
        message = decode(data)
    except BadFrame as error:
        assert data.startswith(error.raw)
        return
    if not math.isnan(message.seconds):  # a NaN need not keep its payload
        assert encode(message) == data
    other = decode(forwarded(data, 77, 1.5))
    assert (other.id, other.seconds, other.body, other.op) == (77, 1.5, message.body, message.op)
    assert same(decode(with_id(data, message.id)), message)


def frames() -> list[bytes]:
    request = Message(Kind.REQUEST, "vm/web1", "qmp", 7, pack({"command": "query-status"}), b"key", 1, 30.0, 3, 17)
    kinds = [encode(msgspec.structs.replace(request, kind=kind)) for kind in Kind]
    return [
        *kinds,
        b"VML1",
        encode(Message(Kind.EVENT, "", "", seconds=math.nan)),
        encode(Message(Kind.HELLO, "é" * 127, "o" * 255, key=b"k" * 64, id=(1 << 64) - 1, seq=(1 << 64) - 1)),
    ]


# -- bodies -------------------------------------------------------------------------------------------------------------------


def body(data: bytes) -> None:
    """A body is refused as `BadRequest`, or its value can be packed again, and told as an error, whatever it is."""
    try:
        value = unpack(data)
    except BadRequest:
        return
    assert same_packed(value)
    error = error_from_wire(value)
    assert isinstance(error, VmloopError)
    assert isinstance(str(error), str)
    with contextlib.suppress(BadRequest):
        assert pack(unpack_map(data)) == pack({} if value is None else value)


def same_packed(value: object) -> bool:
    again = pack(value)
    return pack(unpack(again)) == again


def bodies() -> list[bytes]:
    deep = unpack(HOSTILE_MSGPACK[0])
    return [
        b"",
        pack({"code": "busy", "message": "full", "limit": 5}),
        pack({"code": deep, "message": deep}),
        pack({"code": "no such code", "self": 1, "message": None}),
        pack([1, -1, 1 << 63, 1.5, "text", b"bytes", None, True, {"a": [{}]}]),
        *HOSTILE_MSGPACK,
    ]


def spelling(data: bytes) -> None:
    """A service names one VM or none, a cursor is a place or none, and both are written as they were read."""
    text = data.decode("utf-8", "surrogateescape")
    with contextlib.suppress(BadRequest):
        assert vm_service(vm_of_service(text)) == text
        assert "/" not in text.removeprefix("vm/")
        assert len(data) <= 3 + 64
    with contextlib.suppress(BadRequest):
        cursor = parse_cursor(text)
        assert parse_cursor(str(cursor)) == cursor
        assert Message(Kind.REPLY, epoch=cursor.epoch, seq=cursor.seq) == decode(
            encode(Message(Kind.REPLY, epoch=cursor.epoch, seq=cursor.seq))
        )


def spellings() -> list[bytes]:
    return [
        vm_service(VmName("web1")).encode(),
        b"vm/" + b"a" * 64,
        b"vm/" + b"a" * 65,
        b"vm/../x",
        b"vm/a\n",
        b"vm/\xff",
        str(Cursor(3, 17)).encode(),
        b"4294967295.18446744073709551615",
        b"4294967296.0",
        "３.１７".encode(),
        b"3.17\n",
    ]


# -- Majordomo ----------------------------------------------------------------------------------------------------------------


def majordomo(data: bytes) -> None:
    """Any frames are refused as `BadMajordomo`, or are a request that can be answered in its own frames, with its own id."""
    choices = Choices(data)
    parts = [choices.piece() for _ in range(1 + choices.number(MAX_PARTS))]
    try:
        request = parse_request(parts)
    except BadMajordomo as error:
        if error.envelope is not None:
            build_reply(error.envelope, ok=False, body=pack(error.to_wire()), client_id=error.client_id)
        return
    assert is_majordomo(parts)
    if isinstance(request, MmiRequest):
        assert build_mmi_reply(request.envelope, "404")[-1] == b"404"
        return
    answer = build_reply(request.envelope, ok=True, body=b"", client_id=request.client_id, cursor="1.2")
    header = unpack_map(answer[-2])
    assert pack(header.get("id")) == pack(request.client_id)
    _asks_the_same_again(request)


def _asks_the_same_again(request: MajordomoRequest) -> None:
    header = {"op": request.op, "id": request.client_id, "key": request.key, "reading": request.reading}
    if request.timeout is not None:
        header["timeout"] = request.timeout
    again = parse_request(build_request(request.envelope, header, request.body))
    assert isinstance(again, MajordomoRequest)
    assert (again.envelope, again.op, again.body, again.key) == (
        request.envelope,
        request.op,
        request.body,
        request.key,
    )


def majordomo_requests() -> list[bytes]:
    found = []
    for dialect in Dialect:
        for delimited in (False, True):
            envelope = Envelope(dialect, delimited, "vm/web1")
            header = {"op": "qmp", "id": 5, "timeout": 1.5, "key": "k", "reading": True}
            found += [
                build_request(envelope, header, pack({"command": "stop"})),
                build_request(envelope, {"op": "list", "timeout": (1 << 64) - 1, "id": unpack(HOSTILE_MSGPACK[0])}),
                build_request(envelope, {"op": "x" * 256, "other": 1}),
                build_request(Envelope(dialect, delimited, "mmi.service"), {}, b"vm/web1"),
                *([*build_request(envelope, {})[:-1], hostile] for hostile in HOSTILE_MSGPACK),
            ]
    return [bytes([len(parts) - 1]) + b"".join(map(piece, parts)) for parts in found]


# -- the zygote's packets -----------------------------------------------------------------------------------------------------


def zygote_packet(data: bytes) -> None:
    """A packet is refused as `BadRequest`, or is one that encodes again to the same; the end of the connection is an empty one."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        if data:
            near.send(data)
        else:
            near.close()
        try:
            packet, fds = receive_packet(far)
        except BadRequest:
            return
    assert fds == []
    assert (packet is None) == (not data)
    if packet is not None:
        assert same(msgspec.msgpack.decode(msgspec.msgpack.encode(packet), type=type(packet)), packet)


def zygote_packets() -> list[bytes]:
    spec = msgspec.msgpack.encode(WorkerSpec("web1", "/run", "/state", "/etc", Settings()))
    packets = [
        Fork("web1", spec),
        Forked("web1", 7),
        NotForked("web1", "why"),
        Exited(7, -9, "web1"),
        Keep("web1", "monitor"),
        Drop("web1"),
        Quit(),
    ]
    not_text = pack({"type": "Drop", "vm": "??"}).replace(b"??", b"\xff\xfe")
    return [*map(msgspec.msgpack.encode, packets), not_text, b"\x81\xa4type\xa1\xff", *HOSTILE_MSGPACK]
