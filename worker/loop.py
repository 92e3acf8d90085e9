# SPDX-License-Identifier: Apache-2.0
"""The worker's event loop: asyncio's, over a selector that tells the status page when it sleeps and when it wakes.

Whoever reads the page sees at once whether the loop is held up, since when, and in what; a sleeping loop costs nothing. Used by app.py.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import Any

from ..common.page import Page


class PageSelector(selectors.EpollSelector):
    """An epoll selector with a status page. Only a wait that can sleep is written down."""

    def __init__(self, page: Page) -> None:
        super().__init__()
        self._page = page

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, Any]]:
        if timeout is not None and timeout <= 0:
            return super().select(timeout)
        self._page.idle()
        try:
            return super().select(timeout)
        finally:
            self._page.busy()


def new_loop(page: Page) -> asyncio.SelectorEventLoop:
    """The loop of one worker."""
    return asyncio.SelectorEventLoop(PageSelector(page))
