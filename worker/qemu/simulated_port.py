# SPDX-License-Identifier: Apache-2.0
"""One listening unix socket that serves one client at a time, as QEMU's chardevs do: the second waits in the backlog.

The base of the simulated monitor and agent. Written on the loop's readers and writers rather than on asyncio's transports: those cannot
receive file descriptors, and a port must be able to stop reading (a full queue) or everything (a frozen VM) from one byte to the next.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import select
import socket
from collections import deque
from itertools import islice
from typing import Final

CHUNK: Final = 65536  # bytes read at a time
MAX_FDS: Final = 16  # file descriptors in one message; QEMU's own limit
SEND_BUFFERS: Final = 64  # pieces of output handed to the kernel in one call
_ANCILLARY: Final = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)


class Port:
    """A listening socket and its client of the moment. What is written while there is no client is lost."""

    def __init__(self, listener: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._client: socket.socket | None = None
        self._outbox: deque[memoryview] = (
            deque()
        )  # unbounded, like QEMU's: a client that does not read never blocks the VM
        self._holding = False  # input is left in the socket for now
        self._frozen = False
        self._closed = False
        self._watching: set[str] = set()
        self._hangup: select.epoll | None = None  # tells that the client has left while its input is not read
        listener.setblocking(False)
        self._watch()

    # -- for subclasses --

    def opened(self) -> None:
        """A client has connected."""

    def received(self, data: bytes, fds: list[int]) -> None:
        """The client has sent something."""
        raise NotImplementedError

    def lost(self) -> None:
        """The client is gone."""

    def drained(self) -> None:
        """The client has taken all that was written and had to wait."""

    # -- for the VM --

    @property
    def connected(self) -> bool:
        """True while a client is connected."""
        return self._client is not None

    @property
    def address(self) -> str:
        """The path of the listening socket."""
        return str(self._listener.getsockname())

    @property
    def backed_up(self) -> bool:
        """True while something written waits for the client to read."""
        return bool(self._outbox)

    def write(self, data: bytes) -> None:
        """Send to the client, at once as far as its socket takes it."""
        client = self._client
        if client is None or not data:
            return
        if not self._outbox and not self._frozen:
            try:
                sent = client.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                return  # the reader sees the end of the connection too, and closes it there
            if sent == len(data):
                return
            data = data[sent:]
        self._outbox.append(memoryview(data))
        self._watch()

    def hold(self, holding: bool) -> None:
        """Leave input in the socket, or read it again."""
        if holding != self._holding:
            self._holding = holding
            self._watch()

    def freeze(self, frozen: bool) -> None:
        """Stop everything, or go on as if nothing had been."""
        if frozen != self._frozen:
            self._frozen = frozen
            self._watch()

    def hang_up(self) -> None:
        """Close the client's connection; what its socket does not take at once is lost."""
        client = self._client
        if client is None:
            return
        with contextlib.suppress(OSError):
            while self._hand_over(client):
                pass
        for what in self._watching:
            self._stop(what)
        self._watching.clear()
        self._client = None
        self._outbox.clear()
        self._holding = False
        client.close()
        self.lost()
        self._watch()

    def close(self) -> None:
        """Close the connection and the listening socket."""
        self._closed = True
        self.hang_up()
        self._watch()
        self._listener.close()

    # -- the loop's callbacks --

    def _watch(self) -> None:
        """Have the loop call exactly for what is wanted now."""
        wanted: set[str] = set()
        if not self._frozen and not self._closed:
            if self._client is None:
                wanted.add("accept")
            else:
                wanted.add("hangup" if self._holding else "read")
                if self._outbox:
                    wanted.add("write")
        for what in wanted - self._watching:
            self._start(what)
        for what in self._watching - wanted:
            self._stop(what)
        self._watching = wanted

    def _start(self, what: str) -> None:
        if what == "accept":
            self._loop.add_reader(self._listener.fileno(), self._accept)
        elif self._client is not None and what == "read":
            self._loop.add_reader(self._client.fileno(), self._read)
        elif self._client is not None and what == "write":
            self._loop.add_writer(self._client.fileno(), self._flush)
        elif self._client is not None:
            # The loop knows no way to wait for a hangup alone, and waiting for input that is left unread would spin.
            self._hangup = select.epoll()
            self._hangup.register(self._client.fileno(), 0)
            self._loop.add_reader(self._hangup.fileno(), self.hang_up)

    def _stop(self, what: str) -> None:
        if what == "accept":
            self._loop.remove_reader(self._listener.fileno())
        elif self._client is not None and what == "read":
            self._loop.remove_reader(self._client.fileno())
        elif self._client is not None and what == "write":
            self._loop.remove_writer(self._client.fileno())
        elif self._hangup is not None:
            self._loop.remove_reader(self._hangup.fileno())
            self._hangup.close()
            self._hangup = None

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        client.setblocking(False)
        self._client = client
        self._watch()
        self.opened()

    def _read(self) -> None:
        client = self._client
        if client is None:
            return
        try:
            data, ancillary, _, _ = client.recvmsg(CHUNK, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, ancillary = b"", []
        if data:
            self.received(data, _descriptors(ancillary))
        else:
            self.hang_up()

    def _flush(self) -> None:
        client = self._client
        if client is None:
            return
        try:
            self._hand_over(client)
        except BlockingIOError:
            return
        except OSError:
            self.hang_up()
            return
        self._watch()
        if not self._outbox:
            self.drained()

    def _hand_over(self, client: socket.socket) -> bool:
        """Hand some output to the kernel; False if none is left."""
        outbox = self._outbox
        if not outbox:
            return False
        sent = client.sendmsg(islice(outbox, SEND_BUFFERS))
        while sent:
            first = outbox.popleft()
            if sent < len(first):
                outbox.appendleft(first[sent:])
                break
            sent -= len(first)
        return bool(outbox)


def close_all(fds: list[int]) -> None:
    """Close descriptors that nobody wants."""
    for fd in fds:
        os.close(fd)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()
