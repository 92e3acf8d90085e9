# SPDX-License-Identifier: Apache-2.0
"""The blocking client: `connect()` and `Host`. For programs with threads, or none; aio.py has the same names for asyncio.

A Host may be used by any number of threads. Each request borrows a lane (a socket of its own) from a stack and puts it back: a program
with one thread always uses the same one and pays two list operations; N threads have N requests in flight and never wait for each other.
One socket shared under a lock would need a reader that hands replies to the other threads and can be interrupted to send: slower and
harder to get right.
"""

from __future__ import annotations

import builtins
import contextlib
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar

import zmq

from ..common.capabilities import Capabilities
from ..common.cursor import Cursor
from ..common.errors import BadRequest, Busy, VmloopError
from ..common.names import vm_name
from ..common.sockets import ClientContext, connect_subscriber
from . import requests
from .calls import DEFAULT_TIMEOUT, Answer
from .endpoint import Endpoint, find_endpoint, wait_until_listening
from .lane import Lane, Socket
from .requests import Request
from .results import BrokerVersion, HostShutdown, VmStarted, VmStats, VmSummary, WorkersRestarted
from .subscription import Events
from .vm import Vm

T = TypeVar("T")

# Requests of different threads that may be in flight through one Host; each has a socket.
MAX_LANES: Final = 256
# Of `call_many` on one lane; a quarter of what the broker allows one client.
IN_FLIGHT: Final = 256


def _ignore(part: Any) -> None:
    """For parts that nobody wants."""


def connect(
    endpoint: str | None = None,
    *,
    root: str | Path | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    wait: float = 0.0,
) -> Host:
    """A connection to the broker at an endpoint, under a root, or in the host's own place.

    `timeout`: seconds that a request has unless it says otherwise. `wait`: how long to keep trying while no broker is up; then, or at once
    without it, `NoBroker`. Later on, while the broker is away, requests wait for it until their own timeout.
    """
    found = find_endpoint(endpoint, root)
    wait_until_listening(found, wait)
    return Host(found, timeout)


