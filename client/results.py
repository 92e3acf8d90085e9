# SPDX-License-Identifier: Apache-2.0
"""What the operations answer, typed (docs/operations.md). Made by requests.py.

A newer broker may send more fields than these: they are ignored here, and `Host.call` hands out the answer as it came. States are plain
text, so that a state this version does not know is shown rather than refused. A field that an older broker leaves out has its default.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from ..common.cursor import Cursor
from ..common.errors import Internal

Model = TypeVar("Model")


def typed(value: object, model: type[Model]) -> Model:
    """The answer as a model; `Internal` if the broker sent something else."""
    try:
        return msgspec.convert(value, model)
    except msgspec.ValidationError as error:
        raise Internal(
            f"the broker's answer does not fit: {error}; do broker and client have the same version?"
        ) from error


class BrokerVersion(msgspec.Struct, frozen=True):
    """Answer of `version`."""

    version: str
    protocol: Any = None
    pid: int = 0
    started: float = 0.0  # seconds since 1970


class VmSummary(msgspec.Struct, frozen=True):
    """One entry of `list`."""

    name: str
    state: str
    reason: str = ""
    since: float | None = None  # when it entered the state, seconds since 1970
    monitor: str = ""
    agent: str = ""
    epoch: int = 0
    seq: int = 0
    pid: int | None = None
    worker: str = ""
    worker_pid: int | None = None
    blocked: float = 0.0  # seconds that the worker's loop has been held up
    age: float | None = None  # seconds since the worker last said something
    defined: bool = False
    attached: bool = False

    @property
    def cursor(self) -> Cursor:
        """The VM's newest event, as far as the broker knew."""
        return Cursor(self.epoch, self.seq)


class QmpSummary(msgspec.Struct, frozen=True):
    """The monitor in `show`."""

    version: Any = None
    package: str | None = None
    oob: bool | None = None
    path: str | None = None
    in_flight: int = 0
    queued: int = 0
    garbled: int = 0


class VmDetails(VmSummary, frozen=True):
    """Answer of `show`."""

    definition: Any = None  # TOML text, as the operator wrote it
    argv: list[str] | None = None
    binary: str | None = None
    qmp: QmpSummary | None = None
    started: float | None = None
    worker_started: float | None = None
    incarnation: int | str | None = None
    facts: dict[str, Any] | None = {}  # what handlers have found out about this run, jobs among it


class ProcessFigures(msgspec.Struct, frozen=True):
    """What one process uses."""

    pid: int
    cpu_seconds: float = 0.0
    rss_bytes: int = 0
    threads: int = 0


class VmStats(msgspec.Struct, frozen=True):
    """One entry of `stats`."""

    name: str
    state: str = ""
    epoch: int = 0
    seq: int = 0
    age: float | None = None
    in_flight: int = 0
    requests: int = 0
    restarts: int = 0
    qemu: ProcessFigures | None = None
    worker: ProcessFigures | None = None


class VmStarted(msgspec.Struct, frozen=True):
    """Answer of `start` and `attach`."""

    name: str
    state: str
    reason: str = ""
    epoch: int = 0
    pid: int | None = None


class VmChanged(msgspec.Struct, frozen=True):
    """Answer of `stop kill pause resume reset wait`."""

    state: str
    reason: str = ""
    epoch: int | None = None


class HostShutdown(msgspec.Struct, frozen=True):
    """Answer of `shutdown`."""

    vms: str
    count: int = 0


class WorkerNotRestarted(msgspec.Struct, frozen=True):
    """One VM of `restart-workers` whose worker was not replaced; the VM runs on."""

    name: str
    error: str


class WorkersRestarted(msgspec.Struct, frozen=True):
    """Answer of `restart-workers`."""

    restarted: int
    failed: list[WorkerNotRestarted] = []
