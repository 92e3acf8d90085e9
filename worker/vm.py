# SPDX-License-Identifier: Apache-2.0
"""One VM: its run from start or attach to its end, its states, its monitor, its process. The heart of a worker; used by app.py and verbs/.

    start ── launch.py ──►┐
    attach ── adopt.py ──►├─ session up ─ query-status ─► states follow events ─► end: see `finish`
    resume (new worker) ─►┘

The end, in this order: read the monitor to its end; deliver what was read; close the monitor; settle the final state and its reason;
publish it; release files. Only a process known to be gone is gone: a monitor that is lost makes the VM `unknown`, and is sought again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from typing import Any, Final

import msgspec

from ..common.errors import MonitorLost, NotRunning, QmpError
from ..common.names import VmName
from ..common.page import Page
from ..common.paths import VmPaths
from ..common.settings import WorkerSettings
from ..common.states import MONITOR_MOVES, VM_MOVES, MonitorState, StateHolder, VmState
from .agent.agent import GuestAgent
from .epochs import next_epoch
from .events import Effect, EventLog
from .keeper import Keeper
from .qemu.process import QemuProcess, describe_exit
from .qmp.commands import Command
from .qmp.framing import LineReader
from .qmp.ledger import Ledger
from .qmp.session import QmpSession
from .reconnection import Reconnection
from .run_page import Fact, RunPage
from .runfile import Run, RunFile, clear_run_directory, over, read_run, salvage_run
from .transitions import Move, of_end, of_ended, of_event, of_status
from .waiting import Waiters

log = logging.getLogger(__name__)

# QEMU closes its monitor a moment before it has ended: wait this long before a closed monitor means trouble.
END_GRACE: Final = 2.0


class Vm:
    """The VM of this worker. All methods run on the worker's loop."""

    exit_text = ""  # how its QEMU ended

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        name: VmName,
        paths: VmPaths,
        settings: WorkerSettings,
        page: Page,
        events: EventLog,
        keeper: Keeper,
        on_status: Callable[[], None],
    ) -> None:
        """`on_status` is called whenever something that `list` shows has changed."""
        self.name = name
        self.paths = paths
        self.events = events
        self.loop = loop
        self.settings = settings
        self.noted = noted = RunPage(page)
        had_run = paths.run_file.exists()
        self.run: Run | None = read_run(paths.run_file)
        if had_run and self.run is None:
            self.run = salvage_run(paths, noted.epoch, attached=noted.has(Fact.ATTACHED))
        self.session: QmpSession | None = None
        self.process: QemuProcess | None = None
        self.intent = ""  # the reason that the next state change has, set by who asks for it
        self.agent = GuestAgent(loop, name, events, page, paths, settings, keeper, on_status)
        self.facts: dict[str, Any] = {}  # what handlers have found out about the run (worker/handlers)
        self.gone = asyncio.Event()  # the run is over, or was let go; there is nothing left to do here
        self.file = RunFile(loop, paths.run_file, lambda trouble: self.set_fact("run_file", trouble))
        self._page = page
        self.keeper = keeper
        self._on_status = on_status
        self._ending = False
        self._killed_for = ""  # the reason of a kill that is not the operator's
        self.reconnection = Reconnection(self)
        self._waiters = Waiters(loop)
        self.wait_until = self._waiters.wait
        self.settling_in: asyncio.Task[None] | None = None
        self.page_lost = False  # of a run that goes on: how far its connection was read, and what it owed, is not known
        for event in events.unsettled:
            noted.put(event)
        Ledger(page).release()  # its marks are compared with PROGRESS: before this worker's own events move that
        self._since = noted.since
        if self.run is not None and self.run.ended is None and noted.epoch >= self.run.epoch:
            # A later epoch on the page is one that a full disk did not take into run.json.
            self.run = msgspec.structs.replace(self.run, epoch=noted.epoch)
            first = noted.state
        elif self.run is not None and self.run.ended is None:
            first = Move(VmState.UNKNOWN, "not looked at yet")
            self.page_lost = True
            self._begin_lost_page(self.run)
        else:
            ended = self.run.ended if self.run is not None else None
            first = of_ended(ended.state, ended.reason) if ended is not None else Move(VmState.SHUTOFF, "unknown")
        self.state = StateHolder(f"VM {name}", first.state, VM_MOVES, self._on_state, first.reason)
        self.monitor = StateHolder(f"monitor of {name}", MonitorState.LOST, MONITOR_MOVES, self._on_monitor)
        if self.run is not None and self.alive and first.state is VmState.SHUTOFF:
            self._settled_before(self.run, first)

    # -- what others ask ----------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether there is a run that is not known to be over."""
        return self.run is not None and self.run.ended is None

    @property
    def page_unkept(self) -> str:
        """Why the status page would not outlive this worker; "" if it would."""
        return self._page.unkept

    @property
    def since(self) -> float:
        """When the VM entered its state, seconds since 1970."""
        return self._since / 1e6

    def require_run(self) -> None:
        """Raises `NotRunning` unless there is a run."""
        if not self.alive:
            raise NotRunning(f"VM {self.name} does not run (it is {self.state.state.value}); start it first")

    def require_session(self) -> QmpSession:
        """The monitor's session, negotiated. `NotRunning` without a run, `MonitorLost` without a connection."""
        if self.session is not None and self.session.settled:
            return self.session
        self.require_run()
        raise MonitorLost(f"VM {self.name}: no connection to its monitor ({self.monitor.reason}); it is sought again")

    # -- the run --------------------------------------------------------------------------------------------------------------

    def begin_run(self, reason: str) -> int:
        """Count a new run and go to `starting`; its epoch."""
        epoch = next_epoch(self.paths, self.run, self.events.newest_epoch)
        self.events.begin_epoch(epoch)
        self.noted.begin()
        self._ending = False
        self.events.emit("WORKER_STARTED", {"pid": os.getpid(), "incarnation": self.noted.incarnation})
        self.state.move(VmState.STARTING, reason)
        return epoch

    def _begin_lost_page(self, run: Run) -> None:
        """The numbers of this run's events went with its page: a new epoch, so that no number is given twice."""
        log.error("VM %s: the status page of its run is lost; its events go on in a new epoch", self.name)
        epoch = next_epoch(self.paths, run, self.events.newest_epoch)
        self.save_soon(msgspec.structs.replace(run, epoch=epoch, began=run.first_epoch))
        self.events.begin_epoch(epoch)

    def _settled_before(self, run: Run, move: Move) -> None:
        """An earlier worker came to the run's end, and died of it or could not write it down: what it left undone."""
        self.keeper.drop()
        clear_run_directory(self.paths.run)
        self.save_soon(over(run, move.state.value, move.reason, self.events.cursor, self.since))

    def tell_end_of_run(self) -> None:
        """An earlier worker has written down that the run is over, and may not have come to tell it, nor to clear away."""
        noted = self.noted.state
        if self.run is not None and self.noted.epoch == self.run.epoch and noted.state is not self.state.state:
            self._on_state(noted.state, self.state.state, self.state.reason)
        if self.state.state is VmState.SHUTOFF:  # a detached QEMU still has its sockets there
            clear_run_directory(self.paths.run)

    def save(self, run: Run) -> None:
        """Write down what is known of the run. Raises OSError; the run goes on with it all the same."""
        self.run = run
        self.file.write(run)

    def save_soon(self, run: Run) -> None:
        """The same for what the run can go on without: written now, or when the disk takes it."""
        self.run = run
        self.file.write_or_retry(run)

    def hold(self, process: QemuProcess) -> None:
        """This is the run's process: its end will be the run's."""
        self.process = process
        self.keeper.follow(process.pid, own=process.own)
        self.loop.add_reader(process.fileno(), self.finish, "")

    async def bring_up(self, connection: socket.socket, deadline: float) -> None:
        """Negotiate on a run's first connection and take the VM's state from query-status."""
        await self.negotiate(connection, deadline)
        self.keep_connection(connection)
        await self.settle_in(deadline)

    async def negotiate(self, connection: socket.socket, deadline: float) -> None:
        """Open a session on a fresh connection. Raises `MonitorLost` or `DeadlineExceeded`."""
        session = self.open_session(connection)
        await session.negotiate(deadline - self.loop.time())
        assert self.run is not None
        version = ".".join(map(str, session.greeting.version)) if session.greeting else ""
        self.save_soon(msgspec.structs.replace(self.run, oob=session.oob, qemu_version=version))

    def keep_connection(self, connection: socket.socket) -> None:
        """Let the connection outlive this worker."""
        if connection.fileno() >= 0:
            self.keeper.keep("monitor", connection.fileno())

    async def settle_in(self, deadline: float) -> None:
        """On a negotiated session: find out what state the VM is in."""
        try:
            status = await self.require_session().execute("query-status", seconds=deadline - self.loop.time())
            move = of_status(status)
        except QmpError:  # no VM inside: qemu-storage-daemon and the like
            move = Move(VmState.RUNNING, "unknown")
        self.take_status(move)
        self.look_at_agent()

    def take_status(self, move: Move) -> None:
        """It has come up, and is in this state."""
        self.noted.note(Fact.STARTED)
        if self.state.can(move.state):
            self.state.move(move.state, move.reason)
        self.changed()

    def look_at_agent(self) -> None:
        """Find out by query-chardev whether the guest has the agent's port open."""
        self.agent.look(self._query_chardevs)

    def set_fact(self, name: str, value: Any) -> None:
        """Note what a handler has found out about this run; None removes it."""
        if value is None:
            self.facts.pop(name, None)
        else:
            self.facts[name] = value
        self._on_status()

    async def _query_chardevs(self) -> Any:
        return await self.require_session().execute("query-chardev", seconds=self.settings.launch)

    def open_session(self, connection: socket.socket) -> QmpSession:
        """Read from a connection to the monitor from here on."""
        reader = LineReader(connection, self._page, self.paths, self.events, self.settings.max_reply)
        self.monitor.move(MonitorState.CONNECTING, "connected")
        self.session = QmpSession(self.loop, connection, reader, self._page, self.settings, self)
        self.session.on_garbled = self._on_status
        return self.session

    # -- what others ask of its connection -------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether commands can be sent to its monitor."""
        return self.session is not None and self.session.settled

    @property
    def connecting(self) -> bool:
        """Whether that is about to change: who asks now may wait."""
        return not self.connected and (self.session is not None or self.reconnection.hopeful)

    @property
    def came_up(self) -> bool:
        """Whether this run's monitor was there once."""
        return self.noted.has(Fact.STARTED)

    # -- what the session tells ------------------------------------------------------------------------------------------------

    def on_event(self, name: str, data: dict[str, Any], at: int) -> None:
        if self.reconnection.holds_back(name, data, at):
            return
        self.events.emit(name, data, "qmp", at)
        # A watchdog that powers off says nothing else (QEMU 7.2): the end that follows is no crash.
        if name == "SHUTDOWN" or (name == "WATCHDOG" and data.get("action") == "poweroff"):
            self.noted.note(Fact.SHUTDOWN_SEEN)
        elif name == "RESUME":
            self.noted.strike(Fact.SHUTDOWN_SEEN)
        move = of_event(self.state.state, name, data, self.intent)
        if move is not None and self.state.can(move.state):
            self.state.move(move.state, move.reason)
        self.agent.on_qmp_event(name, data)

    def on_monitor_state(self, state: MonitorState, reason: str) -> None:
        if self.monitor.can(state):
            self.monitor.move(state, reason)

    def on_late(self, command: Command, reply: dict[str, Any]) -> None:
        data: dict[str, Any] = {"id": command.request, "command": command.name}
        data.update((key, reply[key]) for key in ("return", "error") if key in reply)
        self.events.emit("COMMAND_LATE", data)

    def on_end(self, reason: str) -> None:
        """The connection ended by itself."""
        self.session = None
        self.keeper.release("monitor")
        self.reconnection.lost()
        if self._ending:  # `settle` tells, after the agent's end
            return
        self.monitor.move(MonitorState.LOST, reason)
        if self.reconnection.active:
            return
        if self.process is not None:
            self.loop.call_later(END_GRACE, self._seek_if_alive)
        elif self.run and self.run.process:  # in doubt: only its process tells of its end
            self.reconnection.begin()
        elif self.noted.has(Fact.SHUTDOWN_SEEN) or self.state.state is VmState.STARTING:
            self.finish("it closed its monitor after SHUTDOWN")
        else:
            self.reconnection.begin()

    def _seek_if_alive(self) -> None:
        if self.session is None and not self._ending and self.alive and not self.reconnection.active:
            self.reconnection.begin()

    def _on_state(self, old: VmState, new: VmState, reason: str) -> None:
        data = {"old": old.value, "new": new.value, "reason": reason}
        if self.exit_text and new is VmState.SHUTOFF:
            data["detail"] = self.exit_text
        with self.events.together():
            event = self.events.emit("VM_STATE", data)
            self.events.with_line(Effect(lambda: self.noted.put(event)))
        self._since = event.time
        self.changed()

    def _on_monitor(self, old: MonitorState, new: MonitorState, reason: str) -> None:
        self.events.emit("MONITOR_STATE", {"old": old.value, "new": new.value, "reason": reason})
        self.changed()

    def changed(self) -> None:
        """Something that `list` shows, or that somebody may wait for, is another."""
        self._on_status()
        self._waiters.look()

    # -- end --------------------------------------------------------------------------------------------------------------------

    def kill(self, reason: str = "") -> None:
        """SIGKILL through the pidfd. Raises `NotRunning` if no process is known that is surely this VM's.

        `reason`: of the end that follows, if it is not "destroyed".
        """
        if self.process is None or self.run is None or not self.run.may_kill:
            raise NotRunning(f"VM {self.name}: vmloop knows no process that is surely this VM's")
        self.noted.note(Fact.KILLED)
        self._killed_for = reason
        self.process.kill()

    def finish(self, why: str, reason: str = "") -> None:
        """The run is over: the process is gone, or it said so itself. Called once, on the loop. `reason`: if another one is known."""
        if self._ending:
            return
        self._ending = True
        if self.process is not None:
            self.loop.remove_reader(self.process.fileno())
        if self.session is not None:
            self.session.drain()
        gap = self.reconnection.give_up()
        status = None
        if self.process is not None:
            status = self.process.status() if self.process.own else self.keeper.exit_status()
            self.exit_text = describe_exit(status)
        killed, started = self.noted.has(Fact.KILLED), self.noted.has(Fact.STARTED)
        move = of_end(
            killed=killed, started=started, shutdown_seen=self.noted.has(Fact.SHUTDOWN_SEEN), unseen=gap and not status
        )
        reason = reason or (self._killed_for if killed else "") or move.reason
        self.settle(Move(move.state, reason), why or f"QEMU {self.exit_text}")

    def settle(self, move: Move, detail: str) -> None:
        """Write down and publish the final state, and release what the run had."""
        if self.process is not None:
            self.process.close()
            self.process = None
        self.agent.close("the VM is shut off")
        self.drop_session("QEMU is gone")
        self.exit_text = self.exit_text or detail
        self.state.move(move.state, move.reason)
        assert self.run is not None
        self.keeper.drop()
        clear_run_directory(self.paths.run)
        try:
            self.save(over(self.run, move.state.value, move.reason, self.events.cursor))
        except OSError as error:
            log.error("VM %s: the end of its run cannot be written down: %s", self.name, error)
        self.gone.set()
        self.changed()

    def detach(self) -> None:
        """Let go of a running VM: it goes on without vmloop. Raises OSError if that cannot be written down; then it is held as before."""
        assert self.run is not None
        run = over(self.run, "unknown", "detached", self.events.cursor)
        self.file.write(run)  # first: a VM that is let go and noted as ours would be taken up again
        self.run = run
        self._ending = True
        self.let_go()
        if self.state.can(VmState.UNKNOWN):
            self.state.move(VmState.UNKNOWN, "detached")
        self.keeper.drop()
        self.gone.set()
        self.changed()

    def let_go(self) -> None:
        self.agent.close("detached")
        self.reconnection.cancel()
        self.drop_session("detached")
        if self.process is not None:
            self.loop.remove_reader(self.process.fileno())
            self.process.close()
            self.process = None

    def drop_session(self, reason: str) -> None:
        session, self.session = self.session, None
        if session is not None:
            session.close(reason)
            self.keeper.release("monitor")
        if self.monitor.can(MonitorState.LOST):
            self.monitor.move(MonitorState.LOST, reason)

    def leave(self) -> None:
        """The worker ends and the VM runs on: everything stays as it is for the next worker."""
        self.agent.close("the worker ends", over=False)
        if self.session is not None:
            self.loop.remove_reader(self.session.fileno())  # what comes from here on is the next worker's
        if self.settling_in is not None:
            self.settling_in.cancel()
        self.reconnection.cancel()
