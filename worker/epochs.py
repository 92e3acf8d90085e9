# SPDX-License-Identifier: Apache-2.0
"""Numbers of runs: none is given to two runs of a name, not even if the VM was forgotten in between.

Who follows a VM's events knows them by their numbers, and would take those of a new VM of the name for the old one's. So the last epoch of
a VM that is forgotten stays in state/epochs/NAME, in decimal, after the VM's own directories are gone. Used by vm.py, which counts, and by
entry.py and verbs/definition.py, which forget.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final

from ..common.durable import set_aside, write_whole
from ..common.paths import VmPaths
from .runfile import Run

log = logging.getLogger(__name__)

MAX_NAMES: Final = 4096  # files in the directory: who made more names than that gets the oldest ones' numbers again
MAX_EPOCH: Final = 1 << 31  # no VM comes to it; behind it there is still room for as many runs
_MAX_BYTES: Final = 32  # of a file: anything longer is not ours


def next_epoch(paths: VmPaths, run: Run | None, newest: int) -> int:
    """The number of a run that begins. `newest`: what page and journal know; they, run.json, or all of it may have been lost."""
    return max(run.epoch if run is not None else 0, newest, epoch_left(paths.epoch)) + 1


def epoch_left(path: Path) -> int:
    """The last epoch of a VM that was forgotten; 0 if there is none. A file that makes no sense is set aside and named in the log."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return 0
    except OSError as error:
        log.error("%s cannot be read: %s; numbers of runs may come again", path, error.strerror)
        return 0
    text = content.removesuffix(b"\n")
    if len(content) <= _MAX_BYTES and text.isdigit() and int(text) <= MAX_EPOCH:
        return int(text)
    try:
        log.error("%s is no number of a run; it was moved to %s; numbers of runs may come again", path, set_aside(path))
    except OSError as error:
        log.error("%s is no number of a run, and cannot be moved: %s", path, error.strerror)
    return 0


def leave_epoch(paths: VmPaths, run: Run | None, newest: int) -> bool:
    """The VM is forgotten: let its last epoch outlive it. `newest` as above. False, and a line in the log, if the disk takes nothing."""
    last = next_epoch(paths, run, newest) - 1
    if last in (0, epoch_left(paths.epoch)):
        return True
    try:
        paths.epoch.parent.mkdir(mode=0o700, exist_ok=True)
        write_whole(paths.epoch, b"%d\n" % last)
        _make_room(paths.epoch.parent)
    except OSError as error:
        log.error("the last epoch %d cannot be kept: %s: %s", last, error.filename, error.strerror)
        return False
    return True


def _make_room(directory: Path) -> None:
    """Remove the oldest files beyond the bound. Another worker may be at it, too."""
    with os.scandir(directory) as entries:
        paths = [Path(entry.path) for entry in entries]
    if len(paths) > MAX_NAMES:
        paths.sort(key=_age, reverse=True)
        for path in paths[: len(paths) - MAX_NAMES]:
            path.unlink(missing_ok=True)


def _age(path: Path) -> int:
    """The higher the older; what is gone meanwhile is as new as can be."""
    try:
        return -path.stat().st_mtime_ns
    except FileNotFoundError:
        return -(1 << 63)
