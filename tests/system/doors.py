# SPDX-License-Identifier: Apache-2.0
"""Raw ZeroMQ sockets at the broker's two doors, for tests that say what no client of ours would. Used by the system tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import zmq

from vmloop.common.majordomo import Dialect, Envelope, build_request
from vmloop.common.pack import pack, unpack
from vmloop.common.sockets import ipc
from vmloop.common.wire import Kind, Message, decode, encode

ANSWER_SECONDS: Final = 10.0
# Ids of the pings that a test sends to see that nothing came before their answers.
PING_ID: Final = 0x50494E47


class Door:
    """One socket, connected. Answers to requests that the broker carries out itself come in the order of the requests."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket

    def send(self, *frames: bytes) -> None:
        """One message."""
        assert self.socket.poll(int(ANSWER_SECONDS * 1000), zmq.POLLOUT), "the broker takes nothing"
        self.socket.send_multipart(frames)

    def receive(self, seconds: float = ANSWER_SECONDS) -> list[bytes]:
        """The next message."""
        assert self.socket.poll(int(seconds * 1000)), "no answer in time"
        return self.socket.recv_multipart()

    def ask(self, service: str, op: str, arguments: object = None, **fields: Any) -> tuple[Message, Any]:
        """A native request; the answer and its unpacked body."""
        self.send(request(service, op, arguments, **fields))
        return self.answer()

    def answer(self) -> tuple[Message, Any]:
        """The next native answer, with its unpacked body."""
        (frame,) = self.receive()
        message = decode(frame)
        return message, unpack(message.body)

    def error(self, *frames: bytes) -> dict[str, Any]:
        """Send a message whose answer is a native error with the message's own id; its body."""
        self.send(*frames)
        message, body = self.answer()
        assert message.kind is Kind.ERROR, (message.kind, body)
        assert message.id == int.from_bytes(frames[0][8:16], "little")
        return dict(body)

    def is_silent(self) -> bool:
        """Whether nothing sent so far was answered: the answer to a ping is the next thing that comes."""
        self.send(request("vmloop", "ping", id=PING_ID))
        (frame,) = self.receive()
        return decode(frame).id == PING_ID


def request(service: str, op: str, arguments: object = None, **fields: Any) -> bytes:
    """The native frame of a request."""
    body = fields.pop("body", None)
    packed = body if body is not None else pack(arguments) if arguments is not None else b""
    return encode(Message(kind=Kind.REQUEST, service=service, op=op, body=packed, **{"id": 7, **fields}))


@contextmanager
def door(path: Path, kind: int = zmq.DEALER) -> Iterator[Door]:
    """A socket at run/client.sock or run/worker.sock. No high-water mark: a test sends what it wants to send."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(kind)
    try:
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(ipc(path))
        yield Door(socket)
    finally:
        socket.close()
        context.term()


class Majordomo:
    """A Majordomo client in one dialect: what a program in another language would send."""

    def __init__(self, opened: Door, dialect: Dialect, *, delimited: bool) -> None:
        self.door = opened
        self.dialect = dialect
        self.delimited = delimited

    def envelope(self, service: str) -> Envelope:
        return Envelope(self.dialect, self.delimited, service)

    def ask(self, service: str, op: str, arguments: object = None, **header: Any) -> list[tuple[dict[str, Any], Any]]:
        """All parts of the answer in order, as (header, payload); for MDP/0.1 there is one."""
        payload = pack(arguments) if arguments is not None else None
        self.door.send(*build_request(self.envelope(service), {"op": op, **header}, payload))
        parts = []
        while True:
            final, head, body = self.receive(service)
            parts.append((head, body))
            if final:
                return parts

    def receive(self, service: str) -> tuple[bool, dict[str, Any], Any]:
        """One answer: whether it is the last, its header, its payload. Every frame before these is checked."""
        frames = self.door.receive()
        expected = [b""] if self.delimited else []
        expected.append(self.dialect.value)
        assert frames[: len(expected)] == expected
        rest = frames[len(expected) :]
        final = True
        if self.dialect is Dialect.V02:
            command = rest.pop(0)
            assert command in (b"\x02", b"\x03")
            final = command == b"\x03"
        assert rest.pop(0) == service.encode()
        header, payload = rest
        return final, unpack(header), unpack(payload)


def open_files(pid: int) -> int:
    """How many file descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_bytes(pid: int) -> int:
    """The memory of a process that is its own and in RAM."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024
