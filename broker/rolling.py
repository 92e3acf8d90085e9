# SPDX-License-Identifier: Apache-2.0
"""`restart-workers`: the workers are replaced one after another under their VMs, from a fresh zygote, with new code.

Pure; part of host.py.

a fresh zygote ─► leave ─► gone ─► the next one is ready ─► the next VM …
                   └─ not within LEAVE_SECONDS: it is ended; the VM runs on
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgspec

from ..common.errors import Busy, Internal, VmloopError
from ..common.names import VmName
from .crew import Crew
from .inflight import Entry
from .roster import Roster, VmEntry, WorkerState

log = logging.getLogger(__name__)

# A worker ends its handlers and gives its last answers first (worker/app.py), within about 5 s.
LEAVE_SECONDS: Final = 10.0
# Then its successor is made, and made again if it must be.
READY_SECONDS: Final = 30.0


class _Run(msgspec.Struct):
    """One `restart-workers` under way."""

    entry: Entry
    left: deque[VmName]
    restarted: int = 0
    failed: list[dict[str, Any]] = []
    vm: VmName | None = None  # whose worker is being replaced
    incarnation: int = 0  # of the worker that leaves
    told: bool = False  # it has been told to leave
    leave_by: float | None = None
    ready_by: float = 0.0


class Rolling:
    """At most one at a time."""

    def __init__(
        self,
        roster: Roster,
        crew: Crew,
        waits: Callable[[Entry], bool],
        tell: Callable[[Entry, Any, float], None],
        answer: Callable[[Entry, Any, float], None],
        answer_error: Callable[[Entry, VmloopError, float], None],
    ) -> None:
        """`waits`: whether a request still has its caller. `tell` sends one part of an answer, `answer` and `answer_error` its end."""
        self._roster = roster
        self._crew = crew
        self._waits = waits
        self._tell = tell
        self._answer = answer
        self._answer_error = answer_error
        self._run: _Run | None = None

    def begin(self, entry: Entry, names: list[VmName]) -> None:
        """The request has been entered, and a fresh zygote asked for. `Busy` if another one is under way."""
        self.require_none()
        self._run = _Run(entry, deque(names))

    def require_none(self) -> None:
        if self._run is not None:
            raise Busy("the workers are being restarted already; ask again when that is done")

    def on_renewed(self, error: str, now: float) -> None:
        """There is a fresh zygote, or an error why there is none."""
        run = self._run
        if run is None or run.vm is not None:
            return
        if error:
            self._run = None
            text = f"no worker was restarted, for there is no fresh zygote: {error}"
            self._answer_error(run.entry, Internal(text), now)
        else:
            self._next(run, now)

    def on_vm_changed(self, vm: VmEntry, now: float) -> None:
        """A VM's worker has said something, or presented itself."""
        run = self._run
        if run is not None and run.vm == vm.name:
            self._look(run, vm, now)

    def stop(self, error: VmloopError, now: float) -> None:
        """The host goes down: what is left is left."""
        run, self._run = self._run, None
        if run is not None:
            self._answer_error(run.entry, error, now)

    def next_due(self) -> float | None:
        run = self._run
        if run is None or run.vm is None:
            return None
        return run.ready_by if run.leave_by is None else min(run.leave_by, run.ready_by)

    def on_tick(self, now: float) -> None:
        run = self._run
        if run is None or run.vm is None:
            return
        vm = self._roster.get(run.vm)
        if vm is None:
            self._next(run, now)
        elif run.ready_by <= now:
            self._failed(run, f"no worker has taken over in time (it is {vm.worker.state.value})", now)
        elif run.leave_by is not None and run.leave_by <= now:
            run.leave_by = None
            if vm.incarnation == run.incarnation and vm.worker.state in (WorkerState.READY, WorkerState.LEAVING):
                log.error("VM %s: its worker does not leave within %g s: it is ended", vm.name, LEAVE_SECONDS)
                self._crew.end(vm)

    def _next(self, run: _Run, now: float) -> None:
        """The next VM, or the end."""
        run.vm = None
        while run.left and self._waits(run.entry):
            vm = self._roster.get(run.left.popleft())
            if vm is None or not vm.alive:
                continue  # it has ended meanwhile, and its worker with it
            run.vm, run.incarnation, run.told = vm.name, vm.incarnation, False
            run.leave_by, run.ready_by = None, now + LEAVE_SECONDS + READY_SECONDS
            self._look(run, vm, now)
            return
        self._run = None
        if self._waits(run.entry):
            self._answer(run.entry, {"restarted": run.restarted, "failed": run.failed}, now)
        else:
            log.warning("restart-workers: its time is over; %d workers were not restarted", len(run.left))

    def _look(self, run: _Run, vm: VmEntry, now: float) -> None:
        if not vm.alive:
            self._next(run, now)
        elif vm.worker.state is not WorkerState.READY:
            return
        elif not run.told:
            run.told, run.incarnation, run.leave_by = True, vm.incarnation, now + LEAVE_SECONDS
            self._crew.dismiss(vm)
        elif vm.incarnation > run.incarnation:
            run.restarted += 1
            self._tell(run.entry, {"name": vm.name, "worker_pid": vm.worker_pid}, now)
            self._next(run, now)

    def _failed(self, run: _Run, why: str, now: float) -> None:
        name = run.vm
        log.error("VM %s: its worker was not restarted: %s", name, why)
        run.failed.append({"name": name, "error": f"VM {name}: {why}; the VM runs on, see 'vmloop show {name}'"})
        self._tell(run.entry, run.failed[-1], now)
        self._next(run, now)
