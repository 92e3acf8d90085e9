# SPDX-License-Identifier: Apache-2.0
"""Targets for the client: answers from whoever sits at the broker's socket, events from PUB, and words of the command line."""

from __future__ import annotations

import contextlib
from typing import Any, Final

import click

from vmloop.client import requests
from vmloop.client.calls import Calls, new_call
from vmloop.client.cli.monitor import parse_arguments
from vmloop.client.guest_answers import fitting, from_base64
from vmloop.client.results import BrokerVersion, VmStats, VmSummary, typed
from vmloop.client.stream import EVENTS_LOST, Event, Fetch, Page, Stream, page_of, positions_of
from vmloop.common.cursor import Cursor
from vmloop.common.errors import AgentError, BadRequest, Internal, VmloopError
from vmloop.common.names import VmName, vm_name
from vmloop.common.pack import pack, unpack
from vmloop.common.wire import Kind, Message, encode

from .choices import Choices, script
from .values import HOSTILE_JSON, HOSTILE_MSGPACK

MAX_EVENTS: Final = 10_000  # handed out by one script: a stream that never comes to rest is found


def answers(data: bytes) -> None:
    """Frames of any bytes: never an exception, and a call that has moved is finished with a value or an error, or has parts."""
    calls = Calls("ipc://nowhere")
    asked = [
        new_call(requests.qmp("vm/web1", "query-status", {}, False, False, None, None), 5.0),
        new_call(requests.events("vm/web1", "1.0", 10), 5.0, streaming=True),
    ]
    for call in asked:
        calls.frame_of(call)
    for _, frame in Choices(data).steps():
        moved = calls.receive(frame)
        assert moved is None or moved in asked
    for call in asked:
        if call.finished:
            with contextlib.suppress(VmloopError):
                call.result()
        else:
            call.finish(None, Internal("the target is over"))


def answer_scripts() -> list[bytes]:
    found = []
    for body in (pack({"return": {}}), pack({"code": "busy", "message": "full"}), *HOSTILE_MSGPACK):
        found += [
            script(*((0, encode(Message(kind, id=number, body=body))) for number in (1, 2, 2, 3)))
            for kind in (Kind.REPLY, Kind.PARTIAL, Kind.ERROR)
        ]
    good = encode(Message(Kind.REPLY, id=1, body=b"\xc0"))
    return [*found, script((0, good[:7] + b"\xff" + good[8:]), (0, good[:41]), (0, good[:4] + b"\x63" + good[5:]))]


ARRIVED, FETCHED, FAILED, KNOWN = range(4)


def stream(data: bytes) -> None:
    """Any events, answers and positions: no exception, a VM's events come in order and once, and only VMs' names are asked for."""
    subject = Stream(() if data[:1] != b"\1" else (VmName("web1"),))
    newest: dict[str, Cursor] = {}
    handed_out = 0
    for number, content in Choices(data[1:]).steps():
        _tell(subject, number % 4, content)
        while isinstance(step := subject.step(), Event):
            handed_out += 1
            assert handed_out < MAX_EVENTS
            if step.vm and step.seq > 0:
                before = newest.get(step.vm, Cursor(0, 0))
                assert step.cursor > before or step.cursor.epoch < before.epoch, f"{step} after {before}"
                newest[step.vm] = step.cursor
        if isinstance(step, Fetch):
            vm_name(step.vm)
            step.request()


def _tell(subject: Stream, what: int, content: bytes) -> None:
    if what == ARRIVED:
        subject.arrived(content)
        return
    try:
        value = unpack(content)
    except BadRequest:
        return
    if what == FETCHED:
        subject.fetched(Page(value, more=False) if isinstance(value, list) else page_of([value], value))
    elif what == FAILED:
        subject.fetch_failed(BadRequest("no"))
    else:
        try:
            subject.known(positions_of(typed(value, list[VmSummary])))
        except Internal:
            return


def stream_scripts() -> list[bytes]:
    def event(seq: int, epoch: int = 1, vm: object = "web1", **more: object) -> bytes:
        return pack({"vm": vm, "epoch": epoch, "seq": seq, "time": 5, "event": "STOP", "data": {}, **more})

    scripts = [
        script((ARRIVED, event(1)), (ARRIVED, event(2)), (ARRIVED, event(2)), (ARRIVED, event(5))),
        script((ARRIVED, event(1)), (ARRIVED, event(4)), (FETCHED, b"\x92" + event(2) + event(3)), (FETCHED, b"\x90")),
        script((ARRIVED, event(9)), (ARRIVED, event(1, 2)), (FAILED, b"\xc0"), (ARRIVED, event(1, 1))),
        script((KNOWN, pack([{"name": "web1", "state": "running", "epoch": 2, "seq": 5}])), (FETCHED, b"\x90")),
        script((KNOWN, pack([{"name": "../x", "state": "", "epoch": 2, "seq": 5}]))),
        script((ARRIVED, event(5, vm="../x"))),
        script((ARRIVED, event(5, vm="a" * 65)), (ARRIVED, event(5, -1)), (ARRIVED, event(5, 1 << 33))),
        script((ARRIVED, event((1 << 64) - 1)), (ARRIVED, event(-5)), (ARRIVED, event(1, event=EVENTS_LOST))),
        *(script((ARRIVED, hostile), (FETCHED, b"\x91" + hostile), (KNOWN, hostile)) for hostile in HOSTILE_MSGPACK),
        *(script((ARRIVED, event(1)[:-1] + hostile)) for hostile in HOSTILE_MSGPACK),
    ]
    return [first + each for each in scripts for first in (b"\0", b"\1")]


def results(data: bytes) -> None:
    """An answer is what its operation gives, or an error that says it is not."""
    try:
        value = unpack(data)
    except BadRequest:
        return
    models: tuple[Any, ...] = (VmSummary, VmStats, BrokerVersion, list[VmSummary], dict[str, Any])
    for model in models:
        with contextlib.suppress(Internal):
            typed(value, model)
        with contextlib.suppress(AgentError):
            fitting(value, model, "vm/web1", "guest-exec")
    if isinstance(value, str):
        with contextlib.suppress(AgentError):
            from_base64(value, "vm/web1", "guest-file-read")


def result_bodies() -> list[bytes]:
    summary = {"name": "web1", "state": "running", "since": 1.5, "epoch": 1, "seq": 2, "pid": None, "new": 1}
    return [
        pack(summary),
        pack([summary, summary]),
        pack({"version": "1"}),
        pack("aGVsbG8="),
        pack("é"),
        *HOSTILE_MSGPACK,
    ]


def words(data: bytes) -> None:
    """Words of a command line are refused as `UsageError`, or are arguments that are sent or refused as `BadRequest`."""
    given = tuple(word.decode("utf-8", "surrogateescape") for word in data.split(b"\0"))
    try:
        arguments = parse_arguments(given)
    except click.UsageError:
        return
    with contextlib.suppress(BadRequest):
        new_call(requests.qmp("vm/web1", "x", arguments, False, False, None, None), 5.0)


def command_lines() -> list[bytes]:
    return [
        b"node-name=d0\0driver=raw\0file.driver=file\0file.filename=/img/d0",
        b'{"a": {"b": [1, 2.5, null]}}',
        b"a=1\0a.b=2",
        b"a.b=2\0a=1",
        b".=1",
        b"a=\xff",
        b"a." * 2000 + b"b=1",
        *(b"a=" + value for value in HOSTILE_JSON),
        *(b'{"a":' + value + b"}" for value in HOSTILE_JSON),
    ]
