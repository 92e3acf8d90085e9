# SPDX-License-Identifier: Apache-2.0
"""What the simulated VM writes down of itself: every event before its client has it, every mark once, nothing that did not happen."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmloop.common.process import identify
from vmloop.worker.qemu.simulated import machine_from_arguments, main

from ..fakes.raw_qmp import DEADLINE, RawClient, negotiated

COMMAND = [sys.executable, "-m", "vmloop.worker.qemu.simulated"]


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A directory with one VM, web-000, whose file is web-000.jsonl."""
    arguments = ["--directory", str(tmp_path), "--emitted", str(tmp_path), "--prefix", "web"]
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], DEADLINE)[0]
        assert process.stdout.readline() == b"ready 1\n"
        yield process
        if process.poll() is None:
            process.kill()


@pytest.fixture
def client(tmp_path: Path, launched: subprocess.Popen[bytes]) -> Iterator[RawClient]:
    with negotiated(tmp_path / "web-000.qmp") as client:
        yield client


def written(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "web-000.jsonl").read_text().splitlines()]


def test_the_file_begins_with_the_process_that_writes_it(tmp_path: Path, launched: subprocess.Popen[bytes]) -> None:
    (first,) = written(tmp_path)
    assert (first["pid"], first["started"]) == (launched.pid, identify(launched.pid).started)
    assert first["vm"] == "web-000"


def test_an_event_stands_in_the_file_as_its_client_got_it(tmp_path: Path, client: RawClient) -> None:
    client.ask("stop")
    client.send({"execute": "cont", "id": 1})
    _, before = client.reply(1)
    (stamp,) = (message["timestamp"] for message in before if message.get("event") == "RESUME")
    lines = [line for line in written(tmp_path) if "pid" not in line]
    assert [line.get("event") or line.get("command") for line in lines] == ["STOP", "stop", "RESUME", "cont"]
    assert lines[2]["time"] == stamp["seconds"] * 1_000_000 + stamp["microseconds"]


def test_a_mark_is_one_line_and_one_event(tmp_path: Path, client: RawClient) -> None:
    client.send({"execute": "x-simulate", "arguments": {"mark": "m1"}, "id": 1})
    _, before = client.reply(1)
    assert [event["data"] for event in before if event["event"] == "X_SIMULATED_MARK"] == [{"mark": "m1"}]
    assert [line["mark"] for line in written(tmp_path) if "mark" in line] == ["m1"]


def test_a_mark_of_the_guests_agent_is_one_line_and_guest_info_says_nothing_of_the_command(
    tmp_path: Path, client: RawClient
) -> None:
    with RawClient(tmp_path / "web-000.qga") as agent:
        assert agent.ask("x-mark", mark="a1") == {"return": {}}
        assert "error" in agent.ask("x-mark")
        assert "error" in agent.ask("x-mark", mark=1)
        listed = agent.ask("guest-info")["return"]["supported_commands"]
    assert [line for line in written(tmp_path) if "mark" in line] == [{"mark": "a1"}]
    assert "x-mark" not in [command["name"] for command in listed]
    assert client.ask("query-status")["return"]["running"]


def test_what_was_refused_or_only_looked_leaves_no_line(tmp_path: Path, client: RawClient) -> None:
    assert "error" in client.ask("x-simulate", mark="m1", nonsense=True)
    assert "error" in client.ask("closefd", fdname="none")
    client.ask("query-status")
    assert written(tmp_path)[1:] == []


def test_an_event_that_nobody_was_connected_for_is_not_said_to_have_been_emitted(
    tmp_path: Path, client: RawClient
) -> None:
    client.ask("stop")
    client.close()
    with RawClient(tmp_path / "web-000.qmp") as second:
        second.message()
        second.send({"execute": "x-simulate", "arguments": {"emit": {"event": "UNSEEN"}, "mark": "m2"}})
        second.message()
        assert [line["mark"] for line in written(tmp_path) if "mark" in line] == ["m2"]
        assert "UNSEEN" not in [line.get("event") for line in written(tmp_path)]


def test_a_vm_killed_in_the_middle_has_written_all_that_its_client_read(
    tmp_path: Path, launched: subprocess.Popen[bytes], client: RawClient
) -> None:
    client.send({"execute": "x-simulate", "arguments": {"emit": {"event": "X_MANY"}, "count": 2000}})
    got = [client.event("X_MANY") for _ in range(100)]
    os.kill(launched.pid, signal.SIGKILL)
    launched.wait(DEADLINE)
    times = [line["time"] for line in written(tmp_path) if line.get("event") == "X_MANY"]
    stamps = [event["timestamp"]["seconds"] * 1_000_000 + event["timestamp"]["microseconds"] for event in got]
    assert times[:100] == stamps


def test_a_launched_vm_takes_the_file_from_its_arguments(tmp_path: Path) -> None:
    assert machine_from_arguments(["-emitted", "/x,y"]).emitted == "/x,y"
    assert main(["-emitted", str(tmp_path / "none" / "x")]) == 1
