# SPDX-License-Identifier: Apache-2.0
"""run.json: what is known of a VM's newest run, written by its worker, read by the next worker and by a starting broker.

It is written before QEMU starts (intent), again when its process is known, and once more when it has ended. A file that is torn or
foreign is set aside and named, never trusted and never dropped.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import msgspec

from ..common.durable import set_aside, write_whole
from ..common.paths import VmPaths
from ..common.process import Identity, boot_id
from .qemu.adopt import is_refused

log = logging.getLogger(__name__)

MAX_BYTES = 4 * 1024 * 1024  # argv may be long; anything larger is not ours


class RunEnd(msgspec.Struct, frozen=True):
    """How a run ended; `state` and `reason` as in common/states.py, time in seconds since 1970."""

    state: str
    reason: str
    time: float


class Run(msgspec.Struct, frozen=True):
    """One run of a VM. `ended` is None while it is, or may be, alive."""

    epoch: int
    boot_id: str = ""
    started: float = 0.0
    process: Identity | None = None
    monitor: str = ""
    agent: str | None = None
    launched: bool = True  # False: attached
    may_kill: bool = False  # the process is surely this VM's and nobody else's
    binary: str = ""
    argv: list[str] = []
    oob: bool = False
    qemu_version: str = ""
    definition: dict[str, Any] | None = None  # what this run was started from
    ended: RunEnd | None = None


def read_run(path: Path) -> Run | None:
    """The newest run; None if there was none, or if the file was damaged (then it is set aside, with a warning that names it)."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except IsADirectoryError as error:
        log.warning("%s is damaged (%s); it was moved to %s", path, error, set_aside(path))
        return None
    try:
        if len(content) > MAX_BYTES:
            raise ValueError(f"over {MAX_BYTES} bytes")
        return msgspec.json.decode(content, type=Run)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        log.warning("%s is damaged (%s); it was moved to %s", path, error, set_aside(path))
        return None


def salvage_run(paths: VmPaths, epoch: int, *, attached: bool) -> Run:
    """What can still be said of the newest run when its file was damaged. `epoch` and `attached` as the status page has them.

    A QEMU that vmloop launched holds its listening monitor socket as long as it lives: refused there means gone. Anything else is not
    known, and is never read as the run's end.
    """
    run = Run(epoch=max(epoch, 1), boot_id=boot_id(), monitor=os.fspath(paths.monitor_socket), launched=not attached)
    if attached:
        return msgspec.structs.replace(run, ended=RunEnd("unknown", "its run.json was damaged", time.time()))
    if is_refused(run.monitor):
        return msgspec.structs.replace(run, ended=RunEnd("shutoff", "unknown", time.time()))
    return run


def write_run(path: Path, run: Run) -> None:
    """Replace the file. Raises OSError; then the old one is untouched."""
    write_whole(path, msgspec.json.encode(run))


def clear_run_directory(directory: Path) -> None:
    """Remove what a run leaves in its run directory, but not the lock and the page, which belong to the worker."""
    for name in ("monitor.sock", "agent.sock", "carry.0", "carry.1", "handlers.json", "pending.json"):
        (directory / name).unlink(missing_ok=True)


def remove_directory(directory: Path) -> None:
    """Remove a VM's directory with the plain files in it. Raises OSError if something unexpected is inside."""
    if directory.is_dir():
        with os.scandir(directory) as entries:
            for entry in entries:
                os.unlink(entry.path)
        os.rmdir(directory)
