# SPDX-License-Identifier: Apache-2.0
"""Targets for a worker: what QEMU and the guest agent say, what a client's request holds, and what is kept of it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final

import msgspec

from vmloop.common.definition import definition_from_mapping, definition_from_toml, definition_to_toml
from vmloop.common.errors import BadRequest, ConfigError
from vmloop.common.names import VmName
from vmloop.common.pack import pack, unpack_map
from vmloop.common.page import Page
from vmloop.common.wire import decode
from vmloop.worker.agent.lines import Lines
from vmloop.worker.agent.sync import Conversation, NotAReply, Whose, agent_error, read_reply
from vmloop.worker.changes import Known, difference, jobs_of, note
from vmloop.worker.events import MAX_EVENT_BYTES, EventLog
from vmloop.worker.handlers.fields import flag, items, mapping, number, plain, text
from vmloop.worker.handlers.naming import parse_task
from vmloop.worker.handlers.report import clean, newest
from vmloop.worker.journal.store import EventStore
from vmloop.worker.qemu.simulated_json import Input, JsonStream, to_line
from vmloop.worker.qmp.commands import microseconds, qmp_error, read_greeting
from vmloop.worker.transitions import of_event, of_status
from vmloop.worker.verbs.request import parse_arguments
from vmloop.worker.verbs.table import VERBS

from ..fakes.qmp_peer import QmpPeer
from ..fakes.session_bench import Life, SessionBench
from ..unit.test_worker_framing import run as read_with_deaths
from .choices import Choices, script
from .file_targets import directory
from .values import HOSTILE_JSON, HOSTILE_MSGPACK, huge_integer

SMALL_LINE: Final = 4096  # bytes of one line, where lines that are too long shall come up


# -- the monitor ----------------------------------------------------------------------------------------------------------------


def monitor(data: bytes) -> None:
    """Whatever QEMU says: the session goes on or ends, and everybody who asked is told exactly once."""

    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer, "oob")
        asked = [life.submit(f"command-{n}") for n in range(3)] + [life.submit("urgent", oob=True)]
        for _, said in Choices(data).steps():
            if life.vm.ends:
                break
            peer.say(said + b"\n")
            for _ in range(3):
                await asyncio.sleep(0)
        life.session.close("the target is over")
        assert [outcome.told for outcome in asked] == [1, 1, 1, 1]
        for name, kept, at in life.vm.events:
            assert 0 < len(name) <= 200
            assert isinstance(kept, dict)
            assert at > 0 or at == 0

    with directory() as root, SessionBench(root, max_line=SMALL_LINE) as bench:
        bench.run(live)


def monitor_scripts() -> list[bytes]:
    # 1 was the negotiation; 2 to 4 are in-band commands, 5 is the urgent one
    said = [
        b'{"return": {}, "id": 2}',
        b'{"return": {}, "id": 4}',
        b'{"error": {"class": "GenericError", "desc": "no"}, "id": 3}',
        b'{"error": [], "id": 3}',
        b'{"return": 1, "id": 5}',
        b'{"return": 1, "id": 5.0}',
        b'{"return": 1, "id": true}',
        b'{"return": 1}',
        b'{"event": "STOP", "data": {}, "timestamp": {"seconds": 5, "microseconds": 250}}',
        b'{"event": "STOP", "data": [], "timestamp": {"seconds": -1, "microseconds": -1}}',
        b'{"event": "", "data": {}}',
        b'{"event": {}, "data": {}}',
        b'{"QMP": {"version": {"qemu": [7, 2]}, "capabilities": [[], {}]}}',
        b"[]",
        b"x" * (SMALL_LINE + 1),
    ]
    single = [script((0, line)) for line in (*said, *HOSTILE_JSON[:1], *HOSTILE_JSON[2:])]
    nested = [
        script((0, b'{"event": "A", "data": {"a": ' + value + b"}}")) for value in HOSTILE_JSON if len(value) < 4000
    ]
    return [script(*((0, line) for line in said)), *single, *nested]


def monitor_bytes(data: bytes) -> None:
    """Every line once and in order, however it is cut and whenever its readers die."""
    choices = Choices(data)
    kills = [choices.number(40) for _ in range(choices.number(5))]
    writes = [content for _, content in choices.steps() if content]
    lines = b"".join(writes).split(b"\n")
    if lines[-1]:
        writes.append(b"\n")
    else:
        lines.pop()
    read_with_deaths(writes, lines, kills)


def monitor_chunks() -> list[bytes]:
    calm, deadly = bytes([0]), bytes([4, 1, 5, 9, 13])
    contents = (b"a\nbb\nccc\n", b"half", b" a line\n", b"\n\n\n", b"x" * 9000, b"\r\n", bytes(range(256)))
    whole = script(*((0, content) for content in contents))
    long = script(*((0, b"y" * 60_000) for _ in range(4)), (0, b"\nz\n"))
    return [head + body for head in (calm, deadly) for body in (whole, long)]


def said_by_qemu(data: bytes) -> None:
    """Any JSON where an event's data, a greeting, an error or a status is expected: it is read, kept in bounds, and can be sent on."""
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return
    read_greeting(value)
    microseconds(value)
    of_status(value)
    for error in (qmp_error("x", value), agent_error("x", value)):
        pack(error.to_wire())
    members = mapping(value)
    for key in list(members)[:8]:
        pack([text(members, key), flag(members, key), number(members, key)])
    items(value)
    pack(plain(value))
    with directory() as root, Page(root / "page", writable=True) as page:
        sent: list[bytes] = []
        store = EventStore(root / "journal")
        log = EventLog(VmName("web1"), page, sent.append, store)
        made = log.emit("X" * (len(data) % 200 + 1), value if isinstance(value, dict) else {"a": value}, "qmp", 1)
        message = decode(sent[0])
        assert len(message.body) <= MAX_EVENT_BYTES
        assert unpack_map(message.body)["seq"] == made.seq == 1
        for state in _STATES:
            of_event(state, "WATCHDOG", made.data, "")
        store.close()
    known = Known(jobs=jobs_of(value))
    for name in ("JOB_STATUS_CHANGE", "VSERPORT_CHANGE", "VM_STATE"):
        note(known, msgspec.structs.replace(made, event=name), "port")
    pack(difference(known, Known()))


