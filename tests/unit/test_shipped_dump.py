# SPDX-License-Identifier: Apache-2.0
"""Dumps on a fake VM: progress, room, how many are kept, and every way in which one fails."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path
from typing import Any

import pytest

from vmloop.common.errors import BadRequest, DeadlineExceeded, Denied, MonitorLost, QmpError
from vmloop.testing.fake_vm import FakeVm
from vmloop.worker.handlers.dump import KEEP, dump_guest, dumps, keep_dump

MEMORY = {"base-memory": 1 << 20, "plugged-memory": 0}


def active(completed: int) -> dict[str, Any]:
    return {"status": "active", "completed": completed, "total": 100}


DONE = {"status": "completed", "completed": 100, "total": 100}


@pytest.fixture
def vm(tmp_path: Path) -> FakeVm:
    made = FakeVm(tmp_path)
    made.qmp_answers("query-dump-guest-memory-capability", {"formats": ["elf", "kdump-zlib"]})
    made.qmp_answers("query-memory-size-summary", MEMORY)
    made.qmp_answers("dump-guest-memory", {})
    made.qmp_answers("query-dump", DONE)
    return made


def test_progress_is_told_when_it_has_grown(vm: FakeVm) -> None:
    vm.qmp_answers("query-dump", active(0), active(5), active(20), DONE)
    path = vm.paths.state / "x.elf"
    assert asyncio.run(dump_guest(vm, path, 10.0)) == 0
    names = [event.event for event in vm.events]
    assert names == ["DUMP_STARTED", "DUMP_PROGRESS", "DUMP_FINISHED"]
    assert vm.emitted("DUMP_PROGRESS") == [{"completed": 20, "total": 100, "percent": 20.0}]
    assert vm.intents == ["dump", ""]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_newest_dumps_are_kept(vm: FakeVm) -> None:
    (vm.paths.state / "dump-1-1.txt").touch()
    for seq in (9, 10, 11, 12, 13):
        asyncio.run(keep_dump(vm, 1, seq, 10.0))
    assert [path.name for path in dumps(vm.paths.state)] == [f"dump-1-{seq}.kdump" for seq in (13, 12, 11)][:KEEP]
    assert (vm.paths.state / "dump-1-1.txt").exists()


def test_a_dump_that_does_not_fit_is_refused_before_anything_is_removed(vm: FakeVm) -> None:
    for seq in range(KEEP):
        asyncio.run(keep_dump(vm, 1, seq, 10.0))
    vm.qmp_answers("query-memory-size-summary", {"base-memory": 1 << 62})
    with pytest.raises(Denied, match="room"):
        asyncio.run(keep_dump(vm, 1, 99, 10.0))
    assert len(dumps(vm.paths.state)) == KEEP


def test_elf_is_written_where_there_is_nothing_better(vm: FakeVm) -> None:
    vm.qmp_answers("query-dump-guest-memory-capability", {"formats": ["elf"]})
    assert asyncio.run(keep_dump(vm, 1, 1, 10.0)).suffix == ".elf"


def test_a_link_in_the_way_is_not_followed(vm: FakeVm, tmp_path: Path) -> None:
    path = vm.paths.state / "x.elf"
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadRequest):
        asyncio.run(dump_guest(vm, path, 10.0))
    assert not (tmp_path / "elsewhere").exists()


def test_a_failed_dump_is_told_and_removed(vm: FakeVm) -> None:
    vm.qmp_answers("query-dump", {"status": "failed", "completed": 1, "total": 2})
    with pytest.raises(QmpError, match="has failed"):
        asyncio.run(dump_guest(vm, vm.paths.state / "x.elf", 10.0))
    assert "error" in vm.emitted("DUMP_FINISHED")[0]
    assert not (vm.paths.state / "x.elf").exists()


def test_a_dump_that_outlasts_its_time_is_left_to_qemu(vm: FakeVm) -> None:
    vm.qmp_answers("query-dump", active(1))
    with pytest.raises(DeadlineExceeded, match="writes on"):
        asyncio.run(dump_guest(vm, vm.paths.state / "x.elf", 0.2))
    assert (vm.paths.state / "x.elf").exists()


def test_a_dump_whose_outcome_is_unknown_is_not_removed(vm: FakeVm) -> None:
    vm.qmp_answers("dump-guest-memory", MonitorLost("gone"))
    with pytest.raises(MonitorLost):
        asyncio.run(dump_guest(vm, vm.paths.state / "x.elf", 10.0))
    assert (vm.paths.state / "x.elf").exists()
    assert vm.intents == ["dump", ""]
