# SPDX-License-Identifier: Apache-2.0
"""The worker's link to the broker: one DEALER on the loop, an outbox with a bound, and a greeting after every (re)connection.

ZeroMQ's FD is edge-triggered and also moved by our own sends: after any send or receive EVENTS must be read again and everything
drained, or a wake-up is lost. All of that is here. Used by app.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from ..common.sockets import (
    POLLIN,
    POLLOUT,
    RECEIVE,
    SEND,
    WORKER_QUEUE,
    connect_dealer,
    edge_fd,
    readable,
    ready_events,
)
from ..common.wire import KIND_AT, Kind

log = logging.getLogger(__name__)

_EVENT: Final = bytes((Kind.EVENT,))
# For what still waits for room at the end, the goodbye among it: a broker that lives takes it within milliseconds.
LAST_FRAMES_SECONDS: Final = 0.5
BATCH: Final = 64  # messages taken before the loop's other work gets its turn


class Link:
    """Messages to and from the broker. Whole native frames both ways."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        on_frame: Callable[[bytes], None],
        make_hello: Callable[[], bytes],
        outbox: int,
    ) -> None:
        """`on_frame` takes each frame that arrives; `make_hello` gives the frame that is sent first on every connection."""
        self.connected = False
        self.dropped = 0  # messages that a full outbox cost
        self._loop = loop
        self._on_frame = on_frame
        self._make_hello = make_hello
        self._outbox: deque[bytes] = deque()
        self._limit = outbox
        self._receiving = False
        self._closed = False
        self._socket, self._watch = connect_dealer(context, endpoint, WORKER_QUEUE)
        self._alone = [(self._socket, POLLIN)]
        loop.add_reader(edge_fd(self._socket), self._turn)
        loop.add_reader(edge_fd(self._watch), self._on_connection)
        # A turn later: the greeting tells what the worker has inherited, and it takes that up in the loop's first turn.
        loop.call_soon(loop.call_soon, self._on_connection)

    def send(self, frame: bytes) -> None:
        """Send a frame, or keep it until the broker is there. Never blocks; when too many wait, events go first: the journal has them."""
        if self.connected and not self._outbox:
            try:
                self._socket.send(frame, SEND)
            except zmq.Again:
                self._outbox.append(frame)
            if not self._receiving:
                self._look_again()
            return
        self._outbox.append(frame)
        if len(self._outbox) > self._limit:
            self._make_room()

    def _make_room(self) -> None:
        """Drop the older half of the events that wait, which subscribers read from the journal; if there are none, what is oldest."""
        waiting = len(self._outbox)
        events = sum(frame[KIND_AT : KIND_AT + 1] == _EVENT for frame in self._outbox)
        spare = (events + 1) // 2
        if spare:
            kept: deque[bytes] = deque()
            for frame in self._outbox:
                if spare and frame[KIND_AT : KIND_AT + 1] == _EVENT:
                    spare -= 1
                else:
                    kept.append(frame)
            self._outbox = kept
        else:
            self._outbox.popleft()
        self.dropped += waiting - len(self._outbox)
        log.warning("the broker is away and the outbox is full: %d messages dropped so far", self.dropped)

    def filenos(self) -> list[int]:
        """The fds on which ZeroMQ tells its news."""
        return [] if self._closed else [edge_fd(self._socket), edge_fd(self._watch)]

    def close(self) -> None:
        """Stop; what was sent still leaves within the socket's linger, and what waits for room has `LAST_FRAMES_SECONDS`."""
        self._send_rest()
        self._closed = True
        self._loop.remove_reader(edge_fd(self._socket))
        self._loop.remove_reader(edge_fd(self._watch))
        self._socket.disable_monitor()
        self._watch.close()
        self._socket.close()

    def _send_rest(self) -> None:
        until = time.monotonic() + LAST_FRAMES_SECONDS
        while self.connected and self._outbox and (left := until - time.monotonic()) > 0:
            if self._socket.poll(int(left * 1000) + 1, POLLOUT):
                self._flush()

    def _turn(self) -> None:
        """Drain what has come in, then what waits to go out."""
        if self._closed:
            return
        self._receiving = True
        try:
            for _ in range(BATCH):
                if not readable(self._alone):
                    break
                self._on_frame(self._socket.recv(RECEIVE))
            else:
                self._loop.call_soon(self._turn)
                return
        except BaseException:  # this frame's loss is not that of those behind it
            self._loop.call_soon(self._turn)
            raise
        finally:
            self._receiving = False
        if self._outbox and ready_events(self._socket) & POLLOUT:
            self._flush()

    def _flush(self) -> None:
        while self.connected and self._outbox:
            try:
                self._socket.send(self._outbox[0], SEND)
            except zmq.Again:
                break
            self._outbox.popleft()
        self._look_again()

    def _look_again(self) -> None:
        """After a send: it may have taken from the FD the news of something to read, and of room, that will not be told again."""
        waits_for_room = self._outbox and self.connected
        if readable(self._alone) or (waits_for_room and ready_events(self._socket) & POLLOUT):
            self._loop.call_soon(self._turn)

    def _on_connection(self) -> None:
        """The socket's own news: shaken hands, or cut."""
        while not self._closed and ready_events(self._watch) & POLLIN:
            event = parse_monitor_message(self._watch.recv_multipart(zmq.NOBLOCK))["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.connected = True
                self._outbox.appendleft(self._make_hello())
                self._flush()
            elif event == zmq.EVENT_DISCONNECTED:
                self.connected = False
