# SPDX-License-Identifier: Apache-2.0
"""Targets for what a probe reads: lines of a monitor, answers of any shape, documents on disk and on the wire."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

import msgspec

from vmloop.client.command_check import argument_names, wrong_arguments
from vmloop.common.capabilities import Capabilities, Shape, from_plain, part_about, to_plain
from vmloop.common.errors import BadRequest, DeadlineExceeded, MonitorLost
from vmloop.common.pack import pack, unpack
from vmloop.worker.probe.arguments import wrong_arguments as wrong_in_definition
from vmloop.worker.probe.cache import Cached, _decode_names, decode_document, encode_document
from vmloop.worker.probe.conversation import Conversation
from vmloop.worker.probe.document import document
from vmloop.worker.probe.questions import PROBE, PROBE_TCG, Question, Reply, due

from .values import HOSTILE_JSON

TABLE = (Question("query-target", "query-target"), Question("query-kvm", "query-kvm"))


class _Deaf:
    """Where a conversation writes to."""

    def write(self, data: bytes) -> None:
        assert data.endswith(b"\n")


def dialogue(data: bytes) -> None:
    """Any bytes on a probe's monitor: answers, or an error that says why not; never more answers than questions."""

    async def scene() -> None:
        reader = asyncio.StreamReader(limit=1 << 16)
        reader.feed_data(data)
        reader.feed_eof()
        conversation = Conversation(reader, _Deaf())  # type: ignore[arg-type]
        try:
            await conversation.open()
            replies = await conversation.ask_all(TABLE)
        except (MonitorLost, DeadlineExceeded):
            return
        assert set(replies) == {question.name for question in TABLE}

    asyncio.run(scene())


def dialogues() -> list[bytes]:
    greeting = b'{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": ["oob"]}}\r\n'
    replies = b'{"return": {}, "id": 1}\r\n{"id": 3, "error": {"class": "GenericError"}}\r\n{"return": 0, "id": 2}\r\n'
    event = b'{"event": "STOP", "timestamp": {}}\r\n'
    return [greeting + replies, greeting + event + replies, greeting, replies, event * 5, b"\n" * 9, *HOSTILE_JSON]


def answers(data: bytes) -> None:
    """A map of any answers gives a document that can be sent, read and used to check with."""
    try:
        values = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return
    given = values if isinstance(values, dict) else {question.name: values for question in PROBE}
    replies = {str(name): Reply(value) for name, value in given.items()}
    due(PROBE, replies)
    due(PROBE_TCG, replies)
    found = document("/q", replies, replies)
    assert from_plain(unpack(pack(to_plain(found)))) == found
    _use(found, given, data.decode("utf-8", "replace"))


def _use(found: Capabilities, given: Mapping[str, object], text: str) -> None:
    for command in list(found.arguments)[:8]:
        part = part_about(found, command)
        assert wrong_arguments(part, command, given) == wrong_arguments(found, command, given)
        argument_names(part, command)
    for option in ("-machine", "-device", "-cpu", "-accel"):
        assert all(len(str(wrong)) < 1000 for wrong in wrong_in_definition(found, [option, text]))


def answer_maps() -> list[bytes]:
    schema = [
        {"name": "c", "meta-type": "command", "arg-type": "1", "allow-oob": True, "features": ["f"]},
        {"name": "1", "meta-type": "object", "members": [{"name": "a", "type": "[2]", "default": None}], "tag": "a"},
        {"name": "[2]", "meta-type": "array", "element-type": "2"},
        {"name": "2", "meta-type": "alternate", "members": [{"type": "str"}, {"type": "1"}]},
        {"name": "E", "meta-type": "event", "arg-type": "1"},
    ]
    whole = {
        "query-qmp-schema": schema,
        "query-target": {"arch": "aarch64"},
        "query-kvm": {"enabled": True, "present": True},
        "query-machines": [{"name": "virt", "alias": "v", "cpu-max": 1}],
        "query-cpu-definitions": [{"name": "max", "unavailable-features": ["x"]}],
        "query-cpu-model-expansion/host/full": {"model": {"name": "host", "props": {"a": True}}},
        "info-qdm": 'name "virtio-net-pci", bus PCI, alias "virtio-net"\n',
        "qom-list-types/device": [{"name": "virtio-net-pci"}],
        "c": {"a": [1]},
    }
    return [json.dumps(whole).encode(), *HOSTILE_JSON]


def kept(data: bytes) -> None:
    """The content of a file of state/capabilities: `BadRequest`, or a document that is written as it was read."""
    for decode in (_decode_names, decode_document):
        try:
            found = decode(data)
        except BadRequest:
            continue
        _is_kept(found)


def _is_kept(found: Cached) -> None:
    again = decode_document(encode_document(Cached(found.stamp, found.capabilities)))
    assert again == found


def kept_files() -> list[bytes]:
    found = Capabilities(binary="/q", arguments={"c": Shape(members={"a": "str?"})}, more={"later": [1]})
    return [
        encode_document(Cached(None, found)),
        b'{"stamp": null, "capabilities": {"format": 1, "version": [1, 2]}}',
        b'{"stamp": {}, "capabilities": {"format": 1}}',
        b'{"stamp": null, "capabilities": {"format": 1, "more": {"format": 2}}}',
        *(b'{"stamp": null, "capabilities": {"format": 1, "expansion": ' + value + b"}}" for value in HOSTILE_JSON),
        *HOSTILE_JSON,
    ]
