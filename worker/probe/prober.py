# SPDX-License-Identifier: Apache-2.0
"""A prober: a short-lived worker without a VM, with a loop of its own, that answers the broker's requests `capabilities`.

One for each binary, so that a binary on a disk that hangs holds up nobody else's. It presents itself to the broker as a worker does, keeps
what it has learned in memory, and ends when nobody has asked for a while. Forked by the zygote; called by worker/entry.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from typing import Final

import msgspec
import zmq

from ...common.capabilities import to_plain
from ...common.errors import BadRequest, Internal, TooLarge, VmloopError
from ...common.log import log_to_file
from ...common.names import PROBER_SERVICE_PREFIX
from ...common.pack import MAX_MESSAGE_BYTES, pack, unpack_map
from ...common.paths import Paths
from ...common.process import identify
from ...common.settings import Settings
from ...common.sockets import ipc
from ...common.wire import HEADER_BYTES, BadFrame, Kind, Message, decode, encode
from ..link import Link
from ..memory import limit_memory
from .asking import Asking, Known
from .cache import Cache

log = logging.getLogger(__name__)

IDLE_SECONDS: Final = 10.0  # without a request; what it knows is on the disk by then
OUTBOX: Final = 64  # answers that wait for a broker that is away
PACKED: Final = 2  # answers that are kept packed: with its binary's, that of one that was there before an upgrade


class ProbeArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As the broker has checked them."""

    binary: str
    refresh: bool = False


def run_prober(name: str, paths: Paths, settings: Settings, idle: float = IDLE_SECONDS) -> None:
    """Be a prober until nobody has asked for `idle` seconds."""
    log_to_file(paths.state / "probe.log", settings.log.level, settings.worker.log_bytes)
    limit_memory(settings.worker.memory_limit)  # whatever a binary says that is no QEMU
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with asyncio.Runner() as runner:
        runner.run(_Prober(name, paths, idle).run())


class _Prober:
    def __init__(self, name: str, paths: Paths, idle: float) -> None:
        self._name = name
        self._idle = idle
        self._paths = paths
        self._asking = Asking(Cache(paths.capabilities))
        self._packed: dict[int, tuple[Known, bytes]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._leave = asyncio.Event()

    # -- start, run, stop ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._loop.add_signal_handler(signal.SIGTERM, self._leave.set)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._link = Link(self._loop, context, ipc(self._paths.worker_socket), self._on_frame, self._hello, OUTBOX)
        try:
            await self._until_idle()
        finally:
            for task in tuple(self._tasks):
                task.cancel()
            await self._asking.close()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._link.close()
            context.term()  # bounded by the sockets' linger

    async def _until_idle(self) -> None:
        while not self._leave.is_set():
            left = self._last + self._idle - self._loop.time()
            if left <= 0 and not self._tasks:
                return
            try:
                async with asyncio.timeout(left if left > 0 else self._idle):
                    await self._leave.wait()
            except TimeoutError:
                continue

    def _hello(self) -> bytes:
        us = identify(os.getpid())
        body = pack({"worker_pid": us.pid, "worker_ticks": us.started})
        return encode(Message(kind=Kind.HELLO, service=PROBER_SERVICE_PREFIX + self._name, body=body))

    # -- requests -----------------------------------------------------------------------------------------------------------

    def _on_frame(self, frame: bytes) -> None:
        try:
            message = decode(frame)
        except BadFrame as error:
            log.warning("a frame from the broker makes no sense: %s", error)
            return
        if message.kind is Kind.REQUEST:
            self._last = self._loop.time()
            task = self._loop.create_task(self._answer(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif message.kind is Kind.CONTROL and message.op == "leave":
            self._leave.set()
        elif not (message.kind is Kind.CONTROL and message.op == "cancel"):  # a probe goes on for whoever asks next
            log.warning("the broker sent %s %r, which no prober takes", message.kind.name, message.op)

    async def _answer(self, message: Message) -> None:
        began = self._loop.time()
        try:
            kind, body = Kind.REPLY, await self._document(message)
        except VmloopError as error:
            kind, body = Kind.ERROR, pack(error.to_wire())
        except Exception as error:  # the edge of every request: a defect costs this one, not the prober
            log.exception("the request %d failed", message.id)
            text = f"the probe failed: {type(error).__name__}: {error}; see {self._paths.state / 'probe.log'}"
            kind, body = Kind.ERROR, pack(Internal(text).to_wire())
        self._last = self._loop.time()
        self._link.send(encode(Message(kind=kind, id=message.id, body=body, seconds=self._last - began)))

    async def _document(self, message: Message) -> bytes:
        try:
            arguments = msgspec.convert(unpack_map(message.body), ProbeArguments)
        except msgspec.ValidationError as error:
            raise BadRequest(f"capabilities: {error}") from error
        known = await self._asking.known(arguments.binary, seconds=message.seconds, refresh=arguments.refresh)
        held = self._packed.get(id(known))  # the document itself is held beside it, so the id is its own
        if held is not None:
            return held[1]
        body = pack(to_plain(known.capabilities))
        if len(body) + HEADER_BYTES > MAX_MESSAGE_BYTES:
            text = f"capabilities: the document has {len(body)} bytes, a message {MAX_MESSAGE_BYTES} at most"
            raise TooLarge(text, limit=MAX_MESSAGE_BYTES)
        self._packed[id(known)] = (known, body)
        if len(self._packed) > PACKED:
            del self._packed[next(iter(self._packed))]
        return body
