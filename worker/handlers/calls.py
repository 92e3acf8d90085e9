# SPDX-License-Identifier: Apache-2.0
"""Calling an `async def` handler on the loop: named on the page at each of its steps, ended at its limit, reported if it fails.

Used by dispatch.py.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
import types
from collections.abc import Callable, Coroutine, Generator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import FrameType
from typing import Any, Final

from ..events import Event
from .context import VmContext
from .forks import end_if_forked
from .lane import Stuck
from .naming import TaskNames, call_task
from .registry import Handler
from .report import Reporter, TokenBucket, error_text, frames_text, trace_text
from .throttle import LoopThrottle, OverLimit
from .view import AsyncVm

log = logging.getLogger(__name__)

DEFAULT_LIMIT: Final = 30.0  # seconds, of a VM that was attached; else its definition says it
CANCEL_GRACE: Final = 2.0  # seconds that a cancelled handler has to clean up


def default_limit(context: VmContext) -> float:
    """Seconds that a handler or hook without a limit of its own may take for one event."""
    return context.definition.handlers.limit if context.definition is not None else DEFAULT_LIMIT


class AsyncCalls:
    """Makes the calls of one lane."""

    def __init__(
        self,
        context: VmContext,
        names: TaskNames,
        reporter: Reporter,
        emits: TokenBucket,
        on_replace: Callable[[str], None],
        throttle: LoopThrottle,
        cancel_grace: float = CANCEL_GRACE,
    ) -> None:
        self._throttle = throttle
        self._context = context
        self._names = names
        self._reporter = reporter
        self._emits = emits
        self._grace = cancel_grace
        self._stuck = Stuck("async handlers", on_replace)
        self.tasks: set[asyncio.Task[None]] = set()  # those that have not ended, given up or not

    async def call(self, handler: Handler, event: Event) -> None:
        """Make one call; returns when it has ended or was given up."""
        limit = handler.limit or default_limit(self._context)
        subject = self._context if handler.trusted else AsyncVm(self._context, event.epoch, limit, self._emits)
        call = _Call(handler, subject, event, self._names, self._throttle, time.monotonic() + limit)
        task = self._context.loop.create_task(call.run(), name=call.task)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        try:
            await asyncio.wait({task}, timeout=limit)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if task.done():
            if call.over_limit:
                text = f"over its limit of {limit:g} s; it was interrupted"
                self._reporter.failed(
                    handler.name, event, "limit", text, limit=limit, left_behind=False, stack=call.traceback
                )
            elif call.error:
                self._reporter.failed(handler.name, event, "raised", call.error, traceback=call.traceback)
            return
        stack = call.stack()
        task.cancel()
        await asyncio.wait({task}, timeout=self._grace)
        text = f"over its limit of {limit:g} s; it was cancelled"
        if not task.done():
            text += f", did not end within {self._grace:g} s and was left behind"
            self._stuck.add(task)
        self._reporter.failed(handler.name, event, "limit", text, limit=limit, left_behind=not task.done(), stack=stack)
        await self._stuck.wait_for_room()


class _Call:
    """One call of one handler. Whatever it raises ends here: a SystemExit in a task would end the worker's loop."""

    def __init__(
        self, handler: Handler, subject: object, event: Event, names: TaskNames, throttle: LoopThrottle, until: float
    ) -> None:
        self._throttle = throttle
        self._until = until
        self._handler = handler
        self._subject = subject
        self._event = event
        self._names = names
        self._coroutine: Coroutine[Any, Any, object] | None = None
        self.task = call_task("shipped" if handler.trusted else "handler", handler.name, event)
        self.error = ""
        self.traceback = ""
        self.over_limit = False

    async def run(self) -> None:
        try:
            self._coroutine = self._handler.function(self._subject, self._event)
            throttle = nullcontext if self._handler.trusted else partial(self._throttle.step, self._until)
            await _by_steps(self._coroutine, self._names, self.task, throttle)
        except BaseException as error:  # noqa: BLE001 - the caller reports it; a cancelled call is over as well
            self.error, self.traceback = error_text(error), trace_text(error)
            self.over_limit = isinstance(error, OverLimit)
        finally:
            self._coroutine = None

    def stack(self) -> str:
        """Where the handler waits."""
        frames: list[FrameType] = []
        waiting: Any = self._coroutine
        while waiting is not None:
            if inspect.iscoroutine(waiting):
                frame, inner = waiting.cr_frame, waiting.cr_await
            elif inspect.isgenerator(waiting):
                frame, inner = waiting.gi_frame, waiting.gi_yieldfrom
            else:
                return frames_text(frames, f"  waiting for {type(waiting).__name__}\n")
            if frame is not None:
                frames.append(frame)
            waiting = inner
        return frames_text(frames)


@types.coroutine
def _by_steps(
    coroutine: Coroutine[Any, Any, object],
    names: TaskNames,
    task: str,
    throttle: Callable[[], AbstractContextManager[None]],
) -> Generator[Any, Any, None]:
    """`await coroutine`, with the page saying `task` while it runs, and only then. Two stores into the page for each step."""
    thrown: BaseException | None = None
    sent: Any = None
    while True:
        names.enter(task)
        try:
            with throttle():
                awaited = coroutine.throw(thrown) if thrown is not None else coroutine.send(sent)
        except StopIteration:
            return
        finally:
            end_if_forked()  # before anything else: the page is shared with the worker
            names.leave()
        thrown = None
        try:
            sent = yield awaited
        except GeneratorExit:
            coroutine.close()
            raise
        except BaseException as error:  # noqa: BLE001 - a cancellation: it is the handler's to see
            thrown = error
