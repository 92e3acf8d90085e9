# SPDX-License-Identifier: Apache-2.0
"""The requests of one VM: taken up once, carried out at most once, answered once, whichever worker does it. Part of app.py.

A request that the broker gives to the next worker (`repeated`) is, in this order: being carried out here already; answered (answers.py);
an operation of several steps that was begun, which goes on from the step where it was; or not begun, and begins now. A single command of
QMP is in the first of these: the session takes it over from the ledger and `inherit` says whose it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ..common.cursor import Cursor
from ..common.errors import (
    BadRequest,
    Busy,
    DeadlineExceeded,
    Internal,
    NotRunning,
    OutcomeUnknown,
    TooLarge,
    VmloopError,
    WorkerLost,
    error_from_wire,
)
from ..common.pack import MAX_MESSAGE_BYTES, pack
from ..common.wire import HEADER_BYTES, Kind, Message
from .agent.ledger import AgentOwed
from .answers import Answers
from .qmp.commands import Done, awaited
from .qmp.ledger import Owed
from .verbs.agent import AgentArguments, holds, only_looks
from .verbs.monitor import HmpArguments, QmpArguments
from .verbs.request import Lane, Request, Verb, parse_arguments
from .verbs.table import VERBS

if TYPE_CHECKING:
    from .app import App

log = logging.getLogger(__name__)

# Verbs that wait for the VM's end answer at once when it comes; this is only a guard.
LAST_ANSWERS_SECONDS: Final = 2.0
# Operations that come to nothing without the monitor: under the next worker they wait for it. The others see to it themselves.
OF_THE_MONITOR: Final = frozenset({"pause", "resume", "reset"})
# What a state change is noted with that an operation brings (worker/verbs/lifecycle.py).
INTENTS: Final = {"start": "booted", "stop": "user", "pause": "user", "resume": "unpaused"}
# Verbs keep the deadline themselves, and know what they waited for; this much later they are ended.
VERB_GRACE: Final = 0.1


class Requests:
    """All requests that this worker has."""

    def __init__(self, app: App, answers: Answers) -> None:
        self._app = app
        self._loop = app.loop
        self._answers = answers
        self._running: set[int] = set()  # taken up or inherited, not answered
        self._tasks: set[asyncio.Task[None]] = set()
        self._replies: dict[
            int, asyncio.Future[Any]
        ] = {}  # request → QEMU's answer to a step that an earlier worker made
        self._on_cancel: dict[int, Callable[[], None]] = {}  # request → what to do when its caller is gone
        self.last = app.loop.time()  # when the newest one came

    @property
    def running(self) -> list[int]:
        """The numbers of those that this worker answers."""
        return sorted(self._running)

    @property
    def idle(self) -> bool:
        """Whether nothing is being carried out that takes a while."""
        return not self._tasks

    # -- they come --------------------------------------------------------------------------------------------------------------

    def take(self, message: Message, *, leaving: bool) -> None:
        """A request from the broker. `leaving`: this worker makes way for another one."""
        now = self.last = self._loop.time()
        if message.repeated and message.id in self._running:
            return
        request = Request(
            number=message.id,
            op=message.op,
            deadline=now + message.seconds,
            received=now,
            reading=message.reading,
            key=message.key,
            partial=lambda part: self._app.reply(message.id, Kind.PARTIAL, pack(part), now),
        )
        known = self._answers.known(request.number, request.key) if message.repeated or request.key else None
        if known is not None:
            self._app.reply(request.number, Kind(known.kind), known.body, now, known.cursor)
            return
        if leaving and request.op != "kill":
            return  # not taken up: the broker gives it to the next worker
        self._running.add(request.number)
        try:
            self._begin(request, message)
        except VmloopError as error:
            self.finish(request, None, error)

    def _begin(self, request: Request, message: Message) -> None:
        verb = VERBS.get(request.op)
        if verb is None:
            raise BadRequest(f"a VM has no operation {request.op!r:.60}; there are: {', '.join(sorted(VERBS))}")
        left = self._answers.left_by_predecessor(request.number, request.key)
        if message.asking:
            self._tell_what_became(request, begun=left is not None)
        arguments = parse_arguments(verb, message.body)
        lasting = not _only_reads(request, arguments)
        if request.key and not self._answers.begin(request.key, request.number):
            return  # answered together with the one that runs
        if left is not None:
            self._answers.adopt(left.begun, request.number)
            request = msgspec.structs.replace(request, lasting=lasting, left=left)
        else:
            request = msgspec.structs.replace(request, lasting=lasting)
            if verb.begins:
                self.begun(request)
        if verb.direct is not None and not holds(arguments):
            self._run_direct(verb, request, arguments, repeated=message.repeated)
        else:
            self._spawn(self._run_verb(verb, request, arguments))

    def _tell_what_became(self, request: Request, *, begun: bool) -> None:
        """Of a request that was too large to be given to this worker again. Raises `OutcomeUnknown` or `WorkerLost`."""
        text = f"VM {self._app.name}: its worker ended"
        if begun:
            raise OutcomeUnknown(f"{text} while it had '{request.op}'; look at the VM before you repeat it")
        raise WorkerLost(f"{text} before it had begun '{request.op}'; nothing was done, try again")

    def begun(self, request: Request) -> None:
        """Write down that an operation of several steps begins."""
        run = self._app.vm.run
        newest = Cursor(run.epoch if run is not None else 0, 0)  # where page and journal are lost
        self._answers.begun(request.number, request.key, request.op, max(self._app.events.cursor, newest))

    def intent_left(self) -> str:
        """The reason of the state change that an operation of an earlier worker is about to bring; "" if there is none."""
        ops = [left.begun.op for left in self._answers.left()]
        return next((INTENTS[op] for op in reversed(ops) if op in INTENTS), "")

    def inherit_agent(self, owed: AgentOwed) -> Done | None:
        """The same of a command to the guest agent."""
        return self.inherit(owed, "agent")

    def inherit(self, owed: Owed | AgentOwed, op: str = "qmp") -> Done | None:
        """A command that an earlier worker sent and that is still owed an answer: whom that goes to."""
        number = owed.request
        if not number:
            return None
        known = self._answers.known(number)
        if known is not None:  # it died between the answer and the end of its line
            self._app.reply(number, Kind(known.kind), known.body, self._loop.time(), known.cursor)
            return None
        left = self._answers.left_by_predecessor(number)
        if left is not None:  # the last step of an operation, which the broker will ask for again
            self._replies[left.begun.number], answered = awaited(self._loop)
            self._replies[left.begun.number].add_done_callback(_look_at)
            if left.steps and left.steps[-1] not in left.answers:  # else it was entered, and not sent any more
                return self._noting(number, left.steps[-1], answered)
            return answered
        self._running.add(number)
        now = self._loop.time()
        request = Request(number, op, owed.deadline, now, owed.reading, owed.key, _no_parts, lasting=not owed.reading)
        if owed.key:
            self._answers.begin(owed.key, number)
        return lambda value, error: self.finish(request, value, error)

    # -- they are carried out ---------------------------------------------------------------------------------------------------

    async def command(self, request: Request, name: str, *, deadline: float) -> None:
        """A QMP command that is one step of an operation: sent once, whichever worker carries the operation out.

        Raises the error tree's members.
        """
        left = request.left
        if left is not None and name in left.steps:
            if name in left.answers:
                if (error := left.answers[name]) is not None:
                    raise error_from_wire(error)
                return
            reply = self._replies.pop(left.begun.number, None)
            if reply is None and self._app.vm.page_lost:
                text = f"VM {self._app.name}: {name} may have been sent by the worker before this one; look at the VM before you repeat it"
                raise OutcomeUnknown(text)
            try:
                if reply is not None:
                    async with asyncio.timeout_at(deadline):
                        await reply
                    return
            except TimeoutError:
                text = f"{name}: QEMU has not answered in time; the command lives on"
                raise DeadlineExceeded(text, command=name) from None
            except WorkerLost:
                log.info("VM %s: %s was cut off while it was sent; it is sent again", self._app.name, name)
        future, answered = awaited(self._loop)
        self._app.vm.require_session().submit(
            name,
            None,
            done=self._noting(request.number, name, answered),
            deadline=deadline,
            reading=False,
            request=request.number,
            entered=lambda: self._answers.step(request.number, name),
        )
        await future

    def _noting(self, number: int, name: str, answered: Done) -> Done:
        """Write down how QEMU answers a step, while its line is being dealt with: what is struck out of the ledger is in the answers."""

        def done(value: Any, error: VmloopError | None) -> None:
            if not isinstance(error, WorkerLost):  # it was cut off, and is sent again
                self._answers.stepped(number, name, error.to_wire() if error is not None else None)
            answered(value, error)

        return done

    def _run_direct(self, verb: Verb, request: Request, arguments: Any, *, repeated: bool) -> None:
        """The short way for qmp, hmp and agent: no task if nothing is in the way."""
        assert verb.direct is not None
        app = self._app
        if verb.lane is Lane.READ:
            verb.direct(app, request, arguments, lambda value, error: self.finish(request, value, error))
        elif not app.vm.connected and (app.vm.connecting or (repeated and app.vm.alive)):
            self._spawn(self._run_direct_later(verb, request, arguments, repeated=repeated))
        elif _beside_others(request, arguments):
            verb.direct(app, request, arguments, lambda value, error: self.finish(request, value, error))
        elif app.order.try_take(request.op):

            def done(value: Any, error: VmloopError | None) -> None:
                self.finish(request, value, error)
                app.order.release()

            verb.direct(app, request, arguments, done)
        else:
            self._spawn(self._run_direct_in_turn(verb, request, arguments))

    async def _run_direct_later(self, verb: Verb, request: Request, arguments: Any, *, repeated: bool) -> None:
        """The monitor is being connected; of a command that an earlier worker had, its return is waited for in any case."""
        vm = self._app.vm
        if repeated:
            await self._until_connected(request)
        else:
            await vm.wait_until(lambda: not vm.connecting, request.deadline)
        if vm.connecting:
            text = f"VM {vm.name}: {request.op}: its monitor has not been connected in time; nothing was sent"
            self.finish(request, None, DeadlineExceeded(text))
        else:
            self._run_direct(verb, request, arguments, repeated=False)

    async def _until_connected(self, request: Request) -> None:
        vm = self._app.vm
        await vm.wait_until(lambda: vm.connected or not vm.alive, request.deadline)

    async def _run_direct_in_turn(self, verb: Verb, request: Request, arguments: Any) -> None:
        assert verb.direct is not None
        answered = asyncio.Event()

        def done(value: Any, error: VmloopError | None) -> None:
            self.finish(request, value, error)
            answered.set()

        try:
            async with self._app.order.turn(request.op, request.deadline):
                verb.direct(self._app, request, arguments, done)
                await answered.wait()  # the session answers by the deadline at the latest
        except VmloopError as error:
            self.finish(request, None, error)

    async def _run_verb(self, verb: Verb, request: Request, arguments: Any) -> None:
        assert verb.run is not None
        app = self._app
        try:
            async with asyncio.timeout_at(request.deadline + VERB_GRACE):
                if request.begun is not None and request.op in OF_THE_MONITOR:
                    await self._until_connected(request)
                if verb.lane is Lane.TURN:
                    async with app.order.turn(request.op, request.deadline):
                        result = await verb.run(app, request, arguments)
                else:
                    result = await verb.run(app, request, arguments)
        except VmloopError as error:
            self.finish(request, None, error)
        except TimeoutError:
            text = f"VM {app.name}: {request.op} has not ended in time; what was begun may still take effect"
            self.finish(request, None, DeadlineExceeded(text))
        except asyncio.CancelledError:
            self._on_given_up(verb, request)
            raise
        except Exception as error:  # the edge of every verb: a defect costs this request, not the VM's worker
            log.exception("VM %s: %s (request %d) failed", app.name, request.op, request.number)
            text = f"VM {app.name}: {request.op}: {type(error).__name__}: {error}; see {app.paths.worker_log}"
            self.finish(request, None, Internal(text))
        else:
            self.finish(request, result, None)

    def _on_given_up(self, verb: Verb, request: Request) -> None:
        """This worker ends, and has not come to the end of an operation."""
        app = self._app
        if app.vm.alive and (verb.begins or request.reading):
            return  # the next worker goes on with it
        text = f"VM {app.name}: the worker ends; {request.op} was given up"
        end = OutcomeUnknown(f"{text}; look at the VM before you repeat it") if app.vm.alive else NotRunning(text)
        self.finish(request, None, end)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- they end ---------------------------------------------------------------------------------------------------------------

    def finish(self, request: Request, value: Any, error: VmloopError | None) -> None:
        """Answer a request: once, with a result or an error. What must be known to the next worker is written down first."""
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
        self._app.send_status_if_due()  # who reads the answer and then asks for the list must see what the answer says
        again = isinstance(error, (WorkerLost, Busy))
        answers = self._answers
        cursor = self._app.events.cursor
        numbers = answers.finish(request.number, request.key, kind, body, cursor, lasting=request.lasting, again=again)
        for number in numbers:
            self._running.discard(number)
            self._app.reply(number, kind, body, request.received)

    def on_cancel(self, number: int, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` when the broker says that the caller of a request is gone; returns the function that ends this."""
        self._on_cancel[number] = callback

        def end() -> None:
            self._on_cancel.pop(number, None)

        return end

    def caller_gone(self, number: int) -> None:
        """The broker says so. Nearly all requests go on all the same."""
        callback = self._on_cancel.get(number)
        if callback is not None:
            callback()

    async def settle(self) -> None:
        """The worker ends: what is still being carried out comes to its end, or is given up."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=LAST_ANSWERS_SECONDS)
            for task in late:
                task.cancel()

    def fileno(self) -> int:
        """The fd of the file of answers; -1 while there is none."""
        return self._answers.fileno()

    def close(self) -> None:
        self._answers.close()


def _only_reads(request: Request, arguments: Any) -> bool:
    """Whether carrying a request out again would do no harm."""
    if request.reading:
        return True
    if isinstance(arguments, AgentArguments):
        return only_looks(arguments.command)
    return isinstance(arguments, QmpArguments) and arguments.command.startswith("query-")


def _beside_others(request: Request, arguments: Any) -> bool:
    """Whether a monitor command may run beside mutating ones: it only reads, or it goes out of band."""
    if request.reading:
        return True
    if isinstance(arguments, HmpArguments):
        return False
    return isinstance(arguments, QmpArguments) and (arguments.oob or arguments.command.startswith("query-"))


def _look_at(reply: asyncio.Future[Any]) -> None:
    """Nobody may come to ask for the reply: its error must not be warned about."""
    if not reply.cancelled():
        reply.exception()


def _no_parts(_: object) -> None:
    """An inherited command has no partial answers."""
