# SPDX-License-Identifier: Apache-2.0
"""The end of a host with its VMs: `shutdown` with kill, and the end of a private broker's owner. Pure; part of host.py.

begin(kill) ─► every VM is killed ─┐
begin(stop) ─► every guest is asked ┴─► none is alive ─► `on_over`, which answers and lets the broker end
               └─ what does not power down in time, or cannot be asked, is killed
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from ..common.errors import VmloopError
from ..common.names import VmName
from .inflight import Entry
from .roster import Roster, VmEntry

log = logging.getLogger(__name__)

# Ending all VMs: kill is immediate, a process that hangs in the kernel is not waited for longer.
SHUTDOWN_SECONDS: Final = 30.0
# A worker kills its QEMU itself when the guest's time is over, and says so; so much later the broker sees to it.
STOP_GRACE: Final = 5.0


class Ending:
    """One end under way; there is one at a time."""

    def __init__(
        self,
        roster: Roster,
        ask: Callable[[VmEntry, str, Mapping[str, Any], float, float], int],
        on_over: Callable[[list[Entry], int, float], None],
    ) -> None:
        """`ask` sends a request of the broker's own (VM, op, arguments, seconds, now) and gives its number; may raise the error tree.

        `on_over` is told who is to be answered, how many VMs were ended, and the time.
        """
        self.under_way = False
        self.due: float | None = None  # when the end of a private broker's owner is given up
        self._entries: list[Entry] = []  # who is answered when all is done
        self._roster = roster
        self._ask = ask
        self._on_over = on_over
        self._kills = False
        self._timeout = 0.0
        self._asked: dict[int, VmName] = {}  # requests to stop
        self._told: set[VmName] = set()
        self._killed: set[VmName] = set()

    def begin(self, entry: Entry | None, now: float, stop_timeout: float | None = None) -> None:
        """End every VM that is alive. `stop_timeout`: seconds that guests have to power down; None: none, they are killed.

        A second call that kills takes the patience out of one that stops.
        """
        if not self.under_way:
            self.under_way, self._kills = True, False
            self._told, self._killed, self._asked = set(), set(), {}
        self._kills = self._kills or stop_timeout is None
        self._timeout = stop_timeout or 0.0
        if entry is not None:
            self._entries.append(entry)
        elif self.due is None:
            self.due = now + self._timeout + STOP_GRACE + SHUTDOWN_SECONDS
        for vm in [vm for vm in self._roster if vm.alive]:
            self.on_vm_changed(vm, now)
        self.look(now)

    def on_vm_changed(self, vm: VmEntry, now: float) -> None:
        """One that was not alive before, because it was just starting, is ended too."""
        if not self.under_way or not vm.alive:
            return
        if self._kills:
            self._kill(vm, now)
        elif vm.name not in self._told:
            self._told.add(vm.name)
            try:
                arguments = {"timeout": self._timeout, "force": True}
                self._asked[self._ask(vm, "stop", arguments, self._timeout + STOP_GRACE, now)] = vm.name
            except VmloopError as error:
                log.info("VM %s cannot be asked to power down (%s): it is killed", vm.name, error)
                self._kill(vm, now)

    def on_answer(self, number: int, failed: bool, now: float) -> None:
        """A request of the broker's own has been answered; it may be one of these."""
        name = self._asked.pop(number, None)
        vm = self._roster.get(name) if name is not None else None
        if self.under_way and failed and vm is not None and vm.alive:
            log.info("VM %s does not stop: it is killed", name)
            self._kill(vm, now)
        self.look(now)

    def look(self, now: float) -> None:
        """Whether it is over."""
        if self.under_way and not any(vm.alive for vm in self._roster):
            self._finish(now)

    def on_tick(self, now: float) -> None:
        """An end that takes too long, and that nobody waits for, is over all the same."""
        if self.due is not None and self.due <= now:
            left = ", ".join(vm.name for vm in self._roster if vm.alive)
            log.error("these VMs cannot be ended and are left as they are: %s", left)
            self._finish(now)

    def forget(self, is_waiting: Callable[[Entry], bool]) -> None:
        """Who asked for it may have been answered, for its time was over: if nobody waits any more, the host goes on."""
        waited, self._entries = bool(self._entries), [entry for entry in self._entries if is_waiting(entry)]
        if waited and not self._entries and self.due is None:
            self.under_way = False

    def _kill(self, vm: VmEntry, now: float) -> None:
        if vm.name not in self._killed:
            self._told.add(vm.name)
            self._killed.add(vm.name)
            self._ask(vm, "kill", {}, SHUTDOWN_SECONDS, now)

    def _finish(self, now: float) -> None:
        entries, self._entries = self._entries, []
        self.under_way, self.due = False, None
        self._on_over(entries, len(self._told), now)
