# SPDX-License-Identifier: Apache-2.0
"""Targets for recorded dialogues with a monitor: the file as it is read and played, and what is written down of any bytes."""

from __future__ import annotations

import contextlib
import json

from vmloop.common.errors import ConfigError, TooLarge
from vmloop.testing.recording_file import RecordingFile
from vmloop.worker.qemu.recording import Entry, Header, decode_recording, encode_end, encode_line, read_recording
from vmloop.worker.qemu.simulated_json import to_line
from vmloop.worker.qemu.simulated_script import Exchange, Script, reply_to

from .choices import Choices, script
from .file_targets import directory
from .values import HOSTILE_JSON

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}\r\n'
)


def recording(data: bytes) -> None:
    """A file is refused as `ConfigError`, or is a dialogue of which every command can be played and every line written."""
    try:
        found = decode_recording(data, "here")
        played = Script(found)
    except ConfigError as error:
        assert str(error).startswith("here")
        return
    again = b"".join((encode_line(found.header), *map(encode_line, found.entries), encode_end(len(found.entries))))
    assert decode_recording(again, "here") == found
    to_line(played.greeting)
    for entry in found.entries:
        request = entry.client
        if isinstance(request, dict):
            answer = played.take(request)
            if isinstance(answer, Exchange) and answer.reply is not None:
                to_line(reply_to(request, answer.reply.message))


def recordings() -> list[bytes]:
    header = encode_line(Header(1, "2026-11-26T01:20:00Z", "7.2.22"))
    greeting = encode_line(Entry(0.0, qemu=json.loads(GREETING)))
    stop = encode_line(Entry(0.1, client={"execute": "stop", "id": 1}))
    event = encode_line(Entry(0.2, qemu={"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}))
    reply = encode_line(Entry(0.3, qemu={"return": {}, "id": 1}))
    end = encode_line(Entry(0.4, closed="qemu"))
    whole = header + greeting + stop + event + reply + end + encode_end(5)
    odd = [
        b'{"at":0,"client":{"execute":7,"arguments":[],"id":[{}]}}\n',
        b'{"at":0,"client":null}\n',
        b'{"at":-1,"closed":"qemu"}\n',
        b'{"at":0,"qemu":{"return":1},"client":{}}\n',
        b'{"at":0,"qemu":{"QMP":7}}\n',
        b'{"at":0,"qemu":' + b'{"return":' * 600 + b"1" + b"}" * 600 + b"}\n",
        *(
            b'{"at":0,"client":{"execute":"a","arguments":{"a":' + value + b"}}}\n"
            for value in HOSTILE_JSON
            if len(value) < 4000
        ),
    ]
    return [
        whole,
        whole[:-5],
        whole.replace(b"}\n", b"}\r\n"),
        header + encode_end(0),
        *(header + greeting + line + encode_end(2) for line in odd),
        *(value for value in HOSTILE_JSON if len(value) < 4000),
    ]


def recorder(data: bytes) -> None:
    """Whatever a client and a QEMU say, in whatever pieces: it is refused with an error of the tree, or the file reads back."""
    with directory() as root:
        path = root / "made"
        file = RecordingFile(path)
        told = (ConfigError, TooLarge)
        with contextlib.suppress(*told):
            file.qemu(GREETING)
            for kind, piece in Choices(data).steps():
                if kind % 3 == 2:
                    file.closed("qemu" if kind % 2 else "client")
                elif kind % 3 == 1:
                    file.client(piece)
                else:
                    file.qemu(piece)
        file.close()
        found = read_recording(path)
        assert found.header.qemu == "7.2.22"
        with contextlib.suppress(ConfigError):  # JSON that is nothing of QMP's
            Script(found)


def dialogues() -> list[bytes]:
    secret = b'{"execute": "qom-get", "arguments": {"path": "/objects/s", "property": "data"}, "id": "a"}\n'
    return [
        script(
            (1, b'{"execute": "st'), (1, b'op"}'), (0, b'{"event": "STOP"}\r\n{"retu'), (0, b'rn": {}}\r\n'), (2, b"")
        ),
        script((1, secret), (0, b'{"return": "hunter2", "id": "a"}\n')),
        script((1, b'{"execute": "a", "id": {"b": [1]}}{]\xff{"execute": "c"}'), (5, b""), (0, GREETING)),
        script((1, b"[" * 1018 + b"]" * 600)),
        *(script((1, value), (0, value + b"\n")) for value in HOSTILE_JSON if len(value) < 4000),
        *(script((0, b'{"a":' + value + b"}\n")) for value in HOSTILE_JSON if len(value) < 4000),
    ]
