# SPDX-License-Identifier: Apache-2.0
"""A client without the library: one DEALER that speaks the native frame, has no keys, and sees every answer, a second one too."""

from __future__ import annotations

import itertools
import time
from typing import Any, Final

import msgspec
import zmq

from vmloop.common.errors import error_from_wire
from vmloop.common.pack import pack, unpack
from vmloop.common.paths import paths_under
from vmloop.common.sockets import ipc
from vmloop.common.wire import FLAG_READING, Kind, Message, decode, encode

from .commands import PACE, TIMEOUT, Ask, Stage, asks, ended
from .recording import NO_ANSWER, Command

WINDOW: Final = 8  # commands under way
# The broker answers a deadline a moment late; whoever knows nothing of a lost connection gives up so much later.
GRACE: Final = 1.0
TURN_MS: Final = 20


class _Sent(msgspec.Struct):
    ask: Ask
    began: float
    command: Command | None = None  # how it ended
    answers: int = 0


def raw(stage: Stage, client: str) -> None:
    """Run until the stage ends, and then until each command has its answer or is given up."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    sent: dict[int, _Sent] = {}
    try:
        socket.linger = 0
        socket.connect(ipc(paths_under(stage.root).client_socket))
        _converse(stage, client, socket, sent)
    finally:
        socket.close()
        context.term()
    for one in sent.values():
        if one.command is not None:
            stage.commands.append(msgspec.structs.replace(one.command, answers=one.answers))


def _converse(stage: Stage, client: str, socket: zmq.Socket[bytes], sent: dict[int, _Sent]) -> None:
    open_ones: dict[int, _Sent] = {}
    numbers = itertools.count(1)
    source = asks(stage, client)
    next_at = 0.0
    while open_ones or not stage.stop.is_set():
        now = time.monotonic()
        if not stage.stop.is_set() and len(open_ones) < WINDOW and now >= next_at:
            number = next(numbers)
            sent[number] = open_ones[number] = one = _Sent(_without_key(next(source)), now)
            socket.send(_frame(one.ask, number))
            next_at = now + PACE
        if socket.poll(TURN_MS):
            _take(client, decode(socket.recv()), sent, open_ones)
        for number, one in [*open_ones.items()]:
            if time.monotonic() > one.began + TIMEOUT + GRACE:
                del open_ones[number]
                one.command = msgspec.structs.replace(ended(client, one.ask, one.began, None), outcome=NO_ANSWER)


def _take(client: str, message: Message, sent: dict[int, _Sent], open_ones: dict[int, _Sent]) -> None:
    one = sent[message.id]  # an answer to nothing that was asked is a defect, and ends the client
    one.answers += 1
    if open_ones.pop(message.id, None) is None:
        if one.command is not None and one.command.outcome == NO_ANSWER:
            one.answers = 1  # late, and the only one
        return
    body: Any = unpack(message.body) if message.body else None
    error = error_from_wire(body) if message.kind is Kind.ERROR else None
    one.command = ended(client, one.ask, one.began, error)


def _without_key(ask: Ask) -> Ask:
    return msgspec.structs.replace(ask, request=msgspec.structs.replace(ask.request, key=b""), again=False)


def _frame(ask: Ask, number: int) -> bytes:
    request = ask.request
    return encode(
        Message(
            kind=Kind.REQUEST,
            service=request.service,
            op=request.op,
            id=number,
            body=pack(request.arguments),
            flags=FLAG_READING if request.reading else 0,
            seconds=TIMEOUT,
        )
    )
