# SPDX-License-Identifier: Apache-2.0
"""Targets for the broker: any messages at its two doors, in any order, with time passing between them."""

from __future__ import annotations

from typing import Final

from vmloop.broker.actions import Publish, ToClient, ToWorker
from vmloop.common.majordomo import Dialect, Envelope, build_request
from vmloop.common.pack import pack
from vmloop.common.wire import Kind, Message, decode, encode

from ..fakes.broker_desk import CLIENT, Desk
from .choices import Choices, piece, script
from .values import HOSTILE_MSGPACK

CLIENT_NATIVE, CLIENT_PARTS, WORKER, STRANGER, TIME, GONE = range(6)
LONGEST: Final = 4000.0  # seconds; over the longest timeout of a request


def doors(data: bytes) -> None:
    """The core raises nothing, every answer can be sent, what a worker gets can be decoded, and in the end nothing is in flight."""
    desk = Desk()
    desk.known("off")
    worker = desk.worker("web1")
    for number, content in Choices(data).steps():
        _step(desk, worker.identity, number % 6, content)
    for service, op in (("vmloop", "list"), ("vmloop", "stats"), ("vm/web1", "show"), ("vm/off", "show")):
        desk.ask(op, service, client=b"another")
    _check(desk)
    for _ in range(3):  # what a deadline begins may have a deadline itself
        desk.tick(LONGEST)
    assert len(desk.core.inflight) == 0
    assert desk.core.inflight.next_due() is None
    _check(desk)


def _step(desk: Desk, worker: bytes, what: int, content: bytes) -> None:
    match what:
        case 0:
            desk.core.on_client(CLIENT, [content], desk.now)
        case 1:
            choices = Choices(content)
            parts = [choices.piece() for _ in range(choices.number(9))]
            desk.core.on_client(CLIENT, parts, desk.now)
        case 2:
            desk.core.on_worker(worker, [content], desk.now)
        case 3:
            desk.core.on_worker(b"stranger", [content], desk.now)
        case 4:
            desk.tick(len(content) / 10)
        case _:
            desk.core.on_client_gone(CLIENT)
    due = desk.core.next_due()
    assert due is None or due == due


def _check(desk: Desk) -> None:
    for action in desk.core.actions:
        if isinstance(action, ToClient):
            assert all(isinstance(frame, bytes) for frame in action.frames)
        elif isinstance(action, ToWorker):
            decode(action.frame)
        elif isinstance(action, Publish):
            assert b"/" in action.topic
    desk.core.actions.clear()


def messages() -> list[bytes]:
    """Scripts of real messages: each operation, both dialects, a worker's life."""

    def native(kind: Kind, service: str, op: str, body: object = None, number: int = 7) -> bytes:
        return encode(Message(kind, service, op, number, pack(body or {}), seconds=5.0, epoch=1, seq=2))

    status = {"worker_pid": 101, "worker_ticks": 5, "incarnation": 2, "state": "running", "alive": True, "started": 1.0}
    operations = ("ping", "version", "list", "stats", "define", "undefine", "start", "attach", "capabilities")
    host = [(CLIENT_NATIVE, native(Kind.REQUEST, "vmloop", op, {"name": "off"})) for op in operations]
    definition = {"definition": {"name": "off", "qemu": {"binary": "simulated"}}}
    first = 1001  # the desk's first number: an answer to the request before it
    reply = (WORKER, native(Kind.REPLY, "", "", {"return": 1}, first))
    life = [(WORKER, native(kind, "vm/web1", "", status)) for kind in (Kind.HELLO, Kind.STATUS, Kind.BYE)]
    odd = {"state": ["running"], "reason": {}, "since": "x", "alive": "no", "inherited": [1, "x"], "incarnation": -1}
    scripts = [
        script(*host),
        script((CLIENT_NATIVE, native(Kind.REQUEST, "vmloop", "define", definition)), (TIME, b"12345")),
        script((CLIENT_NATIVE, native(Kind.REQUEST, "vm/web1", "qmp")), reply, (GONE, b"")),
        script((CLIENT_NATIVE, native(Kind.REQUEST, "vm/web1", "kill")), *life),
        script((CLIENT_NATIVE, native(Kind.REQUEST, "vm/web1", "wait", {"state": "paused"})), *life, (TIME, b"1" * 99)),
        script((CLIENT_NATIVE, native(Kind.REQUEST, "vmloop", "shutdown", {"vms": "kill"})), *life),
        script((WORKER, native(Kind.STATUS, "vm/web1", "", {**status, **odd}))),
        script((STRANGER, native(Kind.HELLO, "vm/web1", "", {**status, **odd}))),
        script((STRANGER, native(Kind.HELLO, "vm/other", "", {**status, **odd, "incarnation": 1 << 63}))),
        script((WORKER, native(Kind.EVENT, "vm/web1", "STOP", {"event": "STOP"})), *life[:2]),
    ]
    whole = native(Kind.REQUEST, "vm/web1", "qmp", {"command": "x" * 99})
    for at, wrong in (
        (28, 65),
        (28, 255),
        (6, 255),
        (7, 255),
        (4, 0),
        (4, 9),
        (4, 255),
    ):  # lengths that do not fit; kinds
        scripts.append(
            script(*((door, whole[:at] + bytes([wrong]) + whole[at + 1 :]) for door in (CLIENT_NATIVE, WORKER)))
        )
    for dialect in Dialect:
        request = build_request(Envelope(dialect, False, "vm/web1"), {"op": "qmp", "id": 5}, pack({"command": "x"}))
        parts = bytes([len(request)]) + b"".join(map(piece, request))
        partial = (WORKER, native(Kind.PARTIAL, "", "", {}, first))
        scripts.append(script((CLIENT_PARTS, parts), partial, reply))
    for hostile in HOSTILE_MSGPACK:
        head = encode(Message(Kind.STATUS, "vm/web1"))
        request = build_request(Envelope(Dialect.V01, True, "vmloop"), {"op": "list"})[:-1]
        parts = bytes([len(request) + 1]) + b"".join(map(piece, [*request, hostile]))
        scripts.append(
            script((WORKER, head + hostile), (CLIENT_PARTS, parts), (WORKER, head + b"\x81\xa5facts" + hostile))
        )
    return scripts
