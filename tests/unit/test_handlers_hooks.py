# SPDX-License-Identifier: Apache-2.0
"""Executables in etc/hooks.d, good and bad: what they get, what is told of them, and that nothing of them is left."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import select
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmloop.common.definition import Definition, HandlersSection
from vmloop.testing.fake_vm import FakeVm
from vmloop.worker.handlers.dispatch import Dispatcher
from vmloop.worker.handlers.hooks import KEPT_OUTPUT, LOOK_AGAIN, MAX_HOOKS, HookDirectory

from .test_handlers_dispatch import DEADLINE, RecordingPage, run

LIMIT = 0.3  # seconds, of a hook that is to go over it


class Bench:
    """A VM with a directory of hooks. Made inside a coroutine; `async with` closes the dispatcher and looks for what is left."""

    def __init__(self, directory: Path, limit: float = DEADLINE) -> None:
        self.directory = directory / "hooks.d"
        self.directory.mkdir()
        self.out = directory / "out"
        self.vm = FakeVm(directory, definition=Definition("web1", handlers=HandlersSection(limit=limit)))
        self.page = RecordingPage()
        self.dispatcher = Dispatcher(self.vm, self.page, (), on_replace=print, hooks=self.directory)
        self.vm.listen(self.dispatcher.dispatch)

    async def __aenter__(self) -> Bench:
        self._fds = _open_fds()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.dispatcher.close()
        assert _open_fds() == self._fds
        assert not Path(f"/proc/self/task/{os.getpid()}/children").read_text(), "no child, no zombie"

    def hook(self, name: str, script: str) -> None:
        path = self.directory / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    async def settle(self) -> None:
        assert await self.dispatcher.settle(DEADLINE)

    @property
    def failures(self) -> list[dict[str, Any]]:
        return self.vm.emitted("HANDLER_FAILED")


def _open_fds() -> set[tuple[str, str]]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
        except FileNotFoundError:  # the one that listed them
            continue
    return {(fd, target) for fd, target in found if "/proc/" not in target}


def has_ended(pid: int) -> bool:
    """Whether a process that was killed is gone, or is within the deadline."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], DEADLINE)[0])
    finally:
        os.close(pidfd)


def scene_of(tmp_path: Path, scene: Callable[[Bench], Any], limit: float = DEADLINE) -> None:
    async def within() -> None:
        async with Bench(tmp_path, limit) as bench:
            await scene(bench)

    run(within)


def test_a_hook_gets_the_event_on_stdin_and_in_its_environment(tmp_path: Path) -> None:
    async def scene(bench: Bench) -> None:
        bench.hook("all", f"cat > {bench.out}; env >> {bench.out}; ps -o sid= -p $$ >> {bench.out}; pwd >> {bench.out}")
        event = bench.vm.happen("BLOCK_IO_ERROR", {"device": "disk0", "huge": 1 << 70, "nan": float("inf")}, at=5)
        await bench.settle()
        first, *rest = bench.out.read_text().splitlines()
        said = json.loads(first)
        assert (said["event"], said["seq"], said["data"]["device"]) == ("BLOCK_IO_ERROR", event.seq, "disk0")
        assert {"VMLOOP_VM=web1", "VMLOOP_EVENT=BLOCK_IO_ERROR", "VMLOOP_CURSOR=1.1", "VMLOOP_STATE=running"} <= set(
            rest
        )
        assert rest[-1] == "/"
        assert int(rest[-2]) != os.getsid(0)
        assert bench.failures == []
        assert bench.page.tasks == ["hook all on BLOCK_IO_ERROR 1", "loop"]

    scene_of(tmp_path, scene)


