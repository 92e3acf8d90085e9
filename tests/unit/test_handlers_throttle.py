# SPDX-License-Identifier: Apache-2.0
"""Handlers that compute for long are held back, those that do not are left alone, and one that spins beyond its limit is ended."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vmloop.worker.events import Event
from vmloop.worker.handlers.throttle import FREE, PAUSE, LoopThrottle, OverLimit, ThreadThrottle
from vmloop.worker.handlers.view import AsyncVm, SyncVm

from ..fakes.raw_qmp import DEADLINE
from .test_handlers_dispatch import Bench, handler

SECONDS = 0.8  # of spinning


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def cpu_of(work: Callable[[], object]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


def test_what_spins_on_the_loop_gets_a_share_of_a_cpu() -> None:
    throttle = LoopThrottle()
    try:
        with throttle.step(time.monotonic() + DEADLINE):
            used = cpu_of(lambda: spin(SECONDS))
    finally:
        throttle.close()
    assert FREE <= used < FREE + SECONDS / 2


def test_what_is_short_is_left_alone() -> None:
    throttle = LoopThrottle()
    try:
        with throttle.step(time.monotonic() + DEADLINE):
            began = time.monotonic()
            spin(FREE / 3)
            assert time.monotonic() - began < FREE / 3 + PAUSE / 2
    finally:
        throttle.close()


def test_what_spins_on_the_loop_beyond_its_time_is_ended_whatever_it_catches() -> None:
    throttle = LoopThrottle()
    caught = 0

    def stubborn() -> None:
        nonlocal caught
        while True:
            try:
                spin(DEADLINE)
                return
            except OverLimit:
                caught += 1
                if caught == 3:
                    raise

    try:
        with pytest.raises(OverLimit), throttle.step(time.monotonic() + 2 * FREE):
            stubborn()
    finally:
        throttle.close()
    assert caught == 3


def test_after_a_step_nothing_is_held_back_or_ended() -> None:
    throttle = LoopThrottle()
    try:
        with throttle.step(time.monotonic()):
            pass
        assert cpu_of(lambda: spin(2 * FREE)) > FREE
    finally:
        throttle.close()


def test_outside_of_the_main_thread_it_does_nothing() -> None:
    ended: list[float] = []

    def elsewhere() -> None:
        throttle = LoopThrottle()
        with throttle.step(time.monotonic()):
            spin(2 * FREE)
        throttle.close()
        ended.append(time.monotonic())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(DEADLINE)
    assert ended


def test_what_spins_on_a_thread_gets_a_share_of_a_cpu() -> None:
    thread = threading.Thread(target=spin, args=(SECONDS,))
    thread.start()
    throttle = ThreadThrottle(thread)
    before = time.process_time()
    pause = FREE
    while thread.is_alive():
        thread.join(pause)
        pause = throttle.hold_back()
    assert time.process_time() - before < FREE + SECONDS / 2


def test_a_thread_that_sleeps_is_not_held_back() -> None:
    leave = threading.Event()
    thread = threading.Thread(target=leave.wait, args=(DEADLINE,))
    thread.start()
    throttle = ThreadThrottle(thread)
    try:
        for _ in range(3):
            began = time.monotonic()
            assert throttle.hold_back() == FREE
            assert time.monotonic() - began < PAUSE
    finally:
        leave.set()
        thread.join(DEADLINE)
    assert throttle.hold_back() == FREE  # it has ended


@pytest.mark.parametrize("place", ["loop", "thread"])
def test_a_handler_that_spins_is_told_of_at_its_limit_and_the_next_event_is_handled(tmp_path: Path, place: str) -> None:
    async def scene() -> None:
        called: list[int] = []

        async def on_loop(vm: AsyncVm, event: Event) -> None:
            called.append(event.seq)
            while event.seq == 1:
                pass

        def on_thread(vm: SyncVm, event: Event) -> None:
            called.append(event.seq)
            while event.seq == 1:
                pass

        spinner = handler(on_loop if place == "loop" else on_thread, limit=3 * FREE)
        async with Bench(tmp_path, spinner) as bench:
            bench.vm.happen("STOP")
            bench.vm.happen("STOP")
            assert await bench.dispatcher.settle(DEADLINE)
            [failure] = bench.vm.emitted("HANDLER_FAILED")
            assert (failure["why"], failure["left_behind"]) == ("limit", False)
            assert f"in on_{place}" in failure["stack"]
            assert called == [1, 2]

    asyncio.run(scene())
