# SPDX-License-Identifier: Apache-2.0
"""What an earlier broker left on disk: every VM found as its files say; what is damaged or foreign is named and left where it is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vmloop.broker.catalogue import Found, scan
from vmloop.common.cursor import Cursor
from vmloop.common.names import VmName, vm_name
from vmloop.common.page import Page, Word
from vmloop.common.paths import Paths, paths_under
from vmloop.common.process import identify
from vmloop.worker.runfile import Run, RunEnd, write_run

WEB1 = VmName("web1")


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    made = Paths(tmp_path / "run", tmp_path / "state", tmp_path / "etc")
    made.vms_run.mkdir(parents=True)
    made.vms_state.mkdir(parents=True)
    return made


def put(paths: Paths, name: str = "web1", *, definition: bytes | None = b"", run: bytes | Run | None = None) -> None:
    """A VM's state directory with these files."""
    vm = paths.vm(vm_name(name))
    vm.state.mkdir()
    if definition is not None:
        vm.definition.write_bytes(definition)
    if isinstance(run, Run):
        write_run(vm.run_file, run)
    elif run is not None:
        vm.run_file.write_bytes(run)


def only(paths: Paths) -> Found:
    [found] = scan(paths)
    return found


def contents(directory: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(directory.rglob("*"))}


def test_a_host_without_vms_has_none(paths: Paths) -> None:
    assert scan(paths) == []


def test_a_vm_that_never_ran_is_shutoff(paths: Paths) -> None:
    put(paths)
    status = {"defined": True, "state": "shutoff", "reason": "unknown", "run": False}
    assert only(paths) == Found(WEB1, Cursor(0, 0), status, None)


def test_a_vm_whose_run_has_not_ended_is_unknown_until_somebody_has_looked(paths: Paths) -> None:
    put(paths, run=Run(epoch=7, started=12.5))
    found = only(paths)
    assert found.newest.epoch == 7
    assert (found.status["state"], found.status["alive"], found.status["started"]) == ("unknown", True, 12.5)


def test_how_far_a_vms_events_go_is_known_from_its_page_and_after_a_reboot_from_its_runs_end(paths: Paths) -> None:
    put(paths, run=Run(epoch=7, ended=RunEnd("shutoff", "shutdown", 99.5, seq=40)))
    assert only(paths).newest == Cursor(7, 40)
    page = paths.vm(WEB1).page
    page.parent.mkdir(parents=True, exist_ok=True)
    with Page(page, writable=True) as written:
        written.words[Word.EPOCH], written.words[Word.PROGRESS] = 7, 43 << 24 | 17
    assert only(paths).newest == Cursor(7, 43)


def test_a_vm_whose_run_has_ended_is_as_it_ended(paths: Paths) -> None:
    put(paths, run=Run(epoch=7, started=12.5, ended=RunEnd("crashed", "panic", 99.5)))
    status = only(paths).status
    assert (status["state"], status["reason"], status["since"], status.get("alive")) == ("crashed", "panic", 99.5, None)


def test_an_attached_vm_is_found_without_a_definition(paths: Paths) -> None:
    put(paths, definition=None, run=Run(epoch=1, launched=False))
    found = only(paths)
    assert (found.status["defined"], found.status["run"], found.status["alive"]) == (False, True, True)


def test_a_directory_with_nothing_in_it_is_no_vm(paths: Paths) -> None:
    put(paths, definition=None)
    assert scan(paths) == []


def test_vms_come_in_the_order_of_their_names(paths: Paths) -> None:
    for name in ("b", "C", "a", "10", "9"):
        put(paths, name)
    assert [found.name for found in scan(paths)] == ["10", "9", "C", "a", "b"]


