# SPDX-License-Identifier: Apache-2.0
"""The capabilities of a binary, from memory, from disk or by a probe: one probe of a binary, however many ask. Used by prober.py, by a
worker whose QEMU did not start, and by `vmloop probe` where there is no broker.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import msgspec

from ...common.capabilities import Capabilities
from ...common.errors import DeadlineExceeded, LaunchFailed
from .cache import Cache
from .probing import PROBE_SECONDS, find_binary, probe
from .validity import Stamp, stamp_of

log = logging.getLogger(__name__)

# A probe may first wait for another process's, which takes no longer itself.
ASK_SECONDS: Final = 2 * PROBE_SECONDS
MAX_KNOWN: Final = 64  # documents in memory: the oldest is forgotten


class Known(msgspec.Struct, frozen=True):
    """A document in memory, and the facts it was made under."""

    stamp: Stamp
    capabilities: Capabilities


class Asking:
    """Asks for one process; all on its loop."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._known: dict[str, Known] = {}
        self._running: dict[str, asyncio.Task[Known]] = {}

    @property
    def idle(self) -> bool:
        """Whether no probe is under way."""
        return not self._running

    async def known(self, binary: str, *, seconds: float, refresh: bool = False) -> Known:
        """The document of a binary given by name or path; `refresh`: by a new probe.

        Raises what `find_binary` and `probe` raise; `DeadlineExceeded` after `seconds`: the probe goes on, for whoever asks next.
        """
        path = find_binary(binary)
        stamp = _stamp(path)
        known = self._known.get(path)
        if known is not None and known.stamp == stamp and not refresh:
            return known
        task = self._running.get(path)
        if task is None:
            task = self._running[path] = asyncio.get_running_loop().create_task(self._ask(stamp, refresh=refresh))
            task.add_done_callback(lambda done: self._done(path, done))
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.shield(task)
        except TimeoutError:
            raise DeadlineExceeded(f"{path}: its probe was not done within {seconds:.3g} s; it goes on") from None

    async def close(self) -> None:
        """End what is under way."""
        for task in tuple(self._running.values()):
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def _ask(self, stamp: Stamp, *, refresh: bool) -> Known:
        path = stamp.path
        try:
            async with asyncio.timeout(ASK_SECONDS), self._cache.lock(path):
                found = None if refresh else self._cache.read(stamp)
                if found is None:
                    found = await probe(path)
                    self._cache.write(stamp, found)
        except TimeoutError:
            text = f"{path}: another process has been probing it for {ASK_SECONDS:g} s; is one stopped?"
            raise DeadlineExceeded(text) from None
        known = self._known[path] = Known(stamp, found)
        if len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]
        return known

    def _done(self, path: str, task: asyncio.Task[Known]) -> None:
        self._running.pop(path, None)
        if not task.cancelled() and task.exception() is not None:
            log.info("%s", task.exception())  # who asked is told, or has given up waiting


def _stamp(path: str) -> Stamp:
    try:
        return stamp_of(path)
    except OSError as error:
        raise LaunchFailed(f"{path} cannot be looked at: {error.strerror}", log="") from error
