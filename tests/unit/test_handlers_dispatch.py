# SPDX-License-Identifier: Apache-2.0
"""Handlers of every bad kind, called by the dispatcher: what they do is told, and costs the handlers beside them nothing."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmloop.common.definition import Definition, HandlersSection
from vmloop.testing.fake_vm import FakeVm
from vmloop.worker.events import Event
from vmloop.worker.handlers import AsyncVm, SyncVm
from vmloop.worker.handlers.dispatch import Dispatcher
from vmloop.worker.handlers.lane import MAX_STUCK
from vmloop.worker.handlers.registry import Handler
from vmloop.worker.handlers.report import MAX_TRACE_BYTES
from vmloop.worker.handlers.thread import INTERRUPT_GRACE, THREAD_NICE

DEADLINE = 10.0
LIMIT = 0.1  # seconds, of a handler that is to go over it


class RecordingPage:
    """A status page that remembers all that was put on it."""

    def __init__(self) -> None:
        self.tasks: list[str] = []
        self.held_up_in = ""

    def doing(self, task: str) -> None:
        self.tasks.append(task)


class Bench:
    """A VM with handlers. Made inside a coroutine; `async with` closes the dispatcher."""

    def __init__(self, directory: Path, *handlers: Handler, pending: int = 1024, limit: float = 30.0) -> None:
        self.vm = FakeVm(directory, definition=Definition("web1", handlers=HandlersSection(limit=limit)))
        self.page = RecordingPage()
        self.replacements: list[str] = []
        self.dispatcher = Dispatcher(self.vm, self.page, handlers, on_replace=self.replacements.append, pending=pending)
        self.vm.listen(self.dispatcher.dispatch)

    async def __aenter__(self) -> Bench:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.dispatcher.close()

    @property
    def failures(self) -> list[dict[str, Any]]:
        return self.vm.emitted("HANDLER_FAILED")

    async def settle(self) -> None:
        assert await self.dispatcher.settle(DEADLINE)


def handler(function: Callable[..., Any], *events: str, limit: float | None = None, trusted: bool = False) -> Handler:
    return Handler(
        name=f"test.{function.__name__}",
        events=frozenset(events or ("STOP",)),
        function=function,
        is_async=asyncio.iscoroutinefunction(function),
        limit=limit,
        trusted=trusted,
    )


def run(scene: Callable[[], Any]) -> None:
    """One scene on a loop of its own, with a deadline."""

    async def within() -> None:
        async with asyncio.timeout(DEADLINE):
            await scene()

    asyncio.run(within())


# -- who is called --------------------------------------------------------------------------------------------------------


def test_a_thousand_events_reach_every_lane_in_their_order(tmp_path: Path) -> None:
    seen: dict[str, list[int]] = {"shipped": [], "on the loop": [], "on the thread": []}

    async def shipped(vm: FakeVm, event: Event) -> None:
        await asyncio.sleep(0)
        seen["shipped"].append(event.seq)

    async def on_loop(vm: AsyncVm, event: Event) -> None:
        seen["on the loop"].append(event.seq)

    def on_thread(vm: SyncVm, event: Event) -> None:
        seen["on the thread"].append(event.seq)

    async def scene() -> None:
        handlers = (handler(shipped, "*", trusted=True), handler(on_loop, "STOP"), handler(on_thread, "*"))
        async with Bench(tmp_path, *handlers) as bench:
            for _ in range(1000):
                bench.vm.happen("STOP")
            await bench.settle()
        assert bench.failures == []

    run(scene)
    assert all(numbers == list(range(1, 1001)) for numbers in seen.values())


def test_a_handler_gets_its_own_events_and_a_star_gets_all(tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []

    async def stops(vm: AsyncVm, event: Event) -> None:
        seen.append(("stops", event.event))

    async def everything(vm: AsyncVm, event: Event) -> None:
        seen.append(("all", event.event))

    async def scene() -> None:
        async with Bench(tmp_path, handler(stops, "STOP", "RESUME"), handler(everything, "*")) as bench:
            for name in ("STOP", "SHUTDOWN", "RESUME"):
                bench.vm.happen(name)
            assert seen == [], "dispatch only queues"
            await bench.settle()

    run(scene)
    assert seen == [("stops", "STOP"), ("all", "STOP"), ("all", "SHUTDOWN"), ("stops", "RESUME"), ("all", "RESUME")]


def test_shipped_handlers_do_not_wait_for_an_operators(tmp_path: Path) -> None:
    async def scene() -> None:
        done, leave = asyncio.Event(), threading.Event()

        async def sleeps(vm: AsyncVm, event: Event) -> None:
            await asyncio.Event().wait()

        def sleeps_in_thread(vm: SyncVm, event: Event) -> None:
            leave.wait(DEADLINE)

        async def shipped(vm: FakeVm, event: Event) -> None:
            assert isinstance(vm, FakeVm), "it gets the VmContext itself"
            done.set()

        async with Bench(tmp_path, handler(sleeps), handler(sleeps_in_thread), handler(shipped, trusted=True)) as bench:
            bench.vm.happen("STOP")
            await done.wait()
            leave.set()

    run(scene)


# -- who fails ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, MemoryError, asyncio.CancelledError])
@pytest.mark.parametrize("on_loop", [True, False], ids=["async", "thread"])
def test_what_a_handler_raises_is_told_and_the_next_event_is_handled(
    tmp_path: Path, error: type[BaseException], on_loop: bool
) -> None:
    handled: list[int] = []

    def fail_first(event: Event) -> None:
        if event.seq == 1:
            raise error("no use")
        handled.append(event.seq)

    async def on_the_loop(vm: AsyncVm, event: Event) -> None:
        await asyncio.sleep(0)
        fail_first(event)

    def on_the_thread(vm: SyncVm, event: Event) -> None:
        fail_first(event)

    function = on_the_loop if on_loop else on_the_thread

    async def scene() -> None:
        async with Bench(tmp_path, handler(function)) as bench:
            bench.vm.happen("STOP")
            bench.vm.happen("STOP")
            await bench.settle()
        (failure,) = bench.failures
        trace = failure.pop("traceback")
        assert "fail_first" in trace
        expected = f"{error.__name__}: no use"
        name = f"test.{function.__name__}"
        assert failure == {"handler": name, "event": "STOP", "seq": 1, "why": "raised", "error": expected}

    run(scene)
    assert handled == [2]


def test_of_a_long_traceback_the_newest_frames_are_kept(tmp_path: Path) -> None:
    async def deep(vm: AsyncVm, event: Event) -> None:
        def down(depth: int) -> None:
            if depth:
                up_and_down(depth)
            else:
                innermost()

        def up_and_down(depth: int) -> None:  # two lines in turn, or the traceback would fold the repetition
            down(depth - 1)

        def innermost() -> None:
            raise ValueError("x" * 3000)

        down(150)

    async def scene() -> None:
        async with Bench(tmp_path, handler(deep)) as bench:
            bench.vm.happen("STOP")
            await bench.settle()
        (failure,) = bench.failures
        assert len(failure["traceback"].encode()) <= MAX_TRACE_BYTES
        assert "in innermost" in failure["traceback"]
        assert len(failure["error"]) <= 1024

    run(scene)


def test_an_async_handler_over_its_limit_is_cancelled_and_its_stack_told(tmp_path: Path) -> None:
    cleaned_up: list[bool] = []

    async def waits_for_ever() -> None:
        await asyncio.Event().wait()

    async def hangs(vm: AsyncVm, event: Event) -> None:
        try:
            await waits_for_ever()
        finally:
            cleaned_up.append(True)

    async def scene() -> None:
        async with Bench(tmp_path, handler(hangs, limit=LIMIT)) as bench:
            bench.vm.happen("STOP")
            await bench.settle()
        (failure,) = bench.failures
        assert (failure["why"], failure["limit"], failure["left_behind"]) == ("limit", LIMIT, False)
        assert "in hangs" in failure["stack"]
        assert "in waits_for_ever" in failure["stack"]

    run(scene)
    assert cleaned_up == [True]


def test_the_definitions_limit_is_for_those_without_one(tmp_path: Path) -> None:
    async def hangs(vm: AsyncVm, event: Event) -> None:
        await asyncio.Event().wait()

    async def scene() -> None:
        async with Bench(tmp_path, handler(hangs), limit=LIMIT) as bench:
            bench.vm.happen("STOP")
            await bench.settle()
        assert bench.failures[0]["limit"] == LIMIT

    run(scene)


def test_a_handler_that_swallows_its_cancellation_is_left_behind(tmp_path: Path) -> None:
    async def scene() -> None:
        leave = asyncio.Event()
        handled: list[int] = []

        async def stubborn(vm: AsyncVm, event: Event) -> None:
            if event.seq > 1:
                handled.append(event.event == "STOP")
                return
            while not leave.is_set():
                try:
                    await leave.wait()
                except asyncio.CancelledError:
                    continue

        async with Bench(tmp_path, handler(stubborn, limit=LIMIT)) as bench:
            for calls in bench.dispatcher._on_loop:
                calls._grace = LIMIT
            bench.vm.happen("STOP")
            bench.vm.happen("STOP")
            await bench.settle()
            (failure,) = bench.failures
            assert (failure["why"], failure["left_behind"]) == ("limit", True)
            assert handled == [True]
            leave.set()

    run(scene)


def test_a_thread_over_its_limit_is_abandoned_with_its_stack_and_another_goes_on(tmp_path: Path) -> None:
    threads: list[int] = []

    async def scene() -> None:
        leave = threading.Event()

        def hangs_first(vm: SyncVm, event: Event) -> None:
            threads.append(threading.get_native_id())
            if event.seq == 1:
                leave.wait(DEADLINE)

        async with Bench(tmp_path, handler(hangs_first, limit=LIMIT)) as bench:
            bench.vm.happen("STOP")
            bench.vm.happen("STOP")
            await bench.settle()
            (failure,) = bench.failures
            assert (failure["why"], failure["left_behind"]) == ("limit", True)
            assert "in hangs_first" in failure["stack"]
            assert len(set(threads)) == 2
            assert bench.replacements == []
            leave.set()

    run(scene)


def test_a_thread_that_spins_leaves_the_loop_working(tmp_path: Path) -> None:
    async def scene() -> None:
        leave = False
        nice: list[int] = []

        def spins(vm: SyncVm, event: Event) -> None:
            nice.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            while not leave:
                pass

        async with Bench(tmp_path, handler(spins, limit=LIMIT)) as bench:
            bench.vm.happen("STOP")
            await bench.settle()
            assert "in spins" in bench.failures[0]["stack"]
            leave = True
        assert nice == [os.getpriority(os.PRIO_PROCESS, 0) + THREAD_NICE]

    run(scene)


def test_a_thread_that_spins_over_its_limit_is_interrupted_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async def scene() -> None:
        called: list[int] = []

        def spins(vm: SyncVm, event: Event) -> None:
            called.append(event.seq)
            while event.seq == 1:
                pass

        async with Bench(tmp_path, handler(spins, limit=LIMIT)) as bench:
            bench.vm.happen("STOP")
            bench.vm.happen("STOP")
            assert await bench.dispatcher.settle(DEADLINE)
            [failure] = bench.vm.emitted("HANDLER_FAILED")
            assert (failure["why"], failure["left_behind"]) == ("limit", False)
            assert "in spins" in failure["stack"]
            assert called == [1, 2]
            assert bench.replacements == []

    asyncio.run(scene())


def test_after_too_many_abandoned_threads_the_worker_asks_to_be_replaced_and_starts_no_more(tmp_path: Path) -> None:
    async def scene() -> None:
        leave = threading.Event()
        called: list[int] = []

        def hangs(vm: SyncVm, event: Event) -> None:
            called.append(event.seq)
            if event.seq <= MAX_STUCK + 1:
                leave.wait(DEADLINE)

        async with Bench(tmp_path, handler(hangs, limit=LIMIT)) as bench:
            for _ in range(MAX_STUCK + 2):
                bench.vm.happen("STOP")
            assert not await bench.dispatcher.settle((LIMIT + INTERRUPT_GRACE) * (MAX_STUCK + 3))
            assert len(bench.replacements) == 1
            assert called == list(range(1, MAX_STUCK + 2))
            assert bench.failures[-1]["why"] == "pending"
            leave.set()
            await bench.settle()
            assert called[-1] == MAX_STUCK + 2, "one has ended, so there is room again"
        assert len(bench.replacements) == 1

    run(scene)


def test_two_handlers_that_fail_on_failures_do_not_keep_each_other_busy(tmp_path: Path) -> None:
    calls: list[str] = []

    async def one(vm: AsyncVm, event: Event) -> None:
        calls.append(event.event)
        raise ValueError("one")

    def two(vm: SyncVm, event: Event) -> None:
        calls.append(event.event)
        raise ValueError("two")

    async def scene() -> None:
        async with Bench(tmp_path, handler(one, "*"), handler(two, "*")) as bench:
            bench.vm.happen("STOP")
            await bench.settle()
        assert [failure["event"] for failure in bench.failures] == ["STOP", "STOP"]

    run(scene)
    assert sorted(calls) == ["HANDLER_FAILED"] * 4 + ["STOP"] * 2


def test_handlers_that_emit_for_each_other_come_to_an_end(tmp_path: Path) -> None:
    async def echo(vm: AsyncVm, event: Event) -> None:
        vm.emit("SITE_ECHO", {"of": event.seq})

    async def scene() -> None:
        async with Bench(tmp_path, handler(echo, "STOP", "SITE_ECHO")) as bench:
            bench.vm.happen("STOP")
            await bench.settle()
        assert 200 <= len(bench.vm.emitted("SITE_ECHO")) <= 400
        assert bench.failures[-1]["error"].startswith("Busy")

    run(scene)


def test_a_full_lane_drops_the_newest_and_tells_it_once(tmp_path: Path) -> None:
    seen: list[int] = []

    async def scene() -> None:
        async def slow(vm: AsyncVm, event: Event) -> None:
            seen.append(event.seq)

        async with Bench(tmp_path, handler(slow), pending=10) as bench:
            for _ in range(50):
                bench.vm.happen("STOP")
            await bench.settle()
            (failure,) = bench.failures
            assert (failure["why"], failure["dropped"], failure["seq"]) == ("overflow", 40, 11)

    run(scene)
    assert seen == list(range(1, 11))


def test_a_handler_that_fails_for_every_event_of_a_flood_does_not_double_it(tmp_path: Path) -> None:
    async def fails(vm: AsyncVm, event: Event) -> None:
        raise ValueError("again")

    async def scene() -> None:
        async with Bench(tmp_path, handler(fails)) as bench:
            for _ in range(500):
                bench.vm.happen("STOP")
            await bench.settle()
        assert 100 <= len(bench.failures) <= 200

    run(scene)


# -- the page, and the end ------------------------------------------------------------------------------------------------


def test_the_page_names_a_handler_while_it_runs_and_only_then(tmp_path: Path) -> None:
    async def scene() -> None:
        async def steps(vm: AsyncVm, event: Event) -> None:
            said.append(bench.page.tasks[-1])
            await asyncio.sleep(0)
            said.append(bench.page.tasks[-1])

        said: list[str] = []
        async with Bench(tmp_path, handler(steps)) as bench:
            bench.vm.happen("STOP")
            await bench.settle()
        assert said == ["handler test.steps on STOP 1"] * 2
        assert bench.page.tasks == ["handler test.steps on STOP 1", "loop"] * 2

    run(scene)


def test_the_page_names_the_handler_on_the_thread_while_the_loop_is_in_nothing_else(tmp_path: Path) -> None:
    async def scene() -> None:
        entered, leave = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def threaded(vm: SyncVm, event: Event) -> None:
            loop.call_soon_threadsafe(entered.set)
            leave.wait(DEADLINE)

        async def beside(vm: AsyncVm, event: Event) -> None:
            await asyncio.sleep(0)

        async with Bench(tmp_path, handler(threaded), handler(beside)) as bench:
            bench.vm.happen("STOP")
            await entered.wait()
            assert bench.page.tasks[-1] == "thread test.threaded on STOP 1"
            leave.set()
            await bench.settle()
            assert bench.page.tasks[-1] == "loop"
        assert "handler test.beside on STOP 1" in bench.page.tasks

    run(scene)


def test_what_is_left_at_the_end_of_a_run_is_told(tmp_path: Path) -> None:
    async def hangs(vm: AsyncVm, event: Event) -> None:
        await asyncio.Event().wait()

    async def scene() -> None:
        async with Bench(tmp_path, handler(hangs)) as bench:
            bench.vm.happen("STOP")
            bench.vm.happen("STOP")
            assert not await bench.dispatcher.settle(0.05)
            (failure,) = bench.failures
            assert (failure["handler"], failure["why"], failure["pending"]) == ("test.hangs", "pending", 2)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        bench.vm.happen("STOP")
        assert asyncio.all_tasks() == {asyncio.current_task()}, "a closed dispatcher takes nothing up"

    run(scene)
