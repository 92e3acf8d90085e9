# SPDX-License-Identifier: Apache-2.0
"""run.json: what is known of a VM's newest run, written by its worker, read by the next worker and by a starting broker.

It is written before QEMU starts (intent), again when its process is known, and once more when it has ended. A file that is torn or
foreign is set aside and named, never trusted and never dropped.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import tenacity

from ..common.cursor import Cursor
from ..common.durable import set_aside, write_whole
from ..common.paths import JOURNAL, VmPaths
from ..common.process import Identity, boot_id
from .qemu.launch import mark_of

log = logging.getLogger(__name__)

RETRY_FIRST: Final = 0.5  # seconds before a failed write is tried again; doubles
RETRY_MAX: Final = 30.0  # up to this: whoever makes room on the disk waits no longer for it to be noticed
MAX_BYTES = 4 * 1024 * 1024  # argv may be long; anything larger is not ours


class RunEnd(msgspec.Struct, frozen=True):
    """How a run ended; `state` and `reason` as in common/states.py, time in seconds since 1970."""

    state: str
    reason: str
    time: float
    seq: int = 0  # of the newest event then; its handlers may have added some


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
    mark: str = ""  # of a launched one: what it has in its environment (worker/qemu/launch.py)
    binary: str = ""
    argv: list[str] = []
    oob: bool = False
    qemu_version: str = ""
    definition: dict[str, Any] | None = None  # what this run was started from
    ended: RunEnd | None = None
    began: int = 0  # the epoch that it began with, if its page was lost since and its events go on in a later one

    @property
    def first_epoch(self) -> int:
        """The epoch of its first event."""
        return self.began or self.epoch


def over(run: Run, state: str, reason: str, newest: Cursor, at: float | None = None) -> Run:
    """The run with its end. `newest`: its newest event; `at`: seconds since 1970, now if None."""
    return msgspec.structs.replace(run, ended=RunEnd(state, reason, time.time() if at is None else at, newest.seq))


def read_run(path: Path) -> Run | None:
    """The newest run; None if there was none, or if the file was damaged (then it is set aside, with a warning that names it)."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except IsADirectoryError as error:
        _put_aside(path, error)
        return None
    try:
        if len(content) > MAX_BYTES:
            raise ValueError(f"over {MAX_BYTES} bytes")
        return msgspec.json.decode(content, type=Run)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        _put_aside(path, error)
        return None


def _put_aside(path: Path, damage: Exception) -> None:
    try:
        log.warning("%s is damaged (%s); it was moved to %s", path, damage, set_aside(path))
    except OSError as error:  # a file system that is read-only
        log.warning("%s is damaged (%s), and cannot be moved: %s", path, damage, error.strerror)


def salvage_run(paths: VmPaths, epoch: int, *, attached: bool) -> Run:
    """What can still be said of the newest run when its file was damaged. `epoch` and `attached` as the status page has them.

    A QEMU that vmloop launched may live: it is sought by its mark (qemu/recognise.py). An attached one can only be attached again.
    """
    run = Run(epoch=max(epoch, 1), boot_id=boot_id(), monitor=os.fspath(paths.monitor_socket), launched=not attached)
    if attached:
        return msgspec.structs.replace(run, ended=RunEnd("unknown", "its run.json was damaged", time.time()))
    return msgspec.structs.replace(run, may_kill=True, mark=mark_of(paths, None))


def write_run(path: Path, run: Run) -> None:
    """Replace the file. Raises OSError; then the old one is untouched."""
    write_whole(path, msgspec.json.encode(run))


class RunFile:
    """run.json of one VM, written by its worker. A write that may wait is tried again until the disk takes it; the newest content wins."""

    def __init__(self, loop: asyncio.AbstractEventLoop, path: Path, told: Callable[[str | None], None]) -> None:
        """`told` hears why the file is not up to date, and None when it is again."""
        self._loop = loop
        self._path = path
        self._told = told
        self._newest: Run | None = None  # what the file should hold and does not
        self._trouble = False
        self._retrying: asyncio.Task[None] | None = None

    def write(self, run: Run) -> None:
        """Write now. Raises OSError; then the old content stands, and nothing is tried again."""
        write_run(self._path, run)
        self._newest = None
        if self._trouble:
            self._trouble = False
            self._told(None)

    def write_or_retry(self, run: Run) -> None:
        """Write now, or as soon as it can be."""
        try:
            self.write(run)
        except OSError as error:
            self._newest = run
            self._trouble = True
            log.error("%s cannot be written: %s; it is tried again", self._path, error.strerror)
            self._told(f"{self._path} is out of date: {error.strerror}")
            if self._retrying is None:
                self._retrying = self._loop.create_task(self._retry())

    def close(self) -> None:
        """Nothing is tried again after this."""
        if self._retrying is not None:
            self._retrying.cancel()

    async def _retry(self) -> None:
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(OSError),
            wait=tenacity.wait_exponential(multiplier=RETRY_FIRST, max=RETRY_MAX),
        )
        try:
            async for attempt in retrying:
                with attempt:
                    if self._newest is not None:
                        self.write(self._newest)
        finally:
            self._retrying = None


def clear_run_directory(directory: Path) -> None:
    """Remove what a run leaves in its run directory, but not the lock and the page, which belong to the worker.

    What cannot be removed is named in the log: the next start replaces it.
    """
    sockets = ("monitor.sock", "agent.sock")
    carries = ("carry.0", "carry.1", "agent-carry.0", "agent-carry.1")
    for name in (*sockets, *carries, "handlers.json", "pending.json"):
        try:
            (directory / name).unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be removed: %s", directory / name, error.strerror)


def remove_directory(directory: Path) -> None:
    """Remove a VM's directory with the plain files in it and its journal. Raises OSError if something unexpected is inside."""
    if directory.is_dir():
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name == JOURNAL and entry.is_dir(follow_symlinks=False):
                    remove_directory(Path(entry.path))
                else:
                    os.unlink(entry.path)
        os.rmdir(directory)
