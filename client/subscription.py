# SPDX-License-Identifier: Apache-2.0
"""The blocking stream of events, made by `Host.events` and `Vm.events`: a SUB socket around the decisions of stream.py."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from math import ceil
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import zmq

from ..common.cursor import Cursor
from ..common.errors import DeadlineExceeded, NoSuchVm, VmloopError
from ..common.sockets import watch_connection
from .lane import connection_lost, readable
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
    from .session import Host

log = logging.getLogger(__name__)


class Events(Iterator[Event]):
    """A stream of events for blocking programs: iterate, or `get(timeout)`. Close it, or use it in a `with`. For one thread at a time."""

    def __init__(
        self, host: Host, names: tuple[str, ...], since: Cursor | str | None, follow: bool, recent: bool
    ) -> None:
        """Made by `Host.events` and `Vm.events`."""
        self._host = host
        self._names, start = checked_interest(names, since)
        self._follow = follow
        self._stream = Stream(self._names)
        self._in_use = threading.Lock()
        self._live: set[str] = set()
        self._closed = False
        self._check_delay = FIRST_CHECK
        self._check_at = time.monotonic() + FIRST_CHECK
        self._socket = host.open_subscription(self, topics_of(self._names))
        self._watch = watch_connection(self._socket)
        try:
            known = self._ask_positions()
            begin(self._stream, self._names, start, recent or (not follow and start is None), known, self._live)
        except BaseException:
            self.close()
            raise

    def __next__(self) -> Event:
        event = self._next(None)
        if event is None:
            raise StopIteration
        return event

    def get(self, timeout: float) -> Event | None:
        """The next event; None if none came in time or the stream has ended."""
        return self._next(time.monotonic() + timeout)

    def wait_for(self, name: str, timeout: float) -> Event:
        """The next event of that name, passing over others; `DeadlineExceeded` if it did not come in time."""
        until = time.monotonic() + timeout
        while (event := self._next(until)) is not None:
            if event.event == name:
                return event
        raise DeadlineExceeded(f"no event {name} of {', '.join(self._names) or 'any VM'} within {timeout:g} s")

    def close(self) -> None:
        """End the stream. If another thread waits in it, that thread ends it, within seconds."""
        self._closed = True
        if self._in_use.acquire(blocking=False):
            try:
                self._close_sockets()
            finally:
                self._in_use.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- waiting ---------------------------------------------------------------------------------------------------------

    def _next(self, until: float | None) -> Event | None:
        with self._in_use:
            try:
                return self._step(until)
            finally:
                if self._closed:
                    self._close_sockets()

    def _step(self, until: float | None) -> Event | None:
        while not self._closed:
            step = self._stream.step()
            if isinstance(step, Event):
                return step
            if isinstance(step, Fetch):
                self._fetch(step)
            elif not self._follow or not self._listen(until):
                return None
        return None

    def _listen(self, until: float | None) -> bool:
        """Wait for PUB, for the next check, or until then. False if the time is over."""
        now = time.monotonic()
        if self._stream.check_wanted or self._check_at <= now:
            self._check(now)
            return True
        wake = self._check_at if until is None else min(self._check_at, until)
        ready = zmq.zmq_poll([(self._socket, zmq.POLLIN), (self._watch, zmq.POLLIN)], max(0, ceil((wake - now) * 1000)))
        for socket, _ in ready:
            if socket is self._socket:
                self._receive()
            else:
                connection_lost(self._watch)
                # Connected, or lost and soon connected again: what came meanwhile was not published to us.
                self._check_delay = FIRST_CHECK
                self._check_at = time.monotonic() + FIRST_CHECK
        return bool(ready) or until is None or time.monotonic() < until

    def _receive(self) -> None:
        for _ in range(BATCH):
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
            self._stream.arrived(frames[-1])
            if not readable(self._socket):
                return

    def _check(self, now: float) -> None:
        self._stream.check_wanted = False
        self._check_delay = min(self._check_delay * 2, MAX_CHECK)
        self._check_at = now + self._check_delay
        try:
            known = self._ask_positions()
        except VmloopError as error:
            log.info("the broker could not be asked how far the VMs are: %s", error)
            return
        if readable(self._socket):
            self._receive()  # often it is just this that the broker knows and the stream does not yet
        self._stream.known(known)

    def _fetch(self, fetch: Fetch) -> None:
        try:
            page = self._page(fetch)
        except VmloopError as error:
            if self._stream.refuses(fetch, error):
                self.close()
                raise
            if self._stream.fetch_failed(error):
                raise
            return
        self._stream.fetched(page)

    def _page(self, fetch: Fetch) -> Page:
        try:
            return self._ask_page(fetch)
        except VmloopError as error:
            if not transient(error):
                raise
        # Broker or worker went away in the middle of the page; all of it is asked for again.
        from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

        wait, stop = wait_exponential(FETCH_AGAIN), stop_after_attempt(FETCH_ATTEMPTS)
        return Retrying(reraise=True, retry=retry_if_exception(transient), wait=wait, stop=stop)(self._ask_page, fetch)

    def _ask_page(self, fetch: Fetch) -> Page:
        parts: list[Any] = []
        answer = self._host.answer_in_parts(fetch.request(), parts.append)
        return page_of(parts, answer.value)

    def _ask_positions(self) -> dict[str, Cursor]:
        if len(self._names) != 1:
            entries = self._host.list()
            self._live = attended(entries)
            return positions_of(entries)
        try:
            return positions_of(self._host.stats(self._names[0]))
        except NoSuchVm:
            return {}

    def _close_sockets(self) -> None:
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._watch.close(linger=0)
            self._socket.close(linger=0)
            self._host.close_subscription(self)
