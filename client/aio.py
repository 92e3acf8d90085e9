# SPDX-License-Identifier: Apache-2.0
"""The asyncio client: the names of session.py and vm.py, awaited.

    async with connect() as host:
        await host.vm("web1").qmp("query-status")

One DEALER carries everything. It joins the loop by its FD with add_reader, not through zmq.asyncio, which is several times slower. That FD
is edge-triggered and serves sends too: after any send or receive the socket is asked again and drained (`_service`), and while requests
are in flight a slow tick asks as well.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar

import zmq

from ..common.capabilities import Capabilities
from ..common.cursor import Cursor
from ..common.errors import BadRequest, OutcomeUnknown
from ..common.names import vm_name
from ..common.sockets import CLIENT_QUEUE, ClientContext, connect_dealer, connect_subscriber, edge_fd
from . import requests
from .aio_events import Events
from .aio_vm import Vm
from .calls import DEFAULT_TIMEOUT, Answer, Call, Calls, new_call
from .endpoint import Endpoint, find_endpoint, wait_until_listening_async
from .lane import Socket, connection_lost, readable
from .requests import Request
from .results import BrokerVersion, HostShutdown, VmStarted, VmStats, VmSummary, WorkersRestarted

if TYPE_CHECKING:
    from ..common.ownership import Ending
    from .aio_embedding import Embedding

T = TypeVar("T")

# Against a lost edge of the FD; nothing should ever wait for it.
SAFETY_TICK: Final = 1.0
# Frames taken before other tasks of the loop get their turn.
BATCH: Final = 200


def _ignore(part: Any) -> None:
    """For parts that nobody wants."""


def connect(
    endpoint: str | None = None,
    *,
    root: str | Path | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    wait: float = 0.0,
) -> Connecting:
    """As session.connect: `async with connect() as host`, or `host = await connect()`."""
    return Connecting(endpoint, root, timeout, wait)


def embedded(
    directory: str | Path | None = None,
    *,
    vms: Ending = "stop",
    stop_timeout: float = 10.0,
    join: bool = False,
    wait: float = 0.0,
    timeout: float = DEFAULT_TIMEOUT,
) -> Embedding:
    """As embedding.embedded: `async with embedded(DIR) as host`, or `host = await embedded(DIR)`."""
    from .aio_embedding import Embedding
    from .embedding import Launch

    return Embedding(Launch(directory, vms, stop_timeout, join, wait), timeout)


class Connecting:
    """A connection about to be made."""

    def __init__(self, address: str | None, root: str | Path | None, timeout: float, wait: float) -> None:
        self._endpoint = find_endpoint(address, root)
        self._timeout = timeout
        self._wait = wait
        self._host: Host | None = None

    def __await__(self) -> Generator[Any, None, Host]:
        return self._connect().__await__()

    async def __aenter__(self) -> Host:
        self._host = await self._connect()
        return self._host

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._host is not None:
            await self._host.close()

    async def _connect(self) -> Host:
        await wait_until_listening_async(self._endpoint, self._wait)
        return Host(self._endpoint, self._timeout)


class Host:
    """One broker, for one event loop."""

    def __init__(self, endpoint: Endpoint, timeout: float) -> None:
        """Made by `connect`, on the loop it belongs to."""
        self._endpoint = endpoint
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._context: zmq.Context[Socket] = ClientContext()
        self._socket, self._watch = connect_dealer(self._context, endpoint.client_address, CLIENT_QUEUE)
        self._calls = Calls(endpoint.client_address)
        self._wakers: dict[Call, asyncio.Future[None]] = {}
        self._away = False  # as in lane.py
        self._closed = False
        self._ending, self._ended = threading.Lock(), False  # the context
        self._tick: asyncio.TimerHandle | None = None
        self._events: set[Events] = set()
        for socket in (self._socket, self._watch):
            self._loop.add_reader(edge_fd(socket), self._service)

    async def close(self) -> None:
        """End everything: subscriptions end, requests in flight raise `OutcomeUnknown`.

        It can be repeated; if its task is cancelled it goes on without it. On another loop it is possible once this one's loop is closed.
        """
        self._require_closable()
        self._closed = True
        for events in tuple(self._events):
            await events.close()
        if not self._socket.closed:
            self._close_sockets()
        if not self._ended:
            # Waits for what was just sent to leave (LINGER), so not on the loop.
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, self._end_context))

    def _close_sockets(self) -> None:
        for call, waker in tuple(self._wakers.items()):
            call.finish(None, OutcomeUnknown(f"the connection was closed before {call.describe()} was answered"))
            if self._is_at_home:
                _wake(waker)
        if self._tick is not None:
            self._tick.cancel()
        for socket in (self._socket, self._watch):
            self._loop.remove_reader(edge_fd(socket))
        self._socket.disable_monitor()
        self._watch.close(linger=0)
        self._socket.close()

    def _end_context(self) -> None:
        """In a thread; a second close waits for the first. As in session.py not `term`."""
        with self._ending:
            self._context.destroy()
        self._ended = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- operations ------------------------------------------------------------------------------------------------------

    async def ping(self) -> float:
        """The broker's clock, in seconds since 1970."""
        return await self.ask(requests.ping())

    async def version(self) -> BrokerVersion:
        return await self.ask(requests.version())

    async def list(self) -> builtins.list[VmSummary]:
        """What the broker knows of every VM. Never touches QEMU."""
        return await self.ask(requests.list_vms())

    async def stats(self, *names: str) -> builtins.list[VmStats]:
        """Figures of some VMs, of all without names. Never touches QEMU."""
        return await self.ask(requests.stats(names))

    async def define(self, definition: object) -> None:
        """Make a VM known: a common.definition.Definition, or a map of the same shape."""
        await self.ask(requests.define(definition))

    async def undefine(self, name: str) -> None:
        await self.ask(requests.undefine(name))

    async def start(self, name: str, paused: bool = False) -> VmStarted:
        return await self.ask(requests.start(name, paused))

    async def attach(
        self, name: str, qmp: str | Path, agent: str | Path | None = None, pid: int | None = None
    ) -> VmStarted:
        """Adopt a running QEMU by the path of its QMP socket."""
        return await self.ask(requests.attach(name, qmp, agent, pid))

    async def capabilities(self, binary: str | Path | None = None, *, refresh: bool = False) -> Capabilities:
        """What a QEMU binary of the host can do (docs/capabilities.md); None: qemu-system-x86_64. `refresh`: probe it anew.

        Raises `LaunchFailed` (there is no such binary, or it is no QEMU) or `DeadlineExceeded` (it hangs).
        """
        return await self.ask(requests.capabilities(binary, refresh))

    async def shutdown(self, vms: Literal["leave", "kill"] = "leave") -> HostShutdown:
        """End the broker; with "kill" the VMs too, which else run on."""
        return await self.ask(requests.shutdown(vms))

    async def restart_workers(self, *names: str, on_part: Callable[[Any], None] = _ignore) -> WorkersRestarted:
        """As session.Host.restart_workers."""
        request = requests.restart_workers(names)
        return request.result((await self.answer_in_parts(request, on_part)).value)

    def vm(self, name: str) -> Vm:
        """A handle on a VM, which need not exist yet."""
        return Vm(self, vm_name(name))

    def events(
        self, *names: str, since: Cursor | str | None = None, follow: bool = True, recent: bool = False
    ) -> Events:
        """As session.Host.events; use it in an `async with`, which subscribes."""
        return Events(self, names, since, follow, recent)

    # -- any operation ---------------------------------------------------------------------------------------------------

    async def call(
        self,
        service: str,
        op: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        reading: bool = False,
        key: bytes | None = None,
    ) -> Any:
        """Any operation of any service; the answer as it came. See requests.Request for `key`."""
        return (await self.answer(Request(service, op, arguments, requests.plain, timeout, reading, key))).value

    async def call_streaming(
        self,
        service: str,
        op: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        reading: bool = False,
        key: bytes | None = None,
    ) -> AsyncIterator[Any]:
        """The parts of an answer in several parts, as they come."""
        request = Request(service, op, arguments, requests.plain, timeout, reading, key)
        call = new_call(request, self._timeout, streaming=True)
        async with self._in_flight(call):
            while True:
                while call.parts:
                    yield call.parts.popleft()
                if call.finished:
                    call.result()
                    return
                await self._progress(call)

    async def answer_in_parts(self, request: Request[Any], on_part: Callable[[Any], None]) -> Answer:
        """The reply that ends an answer in several parts; `on_part` is called with each of these as it comes."""
        call = new_call(request, self._timeout, streaming=True)
        async with self._in_flight(call):
            while True:
                while call.parts:
                    on_part(call.parts.popleft())
                if call.finished:
                    return call.result()
                await self._progress(call)

    async def ask(self, request: Request[T]) -> T:
        """The typed answer to a request of requests.py."""
        return request.result((await self.answer(request)).value)

    async def answer(self, request: Request[Any]) -> Answer:
        """The answer with its cursor and time."""
        call = new_call(request, self._timeout)
        async with self._in_flight(call):
            while not call.finished:
                await self._progress(call)
        return call.result()

    # -- calls in flight -------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _in_flight(self, call: Call) -> AsyncIterator[None]:
        self._require_usable()
        self._wakers[call] = self._loop.create_future()
        timer = self._loop.call_later(call.due - call.asked, self._overdue)
        try:
            self._send(call)
            self._start_tick()
            yield
        finally:
            timer.cancel()
            self._wakers.pop(call, None)
            self._calls.forget(call)

    def _require_usable(self) -> None:
        if self._closed:
            raise BadRequest("this connection to the broker has been closed")
        if not self._is_at_home:
            raise BadRequest("this connection to the broker belongs to another event loop; connect in this one")

    def _require_closable(self) -> None:
        if not self._is_at_home and not self._loop.is_closed():
            raise BadRequest("this connection to the broker belongs to another event loop, which is to close it")

    @property
    def _is_at_home(self) -> bool:
        """Whether the caller runs on the loop that this connection belongs to."""
        return asyncio.get_running_loop() is self._loop

    async def _progress(self, call: Call) -> None:
        """Wait until something has happened to the call."""
        await self._wakers[call]
        self._wakers[call] = self._loop.create_future()

    def _moved(self, call: Call | None) -> None:
        waker = self._wakers.get(call) if call is not None else None
        if waker is not None:
            _wake(waker)

    def _overdue(self) -> None:
        # The loop's clock is time.monotonic, as the calls' is; rounded down a timer may fire a breath early.
        for call in self._calls.overdue(self._loop.time() + 0.001):
            self._moved(call)

    def _start_tick(self) -> None:
        if self._tick is None and not self._closed:
            self._tick = self._loop.call_later(SAFETY_TICK, self._on_tick)

    def _on_tick(self) -> None:
        self._tick = None
        if self._wakers:
            self._start_tick()
        self._service()

    # -- the sockets -----------------------------------------------------------------------------------------------------

    def _send(self, call: Call) -> None:
        if not call.repeatable:
            self._read_watch()  # old news must not end it; see lane.py
        self._try_send(call)
        self._service()

    def _try_send(self, call: Call) -> bool:
        was_sent = call.was_sent
        frame = self._calls.frame_of(call)
        if not self._away:
            with contextlib.suppress(zmq.Again):
                self._socket.send(frame, zmq.NOBLOCK)
                return True
        self._calls.put_back(call, was_sent)
        return False

    def _service(self) -> None:
        """Do everything the sockets are ready for, until they are ready for nothing: the FD will not tell again."""
        for _ in range(BATCH):
            wants = zmq.POLLIN | (zmq.POLLOUT if self._calls.waits_to_send and not self._away else 0)
            ready = zmq.zmq_poll([(self._socket, wants), (self._watch, zmq.POLLIN)], 0) if not self._closed else []
            if not ready:
                return
            for socket, events in ready:
                if socket is self._watch:
                    self._read_watch()
                    continue
                if events & zmq.POLLIN:
                    self._moved(self._calls.receive(self._socket.recv(zmq.NOBLOCK)))
                if events & zmq.POLLOUT:
                    self._send_waiting()
        self._loop.call_soon(self._service)

    def _send_waiting(self) -> None:
        for call in self._calls.unsent:
            if not self._try_send(call):
                return

    def _read_watch(self) -> None:
        while readable(self._watch):
            self._away = connection_lost(self._watch)
            if self._away:
                while readable(self._socket):  # as in lane.py, `_drain`
                    self._moved(self._calls.receive(self._socket.recv(zmq.NOBLOCK)))
                for call in self._calls.lost():
                    self._moved(call)

    # -- subscriptions ---------------------------------------------------------------------------------------------------

    def open_subscription(self, events: Events, topics: builtins.list[bytes]) -> Socket:
        """Called by `Events` when it begins."""
        self._require_usable()
        self._events.add(events)
        return connect_subscriber(self._context, self._endpoint.events_address, topics)

    def close_subscription(self, events: Events) -> None:
        """Called by `Events` when it has closed its sockets."""
        self._events.discard(events)


def _wake(waker: asyncio.Future[None]) -> None:
    if not waker.done():
        waker.set_result(None)
