# SPDX-License-Identifier: Apache-2.0
"""Ends of connections on run/zygote.sock that never wait: what does not leave at once is kept in order, with its fds.

`PacketEnd` is used by zygote.py, spawner.py and handover.py, `PacketPoll` by spawner.py; the packets are in common/zygote_wire.py.
"""

from __future__ import annotations

import logging
import os
import select
import socket
from collections import deque
from collections.abc import Callable
from typing import Final

from ..common.errors import BadRequest
from ..common.zygote_wire import FdsLost, Packet, receive_packet, send_packet

log = logging.getLogger(__name__)

# Callers that wait at run/zygote.sock to be accepted: each worker makes two, and a thousand may come at once.
BACKLOG: Final = 4096
# Two connections a VM at 4096 VMs. Whoever leaves more unread is cut off.
MAX_QUEUED: Final = 8192


class PacketEnd:
    """A SOCK_SEQPACKET socket with a queue. Its owner polls `fileno` for reading, and for writing while `waits`."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self._queue: deque[tuple[Packet, list[int]]] = deque()

    def fileno(self) -> int:
        return self.socket.fileno()

    @property
    def waits(self) -> bool:
        """Whether there is something to write as soon as there is room."""
        return bool(self._queue)

    def send(self, packet: Packet, fd: int | None = None) -> None:
        """Send a packet, now or later. `fd` goes with it and is closed here, whatever happens. Raises OSError if the other end is gone."""
        fds = [] if fd is None else [fd]
        if len(self._queue) >= MAX_QUEUED:
            close_all(fds)
            raise OSError(f"{MAX_QUEUED} packets are unread at the other end of the zygote's socket")
        self._queue.append((packet, fds))
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as there is room. Raises OSError if the other end is gone."""
        while self._queue:
            packet, fds = self._queue[0]
            try:
                send_packet(self.socket, packet, fds)
            except BlockingIOError:
                return
            self._queue.popleft()
            close_all(fds)

    def receive(self) -> tuple[Packet | None, list[int]]:
        """As `receive_packet`."""
        return receive_packet(self.socket)

    def close(self) -> None:
        """Close it, with what never left."""
        for _, fds in self._queue:
            close_all(fds)
        self._queue.clear()
        self.socket.close()


class PacketPoll:
    """Several ends, and other fds, in one epoll."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._ends: dict[int, tuple[PacketEnd, Callable[[Packet, list[int]], None], Callable[[], None]]] = {}
        self._others: dict[int, Callable[[], None]] = {}

    def fileno(self) -> int:
        return self._epoll.fileno()

    def add(self, end: PacketEnd, use: Callable[[Packet, list[int]], None], on_lost: Callable[[], None]) -> None:
        """Watch an end, or give it another use. `use` gets each packet and takes the fds that it keeps out of the list; `on_lost` when it
        is gone, or talks nonsense."""
        if end.fileno() not in self._ends:
            self._epoll.register(end, select.EPOLLIN)
        self._ends[end.fileno()] = (end, use, on_lost)
        self.arm(end)

    def add_other(self, fd: int, turn: Callable[[], None]) -> None:
        """Watch an fd; `turn` when it is readable."""
        self._others[fd] = turn
        self._epoll.register(fd, select.EPOLLIN)

    def drop_other(self, fd: int) -> None:
        """Watch it no more; it is the caller's to close."""
        del self._others[fd]
        self._epoll.unregister(fd)

    def close_end(self, end: PacketEnd) -> None:
        """Watch it no more, and close it."""
        del self._ends[end.fileno()]
        self._epoll.unregister(end)
        end.close()

    def arm(self, end: PacketEnd) -> None:
        """After something was sent: what did not leave leaves when there is room."""
        self._epoll.modify(end, select.EPOLLIN | (select.EPOLLOUT if end.waits else 0))

    def turn(self) -> None:
        """Take what has happened."""
        for fd, events in self._epoll.poll(0):
            if fd in self._others:
                self._others[fd]()
            elif fd in self._ends:
                self._take(*self._ends[fd], events)

    def close(self) -> None:
        for end, _, _ in tuple(self._ends.values()):
            self.close_end(end)
        self._epoll.close()

    def _take(
        self, end: PacketEnd, use: Callable[[Packet, list[int]], None], on_lost: Callable[[], None], events: int
    ) -> None:
        fds: list[int] = []
        try:
            if events & select.EPOLLOUT:
                end.flush()
                self.arm(end)
            if not events & ~select.EPOLLOUT:
                return
            packet, fds = end.receive()
        except BlockingIOError:
            return
        except FdsLost as error:
            log.error("zygote: %s", error)
            packet = error.packet
        except (ConnectionResetError, BrokenPipeError):  # gone with something unread: an end as good as any
            packet = None
        except (OSError, BadRequest) as error:
            log.error("zygote: %s", error)
            packet = None
        if packet is None:
            on_lost()
            return
        try:
            use(packet, fds)
        finally:
            close_all(fds)


def is_readable(end: PacketEnd | None) -> bool:
    """Whether something, be it the end, lies unread there."""
    if end is None:
        return False
    poll = select.poll()
    poll.register(end, select.POLLIN)
    return bool(poll.poll(0))


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
