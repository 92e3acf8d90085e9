# SPDX-License-Identifier: Apache-2.0
"""Handlers on the bench: they see what a worker's would, their effects are there when `happen` returns, and their failures are told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmloop.common.errors import BadRequest, ConfigError, DeadlineExceeded, QmpError
from vmloop.common.states import VmState
from vmloop.testing.double import HandlerFailed
from vmloop.testing.handler_bench import HandlerBench
from vmloop.worker.handlers import AsyncVm, Event, SyncVm, on


@on("BLOCK_IO_ERROR")
async def tell(vm: AsyncVm, event: Event) -> None:
    disks = await vm.qmp("query-block")
    vm.emit("SITE_DISKS", {"disks": disks, "state": vm.state.value})


@on("SITE_DISKS")
def tell_again(vm: SyncVm, event: Event) -> None:
    vm.emit(
        "SITE_TOLD", {"agent": vm.agent("guest-ping"), "thread": threading.current_thread() is threading.main_thread()}
    )


def test_what_handlers_do_is_done_when_it_returns() -> None:
    with HandlerBench(tell, tell_again, name="db1") as bench:
        bench.vm.qmp_answers("query-block", ["vda"])
        bench.vm.agent_answers("guest-ping", {})
        caused = bench.happen("BLOCK_IO_ERROR", {"device": "vda"})
        assert [event.event for event in caused] == ["SITE_DISKS", "SITE_TOLD"]
        assert caused[0].data == {"disks": ["vda"], "state": "running"}
        assert caused[1].data == {"agent": {}, "thread": False}
        assert [(call.channel, call.command) for call in bench.vm.calls] == [
            ("qmp", "query-block"),
            ("agent", "guest-ping"),
        ]
        assert bench.happen("STOP") == []


def test_the_view_refuses_what_a_workers_refuses() -> None:
    said: list[Exception] = []

    @on("STOP")
    async def try_things(vm: AsyncVm, event: Event) -> None:
        attempts: list[Callable[[], Any]] = [
            lambda: vm.emit("VM_STATE"),
            lambda: vm.emit("RESET"),
            lambda: vm.emit("small"),
        ]
        for attempt in attempts:
            try:
                attempt()
            except BadRequest as error:
                said.append(error)
        try:
            await vm.qmp("stop")
        except QmpError as error:
            said.append(error)
        assert not hasattr(vm, "kill")

    with HandlerBench(try_things) as bench:
        bench.happen("STOP")
    assert [type(error) for error in said] == [BadRequest, BadRequest, BadRequest, QmpError]


def test_a_handler_that_fails_fails_the_call_and_only_once() -> None:
    @on("STOP")
    async def fail(vm: AsyncVm, event: Event) -> None:
        raise ValueError("on purpose")

    with HandlerBench(fail) as bench:
        with pytest.raises(HandlerFailed, match=r"on STOP \(raised\): ValueError: on purpose"):
            bench.happen("STOP")
        assert "on purpose" in bench.expect_failure("STOP")["error"]
        with pytest.raises(AssertionError, match="no handler failed on RESUME"):
            bench.expect_failure("RESUME")


def test_a_handler_over_its_limit_is_ended_and_told() -> None:
    @on("STOP")
    async def hang(vm: AsyncVm, event: Event) -> None:
        await asyncio.Event().wait()

    with HandlerBench(hang, limit=0.2) as bench:
        assert bench.expect_failure("STOP")["why"] == "limit"


def test_a_handler_that_blocks_the_loop_is_told_what_to_do() -> None:
    release = threading.Event()

    @on("STOP")
    async def block(vm: AsyncVm, event: Event) -> None:
        release.wait(30)

    bench = HandlerBench(block, limit=0.1)
    bench.patience = 0.2
    try:
        with pytest.raises(DeadlineExceeded, match="a handler holds up the loop"):
            bench.happen("STOP")
    finally:
        release.set()
        bench.close()


def test_files_are_loaded_as_a_worker_loads_them(tmp_path: Path) -> None:
    good = tmp_path / "good.py"
    good.write_text("from vmloop.worker.handlers import on\n@on('STOP')\ndef said(vm, event): vm.emit('SITE_SAID')\n")
    with HandlerBench(good) as bench:
        assert [event.event for event in bench.happen("STOP")] == ["SITE_SAID"]
        assert bench.handlers[0].name == "good.said"
    bad = tmp_path / "bad.py"
    bad.write_text("1 / 0\n")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        HandlerBench(bad)
    with pytest.raises(ConfigError, match="there is no"):
        HandlerBench(tmp_path / "gone.py")


def test_a_function_without_on_is_no_handler() -> None:
    def plain(vm: AsyncVm, event: Event) -> None: ...

    with pytest.raises(ConfigError, match="plain is no handler: decorate it with @on"):
        HandlerBench(plain)


def test_the_test_may_be_in_a_loop_of_its_own() -> None:
    async def scene() -> list[str]:
        with HandlerBench(tell) as bench:
            bench.vm.qmp_answers("query-block", [])
            return [event.event for event in bench.happen("BLOCK_IO_ERROR")]

    assert asyncio.run(scene()) == ["SITE_DISKS"]


def test_a_closed_bench_leaves_no_thread_and_no_file() -> None:
    before = threading.active_count()
    with HandlerBench(tell_again) as bench:
        bench.vm.agent_answers("guest-ping", {})
        bench.happen("SITE_DISKS")
        place = bench.vm.paths.run.parent
    assert threading.active_count() == before
    assert not place.exists()


def test_states_of_the_fake_vm_are_those_of_a_real_one() -> None:
    seen: list[tuple[VmState, str]] = []

    @on("VM_STATE")
    async def look(vm: AsyncVm, event: Event) -> None:
        seen.append((vm.state, vm.reason))

    with HandlerBench(look) as bench:
        bench.move(VmState.PAUSED, "ioerror")
    assert seen == [(VmState.PAUSED, "ioerror")]
