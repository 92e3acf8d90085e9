# SPDX-License-Identifier: Apache-2.0
"""Waiting for something to become true of a VM's states. Used by vm.py, whose setters call `look`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Waiters:
    """Those who wait for a condition; each is asked again whenever a state has changed."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._looks: list[Callable[[], None]] = []

    def look(self) -> None:
        """Something has changed."""
        for look in tuple(self._looks):
            look()

    async def wait(self, condition: Callable[[], bool], deadline: float) -> bool:
        """Wait until a condition holds; False if the deadline (loop time) comes first."""
        if condition():
            return True
        met: asyncio.Future[None] = self._loop.create_future()

        def look() -> None:
            if not met.done() and condition():
                met.set_result(None)

        self._looks.append(look)
        try:
            async with asyncio.timeout_at(deadline):
                await met
        except TimeoutError:
            return condition()
        finally:
            self._looks.remove(look)
        return True