def test_a_name_that_begins_with_an_event_is_for_that_event_and_any_other_for_all(tmp_path: Path) -> None:
    async def scene(bench: Bench) -> None:
        for name in ("10-all", "STOP", "STOP-mail", "RESUME-mail", "STOPPED", "zz.sh", "lower"):
            bench.hook(name, f'echo "$VMLOOP_EVENT {name}" >> {bench.out}')
        bench.hook(".hidden", f"echo hidden >> {bench.out}")
        bench.hook("backup~", f"echo backup >> {bench.out}")
        (bench.directory / "README").write_text("not executable")
        (bench.directory / "sub").mkdir()
        bench.vm.happen("STOP")
        bench.vm.happen("RESUME")
        await bench.settle()
        assert bench.out.read_text().splitlines() == [
            *(f"STOP {name}" for name in ("10-all", "STOP", "STOP-mail", "lower", "zz.sh")),
            *(f"RESUME {name}" for name in ("10-all", "RESUME-mail", "lower", "zz.sh")),
        ]

    scene_of(tmp_path, scene)


def test_hooks_run_one_at_a_time_in_the_order_of_events(tmp_path: Path) -> None:
    async def scene(bench: Bench) -> None:
        bench.hook(
            "all",
            f"test ! -e {bench.out}.busy || exit 9; : > {bench.out}.busy; echo $VMLOOP_CURSOR >> {bench.out}; rm {bench.out}.busy",
        )
        for _ in range(10):
            bench.vm.happen("STOP")
        await bench.settle()
        assert bench.failures == []
        assert bench.out.read_text().split() == [f"1.{seq}" for seq in range(1, 11)]

    scene_of(tmp_path, scene)


def test_a_hook_that_fails_is_told_with_the_end_of_its_stderr(tmp_path: Path) -> None:
    async def scene(bench: Bench) -> None:
        bench.hook("STOP-fails", "head -c 100000 /dev/zero | tr '\\0' x >&2; echo the reason >&2; exit 3")
        bench.hook("STOP-signal", "kill -TERM $$")
        bench.vm.happen("STOP")
        await bench.settle()
        one, two = bench.failures
        assert (one["handler"], one["why"], one["status"], one["seq"]) == ("STOP-fails", "exit", 3, 1)
        assert one["stderr"].endswith("xthe reason\n")
        assert len(one["stderr"]) == KEPT_OUTPUT
        assert (two["status"], two["error"]) == (-15, "killed by signal 15")

    scene_of(tmp_path, scene)


def test_a_hook_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    async def scene(bench: Bench) -> None:
        bench.hook("STOP", f"echo waiting >&2; sleep 1000 & echo $! > {bench.out}; wait")
        bench.vm.happen("STOP")
        await bench.settle()
        (failure,) = bench.failures
        assert (failure["why"], failure["limit"], failure["left_behind"]) == ("limit", LIMIT, False)
        assert failure["stderr"] == "waiting\n"
        assert has_ended(int(bench.out.read_text()))

    scene_of(tmp_path, scene, LIMIT)


def test_a_hook_that_ignores_a_large_stdin_harms_nobody(tmp_path: Path) -> None:
    async def scene(bench: Bench) -> None:
        bench.hook("STOP", "exec 0<&-; exit 0")
        bench.vm.happen("STOP", {"large": "x" * 1_000_000})
        await bench.settle()
        assert bench.failures == []

    scene_of(tmp_path, scene)


def test_of_a_hook_that_prints_megabytes_the_newest_4_kib_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(bench: Bench) -> None:
        bench.hook("STOP", "head -c 10000000 /dev/zero | tr '\\0' x; echo the end")
        bench.vm.happen("STOP")
        await bench.settle()
        assert bench.failures == []
        (text,) = [record.getMessage() for record in caplog.records if "stdout" in record.getMessage()]
        assert text.endswith("xthe end\n")
        assert len(text) < KEPT_OUTPUT + 200

    caplog.set_level(logging.INFO)
    scene_of(tmp_path, scene)


def test_a_daemon_that_a_hook_leaves_behind_is_not_waited_for(tmp_path: Path) -> None:
    async def scene(bench: Bench) -> None:
        bench.hook("STOP", f"setsid sleep 1000 & echo $! > {bench.out}; echo done")
        bench.vm.happen("STOP")
        await bench.settle()
        os.kill(int(bench.out.read_text()), 9)
        assert bench.failures == []

    scene_of(tmp_path, scene)


