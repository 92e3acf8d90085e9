# SPDX-License-Identifier: Apache-2.0
"""What a run's QEMU can do: checked and kept at its beginning, asked of the run itself where nothing was known."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmloop.common.capabilities import Capabilities
from vmloop.common.definition import Definition, QemuSection
from vmloop.common.errors import ConfigError, DeadlineExceeded, NotRunning, QmpError, VmloopError
from vmloop.common.paths import VmPaths
from vmloop.worker.probe.cache import Cache
from vmloop.worker.probe.probing import ANY
from vmloop.worker.probe.validity import stamp_of
from vmloop.worker.run_capabilities import RunCapabilities

from ..fakes.recorded_qemu import binary_that, load

RECORDING = load()


class Run:
    """A VM in a run, as far as its capabilities are concerned; QEMU answers as the recorded one did."""

    def __init__(self, directory: Path) -> None:
        self.name = "web1"
        self.paths = VmPaths(directory / "run", directory / "state")
        self.alive = True
        self.run = SimpleNamespace(epoch=1)
        self.process = None
        self.settings = SimpleNamespace(launch=30.0)
        self.loop = asyncio.get_running_loop()
        self.asked: list[str] = []
        self.error: VmloopError | None = None
        self.answers = asyncio.Event()
        self.answers.set()
        self.begun = asyncio.Event()

    def require_session(self) -> Run:
        if not self.alive:
            raise NotRunning("VM web1 does not run")
        return self

    async def execute(self, command: str, arguments: dict[str, Any] | None, *, seconds: float) -> Any:
        self.asked.append(command)
        self.begun.set()
        await self.answers.wait()
        if self.error is not None:
            raise self.error
        reply = RECORDING.reply(ANY, command, arguments)
        if "error" in reply:
            raise QmpError(reply["error"]["desc"], **reply["error"])
        return reply["return"]


Scene = Callable[[Run, RunCapabilities, Path], Awaitable[None]]


def play(scene: Scene, directory: Path) -> None:
    async def main() -> None:
        (directory / "state").mkdir()
        vm = Run(directory)
        await scene(vm, RunCapabilities(cast(Any, vm), directory / "c"), binary_that(directory / "qemu"))

    asyncio.run(main())


def definition(binary: Path | str, *args: str) -> Definition:
    return Definition("web1", qemu=QemuSection(os.fspath(binary), list(args)))


def cached(binary: Path, directory: Path) -> Capabilities:
    document = RECORDING.document(str(binary))
    Cache(directory / "c").write(stamp_of(str(binary)), document)
    return document


def test_a_definition_is_checked_against_what_is_known(tmp_path: Path) -> None:
    async def scene(vm: Run, capabilities: RunCapabilities, binary: Path) -> None:
        wrong = definition(binary, "-machine", "q36")
        assert capabilities.check(wrong) is None  # nothing is known, and no probe is made
        known = cached(binary, tmp_path)
        with pytest.raises(ConfigError, match=r"VM web1 was not started: .*'q35'"):
            capabilities.check(wrong)
        checked = capabilities.check(definition(binary, "-machine", "q35"))
        assert checked is not None
        assert (checked.machines, checked.types) == (known.machines, {})  # the names alone: memory is counted
        assert capabilities.check(definition("simulated", "-machine", "q36")) is None
        assert capabilities.check(definition("no-such-qemu", "-machine", "q36")) is None
        os.utime(binary)  # another binary, for all that one knows
        assert capabilities.check(wrong) is None

    play(scene, tmp_path)


def test_what_was_known_is_kept_whatever_becomes_of_the_binarys_file(tmp_path: Path) -> None:
    async def scene(vm: Run, capabilities: RunCapabilities, binary: Path) -> None:
        known = cached(binary, tmp_path)
        capabilities.keep(capabilities.check(definition(binary)))
        kept = vm.paths.capabilities
        [file] = (tmp_path / "c").glob("*.json")
        assert kept.stat().st_ino == file.stat().st_ino  # it costs nothing
        Cache(tmp_path / "c").write(stamp_of(str(binary)), Capabilities(binary=str(binary)))
        assert await capabilities.get(1.0) == known
        assert vm.asked == []
        capabilities.keep(None)
        assert not kept.exists()

    play(scene, tmp_path)


def test_where_no_link_can_be_made_the_run_is_asked(tmp_path: Path) -> None:
    async def scene(vm: Run, capabilities: RunCapabilities, binary: Path) -> None:
        cached(binary, tmp_path)
        found = capabilities.check(definition(binary))
        [file] = (tmp_path / "c").glob("*.json")
        file.unlink()
        capabilities.keep(found)
        assert (await capabilities.get(1.0)).machines == []
        assert "query-qmp-schema" in vm.asked

    play(scene, tmp_path)


def test_a_run_is_asked_once_whoever_wants_to_know(tmp_path: Path) -> None:
    async def scene(vm: Run, capabilities: RunCapabilities, _: Path) -> None:
        found = await asyncio.gather(*(capabilities.get(5.0) for _ in range(5)))
        assert found[0].commands == RECORDING.document().commands
        asked = len(vm.asked)
        assert asked == len(set(vm.asked))
        assert await capabilities.get(5.0) == found[0]
        assert await capabilities.has("query-yank", 5.0)
        assert not await capabilities.has("nosuch", 5.0)
        assert len(vm.asked) == asked

    play(scene, tmp_path)


def test_who_waits_has_a_deadline_and_the_question_goes_on(tmp_path: Path) -> None:
    async def scene(vm: Run, capabilities: RunCapabilities, _: Path) -> None:
        vm.answers.clear()
        with pytest.raises(DeadlineExceeded, match="web1"):
            await capabilities.get(0.02)
        patient = asyncio.ensure_future(capabilities.get(5.0))
        vm.answers.set()
        assert (await patient).target == "x86_64"
        assert vm.asked.count("query-version") == 1

    play(scene, tmp_path)


def test_a_monitor_that_fails_is_told_and_asked_again(tmp_path: Path) -> None:
    async def scene(vm: Run, capabilities: RunCapabilities, _: Path) -> None:
        vm.error = NotRunning("gone")
        with pytest.raises(NotRunning):
            await capabilities.get(5.0)
        vm.error = QmpError("no", **{"class": "CommandNotFound", "desc": "no"})
        assert (await capabilities.get(5.0)).commands == []

    play(scene, tmp_path)


def test_without_a_run_nothing_is_told(tmp_path: Path) -> None:
    async def scene(vm: Run, capabilities: RunCapabilities, binary: Path) -> None:
        cached(binary, tmp_path)
        capabilities.keep(capabilities.check(definition(binary)))
        vm.alive = False
        with pytest.raises(NotRunning):
            await capabilities.get(5.0)

    play(scene, tmp_path)


def test_an_answer_that_comes_when_the_run_is_over_is_not_kept_for_the_next(tmp_path: Path) -> None:
    async def scene(vm: Run, capabilities: RunCapabilities, _: Path) -> None:
        vm.answers.clear()
        waiting = asyncio.ensure_future(capabilities.get(5.0))
        await vm.begun.wait()
        vm.run = SimpleNamespace(epoch=2)
        vm.answers.set()
        await waiting
        assert not vm.paths.capabilities.exists()

    play(scene, tmp_path)


def test_a_qemu_that_ended_at_once_is_explained_by_a_probe_if_it_can_be(tmp_path: Path) -> None:
    async def scene(vm: Run, capabilities: RunCapabilities, binary: Path) -> None:
        with pytest.raises(ConfigError, match="q35"):
            await capabilities.explain(definition(binary, "-machine", "q36"), 10.0)
        await capabilities.explain(definition(binary, "-machine", "q35"), 10.0)
        broken = binary_that(tmp_path / "broken", cut=1, then=f"echo . >> {tmp_path}/starts")
        await capabilities.explain(definition(broken, "-machine", "q36"), 10.0)
        assert (tmp_path / "starts").exists()
        (tmp_path / "starts").unlink()
        await capabilities.explain(definition(broken, "-m", "64"), 10.0)  # nothing that a probe could tell of
        assert not (tmp_path / "starts").exists()

    play(scene, tmp_path)