class Host:
    """One broker. Close it, or use it in a `with`; not across a fork."""

    def __init__(self, endpoint: Endpoint, timeout: float) -> None:
        """Made by `connect`."""
        self._endpoint = endpoint
        self._timeout = timeout
        self._context: zmq.Context[Socket] = ClientContext()
        self._idle: builtins.list[Lane] = []
        # Guards the two below; never held while anything waits. Reentrant, for a lost lane is closed wherever its last reference goes.
        self._lock = threading.RLock()
        self._open: set[object] = (
            set()
        )  # a token for each lane, and subscriptions; the context can end when there are none
        self._ending, self._destroying = threading.RLock(), False
        self._closed = False
        self._events: set[Events] = set()

    def close(self) -> None:
        """End all subscriptions and idle connections. A request of another thread still gets its answer; its connection ends with it.

        It can be repeated, also after an interruption.
        """
        with self._lock:
            self._closed = True
            events = tuple(self._events)
        for subscription in events:
            subscription.close()
        self._close_idle()
        self._end_if_unused()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- operations ------------------------------------------------------------------------------------------------------

    def ping(self) -> float:
        """The broker's clock, in seconds since 1970."""
        return self.ask(requests.ping())

    def version(self) -> BrokerVersion:
        return self.ask(requests.version())

    def list(self) -> builtins.list[VmSummary]:
        """What the broker knows of every VM. Never touches QEMU."""
        return self.ask(requests.list_vms())

    def stats(self, *names: str) -> builtins.list[VmStats]:
        """Figures of some VMs, of all without names. Never touches QEMU."""
        return self.ask(requests.stats(names))

    def define(self, definition: object) -> None:
        """Make a VM known: a common.definition.Definition, or a map of the same shape."""
        self.ask(requests.define(definition))

    def undefine(self, name: str) -> None:
        self.ask(requests.undefine(name))

    def start(self, name: str, paused: bool = False) -> VmStarted:
        return self.ask(requests.start(name, paused))

    def attach(self, name: str, qmp: str | Path, agent: str | Path | None = None, pid: int | None = None) -> VmStarted:
        """Adopt a running QEMU by the path of its QMP socket."""
        return self.ask(requests.attach(name, qmp, agent, pid))

    def capabilities(self, binary: str | Path | None = None, *, refresh: bool = False) -> Capabilities:
        """What a QEMU binary of the host can do (docs/capabilities.md); None: qemu-system-x86_64. `refresh`: probe it anew.

        Raises `LaunchFailed` (there is no such binary, or it is no QEMU) or `DeadlineExceeded` (it hangs).
        """
        return self.ask(requests.capabilities(binary, refresh))

    def shutdown(self, vms: Literal["leave", "kill"] = "leave") -> HostShutdown:
        """End the broker; with "kill" the VMs too, which else run on."""
        return self.ask(requests.shutdown(vms))

    def restart_workers(self, *names: str, on_part: Callable[[Any], None] = _ignore) -> WorkersRestarted:
        """Replace the workers of some VMs, of all without names, one after the other; the VMs run on.

        `on_part`: called as each is done, with `{name, worker_pid}` or `{name, error}`. May take long: see requests.MAX_ROLLING.
        """
        request = requests.restart_workers(names)
        return request.result(self.answer_in_parts(request, on_part).value)

    def vm(self, name: str) -> Vm:
        """A handle on a VM, which need not exist yet."""
        return Vm(self, vm_name(name))

    def events(
        self, *names: str, since: Cursor | str | None = None, follow: bool = True, recent: bool = False
    ) -> Events:
        """The events of some VMs, of the host and all VMs without names; see subscription.py.

        From now on; with `recent` those before that are still kept first; with `since` (one VM only) those after it. Without `follow` the
        stream ends with the newest event.
        """
        return Events(self, names, since, follow, recent)

    # -- any operation ---------------------------------------------------------------------------------------------------

    def call(
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
        return self.answer(Request(service, op, arguments, requests.plain, timeout, reading, key)).value

    def call_streaming(
        self,
        service: str,
        op: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        reading: bool = False,
        key: bytes | None = None,
    ) -> Generator[Any, None, Any]:
        """The parts of an answer in several parts, as they come; the generator's value is the reply that ends them."""
        request = Request(service, op, arguments, requests.plain, timeout, reading, key)
        lane = self._take_lane()
        try:
            answer = yield from lane.ask_streaming(request, self._timeout)
        finally:
            self._give_lane(lane)
        return answer.value

    def answer_in_parts(self, request: Request[Any], on_part: Callable[[Any], None]) -> Answer:
        """The reply that ends an answer in several parts; `on_part` is called with each of these as it comes."""
        lane = self._take_lane()
        try:
            with contextlib.closing(lane.ask_streaming(request, self._timeout)) as parts:
                while True:
                    try:
                        part = next(parts)
                    except StopIteration as end:
                        answer: Answer = end.value
                        return answer
                    on_part(part)
        finally:
            self._give_lane(lane)

    def call_many(
        self, many: Iterable[Request[Any]], in_flight: int = IN_FLIGHT
    ) -> Iterator[tuple[int, Answer | VmloopError]]:
        """Several requests at once from one thread: (place in `many`, answer or error) in the order they end."""
        lane = self._take_lane()
        try:
            yield from lane.ask_many(many, self._timeout, in_flight)
        finally:
            self._give_lane(lane)

    def ask(self, request: Request[T]) -> T:
        """The typed answer to a request of requests.py."""
        return request.result(self.answer(request).value)

    def answer(self, request: Request[Any]) -> Answer:
        """The answer with its cursor and time."""
        lane = self._take_lane()
        try:
            return lane.ask(request, self._timeout)
        finally:
            self._give_lane(lane)

    # -- lanes and subscriptions -----------------------------------------------------------------------------------------

    def _take_lane(self) -> Lane:
        if not self._closed:
            try:
                return self._idle.pop()
            except IndexError:
                pass
        token = object()
        try:
            self._count_in(token, MAX_LANES)
            return Lane(self._context, self._endpoint.client_address, partial(self._count_out, token))
        except BaseException:
            self._count_out(token)
            raise

    def _give_lane(self, lane: Lane) -> None:
        self._idle.append(lane)
        if self._closed:
            self._close_idle()

    def _close_idle(self) -> None:
        while True:
            try:
                lane = self._idle.pop()
            except IndexError:
                return
            lane.close()

    def open_subscription(self, events: Events, topics: builtins.list[bytes]) -> Socket:
        """Called by `Events` when it is made."""
        self._count_in(events, None)
        self._events.add(events)
        return connect_subscriber(self._context, self._endpoint.events_address, topics)

    def close_subscription(self, events: Events) -> None:
        """Called by `Events` when it has closed its sockets."""
        self._events.discard(events)
        self._count_out(events)

    def _count_in(self, token: object, limit: int | None) -> None:
        with self._lock:
            if self._closed:
                raise BadRequest("this connection to the broker has been closed")
            if limit is not None and len(self._open) >= limit:
                raise Busy(f"{limit} requests of this program are in flight; wait for some of them")
            self._open.add(token)

    def _count_out(self, token: object) -> None:
        """Once or more; an interruption may come after the first time."""
        with self._lock:
            self._open.discard(token)
        self._end_if_unused()

    def _end_if_unused(self) -> None:
        """Once or more too."""
        with self._lock:
            unused = self._closed and not self._open
        if unused:
            self._end_context()

    def _end_context(self) -> None:
        """Nobody uses it any more. Not `term`: that waits without end for a socket that an interruption left half made."""
        with self._ending:
            if not self._destroying:  # else a lost lane was collected meanwhile, and closed itself
                try:
                    self._destroying = True
                    self._context.destroy(linger=0)
                finally:
                    self._destroying = False
