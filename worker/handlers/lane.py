# SPDX-License-Identifier: Apache-2.0
"""A lane of handlers: calls that wait, one at a time, in the order of their events. Used by dispatch.py.

A lane that is full drops the newest call and counts it; the count is told once, when the lane has caught up. An idle lane has no task.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from ..events import Event

log = logging.getLogger(__name__)

# Calls given up with their coroutine or thread still there: more of them than this, and the worker should be replaced.
MAX_STUCK: Final = 3


class Named(Protocol):
    """A handler or a hook."""

    @property
    def name(self) -> str: ...


W = TypeVar("W", bound=Named)


class Job(NamedTuple, Generic[W]):
    """One call to make."""

    what: W
    event: Event


class Lane(Generic[W]):
    """On the loop's thread alone."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        call: Callable[[W, Event], Awaitable[None]],
        bound: int,
        on_dropped: Callable[[Job[W], int], None],
    ) -> None:
        """`call` must not raise. `on_dropped` gets the first call that was dropped and how many there were; never called from `put`."""
        self._loop = loop
        self._call = call
        self.bound = bound
        self._on_dropped = on_dropped
        self._jobs: deque[Job[W]] = deque()
        self._first_dropped: Job[W] | None = None
        self._dropped = 0
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self.current: Job[W] | None = None

    def put(self, what: W, event: Event) -> None:
        """Add a call. Neither blocks nor raises."""
        if self._closed:
            return
        job = Job(what, event)
        if len(self._jobs) >= self.bound:
            if self._first_dropped is None:
                self._first_dropped = job
            self._dropped += 1
            return
        self._jobs.append(job)
        if self._task is None:
            self._task = self._loop.create_task(self._work())

    @property
    def idle(self) -> bool:
        return self._task is None

    @property
    def unfinished(self) -> list[Job[W]]:
        """What is running or waits, oldest first."""
        return [*([self.current] if self.current is not None else []), *self._jobs]

    @property
    def task(self) -> asyncio.Task[None] | None:
        """What works the lane off; None while it is idle."""
        return self._task

    def close(self) -> asyncio.Task[None] | None:
        """Forget what waits, cancel what runs; the task to be waited for."""
        self._closed = True
        self._jobs.clear()
        self._tell_dropped()
        if self._task is not None:
            self._task.cancel()
        return self._task

    async def _work(self) -> None:
        try:
            while self._jobs:
                self.current = self._jobs.popleft()
                try:
                    await self._call(*self.current)
                except Exception:  # a defect of the dispatcher's own: the next calls are made all the same
                    log.exception("a call of %s could not be made", self.current.what.name)
                # Half empty: a lane at its bound would tell of every single call otherwise.
                if len(self._jobs) <= self.bound // 2:
                    self._tell_dropped()
        finally:
            self.current = None
            self._task = None

    def _tell_dropped(self) -> None:
        if self._first_dropped is not None:
            job, count = self._first_dropped, self._dropped
            self._first_dropped, self._dropped = None, 0
            self._on_dropped(job, count)


class Stuck:
    """Calls that were given up and have not ended. Beyond a few, no further one is begun until one ends or the worker is replaced."""

    def __init__(self, what: str, on_replace: Callable[[str], None]) -> None:
        self._what = what
        self._on_replace = on_replace
        self._futures: set[asyncio.Future[None]] = set()

    def __len__(self) -> int:
        return len(self._futures)

    def add(self, future: asyncio.Future[None]) -> None:
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)

    async def wait_for_room(self) -> None:
        """Ask for another worker if too many are stuck, and wait until they are fewer, however long that takes."""
        if len(self._futures) <= MAX_STUCK:
            return
        self._on_replace(f"{len(self._futures)} {self._what} are over their limit and cannot be ended")
        while len(self._futures) > MAX_STUCK:
            await asyncio.wait(set(self._futures), return_when=asyncio.FIRST_COMPLETED)
