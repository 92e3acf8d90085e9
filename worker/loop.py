# SPDX-License-Identifier: Apache-2.0
"""The worker's event loop: asyncio's, over a selector that tells the status page when it sleeps and when it wakes.

Whoever reads the page sees at once whether the loop is held up, since when, and in what; a sleeping loop costs nothing. Used by app.py.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from typing import Any

from ..common.page import Page, Word


class PageSelector(selectors.EpollSelector):
    """An epoll selector with a status page. A turn that follows at once is a turn of its own, but no wake-up."""

    def __init__(self, page: Page) -> None:
        super().__init__()
        self._page = page

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, Any]]:
        if timeout is not None and timeout <= 0:
            self._page.words[Word.BUSY_SINCE] = time.monotonic_ns()
            return super().select(timeout)
        self._page.idle()
        try:
            return super().select(timeout)
        finally:
            self._page.busy()


def new_loop(page: Page) -> asyncio.SelectorEventLoop:
    """The loop of one worker."""
    return asyncio.SelectorEventLoop(PageSelector(page))
