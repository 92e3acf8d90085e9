# SPDX-License-Identifier: Apache-2.0
"""Probes of binaries that are no good, or break off: an error that says so, within its time, and nothing left running."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from vmloop.common.capabilities import Capabilities
from vmloop.common.errors import BadRequest, DeadlineExceeded, LaunchFailed
from vmloop.worker.probe import throwaway
from vmloop.worker.probe.probing import find_binary, probe

from ..fakes.recorded_qemu import binary_that, load

SOON = 10.0


def probed(path: Path | str, seconds: float = SOON) -> Capabilities:
    return asyncio.run(probe(find_binary(os.fspath(path)), seconds))


def script(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)
    return path


@pytest.mark.qemu
def test_the_installed_qemu_is_probed_within_a_second(require_qemu: str) -> None:
    best = min(_timed(require_qemu) for _ in range(3))
    assert best < 1.0


def _timed(binary: str) -> float:
    began = time.monotonic()
    found = probed(binary)
    assert found.version >= (4, 2, 0)
    assert {"q35", "none"} <= set(found.machines)
    assert found.expansion
    return time.monotonic() - began


@pytest.mark.qemu
def test_nothing_of_a_probe_stays_on_the_disk(require_qemu: str) -> None:
    before = set(Path(tempfile.gettempdir()).glob("vmloop-probe-*"))
    probed(require_qemu)
    assert set(Path(tempfile.gettempdir()).glob("vmloop-probe-*")) <= before


def test_the_stand_in_gives_the_recorded_document(tmp_path: Path) -> None:
    binary = binary_that(tmp_path / "qemu")
    assert probed(binary) == load().document(str(binary))


def test_errors_to_every_question_still_give_a_document(tmp_path: Path) -> None:
    found = probed(binary_that(tmp_path / "qemu", errors=True))
    assert found.commands == []
    assert found.missing["query-qmp-schema"] == "GenericError: not today"


@pytest.mark.parametrize("answers", [0, 1, 3, 8, 25])
def test_a_dialogue_that_is_cut_short_is_told_with_how_the_process_ended(tmp_path: Path, answers: int) -> None:
    with pytest.raises(LaunchFailed, match=r"hung up before .*exited with status 7"):
        probed(binary_that(tmp_path / "qemu", cut=answers))


def test_one_that_stops_answering_is_ended_at_the_deadline(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"within 1.5 s"):
        probed(binary_that(tmp_path / "qemu", hang=4), 1.5)
    assert time.monotonic() - began < 4.0


def test_one_that_hangs_before_its_greeting_is_ended_with_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    binary = script(tmp_path / "qemu", f"sleep 600 & echo $$ $! > {pids}", "sleep 600")
    with pytest.raises(DeadlineExceeded):
        probed(binary, 0.5)
    assert pids.read_text()  # and conftest's no_process_left looks for them


def test_what_it_prints_is_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(LaunchFailed, match="Could not open 'rom'") as caught:
        probed(script(tmp_path / "qemu", "echo first; echo \"qemu: Could not open 'rom'\" >&2; exit 1"))
    assert caught.value.fields["log"] == "first\nqemu: Could not open 'rom'"
    assert "status 1" in str(caught.value)


def test_a_qemu_that_prints_to_its_standard_output_is_probed_all_the_same(tmp_path: Path) -> None:
    found = probed(binary_that(tmp_path / "qemu", prints='{"QMP": "not here"}\nwarning: x\n' * 100))
    assert found.version == (7, 2, 22)


def test_one_that_prints_without_end_is_ended(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(LaunchFailed, match=f"printed over {throwaway.MAX_OUTPUT} bytes"):
        probed(script(tmp_path / "qemu", "exec yes"))
    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize("program", ["true", "false", "cat", "env"])
def test_a_program_that_is_no_qemu_is_told_to_be_none(program: str) -> None:
    with pytest.raises(LaunchFailed, match=r"Is it a QEMU of 4\.2 or later"):
        probed(program)


def test_a_file_that_cannot_be_run_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "qemu"
    broken.write_bytes(b"\x7fELF and no more")
    broken.chmod(0o755)
    with pytest.raises(LaunchFailed, match=r"cannot start .*Exec format error"):
        probed(broken)


def test_a_path_that_leads_to_no_program_is_told(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch(mode=0o600)
    for name, what in (
        ("no-such-qemu", "no executable"),
        (str(tmp_path), "is a directory"),
        (str(plain), "not executable"),
    ):
        with pytest.raises(LaunchFailed, match=what):
            find_binary(name)
    with pytest.raises(LaunchFailed, match="no executable"):
        find_binary(str(tmp_path / "missing"))
    for name in ("a/b", "", "x\0y", "simulated"):
        with pytest.raises(BadRequest):
            find_binary(name)


def test_a_link_is_followed_to_the_binary(tmp_path: Path) -> None:
    binary = script(tmp_path / "qemu", "exit 0")
    (tmp_path / "link").symlink_to(binary)
    assert find_binary(str(tmp_path / "link")) == str(binary)


def test_a_prober_that_is_killed_leaves_no_qemu_behind(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    binary = script(tmp_path / "qemu", f"echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; exec sleep 600")
    code = "import asyncio, sys; from vmloop.worker.probe.probing import probe; asyncio.run(probe(sys.argv[1]))"
    prober = subprocess.Popen([sys.executable, "-c", code, str(binary)])
    try:
        until = time.monotonic() + SOON
        while not pid_file.exists():
            assert time.monotonic() < until
            select.select([], [], [], 0.01)
        pidfd = os.pidfd_open(int(pid_file.read_text()))
    finally:
        prober.send_signal(signal.SIGKILL)
        prober.wait(SOON)
    with os.fdopen(pidfd):
        assert select.select([pidfd], [], [], SOON)[0], "it runs on"
