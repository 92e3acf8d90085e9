# SPDX-License-Identifier: Apache-2.0
"""One after the other: mutating operations on a VM run in the order they came, each waiting no longer than its own deadline.

Reading operations do not come here, and `kill` overtakes everything by not coming here either. Used by app.py and verbs/.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

from ..common.errors import Busy, DeadlineExceeded

MAX_WAITING = 1024  # operations in line for one VM


class Order:
    """The line of one VM."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._holder: str | None = None
        self._since = 0.0
        self._line: deque[asyncio.Future[None]] = deque()

    def try_take(self, what: str) -> bool:
        """Take the turn if it is free; then `release` must follow."""
        if self._holder is not None or self._line:
            return False
        self._holder = what
        self._since = self._loop.time()
        return True

    def release(self) -> None:
        """Give back what `try_take` took."""
        self._holder = None
        self._pass_on()

    @contextlib.asynccontextmanager
    async def turn(self, what: str, deadline: float) -> AsyncIterator[None]:
        """Hold the turn for the block. Raises `DeadlineExceeded` (nothing was done) or `Busy`."""
        await self._wait(what, deadline)
        self._holder = what
        self._since = self._loop.time()
        try:
            yield
        finally:
            self.release()

    async def _wait(self, what: str, deadline: float) -> None:
        if self._holder is None and not self._line:
            return
        if len(self._line) >= MAX_WAITING:
            raise Busy(f"{what}: {len(self._line)} operations are in line for this VM; try again later")
        place: asyncio.Future[None] = self._loop.create_future()
        self._line.append(place)
        try:
            async with asyncio.timeout_at(deadline):
                await place
        except TimeoutError:
            holder, seconds = self._holder, self._loop.time() - self._since
            self._leave_line(place)
            text = f"{what}: not begun: '{holder}' has held this VM's turn for {seconds:.1f} s"
            raise DeadlineExceeded(text) from None
        except asyncio.CancelledError:
            self._leave_line(place)
            raise

    def _leave_line(self, place: asyncio.Future[None]) -> None:
        if place in self._line:
            self._line.remove(place)
        elif not place.cancelled():
            self._pass_on()  # the turn came in the same instant; it goes to the next

    def _pass_on(self) -> None:
        while self._line:
            place = self._line.popleft()
            if not place.done():
                # The next one is not running yet, but from here on the turn is its.
                self._holder = "the next in line"
                self._since = self._loop.time()
                place.set_result(None)
                return
        self._holder = None
