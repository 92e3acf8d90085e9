# SPDX-License-Identifier: Apache-2.0
"""A broker for the client's tests: real ipc sockets, scripted answers, no VM. It runs in a thread of its own.

    with NativeBroker(directory) as broker:
        broker.answer("vmloop", "ping", lambda request: [reply(request, {"time": 1.0})])
        host = connect(broker.endpoint)

A script gets the decoded request and returns what to send back, in order: messages (packed here) or raw bytes. An unscripted operation gets
`bad-request`. `requests` holds all that came in. Stop it and start another one in the same directory to play a restart.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq

from vmloop.common.errors import BadRequest, VmloopError
from vmloop.common.names import VmName, vm_topic
from vmloop.common.pack import pack, unpack_map
from vmloop.common.sockets import CLIENT_QUEUE, bind_publisher, bind_router
from vmloop.common.wire import Kind, Message, decode, encode

Script = Callable[[Message], Iterable["Message | bytes"]]


def reply(request: Message, value: object = None, epoch: int = 0, seq: int = 0) -> Message:
    return Message(Kind.REPLY, id=request.id, body=pack(value), seconds=0.001, epoch=epoch, seq=seq)


def partial(request: Message, value: object) -> Message:
    return Message(Kind.PARTIAL, id=request.id, body=pack(value))


def refusal(request: Message, error: VmloopError) -> Message:
    return Message(Kind.ERROR, id=request.id, body=pack(error.to_wire()))


def event_map(vm: str, epoch: int, seq: int, event: str = "STOP", **data: Any) -> dict[str, Any]:
    return {
        "vm": vm,
        "epoch": epoch,
        "seq": seq,
        "time": 1_000_000 + seq,
        "event": event,
        "data": data,
        "origin": "qmp",
    }


class NativeBroker:
    """The fake. Public methods may be called from any thread."""

    def __init__(self, directory: Path) -> None:
        self.client_socket = directory / "client.sock"
        self.events_socket = directory / "events.sock"
        self.requests: queue.Queue[Message] = queue.Queue()
        self.seen: list[Message] = []
        self._scripts: dict[tuple[str, str], Script] = {}
        self._orders: queue.Queue[Callable[[], object]] = queue.Queue()
        self._senders: list[bytes] = []
        self._stopping = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._bell = self._context.socket(zmq.PAIR)
        self._bell.bind("inproc://bell")
        self._bell_lock = threading.Lock()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="fake broker")
        self._thread.start()
        if not ready.wait(10):
            raise RuntimeError("the fake broker did not start")

    @property
    def endpoint(self) -> str:
        return f"ipc://{self.client_socket}"

    def answer(self, service: str, op: str, script: Script) -> None:
        self._scripts[service, op] = script

    def answer_with(self, service: str, op: str, value: object, epoch: int = 0, seq: int = 0) -> None:
        self.answer(service, op, lambda request: [reply(request, value, epoch, seq)])

    def refuse(self, service: str, op: str, error: VmloopError) -> None:
        self.answer(service, op, lambda request: [refusal(request, error)])

    def serve_events(self, vm: str, kept: list[dict[str, Any]]) -> None:
        """The ops that a subscriber uses, from a list that the test may change; `list` and `stats` say how far the VM is."""

        def events(request: Message) -> Iterator[Message]:
            arguments = unpack_map(request.body)
            epoch, seq = (int(part) for part in arguments["since"].split("."))
            page = [event for event in kept if (event["epoch"], event["seq"]) > (epoch, seq)][: arguments["limit"]]
            for event in page:
                yield partial(request, event)
            yield reply(request, {"count": len(page), "cursor": arguments["since"]})

        def entry() -> dict[str, Any]:
            last = kept[-1] if kept else {"epoch": 1, "seq": 0}
            return {"name": vm, "state": "running", "epoch": last["epoch"], "seq": last["seq"]}

        self.answer(f"vm/{vm}", "events", events)
        self.answer("vmloop", "stats", lambda request: [reply(request, [entry()])])
        self.answer("vmloop", "list", lambda request: [reply(request, [entry()])])

    def publish(self, event: dict[str, Any] | bytes, topic: bytes | None = None) -> None:
        if isinstance(event, dict):
            topic = topic or vm_topic(VmName(event["vm"]), event["event"])
            event = pack(event)
        frames = [topic or b"vm/", event]
        self._order(lambda: self._publisher.send_multipart(frames))

    def send_to(self, place: int, *messages: Message | bytes) -> None:
        """Send more to the client whose request is at a place in `seen`."""
        self._order(lambda: self._send(self._senders[place], messages))

    def stop(self) -> None:
        if self._thread.is_alive():
            self._stopping = True
            self._order(lambda: None)
            self._thread.join(10)
            self._bell.close(linger=0)
            self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- its thread ------------------------------------------------------------------------------------------------------

    def _order(self, order: Callable[[], object]) -> None:
        with self._bell_lock:
            self._orders.put(order)
            self._bell.send(b"")

    def _run(self, ready: threading.Event) -> None:
        self._router = bind_router(self._context, self.client_socket, CLIENT_QUEUE)
        self._publisher = bind_publisher(self._context, self.events_socket)
        bell = self._context.socket(zmq.PAIR)
        bell.connect("inproc://bell")
        ready.set()
        while not self._stopping:
            for socket, _ in zmq.zmq_poll([(self._router, zmq.POLLIN), (bell, zmq.POLLIN)]):
                if socket is bell:
                    bell.recv()
                    self._orders.get()()
                else:
                    self._serve()
        for socket in (self._router, self._publisher, bell):
            socket.close(linger=200)

    def _serve(self) -> None:
        client, *frames = self._router.recv_multipart()
        message = decode(frames[0])
        self.seen.append(message)
        self._senders.append(client)
        script = self._scripts.get((message.service, message.op))
        if script is None:
            error = BadRequest(f"the fake broker has no answer to {message.op} of {message.service}")
            self._send(client, [refusal(message, error)])
        else:
            self._send(client, script(message))
        self.requests.put(message)

    def _send(self, client: bytes, messages: Iterable[Message | bytes]) -> None:
        for message in messages:
            with contextlib.suppress(zmq.ZMQError):  # the client is gone
                self._router.send_multipart([client, message if isinstance(message, bytes) else encode(message)])
