# SPDX-License-Identifier: Apache-2.0
"""docs/protocol.md and docs/operations.md against the code: every example is decoded and encoded again, every table is complete.

An example is a block that opens with "frame KIND name=NAME": lines of hexadecimal, `-- frame …` before each frame if there are several, and
lines that begin with `=` and hold, put together, what it decodes to as JSON.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

import vmloop
from vmloop.broker.core import _OF_THE_HOST
from vmloop.broker.host import HostCore
from vmloop.common.errors import BadRequest, type_of_code
from vmloop.common.majordomo import (
    FINAL,
    PARTIAL,
    Dialect,
    Envelope,
    MajordomoRequest,
    MmiRequest,
    build_mmi_reply,
    build_reply,
    build_request,
    parse_request,
)
from vmloop.common.names import VmName
from vmloop.common.pack import pack, unpack
from vmloop.common.settings import Settings
from vmloop.common.wire import Kind, Message, decode, encode
from vmloop.common.zygote_wire import Packet
from vmloop.worker.handlers.event_names import require_free_name
from vmloop.worker.verbs.table import VERBS

ROOT = Path(vmloop.__file__).parent
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()

# What the Majordomo header and the dialects are called in the document.
DIALECTS = {"MDP/0.1": Dialect.V01, "MDP/0.2": Dialect.V02}


class Example(NamedTuple):
    """One block of the document."""

    kind: str
    name: str
    frames: list[bytes]
    values: dict[str, Any]


def read_examples(text: str) -> Iterator[Example]:
    for kind, name, block in re.findall(r"^```frame (\S+) name=(\S+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        frames: list[bytes] = []
        values = ""
        for line in block.splitlines():
            if line.startswith("-- frame"):
                frames.append(b"")
            elif line.startswith("= "):
                values += line[2:]
            else:
                frames = frames or [b""]
                frames[-1] += bytes.fromhex(line.partition("#")[0])
        yield Example(kind, name, frames, json.loads(values))


EXAMPLES = list(read_examples(PROTOCOL))


def of_kind(*kinds: str) -> pytest.MarkDecorator:
    """Parametrize a test with the examples of some kinds."""
    chosen = [example for example in EXAMPLES if example.kind in kinds]
    assert chosen
    return pytest.mark.parametrize("example", chosen, ids=lambda example: example.name)


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next of the same level or above."""
    level = len(heading) - len(heading.lstrip("#"))
    _, found, rest = text.partition(f"\n{heading}")
    assert found, heading
    return re.split(rf"^#{{1,{level}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def named_in_tables(text: str) -> list[str]:
    """Every name in backquotes in the first column of the tables of a text."""
    return [name for cell in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`(.+?)`", cell)]


# -- the examples ---------------------------------------------------------------------------------------------------------


def test_names_of_examples_are_unique() -> None:
    names = [example.name for example in EXAMPLES]
    assert len(names) == len(set(names))


@of_kind("native")
def test_a_native_frame_is_what_stands_beside_it(example: Example) -> None:
    check_native(example)


def test_an_example_that_is_wrong_is_found() -> None:
    block = re.search(r"^```frame native name=request\n.*?^```$", PROTOCOL, re.MULTILINE | re.DOTALL)
    assert block is not None
    (right,) = read_examples(block[0])
    check_native(right)
    (wrong,) = read_examples(block[0].replace("76 6d 2f 77", "76 6d 2f 78", 1))
    with pytest.raises(AssertionError):
        check_native(wrong)


def check_native(example: Example) -> None:
    (frame,) = example.frames
    message = decode(frame)
    assert encode(message) == frame
    body = None if not message.body else unpack(message.body)
    found = {
        "kind": message.kind.name.lower(),
        "flags": message.flags,
        "id": message.id,
        "seconds": message.seconds,
        "epoch": message.epoch,
        "seq": message.seq,
        "service": message.service,
        "op": message.op,
        "key": message.key.decode(),
        "body": body,
    }
    assert found == example.values
    made = Message(
        **{
            **example.values,
            "kind": Kind[example.values["kind"].upper()],
            "key": example.values["key"].encode(),
            "body": b"" if example.values["body"] is None else pack(example.values["body"]),
        }
    )
    assert encode(made) == frame, encode(made).hex(" ")


@of_kind("majordomo-request")
def test_a_majordomo_request_is_what_stands_beside_it(example: Example) -> None:
    request = parse_request(example.frames)
    assert isinstance(request, MajordomoRequest)
    values = example.values
    envelope = Envelope(DIALECTS[values["dialect"]], values["delimited"], values["service"])
    header = values["header"]
    payload = None if values["payload"] is None else pack(values["payload"])
    assert request == MajordomoRequest(
        envelope,
        header["op"],
        payload or b"",
        header.get("id"),
        header.get("timeout"),
        header.get("key", "").encode(),
        header.get("reading", False),
    )
    assert build_request(envelope, header, payload) == example.frames


@of_kind("majordomo-reply")
def test_a_majordomo_reply_is_what_stands_beside_it(example: Example) -> None:
    values = example.values
    header = values["header"]
    envelope = Envelope(DIALECTS[values["dialect"]], values["delimited"], values["service"])
    assert unpack(example.frames[-2]) == header
    assert unpack(example.frames[-1]) == values["payload"]
    assert values["command"] == (None if envelope.dialect is Dialect.V01 else command_of(example.frames))
    made = build_reply(
        envelope,
        ok=header["ok"],
        body=pack(values["payload"]),
        client_id=header.get("id"),
        cursor=header.get("cursor"),
        seconds=header["ms"] / 1000,
        final=values["command"] != "PARTIAL",
    )
    assert made == example.frames


def command_of(frames: list[bytes]) -> str:
    return {PARTIAL: "PARTIAL", FINAL: "FINAL"}[frames[frames.index(Dialect.V02.value) + 1]]


@of_kind("mmi-request", "mmi-reply")
def test_an_mmi_example_is_what_stands_beside_it(example: Example) -> None:
    values = example.values
    envelope = Envelope(DIALECTS[values["dialect"]], values["delimited"], values["service"])
    if example.kind == "mmi-reply":
        assert build_mmi_reply(envelope, values["status"]) == example.frames
        return
    assert parse_request(example.frames) == MmiRequest(envelope, values["asked"])
    command = [b"\x01"] if envelope.dialect is Dialect.V02 else []
    first = [b""] if envelope.delimited else []
    assert [*first, envelope.dialect.value, *command, b"mmi.service", values["asked"].encode()] == example.frames


@of_kind("pub")
def test_a_published_event_is_what_stands_beside_it(example: Example) -> None:
    topic, body = example.frames
    assert topic.decode() == example.values["topic"]
    assert unpack(body) == example.values["event"]
    assert pack(example.values["event"]) == body


@of_kind("zygote")
def test_a_packet_of_the_zygote_is_what_stands_beside_it(example: Example) -> None:
    (raw,) = example.frames
    packet = msgspec.msgpack.decode(raw, type=Packet)
    assert msgspec.to_builtins(packet) == example.values
    assert msgspec.msgpack.encode(packet) == raw


def test_every_kind_has_an_example() -> None:
    shown = {example.values["kind"] for example in EXAMPLES if example.kind == "native"}
    assert shown == {kind.name.lower() for kind in Kind}


@pytest.mark.parametrize("kind", ["majordomo-request", "majordomo-reply", "mmi-request", "mmi-reply"])
def test_every_dialect_has_an_example(kind: str) -> None:
    shown = {example.values["dialect"] for example in EXAMPLES if example.kind == kind}
    assert {DIALECTS[name] for name in shown} == set(Dialect)


def test_an_answer_in_parts_is_shown_with_both_commands() -> None:
    assert {example.values.get("command") for example in EXAMPLES} >= {"PARTIAL", "FINAL"}


# -- the tables -----------------------------------------------------------------------------------------------------------


def test_the_table_of_kinds_is_the_codes() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", section(PROTOCOL, "## The native frame"), re.MULTILINE)
    assert {(name, int(number)) for name, number in rows} == {(kind.name.lower(), int(kind)) for kind in Kind}


def test_every_error_code_is_documented_and_no_other() -> None:
    documented = named_in_tables(section(PROTOCOL, "## Errors"))
    assert len(documented) == len(set(documented))
    assert set(documented) == set(type_of_code)


def test_every_packet_of_the_zygote_is_documented() -> None:
    documented = set(named_in_tables(section(PROTOCOL, "## The zygote's packets")))
    assert documented == {kind.__name__ for kind in Packet.__args__}


# Calls that number or publish an event under a name that is not written there: it comes from whoever called.
PASSED_ON = {
    "broker/crew.py": 1,  # publish_host, whose callers are read
    "broker/watch.py": 1,  # _publish, whose callers are read
    "worker/handling.py": 1,  # the handlers' way to the event log: they are read themselves
    "worker/handlers/view.py": 3,  # the operator's own events
    "worker/vm.py": 1,  # QEMU's events
}


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def emitted_in(path: str) -> tuple[set[str], int]:
    """The names of vmloop's own events that a file emits, as literals or by a constant, and how many calls pass one on."""
    module = importlib.import_module("vmloop." + path.removesuffix(".py").replace("/", "."))
    names: set[str] = set()
    passed_on = 0
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if not (
            isinstance(node, ast.Call)
            and node.args
            and called(node) in ("emit", "host_topic", "_publish", "publish_host")
        ):
            continue
        match node.args[0]:
            case ast.Constant(value=str(name)):
                names.add(name)
            case ast.Name(id=name) if isinstance(getattr(module, name, None), str):
                names.add(getattr(module, name))
            case _ if called(node) != "_publish":  # those publish bodies and frames, too
                passed_on += 1
    return names, passed_on


def emitting_files() -> list[str]:
    files = [*(ROOT / "worker").rglob("*.py"), *(ROOT / "broker").rglob("*.py")]
    paths = (file.relative_to(ROOT).as_posix() for file in files)
    return sorted(path for path in paths if not path.startswith("worker/qemu/"))  # the stand-in speaks as QEMU does


def test_every_event_of_vmloops_own_is_documented_and_no_other() -> None:
    """The names stand at the one function that gives events their numbers; the host's own have a topic of their own."""
    found = {path: emitted_in(path) for path in emitting_files()}
    assert {path: count for path, (_, count) in found.items() if count} == PASSED_ON
    emitted = set().union(*(names for names, _ in found.values()))
    _, table = section(PROTOCOL, "## Events").split("vmloop's own events:")
    documented = named_in_tables(table)
    assert len(documented) == len(set(documented))
    assert set(documented) == emitted


def test_no_handler_may_use_the_name_of_an_event_of_vmloops_own() -> None:
    _, table = section(PROTOCOL, "## Events").split("vmloop's own events:")
    for name in named_in_tables(table):
        with pytest.raises(BadRequest):
            require_free_name(name)


def test_every_reason_of_a_thaw_is_documented() -> None:
    told = set[object]()
    for path in ("worker/agent/freeze.py", "worker/verbs/agent.py", "worker/verbs/lifecycle.py"):
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.Call) and called(node) in ("thaw", "_thawed"):
                told |= {given.value for given in node.args if isinstance(given, ast.Constant)}
    assert told
    (row,) = [line for line in PROTOCOL.splitlines() if line.startswith("| `AGENT_THAWED` |")]
    assert {why for why in told if f"`{why!s}`" not in row} == set()


def test_every_field_of_a_workers_status_is_documented_and_no_other() -> None:
    """The map is one literal in the worker."""
    tree = ast.parse((ROOT / "worker" / "status.py").read_text())
    (function,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "status_of"]
    (body,) = [
        node.value for node in function.body if isinstance(node, ast.Return) and isinstance(node.value, ast.Dict)
    ]
    sent = [key.value for key in body.keys if isinstance(key, ast.Constant)]
    documented = named_in_tables(section(PROTOCOL, "## Between broker and worker"))
    assert sorted(documented) == sorted(map(str, sent))
    for example in EXAMPLES:
        if example.values.get("kind") in ("hello", "status", "bye"):
            assert set(example.values["body"]) <= set(sent)


class NothingToSee:
    """A Looker for a core that is only asked for its table."""

    def blocked(self, name: VmName, pid: int | None) -> float:
        return 0.0

    def task(self, name: VmName) -> str:
        return ""

    def stopped(self, pid: int | None) -> bool:
        return False

    def process(self, pid: int | None) -> dict[str, Any] | None:
        return None


def host_operations() -> set[str]:
    return set(HostCore(Settings(), 1, NothingToSee(), 1)._operations)


def test_every_operation_of_the_host_is_documented_and_no_other() -> None:
    documented = named_in_tables(section(OPERATIONS, "## Service `vmloop`"))
    assert len(documented) == len(set(documented))
    assert set(documented) == host_operations()


def test_every_operation_of_a_vm_is_documented_and_no_other() -> None:
    answered_by_the_broker = {op for op in ("show", "wait") if not HostCore._goes_to_worker(op)}
    assert len(answered_by_the_broker) == 2
    documented = named_in_tables(section(OPERATIONS, "## Service `vm/NAME`"))
    assert len(documented) == len(set(documented))
    assert set(documented) == (set(VERBS) - _OF_THE_HOST) | answered_by_the_broker


ARGUMENTS = {op: verb.arguments for op, verb in VERBS.items()}


@pytest.mark.parametrize("op", sorted(ARGUMENTS))
def test_every_argument_of_an_operation_is_in_its_row(op: str) -> None:
    where = section(OPERATIONS, "## Service `vmloop`" if op in _OF_THE_HOST else "## Service `vm/NAME`")
    row = next(line for line in where.splitlines() if line.startswith("| `") and f"`{op}`" in line.split(" | ")[0])
    for argument in msgspec.structs.fields(ARGUMENTS[op]):
        assert re.search(rf"\b{argument.encode_name}\b", row.split(" | ")[1]), argument.encode_name