def json_values() -> list[bytes]:
    return [
        b'{"status": "running", "running": true, "singlestep": false}',
        b'{"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": "x"}, "capabilities": ["oob"]}',
        b'{"class": "CommandNotFound", "desc": "has been disabled"}',
        b'{"action": "pause", "info": {"type": "hyper-v", "arg1": 18446744073709551615}}',
        b'{"seconds": 5, "microseconds": 999999}',
        b'{"a": "' + b"x" * 300_000 + b'"}',
        b'{"desc": "\\ud83d\\ude00"}',
        *(huge_integer(depth) for depth in (0, 100, 400, 600, 900)),
        *HOSTILE_JSON,
    ]


# -- the guest agent ------------------------------------------------------------------------------------------------------------

FEED, SYNC, SENT, GIVE_UP, CUT, LOST = range(6)


def agent(data: bytes) -> None:
    """Whatever a guest says: bounded lines, the same however they are cut, and a reply is only ever given to who is owed one.

    `@S` and `@C` in what is said stand for the numbers of the sync and of the command that are under way.
    """
    lines, cut = Lines(SMALL_LINE), Lines(SMALL_LINE)
    conversation = Conversation()
    sync = current = 0
    for what, content in Choices(data).steps():
        if what % 6 == FEED:
            content = content.replace(b"@S", b"%d" % sync).replace(b"@C", b"%d" % current)
            got = lines.feed(content)
            half = len(content) // 2
            assert got == cut.feed(content[:half]) + cut.feed(content[half:])
            assert lines.held <= SMALL_LINE
            for line in got:
                assert 0 < len(line) <= SMALL_LINE
                assert b"\n" not in line
                assert b"\xff" not in line
                sync, current = _on_line(conversation, line, sync, current)
        elif what % 6 == SYNC:
            sync = int(conversation.sync()[1:].split(b'"id":')[1].split(b",")[0].rstrip(b"}\n"))
        elif what % 6 == SENT and conversation.synced and not current:
            current = 1_000_000 + len(content)
            conversation.sent(current)
        elif what % 6 in (GIVE_UP, CUT, LOST):
            (conversation.give_up, conversation.cut, conversation.lost)[what % 6 - GIVE_UP]()
            sync, current = (0, 0) if what % 6 == LOST else (sync, 0)


def _on_line(conversation: Conversation, line: bytes, sync: int, current: int) -> tuple[int, int]:
    was_synced = conversation.synced
    try:
        reply = read_reply(line)
    except NotAReply:
        return sync, current
    whose, number = conversation.take(reply)
    with contextlib.suppress(NotAReply):
        decoded = reply.decoded()
        assert set(decoded) in ({"return"}, {"error"})
    if whose is Whose.ANSWER:
        assert was_synced
        assert number == current != 0
        return sync, 0
    if whose is Whose.SYNC:
        assert sync
        assert conversation.synced
        return 0, current
    assert (number != 0) == (whose is Whose.LATE)
    return sync, current


def agent_scripts() -> list[bytes]:
    synced = [(SYNC, b""), (FEED, b'\xff{"return": @S, "id": @S}\n')]
    asked = [*synced, (SENT, b"x")]
    scripts = [
        [*asked, (FEED, b'{"return": {"a": [1, 2]}, "id": @C}\n')],
        [*asked, (FEED, b'{"return": {}}\n{"return": {}}\n')],
        [*asked, (FEED, b'{"error": {"class": "X", "desc": "y"}}\n')],
        [*asked, (GIVE_UP, b""), (SYNC, b""), (FEED, b'{"return": 5}\n{"return": @S}\n')],
        [*asked, (CUT, b""), (SYNC, b""), (FEED, b'{"error": {"desc": "JSON parse error"}}\n\xff{"return": @S}\n')],
        [*asked, (LOST, b""), (SYNC, b""), (SYNC, b""), (FEED, b'{"return": 0, "error": {}}\n')],
        [*synced, (FEED, b"x" * (SMALL_LINE + 1) + b"\n\xff\xff\n\n"), (FEED, b"y" * SMALL_LINE), (FEED, b"z\nq\n")],
        *([*asked, (FEED, b'{"return": ' + value + b', "id": @C}\n')] for value in HOSTILE_JSON if len(value) < 6000),
        *(
            [(SYNC, b""), (FEED, b'{"id": ' + value + b', "return": 1}\n')]
            for value in HOSTILE_JSON
            if len(value) < 6000
        ),
    ]
    return [script(*steps) for steps in scripts]


