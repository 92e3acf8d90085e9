# SPDX-License-Identifier: Apache-2.0
"""The monitor's connection is really lost: QEMU is sought again until it answers, and the stream gets EVENTS_LOST. Used by vm.py.

    seek ─► unknown (monitor-lost) ─► connected, negotiated ─► query-status, query-jobs, query-chardev ─► EVENTS_LOST ─► what came meanwhile

What QEMU says on the new connection before EVENTS_LOST is written is held back, so that the mark stands where the gap is. The connection is
given to the zygote only after that: a worker that dies in between leaves a longer gap, never an unmarked one.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from typing import TYPE_CHECKING, Any, Final

import tenacity

from ..common.cursor import Cursor
from ..common.errors import MonitorLost, QmpError, VmloopError
from ..common.states import VmState
from .agent.chardev import is_port_open
from .changes import Known, difference, jobs_of, note
from .qemu.adopt import connect_monitor
from .recognition import hold_again
from .transitions import Move, of_status

if TYPE_CHECKING:
    from .vm import Vm

log = logging.getLogger(__name__)

MAX_HELD: Final = 10_000  # events between negotiation and EVENTS_LOST; of more, those that came first are kept and the rest is counted
AT_ONCE: Final = 256  # events of the journal looked at in one turn of the loop

Said = tuple[str, dict[str, Any], int]  # an event of QEMU's: name, data, time


class Reconnection:
    """One VM's search for its monitor; at most one at a time."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._task: asyncio.Task[None] | None = None
        self._lost_at: float | None = None  # seconds since 1970; None if that was under an earlier worker
        self._failed = False
        self._unmarked = False  # events may be missing in the stream, and nothing there says so yet
        self._held: list[Said] | None = None
        self._dropped = 0

    @property
    def active(self) -> bool:
        """Whether the monitor is being sought."""
        return self._task is not None and not self._task.done()

    @property
    def hopeful(self) -> bool:
        """Whether the monitor is being sought and no attempt has failed yet."""
        return self.active and not self._failed

    def lost(self) -> None:
        """The connection has ended just now."""
        if not self._unmarked:
            self._lost_at = time.time()

    def unwatched(self) -> None:
        """No connection has outlived the worker before this one."""
        self._unmarked = self._vm.came_up

    def begin(self, reason: str = "monitor-lost") -> None:
        """The process lives, or may live: seek its monitor. A VM that has never come up is still `starting`."""
        vm = self._vm
        self.unwatched()
        if vm.came_up and vm.state.can(VmState.UNKNOWN):
            vm.state.move(VmState.UNKNOWN, reason)
        self._failed = False
        self._task = vm.loop.create_task(self._seek())

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def give_up(self) -> bool:
        """The run is over: a gap that is not marked yet is marked now, and what was held back is handed out. Whether there was one."""
        self.cancel()
        held, self._held = self._held or [], None
        unmarked = self._unmarked
        if unmarked:
            self._mark(self._newest(), time.time(), {})
        for said in held:
            self._vm.on_event(*said)
        return unmarked

    def _newest(self) -> float | None:
        """When QEMU last said something, as far as the newest events tell."""
        newest = self._vm.events.cursor
        few = self._vm.events.since(Cursor(newest.epoch, max(newest.seq - AT_ONCE, 0)))
        return max((event.time / 1e6 for event in few if event.origin == "qmp"), default=None)

    def holds_back(self, name: str, data: dict[str, Any], at: int) -> bool:
        """Whether an event of QEMU's has to wait until EVENTS_LOST is written."""
        if self._held is None:
            return False
        if len(self._held) < MAX_HELD:
            self._held.append((name, data, at))
        else:
            self._dropped += 1
        return True

    # -- seek -----------------------------------------------------------------------------------------------------------------

    async def _seek(self) -> None:
        vm = self._vm
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((VmloopError, OSError)),  # OSError: no fd is free now, and the like
            wait=tenacity.wait_exponential(multiplier=0.05, max=vm.settings.reconnect_max_delay),
            before_sleep=self._note_failure,
        )
        async for attempt in retrying:  # ends with the monitor found, or with the run
            with attempt:
                assert vm.run is not None
                if not hold_again(vm):
                    vm.loop.call_soon(vm.finish, "it ended while no worker watched")
                    return
                connection = connect_monitor(vm.run.monitor)
                hold_again(vm, connection)
                await self._come_back(connection)
        self._task = None

    def _note_failure(self, state: tenacity.RetryCallState) -> None:
        self._failed = True
        self._vm.changed()
        error = state.outcome.exception() if state.outcome is not None else None
        log.log(
            logging.INFO if state.attempt_number < 3 else logging.DEBUG,
            "VM %s: its monitor is not there yet: %s",
            self._vm.name,
            error,
        )

    async def _come_back(self, connection: socket.socket) -> None:
        """Bring up one connection. Raises the error tree's members; then it is closed."""
        vm = self._vm
        deadline = vm.loop.time() + vm.settings.launch
        again = vm.came_up
        self._held, self._dropped = [] if again else None, 0
        try:
            await vm.negotiate(connection, deadline)
            if again:
                await self._take_stock(deadline)
            else:
                await vm.settle_in(deadline)
            if vm.session is None:
                raise MonitorLost(f"VM {vm.name}: its monitor closed the connection again")
        except (VmloopError, OSError):
            vm.drop_session("no answer")
            raise
        finally:
            self._held = None
        vm.keep_connection(connection)

    async def _take_stock(self, deadline: float) -> None:
        """Ask what QEMU is at, mark the gap, and then hand out what has come since."""
        vm = self._vm
        until = time.time()
        before = Known()
        newest: float | None = None  # when QEMU last said something: there was a connection then
        assert vm.run is not None
        for count, event in enumerate(vm.events.since(Cursor(vm.run.epoch, 0))):
            note(before, event, vm.agent.port_id)
            if event.origin == "qmp":
                newest = event.time / 1e6
            if count % AT_ONCE == AT_ONCE - 1:
                await asyncio.sleep(0)
        move = await self._status(deadline)
        seen = len(self._held or ())  # what came before that answer is older than what it says
        after = Known(state=move.state.value)
        after.jobs = jobs_of(await self._ask("query-jobs", deadline))
        if vm.run.agent is not None and (chardevs := await self._ask("query-chardev", deadline)) is not None:
            after.agent_port = is_port_open(chardevs, vm.run.agent)
        held, self._held = self._held or [], None
        self._mark(newest, until, difference(before, after))
        for said in held[:seen]:
            vm.on_event(*said)
        vm.take_status(move)
        for said in held[seen:]:
            vm.on_event(*said)
        vm.look_at_agent()

    def _mark(self, newest: float | None, until: float, changed: dict[str, Any]) -> None:
        """Say in the stream that events are missing. `newest`: when QEMU last said something, seconds since 1970."""
        vm = self._vm
        started = vm.run.started if vm.run is not None else until
        span: dict[str, Any] = {"since": self._lost_at or newest or started, "until": until}
        if self._dropped:
            span["dropped"] = self._dropped
        vm.events.emit("EVENTS_LOST", {**span, "reason": "no connection to the monitor", "changed": changed})
        self._unmarked, self._dropped = False, 0

    async def _status(self, deadline: float) -> Move:
        status = await self._ask("query-status", deadline)
        return Move(VmState.RUNNING, "unknown") if status is None else of_status(status)

    async def _ask(self, command: str, deadline: float) -> Any:
        """QEMU's answer; None if it does not know the command (qemu-storage-daemon, older ones)."""
        vm = self._vm
        try:
            return await vm.require_session().execute(command, seconds=deadline - vm.loop.time())
        except QmpError as error:
            log.info("VM %s: %s", vm.name, error)
            return None
