# SPDX-License-Identifier: Apache-2.0
"""guest-exec and guest-exec-status: programs carried out in a guest, and what is told of them."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ..fakes.raw_qmp import DEADLINE, RawClient, refusal
from .subjects import AgentSubject

MAX_OUTPUT = 16 << 20  # bytes of each stream that an agent keeps


@pytest.fixture
def client(agent: AgentSubject) -> Iterator[RawClient]:
    with RawClient(agent.path) as client:
        yield client


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def started(client: RawClient, path: str, **arguments: Any) -> int:
    answer = client.ask("guest-exec", path=path, **arguments)
    assert set(answer) == {"return"}, answer
    return int(answer["return"]["pid"])


def ended(client: RawClient, path: str, **arguments: Any) -> dict[str, Any]:
    """What a program has come to, with its output decoded."""
    pid = started(client, path, **arguments)
    deadline = time.monotonic() + DEADLINE
    while not (status := client.ask("guest-exec-status", pid=pid)["return"])["exited"]:
        assert time.monotonic() < deadline
        assert status == {"exited": False}
    assert client.ask("guest-exec-status", pid=pid) == refusal("Invalid parameter 'pid'")
    return {name: base64.b64decode(value) if name.endswith("-data") else value for name, value in status.items()}


def shell(script: str) -> dict[str, Any]:
    return {"path": "/bin/sh", "arg": ["-c", script], "capture_output": True}


def out(data: bytes, **more: Any) -> dict[str, Any]:
    return {"out-data": data, "out-truncated": False, **more}


def err(data: bytes, **more: Any) -> dict[str, Any]:
    return {"err-data": data, "err-truncated": False, **more}


@pytest.mark.parametrize(
    ("request_arguments", "status"),
    [
        ({"path": "/bin/true"}, {"exitcode": 0}),
        ({"path": "/bin/true", "capture_output": True}, {"exitcode": 0}),
        ({"path": "/bin/false"}, {"exitcode": 1}),
        ({"path": "/bin/echo", "arg": ["a", "b c"]}, {"exitcode": 0}),
        ({"path": "echo", "arg": ["a", "b c"], "capture_output": True}, out(b"a b c\n", exitcode=0)),
        (
            {"path": "/bin/cat", "input_data": encoded(b"\0\xffhi"), "capture_output": True},
            out(b"\0\xffhi", exitcode=0),
        ),
        ({"path": "/bin/cat", "input_data": "YQ", "capture_output": True}, {"exitcode": 0}),
        (
            {"path": "/usr/bin/sha256sum", "capture_output": True},
            out(b"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855  -\n", exitcode=0),
        ),
        (shell("exit 300"), {"exitcode": 44}),
        (shell("kill -9 $$"), {"signal": 9}),
        (shell("echo out; echo err >&2; exit 3"), {**out(b"out\n"), **err(b"err\n"), "exitcode": 3}),
        (shell("false && echo no || echo \"y 'e'\" 's\"'"), out(b"y 'e' s\"\n", exitcode=0)),
        (shell("nosuchprogram"), err(b"/bin/sh: 1: nosuchprogram: not found\n", exitcode=127)),
        ({**shell('echo "$A-${B}-$C"'), "env": ["A=1", "B=2=3", "C"]}, out(b"1-2=3-\n", exitcode=0)),
        (
            shell("sha256sum /nowhere; false"),
            err(b"sha256sum: /nowhere: No such file or directory\n", exitcode=1),
        ),
    ],
    ids=str,
)
def test_a_program_is_carried_out_and_reaped_by_the_first_who_asks(
    client: RawClient, request_arguments: dict[str, Any], status: dict[str, Any]
) -> None:
    assert ended(client, **request_arguments) == {"exited": True, **status}


def test_a_program_that_takes_its_time_is_running(client: RawClient) -> None:
    pid = started(client, "/bin/sleep", arg=["600"])
    assert client.ask("guest-exec-status", pid=pid) == {"return": {"exited": False}}
    assert client.ask("guest-exec-status", pid=pid) == {"return": {"exited": False}}
    ended(client, "/bin/sh", arg=["-c", "sleep 0.05; true"])
    ended(client, "/bin/sh", arg=["-c", f"kill -9 {pid}"])


def test_output_beyond_the_bound_is_cut_off_and_said_to_be(client: RawClient) -> None:
    status = ended(client, **shell(f"head -c {MAX_OUTPUT + 1} /dev/zero; head -c 5 /dev/zero >&2"))
    assert (len(status["out-data"]), status["out-truncated"]) == (MAX_OUTPUT, True)
    assert (status["err-data"], status["err-truncated"]) == (bytes(5), False)


def test_a_program_that_is_not_there_is_an_error(client: RawClient) -> None:
    for path, reason in (("/nowhere", "No such file or directory"), ("", "No such file or directory")):
        words = f"Failed to execute child process \N{LEFT DOUBLE QUOTATION MARK}{path}\N{RIGHT DOUBLE QUOTATION MARK}"
        answer = client.ask("guest-exec", path=path)
        assert answer == refusal(f"Guest agent command failed, error was '{words} ({reason})'")
    assert "(Permission denied)" in client.ask("guest-exec", path="/tmp")["error"]["desc"]


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("guest-exec", {}, "Parameter 'path' is missing"),
        ("guest-exec", {"path": "/bin/true", "arg": "x"}, "Invalid parameter type for 'arg', expected: array"),
        ("guest-exec", {"path": "/bin/true", "arg": [1]}, "Invalid parameter type for 'arg[0]', expected: string"),
        (
            "guest-exec",
            {"path": "/bin/true", "capture-output": "yes"},
            "Invalid parameter type for 'capture-output', expected: boolean",
        ),
        ("guest-exec", {"path": "/bin/cat", "input-data": "!!"}, "Base64 data contains invalid characters"),
        ("guest-exec-status", {}, "Parameter 'pid' is missing"),
        ("guest-exec-status", {"pid": -1}, "Invalid parameter 'pid'"),
        ("guest-exec-status", {"pid": 2**40}, "Invalid parameter 'pid'"),
        ("guest-exec-status", {"pid": "1"}, "Invalid parameter type for 'pid', expected: integer"),
    ],
    ids=str,
)
def test_what_is_wrong_is_refused_in_these_words(
    client: RawClient, command: str, arguments: dict[str, Any], words: str
) -> None:
    client.send({"execute": command, "arguments": arguments})
    assert client.message() == refusal(words)


# -- commands that are not to be had --


def test_a_disabled_command_is_refused_before_its_arguments_are_looked_at(unstarted_agent: AgentSubject) -> None:
    unstarted_agent.disabled = ("guest-ping", "guest-exec")
    unstarted_agent.start()
    with RawClient(unstarted_agent.path) as client:
        for command in unstarted_agent.disabled:
            assert client.ask(command, x=1) == refusal(f"Command {command} has been disabled", "CommandNotFound")
        listed = client.ask("guest-info")["return"]["supported_commands"]
        assert {"name": "guest-exec", "enabled": False, "success-response": True} in listed
        assert "return" in client.ask("guest-get-time")


def test_with_frozen_file_systems_little_is_allowed(unstarted_agent: AgentSubject) -> None:
    unstarted_agent.frozen = True
    unstarted_agent.start()
    with RawClient(unstarted_agent.path) as client:
        assert client.ask("guest-fsfreeze-status") == {"return": "frozen"}
        assert client.ask("guest-ping") == {"return": {}}
        assert client.ask("guest-sync", id=1) == {"return": 1}
        for command in ("guest-exec", "guest-get-time", "guest-file-open", "guest-get-osinfo"):
            words = f"Command {command} has been disabled: the agent is in frozen state"
            assert client.ask(command) == refusal(words, "CommandNotFound")
        listed = client.ask("guest-info")["return"]["supported_commands"]
        assert {command["name"] for command in listed if command["enabled"]} == {
            *("guest-info", "guest-ping", "guest-sync", "guest-sync-delimited"),
            *("guest-fsfreeze-status", "guest-fsfreeze-thaw"),
        }
