# SPDX-License-Identifier: Apache-2.0
"""The guest agent of one VM over all its runs: port, connection, state, commands, freeze guard. Held by vm.py, used by verbs/ and handlers.

    begin ─► waiting ── the guest opens its port ─► syncing ─► ready ◄─► unresponsive        close ─► absent
                ▲─────────── the guest closes it ◄─────────────┘

Whether the port is open is known from VSERPORT_CHANGE and query-chardev. QEMU sends at most one VSERPORT_CHANGE a second for a port, the
last one: a second "open" in a row means that it was closed in between.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import tenacity

from ...common.definition import AgentSection
from ...common.errors import AgentAbsent, AgentUnresponsive, QmpError, VmloopError
from ...common.pack import pack
from ...common.page import Page
from ...common.paths import VmPaths
from ...common.settings import WorkerSettings
from ...common.states import AGENT_MOVES, AgentState, StateHolder
from ..events import EventLog
from ..qmp.commands import Done, awaited
from ..qmp.writer import end_connection
from .chardev import FLAP_HOLD, Openings, connect, is_port_open
from .commands import AgentCommand, adopted
from .endings import Endings, events_that_end
from .freeze import FreezeGuard
from .ledger import AgentOwed, Part
from .session import AgentSession
from .standing import Keeping, Standing
from .sync import encode_command, new_id

log = logging.getLogger(__name__)

RECONNECT_MAX: Final = 30.0  # seconds between attempts to open the socket
STABLE: Final = 60.0  # a connection that lived so long starts the row of delays anew

Query = Callable[[], Awaitable[Any]]  # asks the monitor for query-chardev; raises VmloopError


class GuestAgent:
    """All methods run on the worker's loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        name: str,
        events: EventLog,
        page: Page,
        paths: VmPaths,
        settings: WorkerSettings,
        keeper: Keeping,
        on_status: Callable[[], None],
    ) -> None:
        """`keeper` is handed the connection, so that it outlives this worker; `on_status` is called when the state has changed."""
        self.state = StateHolder(f"agent of {name}", AgentState.ABSENT, AGENT_MOVES, self._on_move, "no port")
        self.guard = FreezeGuard(loop, name, page, events, self._execute_unwatched)
        self._loop = loop
        self._name = name
        self._events = events
        self._page = page
        self._paths = paths
        self._max_reply = settings.max_agent_reply
        self._keeper = keeper
        self._on_status = on_status
        self._section = AgentSection()
        self._path: str | None = None
        self.port_id: str | None = None
        self._open = False
        self._session: AgentSession | None = None
        self._standing = self._new_standing()
        self._endings = Endings(loop)
        self._ended: asyncio.Future[str] | None = None  # of the session
        self._keeping: asyncio.Task[None] | None = None
        self._failure = ""  # why the last attempt to connect came to nothing
        self._openings = Openings()
        self._holding: asyncio.TimerHandle | None = None  # the port flaps
        self._query: Query | None = None
        self._looking: asyncio.Task[None] | None = None
        self._look_again = False

    # -- the run --------------------------------------------------------------------------------------------------------------

    def begin(
        self, socket_path: str | None, section: AgentSection, port_id: str | None, *, taken_over: bool = False
    ) -> None:
        """A run has begun, or (taken_over) goes on under a new worker. port_id: the id in VSERPORT_CHANGE, None if not known."""
        self.close("a new run begins", over=not taken_over)
        self._path, self._section, self.port_id = socket_path, section, port_id
        self._standing = self._new_standing()
        self._openings = Openings()
        self.guard.begin(taken_over=taken_over)
        if socket_path is not None:
            self.state.move(AgentState.WAITING, "the guest has not opened its agent's port yet")

    def _new_standing(self) -> Standing:
        return Standing(self._loop.time(), self._page, self._paths, max_reply=self._max_reply)

    def take_over(self, connection: socket.socket | None, inherit: Callable[[AgentOwed], Done | None]) -> None:
        """After `begin(taken_over=True)`: go on with the connection of an earlier worker, if it was kept, and with what it owed.

        `inherit` gives for a command that was sent whom to tell its answer; None if nobody waits for it.
        """
        kept = connection if self._is_known(connection) else None
        if connection is not None and kept is None:
            end_connection(connection)  # of a run or a page that is gone: QEMU must take a new one
        adopt = partial(self._adopt, kept=kept is not None, inherit=inherit)
        inherited = self._standing.take_over(self._loop.time(), adopt)
        if kept is None:
            self._standing.not_kept(inherited)
            return
        kept.setblocking(False)
        self._open = True
        self.state.move(AgentState.SYNCING, "connection taken over")
        session = self._open_session(kept)
        self._keeping = self._loop.create_task(self._keep_connected(self._ended))
        session.take_over(inherited)

    def _is_known(self, connection: socket.socket | None) -> bool:
        """Whether a connection is the one that the page speaks of."""
        if connection is None or self._path is None:
            return False
        return self._standing.ledger.is_of(os.fstat(connection.fileno()).st_ino)

    def _adopt(self, owed: AgentOwed, *, kept: bool, inherit: Callable[[AgentOwed], Done | None]) -> AgentCommand:
        """A command that an earlier worker sent. Without its connection one that reads has nobody: the broker sends it again."""
        command = adopted(owed)
        if owed.part is Part.GIVEN_UP or owed.told:
            return command
        done = (inherit(owed) if kept or not owed.reading else None) or _nobody
        if owed.part is Part.CURRENT:
            command.done = done = self.guard.watch(owed.name, done, owed.deadline, owed.limit)
        if owed.quiet:
            events = events_that_end(owed.name, {"mode": "reboot"} if owed.reboot else None)
            on_answer = self._endings.await_end(command, events, done, self._standing.ledger)
            command.done = on_answer if owed.part is Part.CURRENT else None
        return command

    def close(self, reason: str, *, over: bool = True) -> None:
        """The run is over, or (not over) the worker leaves. The state is absent.

        Everybody who waits is told, except (not over) for what has been sent: its answer, and the connection, is the next worker's.
        """
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None
        self._path = self._query = None
        if over:
            self._drop(reason)
        else:
            self._leave()
        if self._holding is not None:
            self._holding.cancel()
            self._holding = None
        if over:
            self._endings.close(AgentAbsent(f"VM {self._name}: {reason} before the guest's end was seen", sent=True))
            self._standing.ledger.clear()
            self.guard.over("the run is over")
        else:
            self._endings.leave()
        self.guard.stop()
        if self.state.state is not AgentState.ABSENT:
            self.state.move(AgentState.ABSENT, reason)

    def look(self, query: Query) -> None:
        """Find out whether the port is open: when the monitor is there (again). One question at a time, one more if asked meanwhile."""
        self._query = query
        if self._path is None:
            return
        self._look_again = True
        if self._looking is None:
            self._looking = self._loop.create_task(self._look())

    def fileno(self) -> int:
        """The connection's fd; -1 without one."""
        return self._session.fileno() if self._session is not None else -1

    def on_qmp_event(self, name: str, data: dict[str, Any]) -> None:
        """QEMU's events, all of them or at least VSERPORT_CHANGE, SHUTDOWN, RESET, SUSPEND and SUSPEND_DISK."""
        if name == "VSERPORT_CHANGE":
            self._on_port_change(data)
            return
        self._endings.on_event(name)
        if name in ("RESET", "SHUTDOWN"):
            self.guard.over("the guest was reset" if name == "RESET" else "the guest has shut down")

    # -- commands ---------------------------------------------------------------------------------------------------------------

    def submit(
        self,
        command: str,
        arguments: dict[str, Any] | None,
        *,
        done: Done,
        deadline: float,
        request: int = 0,
        reading: bool = False,
        freeze_limit: float | None = None,
        key: bytes = b"",
        held: bool = False,
    ) -> None:
        """Send a command, or put it in line. `done` is called once: at once with an error, or later on the loop.

        deadline: loop time; reading: safe to repeat; freeze_limit: seconds that a freeze may last, the definition's if None; key: of
        the request; held: the freeze lasts as long as whoever asked stays.
        """
        limit = self._section.freeze_limit if freeze_limit is None else freeze_limit
        if self._session is not None:  # else there is nothing to guard
            done = self.guard.watch(command, done, deadline, limit)
        self._submit(command, arguments, done, deadline, request, reading=reading, limit=limit, key=key, held=held)

    async def execute(self, command: str, arguments: dict[str, Any] | None = None, *, seconds: float) -> Any:
        """Send a command and wait for its `return`. Raises the error tree's members."""
        future, done = awaited(self._loop)
        self.submit(command, arguments, done=done, deadline=self._loop.time() + seconds)
        return await future

    async def _execute_unwatched(self, command: str, arguments: dict[str, Any] | None = None, *, seconds: float) -> Any:
        future, done = awaited(self._loop)
        self._submit(command, arguments, done, self._loop.time() + seconds, 0, reading=True)
        return await future

    def _submit(
        self,
        name: str,
        arguments: dict[str, Any] | None,
        done: Done,
        deadline: float,
        request: int,
        *,
        reading: bool,
        limit: float = 0.0,
        key: bytes = b"",
        held: bool = False,
    ) -> None:
        number = new_id()
        try:
            session = self._require_session()
            text = encode_command(name, arguments, number)
        except VmloopError as error:
            done(None, error)
            return
        command = AgentCommand(name, text, done, number, deadline, request, reading, key=key, limit=limit, held=held)
        events = events_that_end(name, arguments)
        if events:
            command.quiet, command.reboot = True, "RESET" in events
            command.done = self._endings.await_end(command, events, done, self._standing.ledger)
        try:
            session.submit(command)
        except VmloopError as error:  # Busy
            assert command.done is not None
            command.done(None, error)

    def _require_session(self) -> AgentSession:
        if self._session is not None:
            return self._session
        if self._path is None:
            text = f"VM {self._name} has no port for a guest agent; set agent.enabled and start it again"
            raise AgentAbsent(text, sent=False)
        if not self._open or self._holding is not None:
            why = "the guest has not opened its agent's port (not booted, or qemu-ga is not installed or has stopped)"
            raise AgentAbsent(f"VM {self._name}: {why}; {self.state.reason}", sent=False)
        why = self._failure or self.state.reason
        text = f"VM {self._name}: the connection to its guest agent is being opened ({why}); try again later"
        raise AgentUnresponsive(text, sent=False)

    # -- the port ---------------------------------------------------------------------------------------------------------------

    def _on_port_change(self, data: dict[str, Any]) -> None:
        if self._path is None:
            return
        opened = data.get("open")
        if self.port_id is None:
            if self._query is not None and self._holding is None:
                self.look(self._query)
        elif data.get("id") == self.port_id and isinstance(opened, bool):
            self._on_port(opened)

    async def _look(self) -> None:
        while self._look_again and self._query is not None and self._path is not None:
            self._look_again = False
            try:
                opened = is_port_open(await self._query(), self._path)
            except QmpError:  # no query-chardev: no QEMU that could tell
                opened = True
            except VmloopError as error:
                log.info("VM %s: cannot ask for its agent's port now: %s", self._name, error)
                continue  # whoever brings the monitor back looks again
            if opened != self._open or opened is False:
                self._on_port(opened)
            elif self._session is not None:
                self._session.confirm()
        self._looking = None

    def _on_port(self, opened: bool) -> None:
        """The port is open, or closed."""
        again, self._open = self._open and opened, opened
        if self._holding is not None:
            return  # seen to when the time is over
        if again:
            if self._session is not None:
                self._session.distrust()
        elif opened:
            self._openings.opened(self._loop.time())
            self._keeping = self._loop.create_task(self._keep_connected())
        elif self._keeping is not None:
            reason = "the guest closed its agent's port"
            if self._openings.flapping(self._loop.time()):
                reason = f"flapping: the guest opens and closes its agent's port all the time; left alone for {FLAP_HOLD:g} s"
                self._holding = self._loop.call_later(FLAP_HOLD, self._after_hold)
            self._drop(reason)
            if self.state.can(AgentState.WAITING):
                self.state.move(AgentState.WAITING, reason)

    def _after_hold(self) -> None:
        self._holding = None
        if self.port_id is None and self._query is not None:
            self._open = False
            self.look(self._query)
        elif self._open:
            self._open = False
            self._on_port(True)

    def _drop(self, reason: str) -> None:
        """The port is closed, or nothing to us any more."""
        self._open = False
        if self._keeping is not None:
            self._keeping.cancel()
            self._keeping = None
        session, self._session = self._session, None
        if session is not None:
            session.close(reason)
            self._keeper.release("agent")
        self._standing.lost()

    def _leave(self) -> None:
        """The worker ends: the port, and what is said on it, is the next one's."""
        self._open = False
        if self._keeping is not None:
            self._keeping.cancel()
            self._keeping = None
        session, self._session = self._session, None
        if session is not None:
            session.leave()

    # -- the connection ---------------------------------------------------------------------------------------------------------

    async def _keep_connected(self, taken_over: asyncio.Future[str] | None = None) -> None:
        """While the port is open: a connection, and after its end another one. `taken_over`: the end of the first."""
        if taken_over is not None:
            await taken_over
        while True:
            retrying = tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception_type((VmloopError, OSError)),
                wait=tenacity.wait_exponential(multiplier=0.1, max=RECONNECT_MAX),
                before_sleep=self._note_failure,
            )
            async for attempt in retrying:
                with attempt:
                    await self._connection()

    def _note_failure(self, state: tenacity.RetryCallState) -> None:
        self._failure = str(state.outcome.exception()) if state.outcome is not None else ""
        log.info("VM %s: no connection to its guest agent: %s", self._name, self._failure)

    async def _connection(self) -> None:
        """One connection from its begin to its end. Raises OSError or `AgentUnresponsive` unless it lived for long."""
        began = self._loop.time()
        assert self._path is not None
        session = self._open_session(connect(self._path))
        session.start()
        assert self._ended is not None
        reason = await self._ended
        if self._loop.time() - began < STABLE:
            raise AgentUnresponsive(f"VM {self._name}: {reason}")

    def _open_session(self, connection: socket.socket) -> AgentSession:
        self._ended = self._loop.create_future()
        self._session = AgentSession(self._loop, connection, self._standing, self._section.timeout, self)
        self._failure = ""
        self._keeper.keep("agent", connection.fileno())
        return self._session

    # -- what the session tells ---------------------------------------------------------------------------------------------------

    def on_state(self, state: AgentState, reason: str) -> None:
        now = self.state.state
        if state is AgentState.SYNCING and now is AgentState.UNRESPONSIVE:
            return  # only an answer ends that
        if state is AgentState.READY and now is AgentState.UNRESPONSIVE:
            self.state.move(AgentState.SYNCING, "it answers again")
        if self.state.can(state):
            self.state.move(state, reason)

    def on_late(self, command: AgentCommand, reply: dict[str, Any]) -> None:
        data: dict[str, Any] = {"id": command.request, "command": command.name, "agent": True, **reply}
        try:
            pack(data)
        except (ValueError, TypeError, RecursionError, OverflowError) as error:  # nested deeper than a message may be
            data = {"id": command.request, "command": command.name, "agent": True, "unreadable": str(error)[:200]}
        self._events.emit("COMMAND_LATE", data, "agent")

    def on_end(self, reason: str) -> None:
        self._session = None
        self._keeper.release("agent")
        self.on_state(AgentState.UNRESPONSIVE, reason)
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(reason)

    def _on_move(self, old: AgentState, new: AgentState, reason: str) -> None:
        self._events.emit("AGENT_STATE", {"old": old.value, "new": new.value, "reason": reason})
        self._on_status()


def _nobody(_: Any, __: VmloopError | None) -> None:
    """Takes the answers that nobody waits for."""
