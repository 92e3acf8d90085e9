# SPDX-License-Identifier: Apache-2.0
"""The command line as a process: signals, closed pipes, terminals, completion, and what it does not import."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmloop.common.capabilities import part_about, to_plain
from vmloop.common.errors import VmExists
from vmloop.common.pack import unpack_map
from vmloop.common.wire import Message

from ..fakes.native_broker import NativeBroker, event_map, reply
from ..fakes.recorded_qemu import load

COMMAND = [sys.executable, "-W", "error", "-m", "vmloop.client.cli.main"]
SOON = 30.0


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[NativeBroker]:
    with NativeBroker(tmp_path) as broker:
        yield broker


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "FORCE_COLOR")}
    return {**kept, "TERM": "xterm", **extra}


def start(broker: NativeBroker, *arguments: str) -> subprocess.Popen[str]:
    command = [*COMMAND, "--connect", broker.endpoint, *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), restore_signals=True
    )


def test_following_ends_with_130_on_sigint(broker: NativeBroker) -> None:
    broker.serve_events("web1", [event_map("web1", 1, 1)])
    with start(broker, "events", "--follow", "--json") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith('{"vm": "web1"')
        process.send_signal(signal.SIGINT)
        assert process.wait(SOON) == 130
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_a_closed_pipe_is_quiet(broker: NativeBroker) -> None:
    kept = [event_map("web1", 1, seq) for seq in range(1, 4)]
    broker.serve_events("web1", kept)
    with start(broker, "events", "--follow") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        broker.publish(event_map("web1", 1, 4))
        broker.publish(event_map("web1", 1, 5))
        assert process.wait(SOON) == 0
        assert process.stderr.read() == ""


def on_terminal(broker: NativeBroker, *arguments: str, **extra: str) -> str:
    ours, theirs = pty.openpty()
    command = [*COMMAND, "--connect", broker.endpoint, *arguments]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment(**extra)) as process:
        os.close(theirs)
        text = b""
        try:
            while chunk := os.read(ours, 4096):
                text += chunk
        except OSError:  # EIO: the other end is closed
            pass
        finally:
            os.close(ours)
        assert process.wait(SOON) == 0, text
    return text.decode()


def test_a_terminal_gets_tables_and_colour_but_no_text_of_others_as_markup(broker: NativeBroker) -> None:
    entry = {"name": "web1", "state": "running", "reason": "[red]x[/red]\x1b[2J", "worker": "ready", "age": 0.1}
    broker.answer_with("vmloop", "list", [entry])
    shown = on_terminal(broker, "list", COLUMNS="200")
    assert "\x1b[32mrunning" in shown
    assert "[red]x[/red]\\x1b[2J" in shown
    plain = on_terminal(broker, "list", COLUMNS="200", NO_COLOR="1")
    assert "\x1b[32m" not in plain
    assert "running" in plain
    assert on_terminal(broker, "--json", "list").startswith('[{"name": "web1"')


def test_a_terminal_shows_every_kind_of_result(broker: NativeBroker) -> None:
    broker.serve_events("web1", [event_map("web1", 1, 1, "STOP", x=1)])
    broker.answer_with("vm/web1", "show", {"name": "web1", "state": "running"})
    broker.answer_with("vm/web1", "qmp", {"status": "running"})
    broker.answer_with("vmloop", "start", {"name": "web1", "state": "running", "reason": "booted"})
    broker.answer_with(
        "vmloop", "capabilities", {"format": 1, "binary": "/q", "version": [4, 2, 0], "machines": ["x\x1b"]}
    )
    assert "STOP" in on_terminal(broker, "events")
    assert "4.2.0" in on_terminal(broker, "probe")
    assert "web1" in on_terminal(broker, "show", "web1")
    assert "status" in on_terminal(broker, "qmp", "web1", "query-status")
    assert "web1: running (booted)" in on_terminal(broker, "start", "web1")


def test_what_takes_long_has_a_spinner(broker: NativeBroker) -> None:
    broker.answer("vm/web1", "pause", lambda request: [])
    ours, theirs = pty.openpty()
    command = [*COMMAND, "--connect", broker.endpoint, "pause", "web1"]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment()) as process:
        os.close(theirs)
        request = broker.requests.get(timeout=SOON)
        text = b""
        while b"pausing web1" not in text:
            text += os.read(ours, 4096)
        broker.send_to(0, reply(request, {"state": "paused", "reason": "user"}))
        while b"web1: paused (user)" not in text:
            text += os.read(ours, 4096)
        assert process.wait(SOON) == 0
    os.close(ours)


def test_the_shell_completes_names_by_asking_the_broker(broker: NativeBroker) -> None:
    broker.answer_with("vmloop", "list", [{"name": name, "state": "running"} for name in ("web1", "web2", "db")])

    def complete(*words: str) -> str:
        asked = environment(
            _VMLOOP_COMPLETE="bash_complete", COMP_WORDS=" ".join(("vmloop", *words)), COMP_CWORD=str(len(words))
        )
        return subprocess.run(COMMAND, env=asked, capture_output=True, text=True, timeout=SOON, check=False).stdout

    assert complete("--connect", broker.endpoint, "start", "we") == "plain,web1\nplain,web2\n"
    assert complete("--connect", "ipc:///nowhere/client.sock", "start", "we").strip() == ""
    assert "plain,start" in complete("st")


def test_the_shell_completes_commands_and_arguments_from_the_vms_capabilities(broker: NativeBroker) -> None:
    known = load().document()

    def part(request: Message) -> list[Message]:
        return [reply(request, to_plain(part_about(known, unpack_map(request.body)["command"])))]

    broker.answer("vm/web1", "capabilities", part)

    def complete(*words: str) -> list[str]:
        line = " ".join(("vmloop", "--connect", broker.endpoint, "qmp", "web1", *words))
        asked = environment(_VMLOOP_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD=str(len(words) + 4))
        ran = subprocess.run(COMMAND, env=asked, capture_output=True, text=True, timeout=SOON, check=False)
        return [word.removeprefix("plain,") for word in ran.stdout.split()]

    assert complete("query-mig") == ["query-migrate", "query-migrate-capabilities", "query-migrate-parameters"]
    assert complete("device_add", "d") == ["driver="]
    assert complete("set-action", "reboot=") == ["reboot=reset", "reboot=shutdown"]
    assert complete("nosuch", "x") == []
    broker.answer("vm/web1", "capabilities", lambda request: [])  # nobody answers
    assert complete("query-mig") == []


def test_a_short_command_imports_little(broker: NativeBroker) -> None:
    broker.answer_with("vmloop", "list", [])
    script = (
        "import sys; from vmloop.client.cli.main import main; code = main(sys.argv[1:]); "
        "slow = {'rich', 'psutil', 'asyncio', 'tenacity', 'hypothesis', 'tomllib'} & set(sys.modules); "
        "sys.exit(f'imported {slow}' if slow else code)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, "--connect", broker.endpoint, "list"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SOON,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def attachable(broker: NativeBroker, count: int) -> None:
    started = {"name": "x", "state": "running", "reason": "attached", "epoch": 1, "pid": None}
    broker.answer("vmloop", "attach", lambda request: [reply(request, started)])
    broker.answer("vmloop", "ping", lambda request: [reply(request, {"time": 1.0})])
    for number in range(count):
        broker.answer_with(f"vm/sim-{number:03}", "detach", {"name": f"sim-{number:03}"})


def operations(broker: NativeBroker) -> list[str]:
    return sorted(f"{message.op} {message.service}" for message in broker.seen if message.op != "ping")


def test_simulate_attaches_and_detaches(broker: NativeBroker, tmp_path: Path) -> None:
    attachable(broker, 3)
    with start(broker, "simulate", "-n", "3", "--directory", str(tmp_path / "vms"), "--once", "--json") as process:
        assert process.stdout is not None
        assert '"attached": 3, "failed": 0' in process.stdout.read()
        assert process.wait(SOON) == 0
    assert operations(broker) == ["attach vmloop"] * 3 + [f"detach vm/sim-00{number}" for number in range(3)]
    paths = [unpack_map(message.body)["qmp"] for message in broker.seen if message.op == "attach"]
    assert paths == [str(tmp_path / "vms" / f"sim-00{number}.qmp") for number in range(3)]


def test_simulate_stays_until_sigterm(broker: NativeBroker) -> None:
    attachable(broker, 1)
    with start(broker, "simulate", "-n", "1") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("1 simulated VMs attached in ")
        assert operations(broker) == ["attach vmloop"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(SOON) == 0
    assert operations(broker) == ["attach vmloop", "detach vm/sim-000"]


def test_simulate_reports_what_could_not_be_attached(broker: NativeBroker) -> None:
    attachable(broker, 2)
    broker.refuse("vmloop", "attach", VmExists("there is one"))
    with start(broker, "simulate", "-n", "2") as process:
        assert process.stderr is not None
        assert process.stderr.read() == "vmloop: vm-exists: there is one\n"
        assert process.wait(SOON) == 1
