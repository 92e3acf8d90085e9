# SPDX-License-Identifier: Apache-2.0
"""VMs that are to run whenever the host does: started once in a boot, a few at a time. Pure; part of host.py, begun by __main__.py."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

from ..common.errors import AlreadyRunning, VmloopError
from ..common.names import VmName
from ..common.pack import unpack
from .inflight import Entry
from .roster import Roster, VmEntry, WorkerState

log = logging.getLogger(__name__)

# QEMUs that start side by side: each reads its disks and maps its memory, and an operator wants to reach the host meanwhile.
AT_ONCE: Final = 4
# One start: QEMU has [worker] launch for its greeting, and a host that has just come up has much else to do.
START_SECONDS: Final = 120.0
# For a VM that ran before, until its worker knows what became of that run.
SETTLE_SECONDS: Final = 60.0


class Autostart:
    """What is left to start at this boot."""

    def __init__(
        self,
        roster: Roster,
        start: Callable[[VmEntry, float, float], int],
        on_failed: Callable[[VmEntry, str], None],
        on_done: Callable[[], None],
        may_start: Callable[[], bool],
    ) -> None:
        """`start` asks for a VM's start (VM, seconds, now) and gives the request's number. `on_done`: everything has been tried."""
        self._roster = roster
        self._start = start
        self._on_failed = on_failed
        self._on_done = on_done
        self._may_start = may_start
        self._waiting: deque[VmName] = deque()
        self._under_way: dict[int, VmName] = {}
        self._settled_by = 0.0
        self._begun = False

    def begin(self, names: Iterable[VmName], now: float) -> None:
        """Start these, unless they run already."""
        self._waiting.extend(names)
        self._begun, self._settled_by = True, now + SETTLE_SECONDS
        if self._waiting:
            log.info("%d VMs are started with the host", len(self._waiting))
        self.look(now)

    def next_due(self) -> float | None:
        """When `look` has something to do by itself."""
        return self._settled_by if self._waiting and len(self._under_way) < AT_ONCE and self._may_start() else None

    def look(self, now: float) -> None:
        """Start what can be started now."""
        if not self._begun or not self._may_start():  # what is left is for the next broker
            return
        for name in tuple(self._waiting):
            if len(self._under_way) >= AT_ONCE:
                return
            vm = self._roster.get(name)
            if vm is not None and vm.alive and vm.worker.state is not WorkerState.READY and now < self._settled_by:
                continue  # whether its last run goes on is not known yet
            self._waiting.remove(name)
            if vm is None:
                continue
            if not vm.alive:
                self._begin_one(vm, now)
            elif vm.worker.state is not WorkerState.READY:
                self._failed(vm, "no worker could tell in time what became of its last run")
        if not self._waiting and not self._under_way:
            self._begun = False
            self._on_done()

    def on_answer(self, entry: Entry, failed: bool, body: bytes, now: float) -> None:
        """A request of the broker's own has been answered; it may be one of these."""
        name = self._under_way.pop(entry.number, None)
        if name is None:
            return
        vm = self._roster.get(name)
        value = unpack(body) if failed else None
        if vm is not None and failed and not _runs_already(value):
            self._failed(vm, _message(value))
        elif vm is not None:
            log.info("VM %s has been started with the host", name)
        self.look(now)

    def _begin_one(self, vm: VmEntry, now: float) -> None:
        try:
            number = self._start(vm, START_SECONDS, now)
        except VmloopError as error:
            self._failed(vm, str(error))
        else:
            self._under_way[number] = vm.name

    def _failed(self, vm: VmEntry, why: str) -> None:
        log.error("VM %s could not be started with the host: %s; start it when this is mended", vm.name, why)
        self._on_failed(vm, why)


def _runs_already(value: Any) -> bool:
    """A broker before this one had it started, and was killed before it heard of it."""
    return isinstance(value, dict) and value.get("code") == AlreadyRunning.code


def _message(value: Any) -> str:
    return str(value.get("message", "no reason was told")) if isinstance(value, dict) else "no reason was told"