@pytest.mark.parametrize("name", ["-a", ".hidden", "a b", "ä", "a" * 65, "lost+found", "web1.damaged!", "a\nb"])
def test_what_has_no_vms_name_is_named_and_passed_over(
    paths: Paths, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (paths.vms_state / name).mkdir()
    (paths.vms_state / name / "vm.toml").write_text("")
    put(paths)
    before = contents(paths.state)
    assert only(paths).name == "web1"
    assert repr(name)[1:-1] in caplog.text or name in caplog.text
    assert contents(paths.state) == before


def test_a_name_that_is_no_text_is_named_and_passed_over(paths: Paths, caplog: pytest.LogCaptureFixture) -> None:
    os.mkdir(os.fsencode(paths.vms_state) + b"/\xff\xfe")
    put(paths)
    assert only(paths).name == "web1"
    assert "no VM" in caplog.text


def test_a_file_among_the_directories_is_no_vm(paths: Paths, caplog: pytest.LogCaptureFixture) -> None:
    (paths.vms_state / "README").write_text("mine")
    (paths.vms_state / "dangling").symlink_to("nowhere")
    put(paths)
    assert only(paths).name == "web1"
    assert "README" in caplog.text
    assert "dangling" in caplog.text
    assert (paths.vms_state / "README").read_text() == "mine"


DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "torn": b'{"epoch": 3, "star',
    "no JSON": b"\x00\xff\xfe",
    "a list": b"[]",
    "an epoch that is none": b'{"epoch": "3"}',
    "a negative epoch": b'{"epoch": -1}',
    "an epoch that no message can carry": b'{"epoch": 4294967296}',
    "an enormous epoch": b'{"epoch": 1' + b"0" * 500 + b"}",
    "an end that is none": b'{"epoch": 3, "ended": "yes"}',
    "a state that is none": b'{"epoch": 3, "ended": {"state": 5}}',
    "nested without end": b"[" * 100_000,
    "too long": b'{"epoch": 3, "argv": ["' + b"x" * (5 * 1024 * 1024) + b'"]}',
}


@pytest.mark.parametrize("run", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_vm_whose_run_cannot_be_read_is_named_and_unknown_and_never_shutoff(
    paths: Paths, run: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    put(paths, run=run)
    put(paths, "web2")
    before = contents(paths.state)
    found, beside = scan(paths)
    assert (found.status["state"], found.status["alive"], found.newest.epoch) == ("unknown", True, 0)
    assert beside.status["state"] == "shutoff"
    assert str(paths.vm(WEB1).run_file) in caplog.text
    assert contents(paths.state) == before, "the worker sets it aside, nobody removes it"


def test_a_directory_in_the_place_of_a_file_is_named_and_unknown(
    paths: Paths, caplog: pytest.LogCaptureFixture
) -> None:
    put(paths)
    paths.vm(WEB1).run_file.mkdir()
    assert only(paths).status["state"] == "unknown"
    assert "run.json" in caplog.text


def test_fields_that_a_later_version_adds_do_no_harm(paths: Paths) -> None:
    run: dict[str, Any] = {"epoch": 3, "later": {"a": [1]}, "ended": {"state": "shutoff", "reason": "x", "later": 1}}
    put(paths, run=json.dumps(run).encode())
    found = only(paths)
    assert (found.newest.epoch, found.status["state"]) == (3, "shutoff")


def test_a_definition_is_not_read_by_the_broker(paths: Paths) -> None:
    put(paths, definition=b"\xff not TOML at all")
    assert only(paths).status["defined"] is True


# -- its worker -------------------------------------------------------------------------------------------------------------


def page(paths: Paths, pid: int, started: int) -> None:
    paths.vm(WEB1).run.mkdir()
    with Page(paths.vm(WEB1).page, writable=True) as made:
        made.words[Word.WORKER_PID] = pid
        made.words[Word.WORKER_STARTED] = started


def test_a_worker_that_lives_is_found_by_its_page(paths: Paths) -> None:
    put(paths, run=Run(epoch=1))
    me = identify(os.getpid())
    page(paths, me.pid, me.started)
    assert only(paths).worker == me


@pytest.mark.parametrize(
    ("pid", "later"),
    [(os.getpid(), 1), (2**22 + 1, 0), (0, 0), (2**64 - 1, 0)],
    ids=["used again", "beyond all", "none", "no pid"],  # not the pid: runs side by side must name it alike
)
def test_a_pid_that_was_used_again_or_is_gone_is_nobodys_worker(paths: Paths, pid: int, later: int) -> None:
    put(paths, run=Run(epoch=1))
    page(paths, pid, identify(os.getpid()).started + later)
    assert only(paths).worker is None


@pytest.mark.parametrize("content", [b"", b"x", bytes(4096), b"x" * 4096])
def test_a_page_that_is_none_tells_of_no_worker(paths: Paths, content: bytes) -> None:
    put(paths, run=Run(epoch=1))
    paths.vm(WEB1).run.mkdir()
    paths.vm(WEB1).page.write_bytes(content)
    assert only(paths).worker is None


def test_a_root_is_where_the_vms_are(tmp_path: Path) -> None:
    paths = paths_under(tmp_path)
    paths.vms_state.mkdir(parents=True)
    put(paths)
    assert only(paths).name == "web1"
