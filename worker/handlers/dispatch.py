# SPDX-License-Identifier: Apache-2.0
"""Which handlers an event has, and the lanes in which they are called. Made by handling.py for each run, told every event by the event log.

    event ─ dispatch ─┬─► shipped      vmloop's own, on the loop
                      ├─► async        the operator's `async def`, on the loop
                      ├─► thread       the operator's `def`, on the VM's handler thread
                      └─► hooks        executables, each a process

Each lane keeps the order of events and makes one call at a time; none waits for another. So a handler of the operator's that hangs delays
others of its lane, up to its limit, and nothing of vmloop's own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ..events import Event
from .calls import AsyncCalls
from .context import VmContext
from .hooks import ENVIRONMENT, Hook, HookCalls, HookDirectory
from .lane import Job, Lane
from .naming import TaskNames, TaskPage
from .registry import ANY_EVENT, Handler, LoadFailure
from .report import Reporter, TokenBucket
from .thread import ThreadCalls
from .throttle import LoopThrottle
from .view import EMITS_AT_ONCE, EMITS_PER_SECOND

log = logging.getLogger(__name__)

MAX_PENDING: Final = 1024  # calls in one lane; the events themselves are mostly those that the log keeps anyway
CLOSE_SECONDS: Final = 2.0


def _none_held(_: str, __: Path) -> bool:
    return False


class Dispatcher:
    """The handlers of one run of a VM. All methods on the loop's thread."""

    def __init__(
        self,
        context: VmContext,
        page: TaskPage,
        handlers: Sequence[Handler],
        *,
        on_replace: Callable[[str], None],
        hooks: Path | None = None,
        quarantined: Callable[[str, Path], bool] = _none_held,
        pending: int = MAX_PENDING,
        environment: Mapping[str, str] = ENVIRONMENT,
    ) -> None:
        """`handlers`: shipped ones and the operator's, in the order of their calls for one event. `hooks`: etc/hooks.d.

        `on_replace(why)`: too many handlers cannot be ended; another worker should take over. May be called more than once.
        """
        self._context = context
        loop = context.loop
        names = TaskNames(page)
        self._reporter = Reporter(context)
        emits = TokenBucket(EMITS_PER_SECOND, EMITS_AT_ONCE, loop.time)
        self._throttle = LoopThrottle()
        self._on_loop = [
            AsyncCalls(context, names, self._reporter, emits, on_replace, self._throttle) for _ in range(2)
        ]
        self._thread = ThreadCalls(context, names, self._reporter, emits, on_replace)
        self._hook_calls = HookCalls(context, names, self._reporter, on_replace, environment)
        shipped = Lane(loop, self._on_loop[0].call, pending, self._on_dropped)
        operators = Lane(loop, self._on_loop[1].call, pending, self._on_dropped)
        threaded = Lane(loop, self._thread.call, pending, self._on_dropped)
        self._hook_lane: Lane[Hook] = Lane(loop, self._hook_calls.call, pending, self._on_dropped)
        self._lanes: tuple[Lane[Any], ...] = (shipped, operators, threaded, self._hook_lane)
        self._hooks: HookDirectory | None = None
        if hooks is not None:
            self._hooks = HookDirectory(hooks, quarantined, self._on_refused, loop.time)
        lane_of = {handler: _lane_of(handler, shipped, operators, threaded) for handler in handlers}
        self._any = tuple((lane_of[handler], handler) for handler in handlers if ANY_EVENT in handler.events)
        self._of_event: dict[str, tuple[tuple[Lane[Handler], Handler], ...]] = {
            event: tuple((lane_of[h], h) for h in handlers if event in h.events or ANY_EVENT in h.events)
            for event in {event for handler in handlers for event in handler.events}
        }

    def dispatch(self, event: Event, *, only_shipped: bool = False) -> None:
        """Queue the calls that an event makes. Called in the middle of reading a monitor line: it neither blocks nor raises."""
        for lane, handler in self._of_event.get(event.event, self._any):
            if handler.trusted or not only_shipped:
                lane.put(handler, event)
        if only_shipped:
            return
        if self._hooks is not None:
            for hook in self._hooks.matching(event.event):
                self._hook_lane.put(hook, event)

    def report(self, failures: Iterable[LoadFailure]) -> None:
        """Tell which files of handlers could not be loaded."""
        for failure in failures:
            name = Path(failure.source).name
            self._reporter.failed(name, None, failure.why, failure.error, traceback=failure.traceback)

    async def settle(self, seconds: float) -> bool:
        """Wait until no call is left, those included that they lead to; after `seconds` tell what is left and return False."""
        deadline = self._context.loop.time() + seconds
        while working := {lane.task for lane in self._lanes if lane.task is not None}:
            left = deadline - self._context.loop.time()
            if left <= 0:
                break
            await asyncio.wait(working, timeout=left)
        for lane in self._lanes:
            unfinished = lane.unfinished
            if unfinished:
                text = f"the run is over: {len(unfinished)} calls were not made or not ended within {seconds:g} s"
                first = unfinished[0]
                self._reporter.failed(first.what.name, first.event, "pending", text, pending=len(unfinished))
        return all(lane.idle for lane in self._lanes)

    async def close(self) -> None:
        """Give up what is left: cancel, kill, let go. Takes two seconds at most; what then still runs is left behind."""
        waiting: set[asyncio.Task[None]] = {task for lane in self._lanes if (task := lane.close()) is not None}
        for calls in self._on_loop:
            for task in calls.tasks:
                task.cancel()
            waiting |= calls.tasks
        self._thread.close()
        self._throttle.close()
        if waiting:
            _, left = await asyncio.wait(waiting, timeout=CLOSE_SECONDS)
            for late in left:
                log.warning("VM %s: %s does not end; it is left behind", self._context.name, late.get_name())
        await self._hook_calls.close(CLOSE_SECONDS)

    def _on_dropped(self, job: Job[Any], count: int) -> None:
        text = f"{count} calls were dropped: {self._lanes[0].bound} wait already"
        self._reporter.failed(job.what.name, job.event, "overflow", text, dropped=count)

    def _on_refused(self, name: str, why: str) -> None:
        # Out of the reading of a line: an event that is emitted there would overtake the present one in some lanes.
        self._context.loop.call_soon(self._reporter.failed, name, None, "refused", f"hooks.d/{name} is not run: {why}")


def _lane_of(
    handler: Handler, shipped: Lane[Handler], operators: Lane[Handler], threaded: Lane[Handler]
) -> Lane[Handler]:
    if not handler.is_async:
        return threaded
    return shipped if handler.trusted else operators
