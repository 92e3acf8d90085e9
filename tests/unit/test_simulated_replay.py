# SPDX-License-Identifier: Apache-2.0
"""The monitor that says what was recorded, as a process behind a socket: order, refusals, pace, clients one after another, the end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vmloop.common.errors import ConfigError
from vmloop.testing.replay import replaying
from vmloop.worker.qemu.recording import Entry, Header, encode_end, encode_line

from ..fakes.raw_qmp import DEADLINE, RawClient, refusal

GREETING: dict[str, Any] = {
    "QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}}, "capabilities": ["oob"]}
}
STOP = {"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}
LATE = {"timestamp": {"seconds": 3, "microseconds": 4}, "event": "LATE", "data": {"text": "ü\\"}}


def recording(path: Path, *lines: Entry) -> Path:
    """A file of a dialogue that begins with the greeting."""
    entries = [Entry(0.0, qemu=GREETING), *lines]
    content = [
        encode_line(Header(1, "2026-11-26T01:20:00Z", "7.2.22")),
        *map(encode_line, entries),
        encode_end(len(entries)),
    ]
    path.write_bytes(b"".join(content))
    return path


@pytest.fixture
def tape(tmp_path: Path) -> Path:
    return recording(
        tmp_path / "with, a comma.jsonl",
        Entry(0.1, client={"execute": "qmp_capabilities"}),
        Entry(0.2, qemu={"return": {}}),
        Entry(0.3, client={"execute": "stop", "id": 1}),
        Entry(0.4, qemu=STOP),
        Entry(0.5, qemu={"return": {}, "id": 1}),
        Entry(1.5, qemu=LATE),
        Entry(2.0, client={"execute": "query-name", "id": 2}),
        Entry(2.1, qemu={"return": {"name": "web1"}, "id": 2}),
        Entry(3.0, client={"execute": "quit", "id": 3}),
        Entry(3.1, qemu={"return": {}, "id": 3}),
        Entry(3.2, closed="qemu"),
    )


def test_a_client_sees_what_was_recorded_with_ids_of_its_own(tape: Path) -> None:
    with replaying(tape) as replay, RawClient(replay.socket) as client:
        assert client.message() == GREETING
        client.send({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}})
        assert client.message() == {"return": {}}
        client.send({"execute": "stop", "id": "mine"})
        assert client.messages(3) == [STOP, {"return": {}, "id": "mine"}, LATE]
        client.send({"exec-oob": "query-name", "id": "oob"})
        assert client.message() == {"return": {"name": "web1"}, "id": "oob"}
        client.send({"execute": "quit"})
        assert client.rest_messages() == [{"return": {}}]


def test_what_was_not_recorded_is_refused_and_the_replay_goes_on(tape: Path) -> None:
    with replaying(tape) as replay, RawClient(replay.socket) as client:
        client.message()
        said = f"{tape}: cont was not recorded; recorded were qmp_capabilities, stop, query-name, quit"
        assert client.ask("cont") == refusal(said)
        assert client.ask("query-name", x=1) == refusal(
            f'{tape}: query-name was not recorded with the arguments {{"x":1}}'
        )
        client.send(b'{"execute": ]')
        assert client.message()["error"]["desc"] == "JSON parse error, expecting value"
        client.send(b"[1]")
        assert client.message() == refusal("QMP input must be a JSON object")
        assert client.ask("query-name") == {"return": {"name": "web1"}}


def test_the_next_client_is_greeted_and_gets_what_is_left(tape: Path) -> None:
    with replaying(tape) as replay:
        with RawClient(replay.socket) as first:
            first.message()
            first.send({"execute": "stop", "id": 1})
            assert first.messages(3)[0] == STOP
        with RawClient(replay.socket) as second:
            assert second.message() == GREETING
            assert "more often than in the recording" in second.ask("stop")["error"]["desc"]


def test_a_pace_keeps_the_time_that_things_took(tape: Path) -> None:
    with replaying(tape, pace=0.5) as replay, RawClient(replay.socket) as client:
        client.message()
        began = time.monotonic()
        client.send({"execute": "stop", "id": 1})
        assert client.messages(2)[0] == STOP
        between = time.monotonic()
        assert client.message() == LATE
        assert time.monotonic() - between > 0.3  # of half a second
        assert between - began < 1.0


def test_a_torn_recording_is_not_even_begun(tape: Path) -> None:
    tape.write_bytes(tape.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"is cut off|is not the end"), replaying(tape):
        raise AssertionError("it began")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["-replay", "/nowhere.jsonl"], "cannot read the recording /nowhere.jsonl: No such file or directory"),
        (["-replay", "{tape},pace=slow"], "pace: Expected `float`"),
        (["-replay", "{tape}", "-qmp", "unix:{tape}.sock,server=on"], "-replay is for one monitor, this VM has 2"),
    ],
)
def test_a_stand_in_that_cannot_replay_says_why_and_does_not_start(
    tmp_path: Path, arguments: list[str], why: str
) -> None:
    tape = recording(tmp_path / "tape.jsonl")
    command = [sys.executable, "-m", "vmloop.worker.qemu.simulated", "-qmp", f"unix:{tmp_path}/m.sock,server=on"]
    told = [argument.replace("{tape}", str(tape)) for argument in arguments]
    done = subprocess.run([*command, *told], capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 1
    assert why in done.stderr
    assert "Traceback" not in done.stderr


def test_a_replay_leaves_no_file_and_no_process(tape: Path) -> None:
    with replaying(tape) as replay:
        assert os.path.exists(f"/proc/{replay.pid}")
    assert not replay.socket.parent.exists()
    assert not os.path.exists(f"/proc/{replay.pid}")
