# SPDX-License-Identifier: Apache-2.0
"""What an earlier broker left: the VMs on disk, read once before a broker begins to serve. Used by __main__.py.

This is the only time that the broker reads VMs' files; while it serves, workers tell it everything.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ..common.cursor import Cursor
from ..common.definition import definition_from_toml
from ..common.errors import BadRequest, VmloopError
from ..common.names import VmName, vm_name
from ..common.page import Page, PageDamaged, Word
from ..common.paths import Paths
from ..common.process import Identity, ProcessGone, identify

log = logging.getLogger(__name__)

_MAX_BYTES = 4 * 1024 * 1024


class _Ended(msgspec.Struct):
    state: str = "shutoff"
    reason: str = "unknown"
    time: float = 0.0
    seq: Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)] = 0


class _Run(msgspec.Struct):
    """The part of run.json (worker/runfile.py) that a list needs."""

    epoch: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] = 0
    started: float = 0.0
    ended: _Ended | None = None


class Found(msgspec.Struct, frozen=True):
    """One VM on disk, as a status that its worker would send."""

    name: VmName
    newest: Cursor  # of its events
    status: dict[str, Any]
    worker: Identity | None  # its worker, if that lives
    autostart: bool = False  # its definition says that it runs whenever the host does


def scan(paths: Paths) -> list[Found]:
    """All VMs that have a directory. What is damaged or foreign is named in the log and passed over, never removed."""
    found = []
    for entry in sorted(os.scandir(paths.vms_state), key=lambda entry: entry.name):
        try:
            name = vm_name(entry.name)
            if not entry.is_dir():
                raise BadRequest("it is no directory")
        except BadRequest as error:
            log.warning("%s is no VM's directory: %s", entry.path, error)
            continue
        defined = paths.vm(name).definition.exists()
        run = _read(paths, name)
        if defined or run is not None:
            worker, autostart = _worker(paths.vm(name).page), defined and _autostart(paths.vm(name).definition)
            newest = _newest(paths.vm(name).page, run or _Run())
            found.append(Found(name, newest, _status(run, defined), worker, autostart))
    return found


def _read(paths: Paths, name: VmName) -> _Run | None:
    path = paths.vm(name).run_file
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(_MAX_BYTES), type=_Run)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        log.warning("%s cannot be read (%s): VM %s is unknown until its worker has looked", path, error, name)
        return _Run()


def _autostart(path: Path) -> bool:
    """Whether a definition asks for it. One that does not make sense is not started; its worker says why to whoever starts it."""
    try:
        with path.open("rb") as file:
            return definition_from_toml(file.read(_MAX_BYTES), os.fspath(path)).autostart
    except (OSError, VmloopError) as error:
        log.warning("%s: not started with the host: %s", path, error)
        return False


def _newest(path: Path, run: _Run) -> Cursor:
    """The VM's newest event: its page knows, until the next boot; then what was written down at the run's end."""
    try:
        with Page(path, writable=False) as page:
            newest = page.newest()
    except (OSError, PageDamaged):
        newest = Cursor(0, 0)
    return max(newest, Cursor(run.epoch, run.ended.seq if run.ended is not None else 0))


def _worker(path: Path) -> Identity | None:
    """The worker whose page this is; None if it is gone, or the page is."""
    try:
        with Page(path, writable=False) as page:
            pid, started = page.words[Word.WORKER_PID], page.words[Word.WORKER_STARTED]
        worker = identify(pid)
    except (OSError, PageDamaged, ProcessGone):
        return None
    return worker if worker.started == started else None


def _status(run: _Run | None, defined: bool) -> dict[str, Any]:
    status: dict[str, Any] = {"defined": defined, "state": "shutoff", "reason": "unknown", "run": run is not None}
    if run is None:
        return status
    if run.ended is None:
        return {**status, "state": "unknown", "reason": "not looked at yet", "alive": True, "started": run.started}
    return {
        **status,
        "state": run.ended.state,
        "reason": run.ended.reason,
        "since": run.ended.time,
        "started": run.started,
    }
