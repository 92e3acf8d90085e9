# SPDX-License-Identifier: Apache-2.0
"""Finding the QEMU of a run again, in a worker that did not start it. Used by worker/recognition.py and beginnings.py.

    known by its pid       same start time and executable: it is. Another start time: the run's process is gone. Another executable, or
                           one that may not be read: it is if it has the run's mark in its environment, or made the monitor's socket
    launched, pid unknown  (its worker died in the instant of the start, or run.json was damaged) sought in /proc by the mark; none, and
                           the monitor's socket refuses: gone. None, and no socket there: gone if no process can be seen that may be it
    attached without pid   nobody knows

What cannot be told is an error of its own, never "gone": a second QEMU on the same disks, or a signal to a stranger, cannot be taken back.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Final

from ...common.definition import MONITOR_ID
from ...common.paths import VmPaths
from ...common.process import Identity, NotTheProcess, ProcessGone, identify
from ..runfile import Run
from .adopt import is_refused
from .launch import VM_VARIABLE, mark_of
from .process import QemuProcess, peer_of

MONITOR_ARGUMENT: Final = (
    f"chardev={MONITOR_ID},mode=control"  # of every QEMU that launch.py starts, and of none of its helpers
)


def recognise(run: Run, paths: VmPaths, connection: socket.socket | None = None) -> QemuProcess | None:
    """The run's process, held; None if nobody knows it, and it may live. `connection`: to its monitor, if there is one.

    Raises `ProcessGone` if it is known to be gone; OSError if that cannot be told now, `CannotTell` among them.
    """
    mark = run.mark or mark_of(paths, run.epoch)
    if run.process is not None:

        def vouch(found: Identity) -> bool:
            made_socket = connection is not None and peer_of(connection) == found.pid
            return made_socket or (run.launched and is_marked(found.pid, mark))

        try:
            return QemuProcess(run.process, vouch=vouch)
        except NotTheProcess as error:
            raise ProcessGone(str(error)) from error
    if not run.launched:
        return None
    found = find_marked(mark)
    if found is None and (is_refused(run.monitor) or not (os.path.lexists(run.monitor) or any_may_be(mark))):
        raise ProcessGone(f"no process was started for it, and nobody listens at {run.monitor}")
    return found


def is_marked(pid: int, mark: str) -> bool:
    """Whether a process of this user has exactly this mark in its environment, and is no helper that inherited it.

    False, too, if its environment may not be read.
    """
    directory = Path(f"/proc/{pid}")
    with contextlib.suppress(OSError):  # gone meanwhile, or not ours to look at
        return directory.stat().st_uid == os.geteuid() and _has_mark(directory, mark) and _has_monitor(directory)
    return False


def any_may_be(mark: str) -> bool:
    """Whether a QEMU of vmloop's may be the one with this mark: it has become another user's, or does not show its environment."""
    return any(_may_be(Path("/proc", entry), mark) for entry in os.listdir("/proc") if entry.isdecimal())


def _may_be(directory: Path, mark: str) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # gone meanwhile
        try:
            return _has_monitor(directory) and _has_mark(directory, mark)
        except PermissionError:
            return True
    return False


def _has_mark(directory: Path, mark: str) -> bool:
    """`mark` as `mark_of` makes it: one that names no epoch is had by a process of any."""
    wanted = f"{VM_VARIABLE}={mark}".encode()
    for variable in (directory / "environ").read_bytes().split(b"\0"):
        if variable == wanted or (
            mark.endswith(":") and variable.startswith(wanted) and variable[len(wanted) :].isdigit()
        ):
            return True
    return False


def _has_monitor(directory: Path) -> bool:
    """A helper that inherited the mark has not."""
    return MONITOR_ARGUMENT.encode() in (directory / "cmdline").read_bytes().split(b"\0")


def find_marked(mark: str) -> QemuProcess | None:
    """The process that launch.py started with this mark, held; None if there is none that can be seen."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and is_marked(int(entry), mark):
            with contextlib.suppress(ProcessGone):
                found.append(identify(int(entry)))
    # The first to start is the one that launch.py started; a wrapper's children are later, and end with it or not at all.
    for identity in sorted(found, key=lambda identity: (identity.started, identity.pid)):
        with contextlib.suppress(ProcessGone, NotTheProcess):
            process = QemuProcess(identity)
            if is_marked(process.pid, mark):  # once more, now that it cannot become another one unseen
                return process
            process.close()
    return None
