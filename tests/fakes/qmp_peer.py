# SPDX-License-Identifier: Apache-2.0
"""The QEMU end of a monitor's connection, in the test's own hands: it says and reads exactly what the test tells it to.

Used by tests/unit/session_bench.py and the tests on it. Reading waits on the loop, with a deadline; sending never waits.
"""

from __future__ import annotations

import array
import asyncio
import json
import os
import socket
from typing import Any, Final

from .raw_qmp import DEADLINE

Request = dict[str, Any]

_MAX_FDS: Final = 16


class QmpPeer:
    """One end of a socketpair; `connection` is the other, for a worker."""

    def __init__(self) -> None:
        self.fds: list[int] = []  # that came with commands; closed with the peer
        self.connection, self._socket = socket.socketpair()
        self._socket.setblocking(False)
        self.connection.setblocking(False)
        self._received = b""

    def close(self) -> None:
        """Hang up, and forget the worker's end too."""
        self.hang_up()
        self.connection.close()
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()

    def hang_up(self) -> None:
        self._socket.close()

    # -- saying ----------------------------------------------------------------------------------------------------------

    def say(self, *messages: bytes | dict[str, Any]) -> None:
        """Lines, or bytes as they are. All of it must fit the socket."""
        data = b"".join(m if isinstance(m, bytes) else json.dumps(m).encode() + b"\r\n" for m in messages)
        assert self._socket.send(data) == len(data)

    async def say_much(self, data: bytes) -> None:
        """Bytes that may be more than the socket holds."""
        async with asyncio.timeout(DEADLINE):
            await asyncio.get_running_loop().sock_sendall(self._socket, data)

    def greet(self, *capabilities: str) -> None:
        version = {"qemu": {"major": 7, "minor": 2, "micro": 19}, "package": "Debian"}
        self.say({"QMP": {"version": version, "capabilities": list(capabilities)}})

    def answer(self, request: Request, value: Any = None) -> None:
        self.say({"return": {} if value is None else value, "id": request["id"]})

    def refuse(self, request: Request, desc: str, kind: str = "GenericError") -> None:
        self.say({"error": {"class": kind, "desc": desc}, "id": request["id"]})

    def event(self, name: str, **data: Any) -> None:
        self.say({"event": name, "data": data, "timestamp": {"seconds": 5, "microseconds": 250}})

    # -- reading ---------------------------------------------------------------------------------------------------------

    async def request(self) -> Request:
        """The next command."""
        request: Request = json.loads(await self.line())
        return request

    async def requests(self, count: int) -> list[Request]:
        return [await self.request() for _ in range(count)]

    async def line(self) -> bytes:
        """The bytes up to the next end of line, as they came."""
        async with asyncio.timeout(DEADLINE):
            while b"\n" not in self._received:
                if not self._take():
                    await self._readable()
        line, _, self._received = self._received.partition(b"\n")
        return line

    def waiting(self) -> bytes:
        """What has come and was not read yet. A worker sends at once, so what is not here was not sent."""
        while self._take():
            pass
        return self._received

    def _take(self) -> bool:
        try:
            data, ancillary, _, _ = self._socket.recvmsg(1 << 20, socket.CMSG_SPACE(_MAX_FDS * 4))
        except BlockingIOError:
            return False
        assert data, "the worker has hung up"
        for _, _, rights in ancillary:
            self.fds.extend(array.array("i", rights))
        self._received += data
        return True

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()

        def tell() -> None:
            if not ready.done():
                ready.set_result(None)

        loop.add_reader(self._socket, tell)
        try:
            await ready
        finally:
            loop.remove_reader(self._socket)
