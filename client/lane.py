# SPDX-License-Identifier: Apache-2.0
"""One DEALER of the blocking client, with the calls in flight on it. session.py lends each lane to one thread at a time.

A lane waits in one place, `_wait`: for frames, for its connection to come or go (the socket monitor), for room to send, for the deadline.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from math import ceil
from typing import Any, Final

import zmq

from ..common.errors import VmloopError
from ..common.sockets import CLIENT_QUEUE, connect_dealer
from .calls import Answer, Call, Calls, new_call
from .requests import Request

Socket = zmq.Socket[bytes]

# Seconds that one poll lasts at most. A signal in the instant before it begins does not end it, and Python runs the handler only when it is
# over: a Ctrl-C is noticed by then.
MAX_POLL: Final = 1.0


def readable(socket: Socket) -> bool:
    """Whether a message waits; cheaper than an `Again`."""
    return bool(zmq.zmq_poll([(socket, zmq.POLLIN)], 0))


def connection_lost(watch: Socket) -> bool:
    """Take one event from a socket monitor: True if the connection is gone, False if there is a new one.

    Read here rather than by zmq.utils.monitor, which imports asyncio: a quarter of a short command's time.
    """
    frame = watch.recv_multipart(zmq.NOBLOCK)[0]
    return int.from_bytes(frame[:2], sys.byteorder) == zmq.EVENT_DISCONNECTED


class Lane:
    """Not for two threads at once. One that is lost, for an exception came between its lending and its return, closes itself."""

    _on_close: Callable[[], None] | None = None  # set as long as there is something to close

    def __init__(self, context: zmq.Context[Socket], address: str, on_close: Callable[[], None]) -> None:
        """`on_close` is called when its sockets are closed, in any thread; once, or again if it was interrupted."""
        self._socket, self._watch = connect_dealer(context, address, CLIENT_QUEUE)
        self._calls = Calls(address)
        self._finished: list[Call] = []  # ended outside of `_wait`, which hands them out
        # From the news that the connection is lost until the next handshake nothing is sent: it would go into the dying pipe.
        self._away = False
        self._quiet = [(self._socket, zmq.POLLIN), (self._watch, zmq.POLLIN)]
        self._sending = [(self._socket, zmq.POLLIN | zmq.POLLOUT), (self._watch, zmq.POLLIN)]
        self._pid = os.getpid()
        self._on_close = on_close

    def close(self) -> None:
        if self._on_close is None:
            return
        if not self._socket.closed:  # or it was interrupted here before
            self._socket.disable_monitor()
            self._watch.close(linger=0)
            self._socket.close()
        self._on_close()
        self._on_close = None

    def __del__(self) -> None:
        # A KeyboardInterrupt may come between any two instructions, those of a `finally` too: no code can promise to give a lane back.
        # In a forked child the sockets are the parent's.
        if self._on_close is not None and os.getpid() == self._pid:
            self.close()

    # -- asking ----------------------------------------------------------------------------------------------------------

    def ask(self, request: Request[Any], timeout: float) -> Answer:
        """Send a request and wait for its answer."""
        call = new_call(request, timeout)
        try:
            self._send(call)
            while not call.finished:
                self._wait(call.due)
        finally:
            self._calls.forget(call)
        return call.result()

    def ask_streaming(self, request: Request[Any], timeout: float) -> Generator[Any, None, Answer]:
        """The parts of an answer as they come; the generator's value is the reply that ends them."""
        call = new_call(request, timeout, streaming=True)
        try:
            self._send(call)
            while True:
                while call.parts:
                    yield call.parts.popleft()
                if call.finished:
                    return call.result()
                self._wait(call.due)
        finally:
            self._calls.forget(call)

    def ask_many(
        self, requests: Iterable[Request[Any]], timeout: float, in_flight: int
    ) -> Iterator[tuple[int, Answer | VmloopError]]:
        """Keep up to `in_flight` requests on their way; (place in `requests`, answer or error) in the order they end."""
        waiting: dict[Call, int] = {}
        source = enumerate(requests)
        try:
            while True:
                while len(waiting) < in_flight and (following := next(source, None)) is not None:
                    place, request = following
                    try:
                        call = new_call(request, timeout)
                    except VmloopError as error:
                        yield place, error
                        continue
                    waiting[call] = place
                    self._send(call)
                if not waiting:
                    return
                for call in self._wait(min(call.due for call in waiting)):
                    ended = waiting.pop(call, None)
                    if ended is not None:
                        yield ended, call.error or call.result()
        finally:
            for call in waiting:
                self._calls.forget(call)

    # -- the socket ------------------------------------------------------------------------------------------------------

    def _send(self, call: Call) -> None:
        if not call.repeatable:
            # It must not be ended by old news of a connection that was lost before it was sent.
            self._finished += self._read_watch()
        self._try_send(call)

    def _try_send(self, call: Call) -> bool:
        was_sent = call.was_sent
        frame = self._calls.frame_of(call)
        if not self._away:
            with contextlib.suppress(zmq.Again):
                self._socket.send(frame, zmq.NOBLOCK)
                return True
        self._calls.put_back(call, was_sent)
        return False

    def _wait(self, until: float) -> list[Call]:
        """Wait for something to happen, until then at most, and deal with it. Returns the calls that it has finished."""
        finished, self._finished = self._finished, []
        left = 0.0 if finished else until - time.monotonic()
        milliseconds = ceil(min(left, MAX_POLL) * 1000) if left > 0 else 0
        waits_to_send = not self._away and self._calls.waits_to_send
        ready = zmq.zmq_poll(self._sending if waits_to_send else self._quiet, milliseconds)
        for socket, events in ready:
            if socket is self._watch:
                finished += self._read_watch()
                continue
            if events & zmq.POLLIN:
                self._take(self._socket.recv(zmq.NOBLOCK), finished)
            if events & zmq.POLLOUT:
                self._send_waiting()
        if left <= 0 or not ready:
            finished += self._calls.overdue(time.monotonic())
        return finished

    def _take(self, frame: bytes, finished: list[Call]) -> None:
        call = self._calls.receive(frame)
        if call is not None and call.finished:
            finished.append(call)

    def _send_waiting(self) -> None:
        for call in self._calls.unsent:
            if not self._try_send(call):
                return

    def _read_watch(self) -> list[Call]:
        """Take the news of the connection; the calls that ended because it was lost."""
        finished: list[Call] = []
        while readable(self._watch):
            self._away = connection_lost(self._watch)
            if self._away:
                self._drain(finished)
                finished += self._calls.lost()
        return finished

    def _drain(self, finished: list[Call]) -> None:
        """What arrived before the loss counts, as far as libzmq still has it: with IMMEDIATE it drops what is unread in a dying pipe."""
        while readable(self._socket):
            self._take(self._socket.recv(zmq.NOBLOCK), finished)
