# SPDX-License-Identifier: Apache-2.0
"""The worker's loop as somebody else sees it on the status page: asleep, at work, or held up by a callback and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmloop.common.page import Page, Word
from vmloop.worker.loop import WorkerLoop

from ..fakes.raw_qmp import DEADLINE, until


class RunningLoop:
    """A worker's loop in a thread, and a looker's mapping of its page."""

    def __init__(self, path: Path) -> None:
        self.page = Page(path, writable=True)
        self.looker = Page(path, writable=False)
        self.loop = WorkerLoop(self.page, 1.0)
        self._thread = threading.Thread(target=self.loop.run_forever, name="loop under test")
        self._thread.start()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(DEADLINE)
        self.loop.close()
        self.looker.close()
        self.page.close()

    @property
    def idle(self) -> bool:
        return self.looker.words[Word.BUSY_SINCE] == 0 and self.looker.words[Word.WAKEUPS] > 0

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        """A callback that holds the loop up while the block lasts."""
        entered, leave = threading.Event(), threading.Event()

        def callback() -> None:
            entered.set()
            leave.wait(DEADLINE)

        self.loop.call_soon_threadsafe(callback)
        assert entered.wait(DEADLINE)
        try:
            yield
        finally:
            leave.set()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[RunningLoop]:
    running = RunningLoop(tmp_path / "page")
    running.loop.call_soon_threadsafe(lambda: None)
    yield running
    running.close()


def test_a_sleeping_loop_is_idle(running: RunningLoop) -> None:
    until(lambda: running.idle)
    assert running.looker.blocked_seconds() == 0.0


def test_a_loop_in_a_callback_is_blocked_for_longer_and_longer(running: RunningLoop) -> None:
    with running.blocked():
        first = running.looker.blocked_seconds()
        assert first > 0.0
        until(lambda: running.looker.blocked_seconds() > first + 0.05)
    until(lambda: running.idle)
    assert running.looker.blocked_seconds() == 0.0


def test_what_it_is_blocked_in_can_be_read_meanwhile(running: RunningLoop) -> None:
    named = threading.Event()

    def name() -> None:
        running.page.busy("handler on_crash")
        named.set()

    running.loop.call_soon_threadsafe(name)
    assert named.wait(DEADLINE)
    with running.blocked():
        assert running.looker.task() == "handler on_crash"


def test_every_sleep_ends_in_one_wakeup(running: RunningLoop) -> None:
    until(lambda: running.idle)
    before = running.looker.words[Word.WAKEUPS]
    for _ in range(3):
        woken = threading.Event()
        running.loop.call_soon_threadsafe(woken.set)
        assert woken.wait(DEADLINE)
        until(lambda: running.idle)
    assert running.looker.words[Word.WAKEUPS] - before >= 3


def test_a_timer_wakes_it_as_a_socket_does(running: RunningLoop) -> None:
    until(lambda: running.idle)
    fired = threading.Event()
    running.loop.call_soon_threadsafe(lambda: running.loop.call_later(0.01, fired.set))
    assert fired.wait(DEADLINE)
    until(lambda: running.idle)


def test_a_loop_that_is_busy_with_many_short_turns_is_not_blocked(running: RunningLoop) -> None:
    """Each turn counts for itself: a flood keeps a loop from sleeping, but nothing in it is held up."""
    done = threading.Event()
    since: list[int] = []

    def turn() -> None:
        since.append(running.page.words[Word.BUSY_SINCE])
        if len(since) < 100:
            running.loop.call_soon(turn)
        else:
            done.set()

    running.loop.call_soon_threadsafe(turn)
    assert done.wait(DEADLINE)
    assert all(since)
    assert since == sorted(since)
    assert len(set(since)) == len(since)


def test_it_is_asyncios_own_loop_in_everything_else(tmp_path: Path) -> None:
    with Page(tmp_path / "page", writable=True) as page:
        loop = WorkerLoop(page, 1.0)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)

        async def talk() -> bytes:
            await loop.sock_sendall(ours, b"ping")
            assert theirs.recv(10) == b"ping"
            theirs.send(b"pong")
            async with asyncio.timeout(DEADLINE):
                return await loop.sock_recv(ours, 10)

        try:
            assert loop.run_until_complete(talk()) == b"pong"
        finally:
            loop.close()
            ours.close()
            theirs.close()


def test_a_turn_that_was_too_long_is_told_of_once_with_its_length(tmp_path: Path) -> None:
    with Page(tmp_path / "page", writable=True) as page:
        loop = WorkerLoop(page, 0.05)
        told: list[float] = []
        loop.page_selector.on_blocked = told.append

        async def hold_up() -> None:
            threading.Event().wait(0.08)
            await asyncio.sleep(0)
            await asyncio.sleep(0.01)

        try:
            loop.run_until_complete(hold_up())
        finally:
            loop.close()
    assert len(told) == 1
    assert 0.08 <= told[0] < DEADLINE


def test_what_is_enqueued_when_that_is_told_runs_before_the_loop_sleeps(tmp_path: Path) -> None:
    with Page(tmp_path / "page", writable=True) as page:
        loop = WorkerLoop(page, 0.05)
        heard = asyncio.Event()
        loop.page_selector.on_blocked = lambda _: (loop.call_soon(heard.set), None)[1]

        async def hold_up() -> None:
            threading.Event().wait(0.08)
            async with asyncio.timeout(DEADLINE):
                await heard.wait()

        try:
            loop.run_until_complete(hold_up())
        finally:
            loop.close()


def test_a_forked_child_never_gets_into_the_loop_again(tmp_path: Path) -> None:
    with Page(tmp_path / "page", writable=True) as page:
        loop = WorkerLoop(page, 1.0)
        parent = os.getpid()
        loop.page_selector.forked = lambda: os.getpid() != parent

        async def fork() -> int:
            child = os.fork()
            await asyncio.sleep(0.01)  # a child would come out of this as a second worker
            return child

        child = loop.run_until_complete(fork())
        if os.getpid() != parent:
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        loop.close()
