# SPDX-License-Identifier: Apache-2.0
"""The worker's event loop: asyncio's, over a selector that tells the status page when it sleeps and when it wakes.

Whoever reads the page sees at once whether the loop is held up, since when, and in what; a sleeping loop costs nothing. The loop itself
notices afterwards: a turn of more than `blocked_after` seconds is told to `on_blocked`. Used by entry.py and app.py.
"""

from __future__ import annotations

import asyncio
import os
import selectors
import time
from collections.abc import Callable
from typing import Any

from ..common.page import Page, Word


class PageSelector(selectors.EpollSelector):
    """An epoll selector with a status page. A turn that follows at once is a turn of its own, but no wake-up."""

    def __init__(self, page: Page, blocked_after: float) -> None:
        """`blocked_after`: a turn of so many seconds is told to `on_blocked`."""
        super().__init__()
        self.on_blocked: Callable[[float], None] = lambda _: None  # gets the seconds; must only enqueue
        self.forked: Callable[[], bool] = lambda: False  # true in a child that a handler has forked
        self._page = page
        self._blocked_after = int(blocked_after * 1e9)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, Any]]:
        if self.forked():
            os._exit(0)  # never a second worker on the same connections
        words = self._page.words
        now = time.monotonic_ns()
        since = words[Word.BUSY_SINCE]
        if since and now - since >= self._blocked_after:
            self.on_blocked((now - since) / 1e9)
            timeout = 0.0  # what that has enqueued comes first
        if timeout is not None and timeout <= 0:
            words[Word.BUSY_SINCE] = now
            return super().select(timeout)
        self._page.idle()
        try:
            return super().select(timeout)
        finally:
            self._page.busy()


class WorkerLoop(asyncio.SelectorEventLoop):
    """The loop of one worker."""

    def __init__(self, page: Page, blocked_after: float) -> None:
        self.page_selector = PageSelector(page, blocked_after)
        super().__init__(self.page_selector)
