# SPDX-License-Identifier: Apache-2.0
"""The worker of one VM: puts loop, link, VM and verbs together. Made and run by entry.py.

start: lock the VM, open its page, go on with a run that is left, present itself to the broker
run:   requests come in (on_frame), go to their verb, answers go out; events and states go out as they happen
stop:  the run is over, or nothing has come for a while: say goodbye, with everything answered
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

import msgspec
import zmq

from ..common.definition import definition_from_toml
from ..common.errors import (
    BadRequest,
    DeadlineExceeded,
    Internal,
    NotRunning,
    OutcomeUnknown,
    TooLarge,
    VmloopError,
    WorkerLost,
)
from ..common.names import VmName, vm_service
from ..common.pack import MAX_MESSAGE_BYTES, pack, unpack_map
from ..common.page import Page, Word
from ..common.paths import Paths, VmPaths
from ..common.settings import Settings
from ..common.sockets import ipc
from ..common.wire import HEADER_BYTES, BadFrame, Kind, Message, decode, encode
from .answers import Answers
from .beginnings import resume
from .events import EventLog
from .handling import Handling
from .keeper import Keeper
from .link import Link
from .loop import WorkerLoop
from .order import Order
from .predecessor import Predecessor
from .qmp.commands import Done
from .qmp.ledger import Owed
from .stack import StackFile
from .status import status_of
from .verbs.monitor import HmpArguments, QmpArguments
from .verbs.request import Lane, Request, Verb, parse_arguments
from .verbs.table import VERBS
from .vm import Vm

log = logging.getLogger(__name__)

# A worker that was made for a request and got none: the broker that asked for it is gone.
IDLE_SECONDS: Final = 10.0
# Verbs that wait for the VM's end answer at once when it comes; this is only a guard.
LAST_ANSWERS_SECONDS: Final = 2.0
# The handlers of a run's last events, VM_STATE shutoff among them, have so long: then the VM may be started again.
LAST_HANDLERS_SECONDS: Final = 5.0
# Verbs keep the deadline themselves, and know what they waited for; this much later they are ended.
VERB_GRACE: Final = 0.1


class App:
    """One worker."""

    def __init__(
        self,
        loop: WorkerLoop,
        context: zmq.Context[zmq.Socket[bytes]],
        name: VmName,
        paths: Paths,
        settings: Settings,
        page: Page,
        predecessor: Predecessor,
        stack: StackFile,
    ) -> None:
        self.loop = loop
        self.name = name
        self.paths = paths.vm(name)
        self.order = Order(loop)
        self.definition = _read_definition(self.paths)  # as it is on disk now; a run keeps the one it was started from
        self.forget = False  # the broker shall not know the VM any more
        self.protocol = 1  # what the broker speaks to this worker
        self._page = page
        self._predecessor = predecessor
        self._stack = stack
        self._on_cancel: dict[int, Callable[[], None]] = {}  # request → what to do when its caller is gone
        self._service = vm_service(name)
        self._answers = Answers()
        self._tasks: set[asyncio.Task[None]] = set()
        self._inherited: list[int] = []
        self._status_due = False
        self._ask_to_leave = asyncio.Event()
        self._last_request = loop.time()
        self._born = time.time()
        self._keeper = Keeper(paths.zygote_socket, name)
        self.events = EventLog(name, page, self._publish, settings.worker.recent_events)
        self.vm = Vm(
            loop,
            name,
            self.paths,
            settings.worker,
            page,
            self.events,
            self._keeper,
            self._status_soon,
            self._inherit,
        )
        self.handling = Handling(self.vm, page, paths.etc, self._make_way)
        self._link = Link(loop, context, ipc(paths.worker_socket), self._on_frame, self._hello, settings.worker.outbox)

    # -- start, run, stop ---------------------------------------------------------------------------------------------------

    async def run(self, kept: socket.socket | None) -> None:
        """Serve until there is nothing left to do. `kept`: the monitor's connection from an earlier worker of this run."""
        self.loop.page_selector.on_blocked = self._on_blocked
        if self.vm.alive:
            self._tell_of_predecessor()
        self._page.words[Word.LEFT] = 0
        if self.vm.alive:
            resume(self.vm, self.handling, kept, self._predecessor)
        elif kept is not None:
            kept.close()
        await self._until_over()
        await self._answer_last()
        if self.vm.alive:
            await self.handling.leave()
        else:
            await self.handling.end(LAST_HANDLERS_SECONDS)
        await self._answer_last()  # a kill that came meanwhile
        self._page.words[Word.LEFT] = 1
        self._page.idle()
        if self.definition is None and self.vm.run is None:
            self.forget = True  # made for a request that came to nothing
        self._link.send(self._status(Kind.BYE))
        self._link.close()
        self._keeper.close()

    async def _until_over(self) -> None:
        over = self.loop.create_task(self.vm.gone.wait())
        leave = self.loop.create_task(self._ask_to_leave.wait())
        try:
            while not over.done() and not leave.done():
                patience = None if self.vm.alive else IDLE_SECONDS  # under a VM an idle worker never wakes
                await asyncio.wait({over, leave}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                idle = self.loop.time() - self._last_request >= IDLE_SECONDS and not self._tasks
                if idle and not self.vm.alive:
                    break
        finally:
            over.cancel()
            leave.cancel()
        if leave.done() and not self.vm.gone.is_set():
            self.vm.leave()

    async def _answer_last(self) -> None:
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=LAST_ANSWERS_SECONDS)
            for task in late:
                task.cancel()

    def _tell_of_predecessor(self) -> None:
        before = self._predecessor
        if before.died:
            self.events.emit("WORKER_LOST", before.to_event())
        self.events.emit("WORKER_STARTED", {"pid": os.getpid(), "incarnation": self._page.words[Word.INCARNATION]})

    def _on_blocked(self, seconds: float) -> None:
        """The loop has been held up, and moves again. Called between two turns."""
        task, stack = self._page.held_up_in or self._page.task(), self._stack.take()
        self._page.held_up_in = ""
        log.error("VM %s: the loop was held up for %.1f s (%s)\n%s", self.name, seconds, task or "?", stack)
        began = time.time_ns() // 1000 - int(seconds * 1e6)
        data = {"seconds": round(seconds, 3), "task": task, "stack": stack}
        self.loop.call_soon(lambda: self.events.emit("LOOP_BLOCKED", data, at=began))
        self.loop.call_soon(lambda: self.events.emit("LOOP_RECOVERED", {"seconds": round(seconds, 3)}))

    # -- what comes from the broker -------------------------------------------------------------------------------------------

    def _on_frame(self, frame: bytes) -> None:
        try:
            message = decode(frame)
        except BadFrame as error:
            log.warning("a frame from the broker makes no sense: %s", error)
            return
        if message.kind is Kind.REQUEST:
            self._on_request(message)
        elif message.kind is Kind.CONTROL and message.op == "keep":
            self._keeper.keep_again()
        elif message.kind is Kind.CONTROL and message.op == "leave":
            self.leave()
        elif message.kind is Kind.CONTROL and message.op == "agreed":
            self.protocol = _agreed(message)
        elif message.kind is Kind.CONTROL and message.op == "cancel":
            self._on_cancel.get(message.id, _nothing)()
        else:
            log.warning("the broker sent %s %r, which no worker takes", message.kind.name, message.op)

    def _on_request(self, message: Message) -> None:
        if self.vm.gone.is_set():
            return  # not taken up: after our goodbye the broker gives it to the next worker, or answers it
        if self._ask_to_leave.is_set() and message.op != "kill":
            if not message.reading:  # which the broker asks the next worker
                text = f"VM {self.name}: its worker makes way for another one; '{message.op}' was not begun, try again"
                self._reply(message.id, Kind.ERROR, pack(WorkerLost(text).to_wire()), self.loop.time())
            return
        now = self._last_request = self.loop.time()
        request = Request(
            number=message.id,
            op=message.op,
            deadline=now + message.seconds,
            received=now,
            reading=message.reading,
            key=message.key,
            partial=lambda part: self._reply(message.id, Kind.PARTIAL, pack(part), now),
        )
        try:
            verb = VERBS.get(message.op)
            if verb is None:
                raise BadRequest(f"a VM has no operation {message.op!r:.60}; there are: {', '.join(sorted(VERBS))}")
            arguments = parse_arguments(verb, message.body)
        except BadRequest as error:
            self._finish(request, None, error)
            return
        if request.key and not self._first_of_its_key(request):
            return
        if verb.direct is not None:
            self._run_direct(verb, request, arguments)
        else:
            self._spawn(self._run_verb(verb, request, arguments))

    def _first_of_its_key(self, request: Request) -> bool:
        known = self._answers.known(request.key)
        if known is not None:
            self._reply(request.number, Kind(known[0]), known[1], request.received)
            return False
        return self._answers.begin(request.key, request.number)

    def _run_direct(self, verb: Verb, request: Request, arguments: Any) -> None:
        """The short way for qmp and hmp: no task if nothing is in the way."""
        assert verb.direct is not None
        if _beside_others(request, arguments):
            verb.direct(self, request, arguments, lambda value, error: self._finish(request, value, error))
        elif self.order.try_take(request.op):

            def done(value: Any, error: VmloopError | None) -> None:
                self._finish(request, value, error)
                self.order.release()

            verb.direct(self, request, arguments, done)
        else:
            self._spawn(self._run_direct_in_turn(verb, request, arguments))

    async def _run_direct_in_turn(self, verb: Verb, request: Request, arguments: Any) -> None:
        assert verb.direct is not None
        answered = asyncio.Event()

        def done(value: Any, error: VmloopError | None) -> None:
            self._finish(request, value, error)
            answered.set()

        try:
            async with self.order.turn(request.op, request.deadline):
                verb.direct(self, request, arguments, done)
                await answered.wait()  # the session answers by the deadline at the latest
        except VmloopError as error:
            self._finish(request, None, error)

    async def _run_verb(self, verb: Verb, request: Request, arguments: Any) -> None:
        assert verb.run is not None
        try:
            async with asyncio.timeout_at(request.deadline + VERB_GRACE):
                if verb.lane is Lane.TURN:
                    async with self.order.turn(request.op, request.deadline):
                        result = await verb.run(self, request, arguments)
                else:
                    result = await verb.run(self, request, arguments)
        except VmloopError as error:
            self._finish(request, None, error)
        except TimeoutError:
            text = f"VM {self.name}: {request.op} has not ended in time; what was begun may still take effect"
            self._finish(request, None, DeadlineExceeded(text))
        except asyncio.CancelledError:
            text = f"VM {self.name}: the worker ends; {request.op} was given up"
            end = OutcomeUnknown(f"{text}; look at the VM before you repeat it") if self.vm.alive else NotRunning(text)
            self._finish(request, None, end)
            raise
        except Exception as error:  # the edge of every verb: a defect costs this request, not the VM's worker
            log.exception("VM %s: %s (request %d) failed", self.name, request.op, request.number)
            text = f"VM {self.name}: {request.op}: {type(error).__name__}: {error}; see {self.paths.worker_log}"
            self._finish(request, None, Internal(text))
        else:
            self._finish(request, result, None)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _inherit(self, owed: Owed) -> Done | None:
        """A command that an earlier worker sent and QEMU still owes: its answer goes to whoever asked."""
        if not owed.request:
            return None
        self._inherited.append(owed.request)
        request = Request(owed.request, "qmp", owed.deadline, self.loop.time(), owed.reading, owed.key, _no_parts)
        if owed.key:
            self._answers.begin(owed.key, owed.request)
        return lambda value, error: self._finish(request, value, error)

    # -- what goes to the broker ----------------------------------------------------------------------------------------------

    def on_cancel(self, number: int, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` when the broker says that the caller of a request is gone; returns the function that ends this."""
        self._on_cancel[number] = callback

        def end() -> None:
            self._on_cancel.pop(number, None)

        return end

    def leave(self) -> None:
        """End this worker and leave the VM as it is (SIGTERM, or the broker's wish)."""
        self._ask_to_leave.set()

    def _make_way(self, why: str) -> None:
        log.error("VM %s: this worker makes way for another one: %s", self.name, why)
        self.leave()

    def log_info(self, text: str) -> None:
        log.info("VM %s: %s", self.name, text)

    def private_fds(self) -> list[int]:
        """What a child that a handler forks must not keep: it would hold the connections open, or read what is not for it."""
        sockets = (self.vm.session, self.vm.agent, self._keeper)
        return [fd for source in sockets if source is not None and (fd := source.fileno()) >= 0] + self._link.filenos()

    def send_status(self) -> None:
        """Tell the broker what is known of the VM now."""
        self._status_due = False
        self._link.send(self._status(Kind.STATUS))

    def _finish(self, request: Request, value: Any, error: VmloopError | None) -> None:
        """Answer a request: once, with a result or an error."""
        kind = Kind.REPLY if error is None else Kind.ERROR
        try:
            body = pack(value) if error is None else pack(error.to_wire())
        except (TypeError, ValueError, RecursionError) as failure:
            kind, body = Kind.ERROR, pack(Internal(f"{request.op}: the result cannot be sent: {failure}").to_wire())
        if len(body) + HEADER_BYTES > MAX_MESSAGE_BYTES:
            text = (
                f"{request.op}: the result has {len(body)} bytes, a message {MAX_MESSAGE_BYTES} at most; ask for less"
            )
            kind, body = Kind.ERROR, pack(TooLarge(text, limit=MAX_MESSAGE_BYTES).to_wire())
        self._send_status_if_due()  # who reads the answer and then asks for the list must see what the answer says
        numbers = self._answers.finish(request.key, kind, body) if request.key else [request.number]
        for number in numbers or [request.number]:
            self._reply(number, kind, body, request.received)

    def _reply(self, number: int, kind: Kind, body: bytes, received: float) -> None:
        cursor = self.events.cursor
        self._link.send(
            encode(
                Message(
                    kind=kind,
                    id=number,
                    body=body,
                    seconds=self.loop.time() - received,
                    epoch=cursor.epoch,
                    seq=cursor.seq,
                )
            )
        )

    def _publish(self, frame: bytes) -> None:
        self._link.send(frame)

    def _status_soon(self) -> None:
        """Several changes in one turn of the loop become one status message."""
        if not self._status_due:
            self._status_due = True
            self.loop.call_soon(self._send_status_if_due)

    def _send_status_if_due(self) -> None:
        if self._status_due:
            self.send_status()

    def _hello(self) -> bytes:
        return self._status(Kind.HELLO)

    def _status(self, kind: Kind) -> bytes:
        body = status_of(
            self.vm,
            self._page,
            definition=self.definition,
            born=self._born,
            forget=self.forget,
            inherited=self._inherited if kind is Kind.HELLO else [],
        )
        cursor = self.events.cursor
        return encode(Message(kind=kind, service=self._service, body=pack(body), epoch=cursor.epoch, seq=cursor.seq))


def _beside_others(request: Request, arguments: Any) -> bool:
    """Whether a monitor command may run beside mutating ones: it only reads, or it goes out of band."""
    if request.reading:
        return True
    if isinstance(arguments, HmpArguments):
        return False
    return isinstance(arguments, QmpArguments) and (arguments.oob or arguments.command.startswith("query-"))


def _agreed(message: Message) -> int:
    try:
        return int(unpack_map(message.body).get("protocol", 1))
    except (BadRequest, TypeError, ValueError) as error:
        log.warning("the broker agreed on a protocol that makes no sense: %s", error)
        return 1


def _read_definition(paths: VmPaths) -> dict[str, Any] | None:
    if not paths.definition.exists():
        return None
    try:
        definition = definition_from_toml(paths.definition.read_bytes(), str(paths.definition))
    except (VmloopError, OSError) as error:
        log.error("%s", error)  # `start` says it to whoever wants to use it
        return {}
    builtins: dict[str, Any] = msgspec.to_builtins(definition)
    return builtins


def _nothing() -> None:
    """For a request that goes on whether its caller is there or not: nearly all."""


def _no_parts(_: object) -> None:
    """An inherited command has no partial answers."""
