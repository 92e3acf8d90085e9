# SPDX-License-Identifier: Apache-2.0
"""The asyncio stream of events, made by aio.Host.events and aio.Vm.events: a SUB socket around the decisions of stream.py.

async with vm.events(since=cursor) as events:
    async for event in events: ...
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import zmq

from ..common.cursor import Cursor
from ..common.errors import DeadlineExceeded, NoSuchVm, VmloopError
from ..common.sockets import edge_fd, watch_connection
from .lane import Socket, connection_lost, readable
from .stream import (
    BATCH,
    FETCH_AGAIN,
    FETCH_ATTEMPTS,
    FIRST_CHECK,
    MAX_CHECK,
    Event,
    Fetch,
    Page,
    Stream,
    attended,
    begin,
    checked_interest,
    page_of,
    positions_of,
    topics_of,
    transient,
)

if TYPE_CHECKING:
    from .aio import Host

log = logging.getLogger(__name__)

# Against a lost edge of the FD; the checks of a quiet stream are rarer than this.
SAFETY_TICK: Final = 1.0


class Events(AsyncIterator[Event]):
    """A stream of events. It subscribes when it is entered, or at the first event asked for. For one task at a time."""

    def __init__(
        self, host: Host, names: tuple[str, ...], since: Cursor | str | None, follow: bool, recent: bool
    ) -> None:
        """Made by `Host.events` and `Vm.events`."""
        self._host = host
        self._names, self._since = checked_interest(names, since)
        self._follow = follow
        self._recent = recent or (not follow and since is None)
        self._stream = Stream(self._names)
        self._socket: Socket | None = None
        self._watch: Socket | None = None
        self._readable = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._live: set[str] = set()
        self._closed = False
        self._check_delay = FIRST_CHECK
        self._check_at = 0.0

    async def __aenter__(self) -> Self:
        await self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def __anext__(self) -> Event:
        event = await self._next(None)
        if event is None:
            raise StopAsyncIteration
        return event

    async def get(self, timeout: float) -> Event | None:
        """The next event; None if none came in time or the stream has ended."""
        return await self._next(_now() + timeout)

    async def wait_for(self, name: str, timeout: float) -> Event:
        """The next event of that name, passing over others; `DeadlineExceeded` if it did not come in time."""
        until = _now() + timeout
        while (event := await self._next(until)) is not None:
            if event.event == name:
                return event
        raise DeadlineExceeded(f"no event {name} of {', '.join(self._names) or 'any VM'} within {timeout:g} s")

    async def close(self) -> None:
        """End the stream; a task that waits in it ends at once."""
        self._closed = True
        if self._loop in (None, asyncio.get_running_loop()):  # else its loop is closed, and nobody waits
            self._readable.set()
        if self._socket is None or self._watch is None:
            return
        loop = asyncio.get_running_loop()
        for socket in (self._socket, self._watch):
            loop.remove_reader(edge_fd(socket))
        self._socket.disable_monitor()
        self._watch.close(linger=0)
        self._socket.close(linger=0)
        self._socket = self._watch = None
        self._host.close_subscription(self)

    # -- waiting ---------------------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        if self._socket is not None or self._closed:
            return
        self._socket = self._host.open_subscription(self, topics_of(self._names))
        self._watch = watch_connection(self._socket)
        self._loop = loop = asyncio.get_running_loop()
        for socket in (self._socket, self._watch):
            loop.add_reader(edge_fd(socket), self._readable.set)
        try:
            known = await self._ask_positions()
            begin(self._stream, self._names, self._since, self._recent, known, self._live)
        except BaseException:
            await self.close()
            raise
        self._check_at = _now() + FIRST_CHECK

    async def _next(self, until: float | None) -> Event | None:
        await self._begin()
        while not self._closed:
            step = self._stream.step()
            if isinstance(step, Event):
                return step
            if isinstance(step, Fetch):
                await self._fetch(step)
            elif not self._follow or not await self._listen(until):
                return None
        return None

    async def _listen(self, until: float | None) -> bool:
        """Take what PUB has sent, else wait for more, for the next check, or until then. False if the time is over."""
        # Cleared before the sockets are read: an edge after that is seen, and what came before it is read.
        self._readable.clear()
        if self._receive():
            return True
        now = _now()
        if self._stream.check_wanted or self._check_at <= now:
            await self._check(now)
            return True
        wake = min(self._check_at, now + SAFETY_TICK, now + SAFETY_TICK if until is None else until)
        try:
            async with asyncio.timeout(max(0.0, wake - now)):
                await self._readable.wait()
        except TimeoutError:
            return until is None or _now() < until
        return True

    def _receive(self) -> bool:
        """Read both sockets; whether there was a message of PUB."""
        if self._socket is None or self._watch is None:
            return False
        while readable(self._watch):
            connection_lost(self._watch)
            # Connected, or lost and soon connected again: what came meanwhile was not published to us.
            self._check_delay = FIRST_CHECK
            self._check_at = _now() + FIRST_CHECK
        count = 0
        while count < BATCH and readable(self._socket):
            self._stream.arrived(self._socket.recv_multipart(zmq.NOBLOCK)[-1])
            count += 1
        return count > 0

    async def _check(self, now: float) -> None:
        self._stream.check_wanted = False
        self._check_delay = min(self._check_delay * 2, MAX_CHECK)
        self._check_at = now + self._check_delay
        try:
            known = await self._ask_positions()
        except VmloopError as error:
            log.info("the broker could not be asked how far the VMs are: %s", error)
            return
        except BaseException:
            self._stream.check_wanted = True  # cancelled: whoever waits next asks again
            raise
        self._receive()  # often it is just this that the broker knows and the stream does not yet
        self._stream.known(known)

    async def _fetch(self, fetch: Fetch) -> None:
        try:
            page = await self._page(fetch)
        except VmloopError as error:
            if self._closed:
                return
            if self._stream.refuses(fetch, error):
                await self.close()
                raise
            if self._stream.fetch_failed(error):
                raise
            return
        self._stream.fetched(page)

    async def _page(self, fetch: Fetch) -> Page:
        try:
            return await self._ask_page(fetch)
        except VmloopError as error:
            if not transient(error):
                raise
        # Broker or worker went away in the middle of the page; all of it is asked for again.
        from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_exponential

        wait, stop = wait_exponential(FETCH_AGAIN), stop_after_attempt(FETCH_ATTEMPTS)
        attempts = AsyncRetrying(reraise=True, retry=retry_if_exception(transient), wait=wait, stop=stop)
        return await attempts(self._ask_page, fetch)

    async def _ask_page(self, fetch: Fetch) -> Page:
        parts: list[Any] = []
        answer = await self._host.answer_in_parts(fetch.request(), parts.append)
        return page_of(parts, answer.value)

    async def _ask_positions(self) -> dict[str, Cursor]:
        if len(self._names) != 1:
            entries = await self._host.list()
            self._live = attended(entries)
            return positions_of(entries)
        try:
            return positions_of(await self._host.stats(self._names[0]))
        except NoSuchVm:
            return {}


def _now() -> float:
    return asyncio.get_running_loop().time()
