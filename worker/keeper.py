# SPDX-License-Identifier: Apache-2.0
"""Handing the zygote a duplicate of this VM's connections, so that they outlive the worker. Used by vm.py and app.py.

The other side is broker/zygote.py; the packets are in common/zygote_wire.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import tenacity

from ..common.names import VmName
from ..common.zygote_wire import Drop, Keep, send_packet
from .orphan import Orphan

log = logging.getLogger(__name__)

# A zygote that is being replaced is back within a second or two; after that the broker tells the workers to try again.
KEEP_SECONDS = 10.0


class Keeper:
    """The worker's side of run/zygote.sock."""

    def __init__(self, path: Path, name: VmName) -> None:
        self._path = path
        self._name = name
        self._connection: socket.socket | None = None
        self._orphan = Orphan(path, name)
        self._kept: dict[str, int] = {}  # slot → our own fd, still open
        self._tasks: set[asyncio.Task[None]] = set()

    def keep(self, slot: str, fd: int) -> None:
        """Have a connection kept; `slot` is "monitor" or "agent". Goes on in the background if the zygote is away."""
        self._kept[slot] = fd
        self._later(self._send_kept(slot))

    def follow(self, pid: int, *, own: bool) -> None:
        """This is the VM's QEMU. Of one that is not our own child the zygote tells how it ends."""
        if own:
            self._orphan.announce(pid)
        else:
            self._orphan.watch(pid)

    def exit_status(self) -> int | None:
        """How the QEMU that was followed last ended, after its end; None if the zygote does not know it, or it is our own child."""
        return self._orphan.status()

    def keep_again(self) -> None:
        """A new zygote is there: give it everything."""
        self._hang_up()
        self._later(self._tell_again())
        for slot in tuple(self._kept):
            self._later(self._send_kept(slot))

    def release(self, slot: str) -> None:
        """One connection has ended by itself: the zygote may close its duplicate."""
        if self._kept.pop(slot, None) is not None:
            self._tell_drop(slot)

    def drop(self) -> None:
        """The run is over: the zygote may close its duplicates."""
        self._kept.clear()
        self._tell_drop("")

    def _tell_drop(self, slot: str) -> None:
        try:
            self._send(Drop(self._name, slot), [])
        except OSError as error:
            log.warning("the zygote could not be told to drop the connections: %s", error)

    def filenos(self) -> list[int]:
        """The fds of the connections to the zygote."""
        own = [self._connection.fileno()] if self._connection is not None else []
        return [*own, *(fd for fd in (self._orphan.fileno(),) if fd >= 0)]

    def close(self) -> None:
        self._orphan.close()
        self._hang_up()

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @staticmethod
    def _retrying() -> tenacity.AsyncRetrying:
        return tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(OSError),
            wait=tenacity.wait_exponential(multiplier=0.02, max=1.0),
            stop=tenacity.stop_after_delay(KEEP_SECONDS),
            reraise=True,
        )

    async def _tell_again(self) -> None:
        try:
            async for attempt in self._retrying():
                with attempt:
                    self._orphan.again()
        except OSError as error:
            log.warning("the new zygote does not hear of this VM's QEMU (%s): its end as an orphan is not known", error)

    async def _send_kept(self, slot: str) -> None:
        try:
            async for attempt in self._retrying():
                with attempt:
                    if slot in self._kept:
                        self._send(Keep(self._name, slot), [self._kept[slot]])
        except OSError as error:
            log.warning(
                "the %s connection is not kept by the zygote (%s): it would not outlive this worker", slot, error
            )

    def _send(self, packet: Keep | Drop, fds: list[int]) -> None:
        if self._connection is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connection.setblocking(False)
            try:
                connection.connect(os.fspath(self._path))
            except OSError:
                connection.close()
                raise
            self._connection = connection
        try:
            send_packet(self._connection, packet, fds)
        except OSError:
            self._hang_up()
            raise
