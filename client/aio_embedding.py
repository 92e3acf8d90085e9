# SPDX-License-Identifier: Apache-2.0
"""`embedded` for asyncio: the names of embedding.py, awaited. Made by `aio.embedded`.

The loop runs no part of vmloop's: what waits for the broker's process to start and to end waits in the loop's default executor. A thread
there cannot be cancelled: a start is given up when its task is, and an end goes on.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Generator
from types import TracebackType
from typing import Any

from ..common.errors import VmloopError
from ..common.paths import Paths
from .aio import Host
from .embedding import Launch, PrivateBroker
from .endpoint import find_endpoint

log = logging.getLogger(__name__)


class EmbeddedHost(Host):
    """As embedding.EmbeddedHost, for one event loop."""

    def __init__(self, paths: Paths, timeout: float, broker: PrivateBroker | None) -> None:
        super().__init__(find_endpoint(None, paths.run.parent), timeout)
        self.root = paths.run.parent
        self._owner = os.getpid()
        self._broker = broker

    async def close(self) -> None:
        """End the broker, and the VMs as was chosen; returns when all that is to end has ended. Raises `DeadlineExceeded`.

        If the task is cancelled the end goes on without it; another `close` waits for it.
        """
        if os.getpid() != self._owner:
            return  # as embedding.EmbeddedHost.close
        self._require_closable()
        try:
            await super().close()
        finally:
            if self._broker is not None:
                await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, self._broker.end))


class Embedding:
    """A private broker about to be started: `async with embedded(DIR) as host`, or `host = await embedded(DIR)`."""

    def __init__(self, launch: Launch, timeout: float) -> None:
        self._launch = launch
        self._timeout = timeout
        self._host: EmbeddedHost | None = None

    def __await__(self) -> Generator[Any, None, EmbeddedHost]:
        return self._start().__await__()

    async def __aenter__(self) -> EmbeddedHost:
        self._host = await self._start()
        return self._host

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._host is not None:
            await self._host.close()

    async def _start(self) -> EmbeddedHost:
        loop = asyncio.get_running_loop()
        starting = loop.run_in_executor(None, self._launch.start)
        try:
            broker = await asyncio.shield(starting)
        except asyncio.CancelledError:
            self._launch.give_up()
            await asyncio.shield(_undo(starting))  # cancelled once more: it is undone without us
            raise
        try:
            return EmbeddedHost(self._launch.paths, self._timeout, broker)
        except BaseException:
            if broker is not None:
                await asyncio.shield(loop.run_in_executor(None, broker.end))
            raise


async def _undo(starting: asyncio.Future[PrivateBroker | None]) -> None:
    """What a start that nobody waits for any more has brought about."""
    await asyncio.wait((starting,))
    try:
        broker = starting.result()
        if broker is not None:
            await asyncio.get_running_loop().run_in_executor(None, broker.end)
    except VmloopError as error:
        log.info("a private broker whose start was cancelled: %s", error)