# -- requests -------------------------------------------------------------------------------------------------------------------


def arguments(data: bytes) -> None:
    """For each operation: refused as `BadRequest`, or arguments that are the same when they are sent again; so is a definition in them."""
    for verb in VERBS.values():
        try:
            found = parse_arguments(verb, data)
        except BadRequest:
            continue
        if not _holds_extensions(found):
            again = parse_arguments(verb, msgspec.msgpack.encode(found))
            assert msgspec.msgpack.encode(again) == msgspec.msgpack.encode(found)
        given = getattr(found, "definition", None)
        if given is not None:
            _define(given)


def _define(given: object) -> None:
    try:
        definition = definition_from_mapping(given, "here")
    except ConfigError:
        return
    assert definition_from_toml(definition_to_toml(definition), "again") == definition


def _holds_extensions(found: object) -> bool:
    try:
        msgspec.msgpack.encode(found)
    except (OverflowError, RecursionError, TypeError, ValueError):
        return True
    return False


def argument_bodies() -> list[bytes]:
    definition = {
        "name": "web1",
        "qemu": {"binary": "simulated", "args": ["-m", "\x7f\u2028"]},
        "agent": {"timeout": 5},
    }
    bodies: list[Any] = [
        {},
        {"command": "query-status", "arguments": {"a": [1, None, 1.5]}, "oob": True},
        {"line": "info status"},
        {"definition": definition},
        {"definition": {"name": "web1", "qemu": {"binarry": 1}}},
        {"definition": {"name": "a", "agent": {"timeout": float("nan")}, "handlers": {"load": ["x" * 65]}}},
        {"since": "3.17", "names": ["STOP"], "limit": 10},
        {"timeout": 1.5, "force": True},
        {"qmp": "/run/x.sock", "agent": None, "pid": 7},
        {"command": "guest-fsfreeze-freeze", "hold": True, "limit": 5.0},
    ]
    hostile = [b"\x81\xa9arguments" + value for value in HOSTILE_MSGPACK]
    return [
        *map(pack, bodies),
        *HOSTILE_MSGPACK,
        *hostile,
        *(b"\x81\xaadefinition" + value for value in HOSTILE_MSGPACK),
    ]


# -- text from anywhere ---------------------------------------------------------------------------------------------------------


def output(data: bytes) -> None:
    """What a hook or handler printed, and what stands on a page: text that every encoder takes."""
    for made in (clean(data), newest(data.decode("utf-8", "surrogateescape"))):
        assert "\0" not in made
        pack(made)
    culprit = parse_task(data.decode("utf-8", "replace"))
    if culprit is not None:
        assert culprit.label
        assert culprit.seq >= 0


def outputs() -> list[bytes]:
    tasks = [
        b"handler mail.on_error on STOP 17",
        b"thread a.b",
        b"hook 50-mail on A B C 9",
        b"loading handlers/mail.py",
    ]
    return [
        *tasks,
        b"handler a on X " + b"9" * 5000,
        b"\xff\0\xed\xa0\x80",
        "é".encode() * 5000,
        b"loading handlers/",
        b"loop",
    ]


# -- the stand-in for QEMU ------------------------------------------------------------------------------------------------------


def simulated(data: bytes) -> None:
    """The simulated VM's JSON reader: the same inputs however the bytes are cut, and each of them can be written."""
    whole, cut = JsonStream(), JsonStream()
    whole.feed(data)
    found = _inputs(whole)
    half = len(data) // 2
    cut.feed(data[:half])
    first = _inputs(cut)
    cut.feed(data[half:])
    assert repr([*first, *_inputs(cut)]) == repr(found)
    for item in found:
        if item.error is None:
            to_line(item.value)


def _inputs(stream: JsonStream) -> list[Input]:
    found = []
    while (item := stream.take()) is not None:
        found.append(item)
    return found


def simulated_inputs() -> list[bytes]:
    return [
        b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}\n{"exec-oob": "x", "id": 1}',
        b"{'execute': 'guest-sync-delimited', 'arguments': {'id': 5}}\n",
        b'\xff{"execute": "a"}{"execute": "b"}[1, 2.5e3, null, true]',
        b"[" * 505 + b"]" * 505,  # more than Python can parse recursively
        b'{"a": tru}{"a" 1}{,}]}{"a": "\\u12"}',
        *(value for value in HOSTILE_JSON if len(value) < 4000),
    ]


_STATES: Final = tuple(type(of_status({}).state))
