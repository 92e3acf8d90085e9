# SPDX-License-Identifier: Apache-2.0
"""`vmloop run`: one VM in the foreground, as a process, in a terminal, and under a service manager; how it ends, and what it leaves.

Temporary roots are made in the test's own directory, so that what is left can be seen.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from vmloop.client import connect, embedded
from vmloop.common.errors import DeadlineExceeded

from ..fakes.service_manager import ServiceManager
from ..fakes.terminal import Terminal
from ..guest.image import guest_args, require_guest
from .site import REAL_ARGS, processes_of, wait_for

VMLOOP: Final = [sys.executable, "-m", "vmloop.client.cli.main"]
SIMULATED: Final = ["--binary", "simulated"]
SECONDS: Final = 30.0
BOOT: Final = 60.0  # two to six seconds; more on a machine with much else to do

on_real_qemu = pytest.mark.usefixtures("require_qemu")


@pytest.fixture
def place() -> Iterator[Path]:
    """Where temporary roots are made: afterwards nothing of them runs, and none is there."""
    with tempfile.TemporaryDirectory(prefix="vml-") as made:
        place = Path(made)
        yield place
        left = wait_for(lambda: not (found := processes_of(place)) or found, SECONDS)
        assert left is True, f"left running: {left}"
        assert list(place.glob("vml-*")) == [], "a temporary root is left"


def environment(place: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(place), "TERM": "xterm"}


class Run:
    """`vmloop run` without a terminal. `see` reads what it says on standard error."""

    def __init__(
        self, place: Path, *words: str, root: Path | None = None, hang_up: signal.Handlers = signal.SIG_DFL
    ) -> None:
        def signals() -> None:  # pytest may have been started as a background job, which ignores SIGINT
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, hang_up)

        before = ["--root", str(root)] if root is not None else []
        self.process = subprocess.Popen(
            [*VMLOOP, *before, "run", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,  # a line that has been read ahead is not seen by select
            cwd=place,
            env=environment(place),
            preexec_fn=signals,
        )

    def see(self, text: str) -> str:
        assert self.process.stderr is not None
        while select.select([self.process.stderr], [], [], SECONDS)[0]:
            line = self.process.stderr.readline().decode()
            assert line, f"it has ended before it said {text!r}"
            if text in line:
                return line
        raise AssertionError(f"{text!r} has not come")

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, out.decode(), err.decode()


# -- how it ends ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_powers_the_guest_down_and_that_is_a_success(place: Path) -> None:
    run = Run(place, *SIMULATED, "--events", "--")
    run.see('"new": "running"')
    run.process.send_signal(signal.SIGINT)
    code, out, err = run.end()
    assert (code, out) == (0, "")
    assert "asking the guest to power down" in err


@pytest.mark.parametrize("closed", [True, False])
def test_it_ends_with_the_vm_also_if_nobody_reads_its_events(place: Path, closed: bool) -> None:
    """`2>&-`, and a pipe like `| head -1`. Its exit code says still how the VM ended."""
    words = [*VMLOOP, "--root", str(place / "root"), "run", *SIMULATED, "--events", "--"]
    pipe, theirs = os.pipe()
    os.close(pipe)
    with open(theirs, "wb") as stderr:
        shell = ["sh", "-c", 'exec "$@" 2>&-', "sh"] if closed else []
        process = subprocess.Popen(
            [*shell, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            cwd=place,
            env=environment(place),
        )
    with process:
        try:
            with connect(root=place / "root", wait=SECONDS) as host:
                wait_for(lambda: [vm.name for vm in host.list()], SECONDS)
                vm = host.vm(host.list()[0].name)
                vm.wait("running", SECONDS)
                vm.kill()
            assert process.wait(SECONDS) == 12
        finally:
            process.kill()


def test_a_second_ctrl_c_kills(place: Path) -> None:
    run = Run(place, *SIMULATED, "--events", "--json", "--", "-simulate", "ignore_powerdown")
    run.see('"new": "running"')
    run.process.send_signal(signal.SIGINT)
    run.see("Ctrl-C once more kills")
    run.process.send_signal(signal.SIGINT)
    code, out, _ = run.end()
    assert code == 12
    result = json.loads(out)
    assert (result["state"], result["reason"], result["exit"]) == ("shutoff", "destroyed", 12)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_and_sighup_kill_a_guest_that_does_not_listen_at_its_time(place: Path, number: signal.Signals) -> None:
    run = Run(place, *SIMULATED, "--events", "--stop-timeout", "0.3", "--", "-simulate", "ignore_powerdown")
    run.see('"new": "running"')
    run.process.send_signal(number)
    code, _, err = run.end()
    assert code == 12
    assert "in 0.3 s the VM is killed" in err


def test_a_hang_up_that_was_to_be_ignored_is(place: Path) -> None:
    root = place / "kept"
    run = Run(place, *SIMULATED, "--events", "--", root=root, hang_up=signal.SIG_IGN)
    run.see('"new": "running"')
    run.process.send_signal(signal.SIGHUP)
    with connect(root=root) as host, pytest.raises(DeadlineExceeded, match="is running"):
        host.vm("vm").wait("shutoff", timeout=1.0)
    run.process.send_signal(signal.SIGTERM)
    assert run.end()[0] == 0


def test_a_guest_that_panics_ends_the_run_and_says_so(place: Path) -> None:
    root = place / "kept"
    run = Run(place, *SIMULATED, "--events", "--", root=root)
    run.see('"new": "running"')
    with connect(root=root) as host:
        host.vm("vm").qmp("x-simulate", {"panic": True})
    code, _, err = run.end()
    assert code == 11
    assert "its guest had panicked" in err


def test_a_guest_that_panics_is_kept_where_its_definition_says_so_and_that_is_told(place: Path) -> None:
    root = place / "kept"
    (place / "web.toml").write_text(
        'name = "vm"\n[qemu]\nbinary = "simulated"\nargs = ["-simulate", "ignore_powerdown"]\n[handlers]\non_crash = "preserve"\n'
    )
    run = Run(place, "web.toml", "--events", root=root)
    run.see('"new": "running"')
    with connect(root=root) as host:
        host.vm("vm").qmp("x-simulate", {"panic": True})
        run.see('on_crash = "preserve" keeps the VM')
        assert host.vm("vm").show().state == "crashed"
    run.process.send_signal(signal.SIGINT)
    run.see("Ctrl-C once more kills")
    run.process.send_signal(signal.SIGINT)
    assert run.end()[0] == 11


def test_a_qemu_that_dies_ends_the_run_as_crashed(place: Path) -> None:
    root = place / "kept"
    run = Run(place, *SIMULATED, "--events", "--", root=root)
    run.see('"new": "running"')
    with connect(root=root) as host:
        pid = host.vm("vm").show().pid
    assert pid is not None
    os.kill(pid, signal.SIGSEGV)
    code, _, err = run.end()
    assert code == 10
    assert "vmloop: vm: shutoff (crashed): was ended by SIGSEGV" in err


@pytest.mark.qemu
@on_real_qemu
def test_a_qemu_that_does_not_start_tells_why(place: Path) -> None:
    missing = place / "missing.img"  # which no probe can know of
    code, _, err = Run(place, "--", "-drive", f"file={missing},if=none,format=raw").end()
    assert code == 1
    assert "launch-failed" in err
    assert str(missing) in err


@pytest.mark.qemu
@on_real_qemu
def test_a_machine_that_qemu_does_not_have_is_told_with_a_near_name(place: Path) -> None:
    code, _, err = Run(place, "--", "-machine", "q53").end()
    assert code == 1
    assert "q53" in err
    assert ("did you mean" in err) or ("unsupported machine type" in err)  # whether there was time to probe


def test_a_broker_that_is_killed_under_it_is_told_and_nothing_is_left(place: Path) -> None:
    root = place / "kept"
    run = Run(place, *SIMULATED, "--events", "--", root=root)
    run.see('"new": "running"')
    with connect(root=root) as host:
        os.kill(host.version().pid, signal.SIGKILL)
    code, _, err = run.end()
    assert code == 1
    assert "its broker has ended under it" in err


def test_a_run_that_is_killed_takes_its_vm_and_its_root_with_it(place: Path) -> None:
    run = Run(place, *SIMULATED, "--events", "--")
    run.see('"new": "running"')
    assert len(list(place.glob("vml-*"))) == 1
    run.process.kill()
    run.end()
    assert wait_for(lambda: not list(place.glob("vml-*")), SECONDS)


# -- what runs --------------------------------------------------------------------------------------------------------------


def test_a_definition_can_be_changed_and_its_root_kept(place: Path) -> None:
    (place / "web.toml").write_text('name = "web"\n[qemu]\nbinary = "simulated"\nargs = ["-a"]\n')
    changes = ["--set", 'qemu.args+=["-b", "-c"]', "--set", "agent.enabled=true", "--set", "name=web2"]
    run = Run(place, "web.toml", *changes, "--events", root=place / "kept")
    run.see('"new": "running"')
    run.process.send_signal(signal.SIGTERM)
    assert run.end()[0] == 0
    definition = (place / "kept/state/vms/web2/vm.toml").read_text()
    assert 'args = ["-a", "-b", "-c"]' in definition
    assert "enabled = true" in definition


@pytest.mark.qemu
@on_real_qemu
def test_relative_paths_mean_what_they_mean_in_the_shell(place: Path) -> None:
    (place / "disk.img").write_bytes(bytes(1 << 16))
    run = Run(
        place, "--events", "--stop-timeout", "0.2", "--", *REAL_ARGS, "-drive", "if=none,id=d,format=raw,file=disk.img"
    )
    run.see('"new": "running"')
    run.process.send_signal(signal.SIGTERM)
    assert run.end()[0] == 12


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "give a FILE, or QEMU's arguments"),
        (["a.toml", "--", "-m", "64"], 2, "give a FILE, or QEMU's arguments"),
        (["--console", "--json", "--", "-m", "64"], 2, "cannot both have standard output"),
        (["missing.toml"], 1, "cannot read missing.toml"),
        (["--set", "agent", "--", "-m", "64"], 1, "KEY=VALUE"),
        (["--set", "agent.enalbed=true", "--"], 1, "did you mean 'agent.enabled'"),
        (["--console", "--", "-serial", "null"], 1, "the arguments have -serial already"),
        (["--console", *SIMULATED, "--"], 1, "a simulated VM has no console"),
    ],
)
def test_what_cannot_be_run_is_told(place: Path, words: list[str], code: int, says: str) -> None:
    told = Run(place, *words).end()
    assert told[0] == code
    assert says in told[2]


def test_a_root_that_has_a_broker_is_left_to_it(place: Path) -> None:
    with embedded(place / "kept") as host:
        code, _, err = Run(place, *SIMULATED, "--", root=place / "kept").end()
        assert code == 1
        assert f"vmloop: denied: a broker (pid {host.version().pid}) serves {place}/kept already" in err
        assert host.list() == []


# -- under a service manager ------------------------------------------------------------------------------------------------


def test_a_service_manager_hears_when_the_vm_runs_and_when_it_is_ending(place: Path) -> None:
    manager = ServiceManager(place)
    try:
        with (place / "log").open("ab") as log:
            root = ["--root", str(place / "kept")]
            service = manager.start([*VMLOOP, *root, "run", *SIMULATED, "--"], log.fileno())
        assert wait_for(lambda: any("READY=1" in text for text in manager.said), SECONDS)
        with connect(root=place / "kept") as host:
            assert host.vm("vm").show().state == "running"
        service.terminate()
        assert service.wait(SECONDS) == 0
        assert wait_for(lambda: "STATUS=shutoff (shutdown)" in manager.said, SECONDS)
    finally:
        manager.close()
    ready, stopping = (
        next(n for n, text in enumerate(manager.said) if word in text) for word in ("READY=1", "STOPPING=1")
    )
    assert ready < stopping
    assert manager.said[ready] == "READY=1\nSTATUS=vm runs"
    assert manager.refused == [], "the private broker and what it starts are not the service"


# -- in a terminal ----------------------------------------------------------------------------------------------------------


def terminal(place: Path, *words: str) -> Terminal:
    return Terminal([*VMLOOP, "run", *words], place, environment(place))


@pytest.mark.qemu
@on_real_qemu
def test_a_guest_is_used_through_its_console_and_powered_down_by_ctrl_c(place: Path) -> None:
    args = guest_args(require_guest(), shell=True)
    with terminal(place, "--console", "--", *args) as at:
        at.see(b"guest: up", seconds=BOOT)
        assert at.is_raw
        at.type(b"\r")
        at.see(b"# ", seconds=BOOT)
        at.type(b"echo it-is-$((6*7))\r")
        at.see(b"it-is-42")
        at.type(b"\x03")
        at.see(b"asking the guest to power down")
        at.see(b"reboot: Power down", seconds=BOOT)
        assert at.end() == 0
        assert at.attributes() == at.before


@pytest.mark.qemu
@on_real_qemu
def test_the_console_can_be_left_and_a_second_ctrl_c_kills(place: Path) -> None:
    with terminal(place, "--console", "--events", "--", *REAL_ARGS) as at:
        at.see(b'"new": "running"')
        wait_for(lambda: at.is_raw)
        at.type(b"\x1d")
        at.see(b"console left")
        assert at.attributes() == at.before
        at.type(b"\x03")
        at.see(b"Ctrl-C once more kills the VM")
        at.type(b"\x03")
        assert at.end() == 12
        assert b"shutoff (destroyed)" in at.seen


@pytest.mark.qemu
@on_real_qemu
def test_the_terminal_is_given_back_when_the_vm_dies(place: Path) -> None:
    with terminal(place, "--console", "--", *REAL_ARGS) as at:
        assert wait_for(lambda: at.is_raw, SECONDS)
        [root] = place.glob("vml-*")
        with connect(root=root) as host:
            host.vm("vm").kill()
        assert at.end() == 12
        assert at.attributes() == at.before
