# SPDX-License-Identifier: Apache-2.0
"""What the broker knows of each VM and its worker: said by workers, never asked of QEMU. Pure; used by core.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, Final

from ..common.names import VmName, vm_service
from ..common.states import StateHolder


class WorkerState(Enum):
    """One VM's worker, as the broker sees it."""

    ABSENT = "absent"  # none, and none needed
    STARTING = "starting"  # fork asked for, not presented yet
    READY = "ready"  # presented itself; requests go to it
    LEAVING = "leaving"  # said goodbye; its exit is awaited
    LOST = "lost"  # died under its VM; the next one is made when its delay is over


WORKER_MOVES: Final[Mapping[WorkerState, frozenset[WorkerState]]] = {
    WorkerState.ABSENT: frozenset({WorkerState.STARTING, WorkerState.READY}),
    WorkerState.STARTING: frozenset({WorkerState.READY, WorkerState.LOST, WorkerState.ABSENT}),
    WorkerState.READY: frozenset({WorkerState.LEAVING, WorkerState.LOST, WorkerState.ABSENT}),
    WorkerState.LEAVING: frozenset({WorkerState.ABSENT, WorkerState.READY}),
    WorkerState.LOST: frozenset({WorkerState.STARTING, WorkerState.READY, WorkerState.ABSENT}),
}


class VmEntry:
    """One VM. `status` is the map of its worker's newest HELLO, STATUS or BYE."""

    def __init__(self, name: VmName, status: dict[str, Any]) -> None:
        self.name = name
        self.service = vm_service(name).encode()
        self.status = status
        self.epoch = 0
        self.seq = 0
        self.heard: float | None = None  # when the worker last said something (monotonic)
        self.identity = b""  # of the worker on the ROUTER
        self.incarnation = 0
        self.worker_pid: int | None = None
        self.born: float = 0.0  # when the worker presented itself (monotonic)
        self.due: float | None = None  # STARTING: give up; LOST: try again; exited: nothing more will come
        self.exited = False  # its end has been seen, its last words perhaps not
        self.deaths = 0  # in a row
        self.restarts = 0
        self.protocol = 1  # agreed with its worker (common/worker_protocol.py)
        self.requests = 0  # sent to workers so far
        self.worker = StateHolder(f"worker of {name}", WorkerState.ABSENT, WORKER_MOVES, _nobody_listens)

    def take_status(self, status: dict[str, Any]) -> None:
        """What a worker says replaces all that was known."""
        status["run"] = status.get("started") is not None
        self.status = status

    @property
    def repeats(self) -> bool:
        """Whether its worker knows what became of requests that an earlier one had, and may be given them again."""
        return self.protocol >= 2

    @property
    def state(self) -> str:
        return str(self.status.get("state", "unknown"))

    @property
    def alive(self) -> bool:
        """Whether a run is not known to be over."""
        return bool(self.status.get("alive"))

    @property
    def known(self) -> bool:
        """Whether there is anything behind the name: a definition, or a run that is or was."""
        return not self.status.get("forget") and bool(self.status.get("defined") or self.status.get("run"))

    def summary(self, now: float, blocked: float) -> dict[str, Any]:
        """One entry of `list`."""
        status = self.status
        return {
            "name": self.name,
            "state": self.state,
            "reason": status.get("reason", "unknown"),
            "since": status.get("since"),
            "monitor": status.get("monitor", "lost"),
            "agent": status.get("agent", "absent"),
            "epoch": self.epoch,
            "seq": self.seq,
            "pid": status.get("pid"),
            "worker": self.worker.state.value,
            "worker_pid": self.worker_pid,
            "blocked": round(blocked, 3),
            "age": None if self.heard is None else round(now - self.heard, 3),
            "defined": bool(status.get("defined")),
            "attached": bool(status.get("attached")),
        }

    def details(self, now: float, blocked: float) -> dict[str, Any]:
        """The answer of `show`."""
        more = ("definition", "argv", "binary", "qmp", "started", "worker_started", "version")
        return {
            **self.summary(now, blocked),
            **{name: self.status.get(name) for name in more},
            "facts": self.status.get("facts") or {},
            "incarnation": self.incarnation,
            "restarts": self.restarts,
        }


class Roster:
    """All VMs, by name and by the service as it stands in frames."""

    def __init__(self) -> None:
        self._by_name: dict[VmName, VmEntry] = {}
        self.by_service: dict[bytes, VmEntry] = {}
        self.by_identity: dict[bytes, VmEntry] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[VmEntry]:
        """In the order of names."""
        return iter([self._by_name[name] for name in sorted(self._by_name)])

    def get(self, name: VmName) -> VmEntry | None:
        return self._by_name.get(name)

    def add(self, name: VmName, status: dict[str, Any] | None = None) -> VmEntry:
        """The VM's entry, made if it is not there."""
        entry = self._by_name.get(name)
        if entry is None:
            entry = VmEntry(name, status or {"state": "shutoff", "reason": "unknown"})
            self._by_name[name] = entry
            self.by_service[entry.service] = entry
        return entry

    def present(self, entry: VmEntry, identity: bytes) -> None:
        """A worker speaks for this VM from now on, under this identity."""
        self.by_identity.pop(entry.identity, None)
        entry.identity = identity
        self.by_identity[identity] = entry

    def absent(self, entry: VmEntry) -> None:
        """No worker speaks for this VM any more."""
        self.by_identity.pop(entry.identity, None)
        entry.identity = b""
        entry.worker_pid = None

    def remove(self, entry: VmEntry) -> None:
        self.by_identity.pop(entry.identity, None)
        del self._by_name[entry.name]
        del self.by_service[entry.service]


def _nobody_listens(old: WorkerState, new: WorkerState, reason: str) -> None:
    """The core acts by itself on what changes a worker's state."""
