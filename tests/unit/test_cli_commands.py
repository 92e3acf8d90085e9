# SPDX-License-Identifier: Apache-2.0
"""The command line against a scripted broker: what it asks, prints and returns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from vmloop import __version__
from vmloop.client.cli.main import FAMILY, main
from vmloop.common.capabilities import part_about, to_plain
from vmloop.common.errors import DeadlineExceeded, LaunchFailed, NoSuchVm, QmpError
from vmloop.common.pack import unpack_map

from ..fakes.native_broker import NativeBroker, event_map, reply
from ..fakes.recorded_qemu import load

SUMMARY = {
    "name": "web1",
    "state": "running",
    "reason": "booted",
    "since": 1.0,
    "monitor": "ready",
    "agent": "absent",
    "epoch": 1,
    "seq": 3,
    "pid": 42,
    "worker": "ready",
    "worker_pid": 41,
    "blocked": 0.0,
    "age": 0.25,
    "defined": True,
    "attached": False,
    "of_a_newer_broker": [1],
}


class Ran(NamedTuple):
    code: int
    out: str
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
def run(broker: NativeBroker, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> Ran:
        code = main(["--connect", broker.endpoint, *arguments])
        return Ran(code, *capsys.readouterr())

    return run


# -- looking --------------------------------------------------------------------------------------------------------------


def test_list(run: Run, broker: NativeBroker) -> None:
    broker.answer_with("vmloop", "list", [SUMMARY])
    heading, line = run("list").out.splitlines()
    assert heading.split() == ["NAME", "STATE", "REASON", "MONITOR", "AGENT", "PID", "WORKER", "BLOCKED", "AGE"]
    assert line.split() == ["web1", "running", "booted", "ready", "absent", "42", "ready", "-", "0.2s"]
    assert run("list", "--json").json == [SUMMARY]
    assert run("--json", "list").json == [SUMMARY]


def test_show(run: Run, broker: NativeBroker) -> None:
    details = {
        **SUMMARY,
        "argv": ["qemu", "-name", "a b"],
        "qmp": {"oob": True, "package": None},
        "definition": "x\ny\n",
    }
    broker.answer_with("vm/web1", "show", details)
    shown = run("show", "web1").out
    assert "argv: qemu -name 'a b'\nqmp.oob: true\ndefinition: x\n  y\n" in shown
    assert run("show", "web1", "--json").json == details


def test_stats(run: Run, broker: NativeBroker) -> None:
    process = {"pid": 42, "cpu_seconds": 1.5, "rss_bytes": 3 << 20, "threads": 4}
    broker.answer_with("vmloop", "stats", [{"name": "web1", "state": "running", "qemu": process, "worker": None}])
    assert "web1  running  0          0         0         1.5s      3.0M" in run("stats", "web1").out
    assert unpack_map(broker.seen[-1].body) == {"names": ["web1"]}
    assert run("--json", "stats").json[0]["qemu"] == process


def test_wait(run: Run, broker: NativeBroker) -> None:
    broker.answer_with("vm/web1", "wait", {"state": "paused", "reason": "user", "epoch": 1})
    assert run("wait", "web1", "--for", "paused", "--timeout", "7.5") == (0, "web1: paused (user)\n", "")
    assert broker.seen[-1].seconds == 7.5
    assert run("wait", "web1", "--for", "happy").code == 2


# -- changing -------------------------------------------------------------------------------------------------------------


def test_start_and_its_kin(run: Run, broker: NativeBroker) -> None:
    started = {"name": "web1", "state": "paused", "reason": "booted", "epoch": 1, "pid": 42}
    broker.answer_with("vmloop", "start", started)
    assert run("start", "web1", "--paused") == (0, "web1: paused (booted, pid 42)\n", "")
    assert unpack_map(broker.seen[-1].body) == {"name": "web1", "paused": True}
    assert run("start", "web1", "--json").json == started
    for op in ("kill", "pause", "resume", "reset"):
        broker.answer_with("vm/web1", op, {"state": "paused", "reason": "user"})
        assert run(op, "web1") == (0, "web1: paused (user)\n", "")
    broker.answer_with("vm/web1", "detach", {"name": "web1"})
    assert run("detach", "web1").out == "web1: detached\n"
    broker.answer_with("vmloop", "attach", {**started, "pid": None})
    assert run("attach", "web1", "--qmp", "/q.sock", "--pid", "7").out == "web1: paused (booted)\n"
    assert unpack_map(broker.seen[-1].body) == {"name": "web1", "qmp": "/q.sock", "pid": 7}
    broker.answer_with("vm/web1", "stop", {"state": "shutoff", "reason": "shutdown"})
    assert run("stop", "web1", "--timeout", "2", "--force").out == "web1: shutoff (shutdown)\n"
    assert unpack_map(broker.seen[-1].body) == {"timeout": 2.0, "force": True}


def test_define_reads_and_checks_the_file(run: Run, broker: NativeBroker, tmp_path: Path) -> None:
    broker.answer_with("vmloop", "define", {"name": "web1"})
    broker.answer_with("vmloop", "undefine", {"name": "web1"})
    file = tmp_path / "web1.toml"
    file.write_text('name = "web1"\n[qemu]\nargs = ["-m", "512"]\n')
    assert run("define", str(file)) == (0, "web1: defined\n", "")
    assert unpack_map(broker.seen[-1].body)["definition"]["qemu"]["args"] == ["-m", "512"]
    assert run("undefine", "web1").out == "web1: undefined\n"
    file.write_text('name = "web1"\n[qemu]\nargz = []\n')
    asked = len(broker.seen)
    ran = run("define", str(file))
    assert ran.code == 1
    assert "vmloop: config-error: " in ran.err
    assert "did you mean 'qemu.args'" in ran.err
    assert run("define", str(tmp_path / "none.toml")).err.startswith("vmloop: config-error: cannot read")
    assert len(broker.seen) == asked


def test_shutdown(run: Run, broker: NativeBroker) -> None:
    broker.answer("vmloop", "shutdown", lambda request: [reply(request, {**unpack_map(request.body), "count": 2})])
    assert run("shutdown").out == "broker ends, 2 VMs left running\n"
    assert run("shutdown", "--kill", "--json").json == {"vms": "kill", "count": 2}


# -- monitor and events ---------------------------------------------------------------------------------------------------


def test_qmp(run: Run, broker: NativeBroker) -> None:
    broker.answer("vm/web1", "qmp", lambda request: [reply(request, unpack_map(request.body))])
    asked = {"command": "blockdev-add", "arguments": {"driver": "raw", "file": {"size": 5}}, "oob": True}
    assert run("qmp", "web1", "blockdev-add", "driver=raw", "file.size=5", "--oob", "--json").json == asked
    assert json.loads(run("qmp", "web1", "query-status").out) == {"command": "query-status"}
    assert broker.seen[-1].reading
    assert run("qmp", "web1", "x", "novalue").code == 2


def test_qmp_says_what_is_wrong_before_it_sends_anything(run: Run, broker: NativeBroker) -> None:
    known = to_plain(part_about(load().document(), "device_del"))
    broker.answer_with("vm/web1", "capabilities", known)
    broker.answer("vm/web1", "qmp", lambda request: [reply(request, {})])
    ran = run("qmp", "web1", "device_del", "idd=x")
    assert (ran.code, ran.out) == (2, "")
    assert "device_del: id is missing; idd is unknown; did you mean id? (--no-check sends it all the same)" in ran.err
    assert [request.op for request in broker.seen] == ["capabilities"]
    assert unpack_map(broker.seen[0].body) == {"command": "device_del"}
    assert run("qmp", "web1", "device_del", "id=x").code == 0
    ran = run("qmp", "web1", "device_del", "id=x", "--oob")  # QEMU's to refuse
    assert (ran.code, "these can: migrate-pause, migrate-recover, query-yank, yank" in ran.err) == (0, True)
    assert run("qmp", "web1", "device_del", "idd=x", "--no-check").code == 0
    assert [request.op for request in broker.seen][-1] == "qmp"


def test_qmp_names_commands_near_to_one_that_is_not_there_and_leaves_the_verdict_to_qemu(
    run: Run, broker: NativeBroker
) -> None:
    broker.answer_with("vm/web1", "capabilities", to_plain(part_about(load().document(), "query-statu")))
    broker.refuse("vm/web1", "qmp", QmpError("not found", **{"class": "CommandNotFound", "desc": "not found"}))
    ran = run("qmp", "web1", "query-statu")
    assert ran.code == 1
    assert "did you mean query-status" in ran.err
    assert "vmloop: qmp-error: not found" in ran.err


def test_qmp_sends_what_cannot_be_checked(run: Run, broker: NativeBroker) -> None:
    broker.answer("vm/web1", "qmp", lambda request: [reply(request, {"ok": 1})])
    broker.answer_with("vm/web1", "capabilities", {"format": 99})  # of a later vmloop
    assert run("qmp", "web1", "device_del", "idd=x", "--json").json == {"ok": 1}


def test_probe(run: Run, broker: NativeBroker) -> None:
    known = load().document()
    broker.answer_with("vmloop", "capabilities", to_plain(known))
    assert run("probe", "--json").json == json.loads(json.dumps(to_plain(known)))
    assert unpack_map(broker.seen[-1].body) == {}
    shown = run("probe", "./qemu", "--refresh").out
    assert unpack_map(broker.seen[-1].body) == {"binary": str(Path("qemu").absolute()), "refresh": True}
    assert "binary: /usr/bin/qemu-system-x86_64\nversion: 7.2.22 (Debian" in shown
    assert "commands: 216 (out of band: migrate-pause, migrate-recover, query-yank, yank)" in shown
    broker.refuse("vmloop", "capabilities", LaunchFailed("no QEMU", log="usage"))
    ran = run("probe", "true")
    assert (ran.code, ran.err.splitlines()[0]) == (1, "vmloop: launch-failed: no QEMU")


def test_hmp(run: Run, broker: NativeBroker) -> None:
    broker.answer("vm/web1", "hmp", lambda request: [reply(request, f"got {unpack_map(request.body)['line']}\r\n")])
    assert run("hmp", "web1", "info", "status").out == "got info status\n"
    assert run("hmp", "web1", "info status", "--json").json == "got info status\r\n"


def test_events(run: Run, broker: NativeBroker) -> None:
    kept = [event_map("web1", 1, 1, "STOP"), event_map("web1", 1, 2, "RESUME", x="\x1b[2J")]
    broker.serve_events("web1", kept)
    first, second = run("events", "web1").out.splitlines()
    assert first.endswith("web1 1.1 STOP")
    assert second.endswith(r'web1 1.2 RESUME {"x": "\u001b[2J"}')
    assert [json.loads(line) for line in run("events", "--json").out.splitlines()] == kept
    assert [json.loads(line)["seq"] for line in run("events", "web1", "--since", "1.1", "--json").out.splitlines()] == [
        2
    ]
    for wrong in (("--since", "1.1"), ("web1", "web2", "--since", "1.1"), ("web1", "--since", "x")):
        assert run("events", *wrong).code == 2


# -- errors and exit codes ------------------------------------------------------------------------------------------------


def test_an_error_is_one_line_with_its_code_and_then_the_facts(run: Run, broker: NativeBroker) -> None:
    broker.refuse("vmloop", "start", LaunchFailed("QEMU ended", log="line 1\nline \x1b[2J\n"))
    assert run("start", "web1") == (
        1,
        "",
        "vmloop: launch-failed: QEMU ended\n  the end of qemu.log:\n  | line 1\n  | line \\x1b[2J\n",
    )
    broker.refuse("vm/web1", "qmp", QmpError("refused", **{"class": "GenericError", "desc": "bad bus"}))
    assert run("qmp", "web1", "x").err == "vmloop: qmp-error: refused\n  class: GenericError\n  desc: bad bus\n"
    broker.refuse("vm/web1", "show", NoSuchVm("no web1"))
    assert run("show", "web1") == (1, "", "vmloop: no-such-vm: no web1\n")


def test_a_deadline_has_its_own_exit_code(run: Run, broker: NativeBroker) -> None:
    broker.refuse("vm/web1", "wait", DeadlineExceeded("not yet"))
    assert run("wait", "web1", "--for", "shutoff").code == 4
    broker.answer("vmloop", "list", lambda request: [])
    assert run("--timeout", "0.01", "list").code == 4


def test_no_broker_has_its_own_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(tmp_path), "list"]) == 3
    assert capsys.readouterr().err.startswith("vmloop: no-broker: nobody listens at ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nosuch"],
        ["list", "extra"],
        ["start"],
        ["start", "../x"],
        ["stop", "a", "--timeout", "0"],
        ["--timeout", "-1", "list"],
        ["--timeout", "nan", "list"],
        ["--root", "/x", "--connect", "ipc:///y", "list"],
        ["--connect", "ipc:///y", "broker"],
        ["simulate"],
        ["completion", "tcsh"],
    ],
)
def test_a_wrong_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("vmloop: bad-request: ")


def test_help_version_and_completion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {command} " in shown for command in FAMILY)
    for command in FAMILY:
        assert main([command, "--help"]) == 0
        assert "--json" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    for shell in ("zsh", "fish"):
        assert main(["completion", shell]) == 0
        assert "_VMLOOP_COMPLETE" in capsys.readouterr().out
