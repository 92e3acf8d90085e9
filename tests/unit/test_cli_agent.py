# SPDX-License-Identifier: Apache-2.0
"""`vmloop agent` against a guest on a scripted broker: what it asks, prints and returns."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from vmloop.client.cli.main import main
from vmloop.common.errors import AgentUnresponsive
from vmloop.common.pack import unpack_map

from ..fakes.guest_on_wire import Ended, GuestOnWire, Started
from ..fakes.native_broker import NativeBroker

COMMAND = [sys.executable, "-W", "error", "-m", "vmloop.client.cli.main"]
SOON = 30.0
HOLD = ("agent", "web1", "guest-fsfreeze-freeze", "--hold")


class Ran(NamedTuple):
    code: int
    out: bytes
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[NativeBroker]:
    with NativeBroker(tmp_path) as broker:
        yield broker


@pytest.fixture
def guest(broker: NativeBroker) -> GuestOnWire:
    return GuestOnWire(broker)


@pytest.fixture
def run(broker: NativeBroker, guest: GuestOnWire, capsysbinary: pytest.CaptureFixture[bytes]) -> Run:
    def run(*arguments: str) -> Ran:
        code = main(["--connect", broker.endpoint, *arguments])
        out, err = capsysbinary.readouterr()
        return Ran(code, out, err.decode())

    return run


def start(broker: NativeBroker, *arguments: str) -> subprocess.Popen[str]:
    command = [*COMMAND, "--connect", broker.endpoint, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, broker: NativeBroker, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200", "NO_COLOR": "1"}
        command = [*COMMAND, "--connect", broker.endpoint, *arguments]
        self.process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        self.text = ""

    def read_until(self, wanted: str) -> None:
        while wanted not in self.text:
            self.text += os.read(self._ours, 4096).decode()

    def end(self) -> int:
        try:
            while chunk := os.read(self._ours, 4096):
                self.text += chunk.decode()
        except OSError:  # EIO: the other end is closed
            pass
        finally:
            os.close(self._ours)
        return self.process.wait(SOON)


# -- commands -------------------------------------------------------------------------------------------------------------


def test_a_commands_return_is_printed(run: Run, guest: GuestOnWire, broker: NativeBroker) -> None:
    guest.files["/f"] = b"x"
    assert run("agent", "web1", "guest-file-open", "path=/f", "mode=r", "--timeout", "7") == (0, b"1000\n", "")
    assert unpack_map(broker.seen[-1].body)["arguments"] == {"path": "/f", "mode": "r"}
    assert broker.seen[-1].seconds == 7.0
    ran = run("--timeout", "8", "agent", "web1", "guest-file-read", '{"handle": 1000}', "--json")
    assert ran.json == {"count": 1, "buf-b64": "eA==", "eof": True}
    assert broker.seen[-1].seconds == 8.0
    assert run("agent", "web1", "guest-file-close", "handle=1000").out == b"{}\n"


def test_errors_of_the_agent(run: Run, guest: GuestOnWire, broker: NativeBroker) -> None:
    ran = run("agent", "web1", "nosuch")
    assert ran.code == 1
    assert ran.err == (
        "vmloop: agent-error: the guest agent of web1 refused: The command nosuch has not been found\n"
        "  class: CommandNotFound\n"
    )
    broker.refuse("vm/web1", "agent", AgentUnresponsive("no answer"))
    assert run("agent", "web1", "guest-ping") == (1, b"", "vmloop: agent-unresponsive: no answer\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("guest-ping", "--wait"),
        ("guest-ping", "--hold"),
        ("guest-exec", "path=x", "--hold"),
        ("guest-fsfreeze-freeze", "--hold", "mountpoints=[]"),
        ("guest-fsfreeze-thaw", "--limit", "5"),
        ("guest-fsfreeze-freeze", "--hold", "--limit", "0"),
        ("guest-fsfreeze-freeze", "--hold", "--limit", "3600"),
        ("guest-fsfreeze-freeze", "--hold", "--timeout", "5"),
        ("guest-ping", "novalue"),
    ],
)
def test_options_that_do_not_fit(run: Run, broker: NativeBroker, arguments: tuple[str, ...]) -> None:
    assert run("agent", "web1", *arguments).code == 2
    assert not broker.seen


# -- programs -------------------------------------------------------------------------------------------------------------


def list_files(started: Started) -> Ended:
    return Ended(3, out=b"a\xff\x1b[2J\n", err=" ".join(started.args).encode() + b"\n", looks=2)


def test_a_programs_output_and_exit_code_are_ours(run: Run, guest: GuestOnWire) -> None:
    guest.programs["/bin/ls"] = list_files
    assert run("agent", "web1", "guest-exec", "path=/bin/ls", 'arg=["-l"]', "--wait") == (3, b"a\xff\x1b[2J\n", "-l\n")


def test_a_programs_end_as_json(run: Run, guest: GuestOnWire) -> None:
    guest.programs["/bin/ls"] = list_files
    ran = run("agent", "web1", "guest-exec", "path=/bin/ls", "--wait", "--json")
    assert ran.code == 1
    assert ran.json == {
        "pid": 4711,
        "exitcode": 3,
        "signal": None,
        "out": "a\\xff\x1b[2J\n",
        "err": "\n",
        "out_truncated": False,
        "err_truncated": False,
    }
    guest.programs["/bin/true"] = lambda got: Ended()
    assert run("agent", "web1", "guest-exec", "path=/bin/true", "--wait", "--json").code == 0


def test_a_signal_and_cut_output_are_said(run: Run, guest: GuestOnWire) -> None:
    guest.programs["x"] = lambda got: Ended(None, 9, out=b"x\n", truncated=True)
    ran = run("agent", "web1", "guest-exec", "path=x", "--wait")
    assert (ran.code, ran.out) == (137, b"x\n")
    assert "vmloop: standard output was cut off by the agent" in ran.err
    assert "vmloop: process 4711 in web1 was ended by signal 9\n" in ran.err


def test_a_program_may_be_run_without_capture(run: Run, guest: GuestOnWire, broker: NativeBroker) -> None:
    guest.programs["x"] = lambda got: Ended(out=b"x")
    assert run("agent", "web1", "guest-exec", "path=x", "capture-output=false", "--wait") == (0, b"", "")


def test_a_program_that_does_not_end_is_a_deadline(run: Run, guest: GuestOnWire) -> None:
    guest.programs["x"] = lambda got: Ended(looks=1000)
    ran = run("agent", "web1", "guest-exec", "path=x", "--wait", "--timeout", "0.1")
    assert ran.code == 4
    assert "vmloop: deadline: process 4711 in web1 has not ended within 0.1 s" in ran.err


def test_ctrl_c_leaves_the_program_running_and_says_so(broker: NativeBroker, guest: GuestOnWire) -> None:
    guest.programs["x"] = lambda got: Ended(looks=10_000)
    with start(broker, "agent", "web1", "guest-exec", "path=x", "--wait") as process:
        for _ in range(3):
            broker.requests.get(timeout=SOON)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=SOON)
        assert process.returncode == 130
        assert err == "vmloop: process 4711 runs on in web1: the agent cannot end it\n"


def test_a_terminal_gets_output_that_cannot_rewrite_it(broker: NativeBroker, guest: GuestOnWire) -> None:
    guest.programs["/bin/ls"] = list_files
    terminal = Terminal(broker, "agent", "web1", "guest-exec", "path=/bin/ls", "--wait")
    assert terminal.end() == 3
    assert "a\\xff\\x1b[2J" in terminal.text


# -- frozen file systems --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_hold_lasts_until_it_is_told_to_end(broker: NativeBroker, guest: GuestOnWire, number: signal.Signals) -> None:
    with start(broker, "--json", *HOLD, "--limit", "60") as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"return": 3}
        assert json.loads(process.stdout.readline()) == {"left": 59.0}
        process.send_signal(number)
        out, err = process.communicate(timeout=SOON)
    assert (process.returncode, json.loads(out), err) == (0, {"thawed": "interrupted"}, "")
    assert guest.hold is None
    assert unpack_map(broker.seen[0].body)["limit"] == 60.0


@pytest.mark.parametrize(("why", "code"), [("limit", 4), ("asked", 0)])
def test_a_hold_that_ends_by_itself_says_why(broker: NativeBroker, guest: GuestOnWire, why: str, code: int) -> None:
    with start(broker, *HOLD) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "web1: 3 file systems frozen\n"
        guest.end_hold(why)
        out, err = process.communicate(timeout=SOON)
    assert (process.returncode, out, err) == (code, f"web1: thawed ({why})\n", "")


def test_an_interruption_that_comes_too_late_is_no_success(broker: NativeBroker, guest: GuestOnWire) -> None:
    """The snapshot that was made meanwhile may not be consistent, whatever the order of the news."""
    with start(broker, *HOLD) as process:
        assert process.stdout is not None
        process.stdout.readline()
        guest.hold = None  # thawed, and its end is still on the way
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=SOON)
    assert process.returncode == 1
    assert err.startswith("vmloop: outcome-unknown: the file systems of web1 were thawed by others")


def test_a_hold_on_a_terminal_shows_the_time_left(broker: NativeBroker, guest: GuestOnWire) -> None:
    terminal = Terminal(broker, *HOLD)
    terminal.read_until("web1 is frozen for 59 s more; Ctrl-C thaws it")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 0
    assert "web1: thawed (interrupted)" in terminal.text


def test_a_freeze_without_a_hold_has_a_limit_too(run: Run, broker: NativeBroker) -> None:
    assert run("agent", "web1", "guest-fsfreeze-freeze", "--limit", "5").out == b"3\n"
    assert unpack_map(broker.seen[-1].body) == {"command": "guest-fsfreeze-freeze", "limit": 5.0}


def test_nothing_to_freeze_is_said(run: Run, guest: GuestOnWire) -> None:
    guest.file_systems = 0
    assert run(*HOLD) == (0, b"web1: thawed (there was nothing to freeze)\n", "")


def test_a_hold_that_is_refused(run: Run, guest: GuestOnWire) -> None:
    guest.disabled.add("guest-fsfreeze-freeze")
    ran = run(*HOLD)
    assert (ran.code, ran.out) == (1, b"")
    assert ran.err.startswith("vmloop: agent-error: ")
    assert guest.commands == ["guest-fsfreeze-freeze"]


# -- what is known of the agent -------------------------------------------------------------------------------------------


def test_show_tells_what_handlers_found_out(run: Run, broker: NativeBroker) -> None:
    facts = {
        "jobs": {"drive0": {"status": "ready", "offset": 5, "len": 10}},
        "rx_filter": ["net0", "net1"],
        "dumps": [{"path": "/d"}],
        "crashes": [],
    }
    broker.answer_with("vm/web1", "show", {"name": "web1", "state": "running", "agent": "ready", "facts": facts})
    shown = run("show", "web1").out.decode()
    assert "agent: ready\n" in shown
    assert "facts.jobs.drive0.status: ready\n" in shown
    assert "facts.rx_filter: net0 net1\n" in shown
    assert 'facts.dumps: [{"path": "/d"}]\n' in shown
