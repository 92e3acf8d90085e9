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
from typing import Any, Final

import msgspec
import zmq

from ..common.cursor import Cursor
from ..common.definition import definition_from_toml
from ..common.errors import BadRequest, VmloopError
from ..common.names import VmName, vm_service
from ..common.pack import pack, unpack_map
from ..common.page import Page, Word
from ..common.paths import Paths, VmPaths
from ..common.settings import Settings
from ..common.sockets import ipc
from ..common.wire import BadFrame, Kind, Message, decode, encode
from .answers import Answers
from .events import EventLog
from .handling import Handling
from .journal.store import RETRY_SECONDS, EventStore
from .keeper import Keeper
from .link import Link
from .loop import WorkerLoop
from .order import Order
from .predecessor import Predecessor
from .requests import Requests
from .resumption import give_up_connections, resume
from .stack import StackFile
from .status import status_of
from .vm import Vm

log = logging.getLogger(__name__)

# A worker that was made for a request and got none: the broker that asked for it is gone.
IDLE_SECONDS: Final = 10.0
# The handlers of a run's last events, VM_STATE shutoff among them, have so long: then the VM may be started again.
LAST_HANDLERS_SECONDS: Final = 5.0


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
        self._service = vm_service(name)
        self._status_due = False
        self._ask_to_leave = asyncio.Event()
        self._born = time.time()
        self._keeper = Keeper(paths.zygote_socket, name)
        self._retry: asyncio.TimerHandle | None = None  # of what the journal's disk has not taken
        store = EventStore(self.paths.journal, settings.worker.journal_bytes)
        self.events = EventLog(name, page, self._publish, store)
        self.events.on_trouble = self._on_journal
        self.requests = Requests(self, Answers(self.paths.answers))
        self.vm = Vm(
            loop,
            name,
            self.paths,
            settings.worker,
            page,
            self.events,
            self._keeper,
            self._status_soon,
        )
        self.handling = Handling(self.vm, page, paths.etc, self._make_way, paths.capabilities)
        self._link = Link(loop, context, ipc(paths.worker_socket), self._on_frame, self._hello, settings.worker.outbox)

    # -- start, run, stop ---------------------------------------------------------------------------------------------------

    async def run(self, kept: socket.socket | None, agent: socket.socket | None = None) -> None:
        """Serve until there is nothing left to do. `kept`, `agent`: the monitor's and the guest agent's connection from an earlier
        worker of this run."""
        self.loop.page_selector.on_blocked = self._on_blocked
        self.events.tell_of_predecessor()
        if self.vm.alive:
            self._tell_of_predecessor()
        else:
            self.vm.tell_end_of_run()
        self._page.words[Word.LEFT] = 0
        if self.vm.alive:
            resume(self.vm, self.handling, self.requests, self._page, kept, agent, self._predecessor)
        else:
            give_up_connections(self.vm, kept, agent)
        await self._until_over()
        await self.requests.settle()
        if self.vm.alive:
            await self.handling.leave()
        else:
            await self.handling.end(LAST_HANDLERS_SECONDS)
        await self.requests.settle()  # a kill that came meanwhile
        if self._retry is not None:
            self._retry.cancel()
        self.events.close()
        self.requests.close()
        self._page.words[Word.LEFT] = 1
        self._page.idle()
        if self.definition is None and self.vm.run is None:
            self.forget = True  # made for a request that came to nothing
        self._link.send(self._status(Kind.BYE))
        self._link.close()
        self._keeper.close()
        self.vm.file.close()

    async def _until_over(self) -> None:
        over = self.loop.create_task(self.vm.gone.wait())
        leave = self.loop.create_task(self._ask_to_leave.wait())
        try:
            while not over.done() and not leave.done():
                patience = None if self.vm.alive else IDLE_SECONDS  # under a VM an idle worker never wakes
                await asyncio.wait({over, leave}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                idle = self.loop.time() - self.requests.last >= IDLE_SECONDS and self.requests.idle
                if idle and not self.vm.alive:
                    break
        finally:
            over.cancel()
            leave.cancel()
        if leave.done() and not self.vm.gone.is_set():
            self.vm.leave()

    def _tell_of_predecessor(self) -> None:
        before = self._predecessor
        if before.died:
            self.events.emit("WORKER_LOST", before.to_event())
        self.events.emit("WORKER_STARTED", {"pid": os.getpid(), "incarnation": self._page.words[Word.INCARNATION]})

    def _on_journal(self, trouble: str) -> None:
        """Events are not written to the disk, or are again."""
        self._status_soon()
        if trouble and self._retry is None:
            self._retry = self.loop.call_later(RETRY_SECONDS, self._retry_journal)

    def _retry_journal(self) -> None:
        self._retry = None
        self.events.retry()
        if self.events.trouble and self._retry is None:
            self._retry = self.loop.call_later(RETRY_SECONDS, self._retry_journal)

    def _on_blocked(self, seconds: float) -> None:
        """The loop has been held up, and moves again. Called between two turns."""
        task, stack = self._page.held_up_in or self._page.task(), self._stack.take()
        self._page.held_up_in = ""
        log.error("VM %s: the loop was held up for %.1f s (%s)\n%s", self.name, seconds, task or "?", stack)
        if not self._page.words[Word.EPOCH]:
            return  # no run has begun, so there is no stream to tell it in
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
            if not self.vm.gone.is_set():  # else not taken up: after our goodbye the broker gives it to the next worker
                self.requests.take(message, leaving=self._ask_to_leave.is_set())
        elif message.kind is Kind.CONTROL and message.op == "keep":
            self._keeper.keep_again()
        elif message.kind is Kind.CONTROL and message.op == "leave":
            self.leave()
        elif message.kind is Kind.CONTROL and message.op == "agreed":
            self.protocol = _agreed(message)
        elif message.kind is Kind.CONTROL and message.op == "cancel":
            self.requests.caller_gone(message.id)
        else:
            log.warning("the broker sent %s %r, which no worker takes", message.kind.name, message.op)

    # -- what goes to the broker ----------------------------------------------------------------------------------------------

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
        sources = (self.vm.session, self.vm.agent, self.requests)
        own = [fd for source in sources if source is not None and (fd := source.fileno()) >= 0]
        return [*own, *self._keeper.filenos(), *self.events.filenos(), *self._link.filenos()]

    def send_status(self) -> None:
        """Tell the broker what is known of the VM now."""
        self._status_due = False
        self._link.send(self._status(Kind.STATUS))

    def reply(self, number: int, kind: Kind, body: bytes, received: float, cursor: Cursor | None = None) -> None:
        """Send an answer, or a part of one. `received`: when its request came (loop time); `cursor`: when it was made, now if None."""
        cursor = cursor or self.events.cursor
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
            self.loop.call_soon(self.send_status_if_due)

    def send_status_if_due(self) -> None:
        """Tell the broker at once what it is to be told soon."""
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
            inherited=self.requests.running if kind is Kind.HELLO else [],
            journal=self.events.trouble,
        )
        cursor = self.events.cursor
        return encode(Message(kind=kind, service=self._service, body=pack(body), epoch=cursor.epoch, seq=cursor.seq))


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
