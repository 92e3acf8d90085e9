# SPDX-License-Identifier: Apache-2.0
"""Workers that do not get on: seen from their status pages, told, and replaced under their VMs. Pure but for looking; used by host.py.

    held up for `blocked_after` s   host/LOOP_BLOCKED is published, the worker is made to write down its stack (worker/stack.py)
    moves again                     host/LOOP_RECOVERED
    held up for `blocked_limit` s   the worker is ended; its successor takes over the connections, and tells the VM's stream what happened
    a kill is not taken up          the same after KILL_PATIENCE: nothing in a worker may stand between an operator and a kill

A worker is held up when its loop has been in one turn for long, or when its process is stopped while requests wait for it. A loop that
sleeps in its poller is never held up, however long nothing happens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final, Protocol

from ..common.names import VmName, host_topic
from ..common.pack import pack
from ..common.settings import BrokerSettings
from .actions import Action, DumpStack, KillWorker, Publish
from .inflight import Entry, InFlight
from .roster import Roster, VmEntry, WorkerState

log = logging.getLogger(__name__)

# Pages are looked at this often while there are workers: one load from memory each.
LOOK_EVERY: Final = 0.5
# A healthy worker answers a kill within milliseconds; the design allows half a second until shutoff is published.
KILL_PATIENCE: Final = 0.15
# Twice as long as a worker may wait for the zygote at its VM's end (worker/orphan.py): that one has done as it was told.
KILL_HELD_UP: Final = 0.1


class Looker(Protocol):
    """What the broker may look at without waiting: status pages and /proc. Implemented by looker.py."""

    def blocked(self, name: VmName, pid: int | None) -> float: ...
    def task(self, name: VmName) -> str: ...
    def stopped(self, pid: int | None) -> bool: ...
    def process(self, pid: int | None) -> dict[str, Any] | None: ...


class Watch:
    """All workers of a broker, looked at every now and then."""

    def __init__(
        self,
        settings: BrokerSettings,
        roster: Roster,
        inflight: InFlight,
        looker: Looker,
        act: Callable[[Action], None],
        wall_micros: Callable[[], int],
    ) -> None:
        self._settings = settings
        self._roster = roster
        self._inflight = inflight
        self._looker = looker
        self._act = act
        self._wall_micros = wall_micros
        self._next_look: float | None = None
        self._told: dict[VmName, int] = {}  # VMs whose worker was reported as blocked → that worker's pid
        self._stopped_since: dict[VmName, float] = {}
        self._kills: dict[int, float] = {}  # kills that a worker has not taken up yet → when to lose patience

    # -- what the core tells ------------------------------------------------------------------------------------------------

    def on_kill(self, entry: Entry) -> None:
        """A kill goes to a VM's worker."""
        self._kills[entry.number] = entry.received + KILL_PATIENCE

    # -- time ---------------------------------------------------------------------------------------------------------------

    def next_due(self) -> float | None:
        """When `on_tick` has something to do; None while there are no workers."""
        if not self._roster.by_identity:
            self._next_look = None
        elif self._next_look is None:
            return 0.0  # the first worker has come: look now, and from then on in steps
        if not self._kills:
            return self._next_look
        first = min(self._kills.values())
        return first if self._next_look is None else min(first, self._next_look)

    def on_tick(self, now: float) -> None:
        """Look at what is due."""
        if self._kills:
            self._look_at_kills(now)
        if self._roster.by_identity and (self._next_look is None or self._next_look <= now):
            self._next_look = now + LOOK_EVERY
            for vm in list(self._roster.by_identity.values()):
                self._look(vm, now)
        for name in [name for name in self._told if self._is_gone(name)]:
            del self._told[name]

    def _look(self, vm: VmEntry, now: float) -> None:
        seconds = self._held_up(vm, now)
        if seconds >= self._settings.blocked_after:
            if self._told.get(vm.name) != vm.worker_pid:
                # Told first, and looked at again: a host that stood still as a whole has no worker to blame.
                self._tell_blocked(vm, seconds)
            elif seconds >= self._settings.blocked_limit and not vm.exited:
                self._replace(vm, f"its loop has been held up for {seconds:.1f} s")
        elif self._told.pop(vm.name, None) is not None:
            log.warning("VM %s: its worker (pid %d) moves again", vm.name, vm.worker_pid or 0)
            self._publish("LOOP_RECOVERED", vm, {"pid": vm.worker_pid})

    def _held_up(self, vm: VmEntry, now: float) -> float:
        """Seconds for which the worker has not got on."""
        seconds = self._looker.blocked(vm.name, vm.worker_pid)
        if seconds or not self._waits_long(vm, now) or not self._looker.stopped(vm.worker_pid):
            self._stopped_since.pop(vm.name, None)
            return seconds
        # Stopped in its sleep: its page says nothing, but requests that it has been given lie there.
        return now - self._stopped_since.setdefault(vm.name, now - self._settings.blocked_after)

    def _waits_long(self, vm: VmEntry, now: float) -> bool:
        oldest = self._inflight.oldest_of_vm(vm.name)
        return oldest is not None and now - oldest.received >= self._settings.blocked_after

    def _tell_blocked(self, vm: VmEntry, seconds: float) -> None:
        assert vm.worker_pid is not None
        self._told[vm.name] = vm.worker_pid
        task = self._looker.task(vm.name)
        log.error("VM %s: its worker (pid %d) is held up for %.1f s (%s)", vm.name, vm.worker_pid, seconds, task or "?")
        self._publish("LOOP_BLOCKED", vm, {"pid": vm.worker_pid, "seconds": round(seconds, 3), "task": task})
        if vm.status.get("stack_signal"):
            self._act(DumpStack(vm.name))

    def _look_at_kills(self, now: float) -> None:
        for number, due in list(self._kills.items()):
            entry = self._inflight.get(number)
            vm = self._roster.get(entry.vm) if entry is not None and entry.vm is not None else None
            if entry is None or vm is None:
                del self._kills[number]
            elif due <= now:
                self._kills[number] = now + KILL_PATIENCE
                blocked = self._looker.blocked(vm.name, vm.worker_pid)
                stuck = blocked >= KILL_HELD_UP or self._looker.stopped(vm.worker_pid)
                held = (WorkerState.READY, WorkerState.STARTING, WorkerState.LEAVING)
                if vm.worker.state in held and not vm.exited and stuck:
                    self._replace(vm, "it does not take up a kill")

    def _replace(self, vm: VmEntry, why: str) -> None:
        log.error("VM %s: its worker (pid %d) is replaced: %s", vm.name, vm.worker_pid or 0, why)
        self._act(KillWorker(vm.name))

    def _is_gone(self, name: VmName) -> bool:
        vm = self._roster.get(name)
        return vm is None or vm.worker_pid != self._told[name]

    def _publish(self, event: str, vm: VmEntry, data: dict[str, Any]) -> None:
        """The doorbell, as the worker cannot speak. In the VM's own stream it says so itself, or its successor does, with a number."""
        body = {"vm": vm.name, "epoch": vm.epoch, "seq": 0, "time": self._wall_micros(), "event": event}
        self._act(Publish(host_topic(event), pack({**body, "data": data, "origin": "vmloop"})))
