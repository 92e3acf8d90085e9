# SPDX-License-Identifier: Apache-2.0
"""A QMP session: commands out, replies matched by id, events on. One per connection, on the worker's loop; used by vm.py.

Several commands may be outstanding. QEMU reads at most eight in-band requests ahead and then stops reading, out-of-band ones included
(monitor/qmp.c, QMP_REQ_QUEUE_LEN_MAX), so at most `IN_BAND_WINDOW` are on the wire and the rest wait here: the question whether QEMU
still lives must always get through. A deadline ends the caller's wait; a command that was sent lives on, and its late reply is told to the
listener. Answers go to callbacks, called on the loop, so that the shortest path from socket to socket needs no task and no future.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgspec

from ...common.deadlines import Deadlines
from ...common.errors import (
    Busy,
    DeadlineExceeded,
    MonitorFrozen,
    MonitorLost,
    QmpError,
    VmloopError,
    WorkerLost,
)
from ...common.page import Page
from ...common.settings import WorkerSettings
from ...common.states import MonitorState
from ..events import Afterwards
from .commands import (
    Command,
    Done,
    Greeting,
    Listener,
    awaited,
    encode_command,
    end_of,
    microseconds,
    qmp_error,
    read_greeting,
)
from .framing import LineReader, LineTooLong
from .ledger import Ledger, Owed
from .liveness import Liveness
from .writer import CommandWriter, close_all, end_connection

log = logging.getLogger(__name__)

IN_BAND_WINDOW: Final = 7  # one below QEMU's own queue, see above
OOB_WINDOW: Final = 4  # out-of-band commands of callers; the liveness probe has a place of its own
# QEMU answers in order, however late; the cut command's caller has a deadline of its own.
REPAIR_SECONDS: Final = 3600.0
MAX_WAITING: Final = 1024  # commands of one VM, on the wire or before it


class QmpSession:
    """One connection. Life: made → `negotiate` or `take_over` → commands → `close`, or `on_end` when the connection ends by itself."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: socket.socket,
        reader: LineReader,
        page: Page,
        settings: WorkerSettings,
        listener: Listener,
    ) -> None:
        self.greeting: Greeting | None = None
        self.oob = False
        self.settled = False  # negotiated, or taken over: commands may be sent
        self.garbled = 0  # lines that were dropped
        self.on_garbled: Callable[[], None] = lambda: None  # called while there are few of them
        self.fileno = connection.fileno  # -1 once it is closed
        self._loop = loop
        self._socket = connection
        self._reader = reader
        self._words = page.words
        self._ledger = Ledger(page)
        self._listener = listener
        self._on_wire: dict[int, Command] = {}
        self._window = {False: IN_BAND_WINDOW, True: OOB_WINDOW}  # free places, by oob
        self._waiting: deque[Command] = deque()
        self._writer = CommandWriter(loop, connection, page, self._send_waiting)
        self._deadlines: Deadlines[int] = Deadlines()
        self._by_id: dict[int, Command] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._greeted: asyncio.Future[None] = loop.create_future()
        self._ended: str | None = None
        self._question = 0  # the id of the newest question whether QEMU lives
        self._liveness = Liveness(loop, settings, self._probe, listener.on_monitor_state)

    # -- start ------------------------------------------------------------------------------------------------------------

    async def negotiate(self, seconds: float) -> None:
        """On a fresh connection: read the greeting, agree on capabilities. Raises `MonitorLost` or `DeadlineExceeded`."""
        self._ledger.clear()
        self._writer.begin()
        self._reader.begin()
        self._loop.add_reader(self._socket, self._readable)
        until = self._loop.time() + seconds
        try:
            async with asyncio.timeout_at(until):
                await self._greeted
        except TimeoutError:
            raise DeadlineExceeded(f"no QMP greeting within {seconds:g} s") from None
        enable = [name for name in (self.greeting.capabilities if self.greeting else ()) if name == "oob"]
        await self.execute(
            "qmp_capabilities", {"enable": enable} if enable else None, seconds=until - self._loop.time()
        )
        self.oob = bool(enable)
        self._settle("negotiated")

    def take_over(self, *, oob: bool, answer: Callable[[Owed], Done | None]) -> None:
        """On a connection that an earlier worker negotiated: go on where it was killed.

        `answer` gives for each command that is owed whom to tell; None if nobody waits for it.
        """
        self.oob = oob
        self._greeted.set_result(None)
        for owed in self._ledger:
            done = answer(owed)
            late = owed.request and owed.deadline <= self._loop.time()  # else nobody waits, and nobody was told to
            command = Command(
                name="(sent by an earlier worker)",
                text=b"",
                done=done or (None if late else _nobody),
                qmp_id=owed.qmp_id,
                request=owed.request,
                reading=owed.reading,
                oob=owed.oob,
                deadline=owed.deadline,
                sent=time.monotonic(),
            )
            self._on_wire[owed.qmp_id] = self._by_id[owed.qmp_id] = command
            self._window[owed.oob] -= 1
            if done is not None:
                self._deadlines.add(owed.qmp_id, owed.deadline)
        self._repair_half_sent_command()
        self._reader.take_over()
        self._loop.add_reader(self._socket, self._readable)
        self._set_timer()
        self._settle("connection taken over")

    def _repair_half_sent_command(self) -> None:
        """A predecessor died inside a send. 0xFF ends whatever QEMU's parser has begun (its lexer starts anew there).

        Whether the command was complete only QEMU knows: it answers in order, so a command of ours behind it tells.
        """
        cut = self._writer.cut_command
        if not cut:
            return

        def behind_it(_: Any, error: VmloopError | None) -> None:
            if error is not None and not isinstance(error, QmpError):
                return  # not QEMU's word
            command = self._on_wire.pop(cut, None)
            if command is not None:
                text = f"{command.name}: the worker was killed while it sent the command; it was not carried out"
                self._answer(command, None, WorkerLost(text))
                self._forget(command)

        self._writer.write(b"\xff", cut)
        deadline = self._loop.time() + REPAIR_SECONDS
        self.submit("query-name", None, done=behind_it, deadline=deadline, reading=True, wait_frozen=True)

    # -- commands -----------------------------------------------------------------------------------------------------------

    async def execute(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        *,
        seconds: float,
        reading: bool = True,
        oob: bool = False,
    ) -> Any:
        """Send one of vmloop's own commands and wait for its `return`. Raises the error tree's members."""
        future, done = awaited(self._loop)
        deadline = self._loop.time() + seconds
        self.submit(command, arguments, done=done, deadline=deadline, reading=reading, oob=oob)
        return await future

    def submit(
        self,
        name: str,
        arguments: dict[str, Any] | None,
        *,
        done: Done,
        deadline: float,
        reading: bool,
        request: int = 0,
        oob: bool = False,
        key: bytes = b"",
        fds: tuple[int, ...] = (),
        wait_frozen: bool = False,
        entered: Callable[[], None] = lambda: None,
    ) -> None:
        """Send a command, or put it in line. `done` is called once: at once with an error, or later on the loop.

        deadline: loop time at which the wait ends; fds: passed along, closed here; entered: called when the ledger has it, before the send.
        """
        try:
            self._refuse(name, oob=oob, wait_frozen=wait_frozen)
            qmp_id = self._ledger.next_qmp_id()
            text = encode_command(name, arguments, qmp_id, oob=oob)
        except VmloopError as error:
            close_all(fds)
            done(None, error)
            return
        command = Command(name, text, done, qmp_id, request, reading, oob, deadline, key, fds, entered=entered)
        self._by_id[qmp_id] = command
        self._deadlines.add(qmp_id, deadline)
        self._set_timer(deadline)
        if self._window[oob] > 0 and not (self._waiting and not oob) and not self._writer.full:
            self._send(command)
        else:
            self._waiting.append(command)

    @property
    def in_flight(self) -> int:
        """Commands that QEMU owes an answer."""
        return len(self._on_wire)

    @property
    def queued(self) -> int:
        """Commands that wait for a place on the wire."""
        return len(self._waiting)

    def _refuse(self, name: str, *, oob: bool, wait_frozen: bool) -> None:
        """Raise what speaks against sending a command now."""
        if self._ended is not None:
            raise MonitorLost(f"{name}: no connection to the monitor: {self._ended}")
        if oob and not self.oob:
            desc = "this monitor did not offer out-of-band execution"
            raise QmpError(f"{name}: {desc}", **{"class": "GenericError", "desc": desc})
        if self._liveness.state is MonitorState.FROZEN and not wait_frozen:
            silent = self._liveness.silent_for()
            text = f"{name}: QEMU has answered nothing for {silent:.1f} s, not even out of band; wait, or kill the VM"
            raise MonitorFrozen(text)
        if len(self._by_id) >= MAX_WAITING:
            raise Busy(f"{name}: {len(self._by_id)} commands wait for this VM's monitor already; try again later")

    # -- out ------------------------------------------------------------------------------------------------------------------

    def _send(self, command: Command) -> None:
        self._writer.announce(command.qmp_id)
        self._ledger.enter(
            Owed(command.qmp_id, command.request, command.reading, command.oob, command.deadline, command.key)
        )
        command.entered()
        self._window[command.oob] -= 1
        command.sent = self._loop.time()
        self._on_wire[command.qmp_id] = command
        self._writer.write(command.text, command.qmp_id, command.fds)
        self._liveness.sent(command.oob)

    def _send_waiting(self) -> None:
        """Fill the window. Out-of-band commands do not wait behind in-band ones."""
        blocked: list[Command] = []
        while self._waiting and not self._writer.full and max(self._window.values()) > 0:
            command = self._waiting.popleft()
            if self._window[command.oob] > 0:
                self._send(command)
            else:
                blocked.append(command)
        self._waiting.extendleft(reversed(blocked))

    # -- in ---------------------------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            open_still = self._reader.read(self._on_line)
        except (LineTooLong, OSError) as error:  # OSError: the start of a line cannot be kept for a successor
            self._end(str(error))
            return
        if not open_still:
            self._end("QEMU closed the connection")

    def drain(self) -> None:
        """Read to the end what a QEMU that is gone has left in the socket."""
        while self._ended is None:
            before = self._reader.taken
            self._readable()
            if self._reader.taken == before:
                self._end("QEMU is gone")

    def _on_line(self, line: bytes) -> None:
        """The router of everything that QEMU says. A line that makes no sense is counted, logged and dropped here alone."""
        try:
            message = msgspec.json.decode(line)
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            return self._drop(line, str(error))
        if not isinstance(message, dict):
            return self._drop(line, "not an object")
        if "return" in message or "error" in message:
            qmp_id = message.get("id")
            command = self._on_wire.pop(qmp_id, None) if type(qmp_id) is int else None
            if command is None:
                return self._drop(line, "a reply without an id that was asked")
            return self._on_reply(command, message)
        if "event" in message:
            return self._on_event(line, message)
        if "QMP" in message:
            return self._on_greeting(message["QMP"])
        return self._drop(line, "neither reply, event nor greeting")

    def _drop(self, line: bytes, why: str) -> None:
        self.garbled += 1
        if self.garbled <= 10 or self.garbled % 1000 == 0:
            log.warning("monitor: line dropped (%s), %d so far: %.120r", why, self.garbled, line)
            self.on_garbled()

    def _on_reply(self, command: Command, message: dict[str, Any]) -> None:
        if command.done is None:
            self._listener.on_late(command, message)
        elif "return" in message:
            self._answer(command, message["return"], None)
        else:
            self._answer(command, None, qmp_error(command.name, message["error"]))
        self._forget(command)
        if not command.oob and next(iter(self._on_wire), command.qmp_id) < command.qmp_id:
            self._pass_over(command.qmp_id)
        self._liveness.answered(command.oob, self._oldest_in_band())
        if self._waiting:
            self._reader.with_line(Afterwards(self._send_waiting))  # when the ledger has room again

    def _pass_over(self, answered: int) -> None:
        """QEMU answers in-band commands in order: the replies to those before were damaged, and will not come any more."""
        for command in [other for other in self._on_wire.values() if not other.oob and other.qmp_id < answered]:
            self._on_wire.pop(command.qmp_id, None)
            self._forget(command)
            self._answer(command, None, end_of(command, "its reply made no sense, and later ones have come"))

    def _on_event(self, line: bytes, message: dict[str, Any]) -> None:
        name = message["event"]
        data = message.get("data", {})
        if not isinstance(name, str) or not name or len(name) > 200 or not isinstance(data, dict):
            return self._drop(line, "an event without a proper name or data")
        return self._listener.on_event(name, data, microseconds(message.get("timestamp")))

    def _on_greeting(self, content: object) -> None:
        if not self._greeted.done():
            self.greeting = read_greeting(content)
            self._greeted.set_result(None)

    # -- time -----------------------------------------------------------------------------------------------------------------

    def _set_timer(self, due: float | None = None) -> None:
        if due is None:
            due = self._deadlines.next_due()
        if due is None or self._ended is not None:
            return
        timer = self._timer
        if timer is not None and timer.when() <= due and not timer.cancelled():
            return
        if timer is not None:
            timer.cancel()
        self._timer = self._loop.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        for qmp_id in self._deadlines.take_due(self._loop.time()):
            command = self._by_id.get(qmp_id)
            if command is None:  # whoever was told before it has closed the session
                continue
            if command.sent:
                text = "QEMU has not answered in time; the command lives on and its answer will come as COMMAND_LATE"
            else:
                self._waiting.remove(command)
                del self._by_id[qmp_id]
                close_all(command.fds)
                text = f"not sent in time: {self.in_flight} earlier commands wait for QEMU"
            self._answer(command, None, DeadlineExceeded(f"{command.name}: {text}", command=command.name))
        self._set_timer()

    def _probe(self, deadline: float) -> bool:
        """Ask out of band whether QEMU lives (query-yank is harmless and allowed there since 6.0); False if that cannot be asked."""
        if not self.oob or self._ended is not None or self._writer.full:
            return False
        unanswered = self._on_wire.pop(self._question, None)
        if unanswered is not None:  # a question has one place on the wire, whatever became of the last one
            self._forget(unanswered)
        qmp_id = self._question = self._ledger.next_qmp_id()
        text = encode_command("query-yank", None, qmp_id, oob=True)
        command = Command("query-yank", text, _nobody, qmp_id, reading=True, oob=True, deadline=deadline)
        self._by_id[qmp_id] = command
        self._send(command)
        return True

    # -- end --------------------------------------------------------------------------------------------------------------------

    def close(self, reason: str) -> None:
        """End the session; everybody who waits is told. The listener is not."""
        if self._ended is not None:
            return
        self._ended = reason
        self._reader.close()
        self._liveness.stop()
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._socket)
        self._writer.close()
        if not self._greeted.done():
            self._greeted.set_exception(MonitorLost(f"no QMP greeting: {reason}"))
            self._greeted.exception()  # whoever awaits it gets it too; without a waiter it must not be warned about
        for command in tuple(self._by_id.values()):
            self._answer(command, None, end_of(command, reason))
            close_all(command.fds if not command.sent else ())
        self._by_id.clear()
        self._on_wire.clear()
        self._waiting.clear()
        self._ledger.clear()
        self._ledger.release()
        end_connection(self._socket)

    def _end(self, reason: str) -> None:
        if self._ended is None:
            self.close(reason)
            self._listener.on_end(reason)

    def _answer(self, command: Command, value: Any, error: VmloopError | None) -> None:
        done, command.done = command.done, None
        self._deadlines.drop(command.qmp_id)
        if done is not None:
            done(value, error)

    def _forget(self, command: Command) -> None:
        self._by_id.pop(command.qmp_id, None)
        self._deadlines.drop(command.qmp_id)
        if self._ended is None:
            self._window[command.oob] += 1
            self._reader.with_line(self._ledger.answered_by_line(command.qmp_id))

    def _oldest_in_band(self) -> float | None:
        return next((command.sent for command in self._on_wire.values() if not command.oob), None)

    def _settle(self, reason: str) -> None:
        self.settled = True
        self._liveness.start(self._oldest_in_band())
        self._listener.on_monitor_state(MonitorState.READY, reason)


def _nobody(_: Any, __: VmloopError | None) -> None:
    """Takes the answers that nobody waits for."""
