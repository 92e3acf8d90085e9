# SPDX-License-Identifier: Apache-2.0
"""Waiting until something holds of a VM: whoever waits looks again when a state has changed. Used by vm.py and, through it, by verbs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Conditions:
    """Those who wait, of one VM. On the worker's loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiters: list[Callable[[], None]] = []

    def look(self) -> None:
        """Something has changed."""
        for look in tuple(self._waiters):
            look()

    async def wait(self, condition: Callable[[], bool], deadline: float) -> bool:
        """Wait until a condition on states holds; False if the deadline (loop time) comes first."""
        if condition():
            return True
        met: asyncio.Future[None] = self._loop.create_future()

        def look() -> None:
            if not met.done() and condition():
                met.set_result(None)

        self._waiters.append(look)
        try:
            async with asyncio.timeout_at(deadline):
                await met
        except TimeoutError:
            return condition()
        finally:
            self._waiters.remove(look)
        return True
