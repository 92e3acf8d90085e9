# SPDX-License-Identifier: Apache-2.0
"""What a handler can do with its VM, from the loop and from its thread, and what it is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.common.errors import BadRequest, Busy, DeadlineExceeded, Denied, NotRunning, QmpError, TooLarge
from vmloop.common.states import AgentState, VmState
from vmloop.testing.fake_vm import FakeVm
from vmloop.worker.handlers import AsyncVm, SyncVm
from vmloop.worker.handlers.event_names import require_free_name
from vmloop.worker.handlers.report import TokenBucket

from .test_handlers_dispatch import run


def bucket(at_once: float = 1000.0) -> TokenBucket:
    return TokenBucket(0.001, at_once, asyncio.get_running_loop().time)


def async_vm(vm: FakeVm, limit: float = 30.0, at_once: float = 1000.0) -> AsyncVm:
    return AsyncVm(vm, vm.epoch, limit, bucket(at_once))


async def on_thread(vm: FakeVm, work: Callable[[SyncVm], Any], limit: float = 30.0) -> Any:
    vm.loop  # noqa: B018 - known before the thread asks for it
    return await asyncio.to_thread(work, SyncVm(vm, vm.epoch, limit, bucket()))


def test_both_views_show_the_vm(tmp_path: Path) -> None:
    def shown(view: AsyncVm | SyncVm) -> tuple[Any, ...]:
        return view.name, view.epoch, view.state, view.reason, view.pid, view.agent_state, view.data, view.definition

    async def scene() -> None:
        vm = FakeVm(tmp_path)
        vm.set_fact("dump", {"file": "core"})
        expected = (vm.name, 1, VmState.RUNNING, "booted", vm.pid, AgentState.ABSENT, {"dump": {"file": "core"}})
        assert shown(async_vm(vm))[:-1] == expected
        assert shown(async_vm(vm)) == await on_thread(vm, shown)
        definition = async_vm(vm).definition
        assert definition is not None
        assert definition["handlers"]["limit"] == 30.0
        async_vm(vm).data["dump"]["file"] = "changed"
        assert vm.facts == {"dump": {"file": "core"}}, "data is a copy"
        vm.definition = None
        assert async_vm(vm).definition is None

    run(scene)


def test_commands_go_to_qemu_and_agent_with_what_is_left_of_the_limit(tmp_path: Path) -> None:
    async def scene() -> None:
        vm = FakeVm(tmp_path)
        vm.qmp_answers("query-status", {"status": "running"})
        vm.qmp_answers("stop", {})
        vm.agent_answers("guest-ping", {})
        view = async_vm(vm, limit=20.0)
        assert await view.qmp("query-status") == {"status": "running"}
        await view.qmp("stop", {"a": 1}, timeout=2.0)
        await view.agent("guest-ping", timeout=1000.0)
        assert await on_thread(vm, lambda view: view.qmp("query-status")) == {"status": "running"}
        await on_thread(vm, lambda view: view.agent("guest-ping"))
        first, second, third, *_ = vm.calls
        assert 19.0 < first.seconds <= 20.0
        assert (first.reading, second.reading) == (True, False)
        assert (second.arguments, second.seconds) == ({"a": 1}, 2.0)
        assert third.seconds <= 20.0

    run(scene)


def test_errors_reach_the_handler_as_they_are(tmp_path: Path) -> None:
    async def scene() -> None:
        vm = FakeVm(tmp_path)
        with pytest.raises(QmpError) as caught:
            await async_vm(vm).qmp("no-such-command")
        assert caught.value.fields["class"] == "CommandNotFound"
        with pytest.raises(QmpError):
            await on_thread(vm, lambda view: view.qmp("no-such-command"))

    run(scene)


def test_nobody_answers_and_the_deadline_comes(tmp_path: Path) -> None:
    async def scene() -> None:
        vm = FakeVm(tmp_path)
        vm.qmp_answers("query-block", asyncio.Event().wait)
        with pytest.raises(DeadlineExceeded):
            await async_vm(vm).qmp("query-block", timeout=0.05)
        with pytest.raises(DeadlineExceeded):
            await on_thread(vm, lambda view: view.qmp("query-block"), limit=0.05)

    run(scene)


def test_a_view_of_a_run_that_is_over_touches_nothing(tmp_path: Path) -> None:
    async def scene() -> None:
        vm = FakeVm(tmp_path)
        vm.qmp_answers("stop", {})
        view = async_vm(vm)
        vm.next_run()
        with pytest.raises(NotRunning, match="run 1"):
            await view.qmp("stop")
        with pytest.raises(NotRunning):
            await view.agent("guest-ping")
        with pytest.raises(NotRunning):
            view.emit("SITE_NEWS")
        with pytest.raises(NotRunning):
            _ = view.pid
        old = SyncVm(vm, 1, 30.0, bucket())
        with pytest.raises(NotRunning):
            await asyncio.to_thread(old.qmp, "stop")
        assert (view.name, view.epoch, vm.calls, vm.events) == ("web1", 1, [], [])

    run(scene)


def test_a_handler_that_comes_back_after_its_limit_touches_nothing(tmp_path: Path) -> None:
    async def scene() -> None:
        vm = FakeVm(tmp_path)
        vm.qmp_answers("stop", {})
        view = async_vm(vm, limit=-1.0)
        with pytest.raises(DeadlineExceeded):
            await view.qmp("stop", timeout=10.0)
        with pytest.raises(DeadlineExceeded):
            view.emit("SITE_NEWS")
        assert vm.calls == []

    run(scene)


def test_a_blocking_view_refuses_to_block_the_loop(tmp_path: Path) -> None:
    async def scene() -> None:
        vm = FakeVm(tmp_path)
        with pytest.raises(Denied, match="async def"):
            SyncVm(vm, 1, 30.0, bucket()).qmp("stop")

    run(scene)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_is_seconds(tmp_path: Path, timeout: float) -> None:
    async def scene() -> None:
        with pytest.raises(BadRequest):
            await async_vm(FakeVm(tmp_path)).qmp("stop", timeout=timeout)

    run(scene)


# -- events of handlers ---------------------------------------------------------------------------------------------------


def test_an_event_of_a_handler_joins_the_stream(tmp_path: Path) -> None:
    async def scene() -> None:
        vm = FakeVm(tmp_path)
        data: dict[str, Any] = {"disks": ["vda"]}
        made = async_vm(vm).emit("SITE_DISK_FULL", data)
        data["disks"].append("changed later")
        assert (made.event, made.data, made.origin) == ("SITE_DISK_FULL", {"disks": ["vda"]}, "vmloop")
        assert (await on_thread(vm, lambda view: view.emit("SITE_DISK_FULL"))).data == {}
        assert vm.emitted("SITE_DISK_FULL") == [{"disks": ["vda"]}, {}]

    run(scene)


@pytest.mark.parametrize(
    "name",
    [
        "VM_STATE",
        "MONITOR_STATE",
        "AGENT_STATE",
        "LOOP_BLOCKED",
        "LOOP_ANYTHING",
        "WORKER_LOST",
        "HANDLER_FAILED",
        "EVENTS_LOST",
        "COMMAND_LATE",
        "JOURNAL_TRUNCATED",
        "AGENT_FROZEN",
        "AGENT_THAWED",
        "STOP",
        "SHUTDOWN",
        "BLOCK_IO_ERROR",
        "x",
        "X",
        "lower",
        "with-dash",
        "9X",
        "_X",
        "É",
        "",
        "A" * 65,
        "SITE NEWS",
        "SITE\n",
    ],
)
def test_names_of_vmloops_and_qemus_and_no_names_are_refused(name: str) -> None:
    with pytest.raises(BadRequest):
        require_free_name(name)


@given(st.text(max_size=80) | st.none() | st.integers())
def test_any_name_is_taken_or_refused(name: object) -> None:
    try:
        assert require_free_name(name) == name
    except BadRequest:
        return


@pytest.mark.parametrize("data", [{"x": object()}, {"x": {1, 2}}, {1: "x"}, ["list"], {"x": "\ud800"}, "text"])
def test_data_that_no_reader_could_get_is_refused(tmp_path: Path, data: Any) -> None:
    async def scene() -> None:
        vm = FakeVm(tmp_path)
        with pytest.raises(BadRequest):
            async_vm(vm).emit("SITE_NEWS", data)
        assert vm.events == []

    run(scene)


def test_data_that_is_too_deep_or_too_large_is_refused(tmp_path: Path) -> None:
    async def scene() -> None:
        vm = FakeVm(tmp_path)
        deep: dict[str, Any] = {}
        for _ in range(3000):
            deep = {"x": deep}
        with pytest.raises(BadRequest):
            async_vm(vm).emit("SITE_NEWS", deep)
        with pytest.raises(TooLarge):
            async_vm(vm).emit("SITE_NEWS", {"x": "x" * 65536})
        assert vm.events == []

    run(scene)


def test_too_many_events_are_refused_until_some_time_has_passed(tmp_path: Path) -> None:
    async def scene() -> None:
        vm = FakeVm(tmp_path)
        view = async_vm(vm, at_once=3)
        for _ in range(3):
            view.emit("SITE_NEWS")
        with pytest.raises(Busy):
            view.emit("SITE_NEWS")
        assert len(vm.events) == 3

    run(scene)


def test_a_bucket_fills_with_time_and_never_over_its_brim() -> None:
    now = [0.0]
    bucket = TokenBucket(10.0, 2.0, lambda: now[0])
    assert [bucket.take() for _ in range(3)] == [True, True, False]
    now[0] += 0.1
    assert [bucket.take() for _ in range(2)] == [True, False]
    now[0] += 100.0
    assert [bucket.take() for _ in range(3)] == [True, True, False]


def test_both_views_tell_what_qemu_can(tmp_path: Path) -> None:
    async def scene() -> None:
        vm = FakeVm(tmp_path)
        vm.abilities = {"query-yank", "STOP"}
        assert await async_vm(vm).can("query-yank") is True
        assert await async_vm(vm).can("nosuch") is False
        assert await on_thread(vm, lambda view: view.can("STOP")) is True
        with pytest.raises(BadRequest):
            await async_vm(vm).can(3)  # type: ignore[arg-type]
        late = async_vm(vm)
        vm.next_run()
        with pytest.raises(NotRunning):
            await late.can("STOP")

    run(scene)
