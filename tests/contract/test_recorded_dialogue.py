# SPDX-License-Identifier: Apache-2.0
"""A dialogue that was recorded plays as it was: of each subject now, and of a real QEMU as it stands in tests/data/recordings.

The file there was made by `converse` through the recorder; a new version of QEMU gets a file of its own beside it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from msgspec import UNSET

import vmloop
from vmloop.common.errors import ConfigError
from vmloop.testing.replay import replaying
from vmloop.worker.qemu.recording import read_recording
from vmloop.worker.qemu.redaction import HIDDEN

from ..fakes.raw_qmp import DEADLINE, RawClient
from .subjects import Subject

RECORDINGS: Final = Path(vmloop.__file__).parent / "tests" / "data" / "recordings"
QEMU_7_2: Final = RECORDINGS / "qemu-7.2.22.jsonl"

PASSWORD: Final = "hunter2"

# What vmloop itself asks when it attaches comes first; then states with their events, a secret, refusals, out of band, the end.
DIALOGUE: Final[list[tuple[str, str, dict[str, Any]]]] = [
    ("execute", "query-status", {}),
    ("execute", "query-chardev", {}),
    ("execute", "query-version", {}),
    ("execute", "cont", {}),
    ("execute", "query-status", {}),
    ("execute", "stop", {}),
    ("execute", "query-status", {}),
    ("exec-oob", "query-yank", {}),
    ("execute", "change-vnc-password", {"password": PASSWORD}),
    ("execute", "no-such-command", {"x": [1, {"y": None}]}),
    ("execute", "query-name", {"surplus": True}),
    ("execute", "quit", {}),
]


def converse(path: Path) -> list[Any]:
    """Say all of DIALOGUE to a monitor; everything that it said."""
    with RawClient(path) as client:
        heard = [client.message()]
        client.send({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": "n"})
        heard.append(client.message())
        for number, (how, command, arguments) in enumerate(DIALOGUE):
            client.send({how: command, "arguments": arguments, "id": number})
            reply, before = client.reply(number)
            heard += [*before, reply]
        return heard + client.rest_messages()


def said_in(recording: Path) -> list[Any]:
    """What QEMU said, as the file has it."""
    return [entry.qemu for entry in read_recording(recording).entries if entry.qemu is not UNSET]


def record(qmp: Path, directory: Path, file: Path) -> list[Any]:
    """`converse` through the recorder; what its client heard."""
    listen = directory / "recorded.sock"
    command = [
        sys.executable,
        "-m",
        "vmloop.testing.record",
        "--qmp",
        str(qmp),
        "--listen",
        str(listen),
        "--record",
        str(file),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as recorder:
        try:
            assert recorder.stdout is not None
            assert recorder.stdout.readline() == b"ready\n"
            heard = converse(listen)
            assert recorder.wait(DEADLINE) == 0
        finally:
            recorder.send_signal(signal.SIGKILL)
    return heard


def test_a_recorded_dialogue_plays_as_it_was(subject: Subject, tmp_path: Path) -> None:
    subject.start()
    file = tmp_path / "made.jsonl"
    heard = record(subject.path, tmp_path, file)
    assert said_in(file) == heard
    assert PASSWORD not in file.read_text()
    with replaying(file) as replay:
        assert converse(replay.socket) == heard


def test_the_dialogue_with_qemu_7_2_plays_as_it_was_recorded() -> None:
    with replaying(QEMU_7_2) as replay:
        heard = converse(replay.socket)
    assert heard == said_in(QEMU_7_2)
    assert heard[0]["QMP"]["version"]["qemu"] == {"major": 7, "minor": 2, "micro": 22}
    assert [message["event"] for message in heard if "event" in message] == ["RESUME", "STOP", "SHUTDOWN"]
    assert [message["id"] for message in heard if "error" in message] == [8, 9, 10]
    assert HIDDEN in QEMU_7_2.read_text()


@pytest.mark.parametrize("number", range(1, 29))
def test_the_recording_of_qemu_is_refused_wherever_it_is_cut(tmp_path: Path, number: int) -> None:
    lines = QEMU_7_2.read_bytes().splitlines(keepends=True)
    assert len(lines) > number
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(b"".join(lines[:number]))
    with pytest.raises(ConfigError, match=r"torn\.jsonl"):
        read_recording(torn)
