# SPDX-License-Identifier: Apache-2.0
"""Calling a plain `def` handler: on a thread beside the loop, so that one that sleeps leaves its own VM's monitor working.

Used by dispatch.py.

A thread cannot be ended from outside. One that is over its limit is reported with its stack, and Python is asked to raise `OverLimit`
in it, which ends what runs as Python code: a loop that spins. One that sleeps or hangs in C does not notice: it is abandoned, and another
one takes the next events; after a few of those the worker asks to be replaced, which ends them all and leaves QEMU as it is.

The thread is niced. Linux schedules threads, and each has a nice value of its own: a handler that spins takes what the other VMs'
workers leave over, and no more. What it costs its own VM is the interpreter's lock, which it hands over every 5 ms at the latest once
it is running; on a busy host it may wait longer for a CPU to do so. That is its own VM's business: the others have processes of their own.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Final, NamedTuple

from ..events import Event
from .calls import default_limit
from .context import VmContext
from .forks import end_if_forked
from .lane import Stuck
from .naming import TaskNames, call_task
from .registry import Handler
from .report import Reporter, TokenBucket, error_text, stack_text, trace_text
from .throttle import FREE, OverLimit, ThreadThrottle
from .view import SyncVm

log = logging.getLogger(__name__)

THREAD_NICE: Final = 10
INTERRUPT_GRACE: Final = 0.25  # seconds that an interrupted handler has to clean up

Function = Callable[[], object]


class Ended(NamedTuple):
    """How a call ended; no error is success. Texts, not the exception: its frames would keep alive all that the handler had."""

    error: str = ""
    traceback: str = ""


class ThreadCalls:
    """Makes the calls of the thread's lane."""

    def __init__(
        self,
        context: VmContext,
        names: TaskNames,
        reporter: Reporter,
        emits: TokenBucket,
        on_replace: Callable[[str], None],
    ) -> None:
        self._context = context
        self._names = names
        self._reporter = reporter
        self._emits = emits
        self._stuck = Stuck("handler threads", on_replace)
        self._thread: HandlerThread | None = None  # started for the first event that wants it

    async def call(self, handler: Handler, event: Event) -> None:
        """Make one call; returns when it has ended or was given up."""
        limit = handler.limit or default_limit(self._context)
        view = SyncVm(self._context, event.epoch, limit, self._emits)
        if self._thread is None:
            self._thread = HandlerThread(self._context.loop, f"handlers of {self._context.name}")
        self._names.rest_in(call_task("thread", handler.name, event))
        try:
            running = self._thread.run(lambda: handler.function(view, event))
            await self._wait(running, self._thread, limit)
        finally:
            self._names.rest_in()
        if running.done():
            error, traceback = running.result()
            if error:
                self._reporter.failed(handler.name, event, "raised", error, traceback=traceback)
            return
        stack = self._thread.stack()
        self._thread.interrupt()
        await asyncio.wait({running}, timeout=INTERRUPT_GRACE)
        left_behind = not running.done()
        text = f"over its limit of {limit:g} s; " + ("its thread is abandoned" if left_behind else "it was interrupted")
        self._thread.end()  # an interruption may still be on its way to it: the next event gets another one
        self._thread = None
        if left_behind:
            self._abandon(running)
        self._reporter.failed(handler.name, event, "limit", text, limit=limit, left_behind=left_behind, stack=stack)
        await self._stuck.wait_for_room()

    async def _wait(self, running: asyncio.Future[Ended], thread: HandlerThread, limit: float) -> None:
        """Until the call has ended or its time is over. One that computes for long is held back."""
        until = self._context.loop.time() + limit
        throttle, pause = thread.throttle(), FREE
        try:
            while not running.done() and (left := until - self._context.loop.time()) > 0:
                await asyncio.wait({running}, timeout=min(pause, left))
                if not running.done():
                    pause = throttle.hold_back()
        finally:
            throttle.close()

    def close(self) -> None:
        """Let the thread end after what it does now; it is a daemon and holds nothing up."""
        if self._thread is not None:
            self._thread.end()
            self._thread = None

    def _abandon(self, running: asyncio.Future[Ended]) -> None:
        gone: asyncio.Future[None] = self._context.loop.create_future()
        running.add_done_callback(lambda _: None if gone.done() else gone.set_result(None))
        self._stuck.add(gone)


class HandlerThread:
    """One daemon thread that makes calls, one after the other. `run`, `stack` and `end` are for the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str) -> None:
        self._loop = loop
        self._work: queue.SimpleQueue[tuple[Function, asyncio.Future[Ended]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def run(self, function: Function) -> asyncio.Future[Ended]:
        """Call `function` on the thread; the future tells how it ended and never fails."""
        future: asyncio.Future[Ended] = self._loop.create_future()
        self._work.put((function, future))
        return future

    def throttle(self) -> ThreadThrottle:
        """For the call that has just begun."""
        return ThreadThrottle(self._thread)

    def stack(self) -> str:
        """Where the thread is."""
        assert self._thread.ident is not None
        return stack_text(sys._current_frames().get(self._thread.ident))

    def interrupt(self) -> None:
        """Have `OverLimit` raised in the thread as soon as it runs Python code."""
        assert self._thread.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread.ident), ctypes.py_object(OverLimit))

    def end(self) -> None:
        """No further call; the thread ends after its present one."""
        self._work.put(None)

    def join(self, seconds: float) -> bool:
        """Wait until the thread has ended; False if it has not. For tests."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # -- on the thread itself ---------------------------------------------------------------------------------------------------

    def _main(self) -> None:
        _be_nice()
        try:
            self._serve()
        except OverLimit:  # it came after the call that it was meant for; this thread gets no further one
            log.info("%s: interrupted between two calls", self._thread.name)

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            function, future = work
            ended = _call(function)
            del function, work  # the view and the event, until the next call
            try:
                self._loop.call_soon_threadsafe(_settle, future, ended)
            except RuntimeError:  # the loop is closed: the worker ends
                return


def _call(function: Function) -> Ended:
    try:
        result = function()
        if inspect.iscoroutine(result):
            result.close()
            return Ended("a plain `def` returned a coroutine, which nobody awaits; make it an `async def`")
    except BaseException as error:  # noqa: BLE001 - the loop's side reports it; SystemExit is the handler's, not the worker's
        end_if_forked()
        return Ended(error_text(error), trace_text(error))
    end_if_forked()
    return Ended()


def _settle(future: asyncio.Future[Ended], ended: Ended) -> None:
    if not future.done():
        future.set_result(ended)


def _be_nice() -> None:
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), THREAD_NICE)
    except OSError as error:
        log.warning("the handler thread keeps its priority: %s", error)