@pytest.mark.parametrize("content", [b"\x00\x01 no program", b"#!/no/such/interpreter\n"])
def test_a_file_that_cannot_be_executed_is_told(tmp_path: Path, content: bytes) -> None:
    async def scene(bench: Bench) -> None:
        path = bench.directory / "STOP"
        path.write_bytes(content)
        path.chmod(0o755)
        bench.vm.happen("STOP")
        await bench.settle()
        (failure,) = bench.failures
        assert (failure["handler"], failure["why"]) == ("STOP", "start")

    scene_of(tmp_path, scene)


def test_an_event_whose_name_no_environment_can_hold_is_told(tmp_path: Path) -> None:
    async def scene(bench: Bench) -> None:
        bench.hook("all", "exit 0")
        bench.vm.happen("A\0B")
        await bench.settle()
        assert {failure["why"] for failure in bench.failures} == {"start"}

    scene_of(tmp_path, scene)


def test_a_file_that_others_may_write_to_is_not_run_and_told_once(tmp_path: Path) -> None:
    async def scene(bench: Bench) -> None:
        bench.hook("STOP", f"echo ran > {bench.out}")
        (bench.directory / "STOP").chmod(0o777)
        for _ in range(3):
            bench.vm.happen("STOP")
        await asyncio.sleep(0)
        await bench.settle()
        (failure,) = bench.failures
        assert (failure["why"], "chmod o-w" in failure["error"]) == ("refused", True)
        assert not bench.out.exists()

    scene_of(tmp_path, scene)


def test_a_hook_whose_name_is_no_text_is_told_like_any_other(tmp_path: Path) -> None:
    async def scene(bench: Bench) -> None:
        bench.hook(os.fsdecode(b"bad-\xff\t-name"), "exit 4")
        bench.vm.happen("STOP")
        await bench.settle()
        failure = bench.failures[0]
        assert (failure["handler"], failure["status"]) == ("bad-?\t-name", 4)

    scene_of(tmp_path, scene)


def test_closing_kills_a_hook_that_runs(tmp_path: Path) -> None:
    async def scene(bench: Bench) -> None:
        bench.hook("STOP", "exec sleep 1000")
        bench.vm.happen("STOP")
        assert not await bench.dispatcher.settle(0.05)
        assert bench.failures[-1]["why"] == "pending"

    scene_of(tmp_path, scene)


def test_the_directory_is_looked_at_again_once_a_second_and_sees_a_late_chmod(tmp_path: Path) -> None:
    now = [100.0]
    refused: list[str] = []
    hooks = HookDirectory(
        tmp_path / "hooks.d", lambda name, _: name == "held", lambda name, _: refused.append(name), lambda: now[0]
    )
    assert hooks.matching("STOP") == []
    (tmp_path / "hooks.d").mkdir()
    path = tmp_path / "hooks.d" / "STOP"
    path.touch(0o644)
    (tmp_path / "hooks.d" / "held").touch(0o755)
    now[0] += LOOK_AGAIN
    assert hooks.matching("STOP") == []
    path.chmod(stat.S_IRWXU)
    assert hooks.matching("STOP") == [], "not looked at yet"
    now[0] += LOOK_AGAIN
    assert [hook.name for hook in hooks.matching("STOP")] == ["STOP"]
    assert hooks.matching("RESUME") == []
    assert refused == []


def test_there_is_a_bound_to_hooks(tmp_path: Path) -> None:
    refused: list[str] = []
    for number in range(MAX_HOOKS + 2):
        (tmp_path / f"{number:03}").touch(0o755)
    hooks = HookDirectory(tmp_path, lambda *_: False, lambda name, _: refused.append(name), lambda: 0.0)
    assert len(hooks.matching("STOP")) == MAX_HOOKS
    assert len(refused) == 2
