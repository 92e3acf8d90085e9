# SPDX-License-Identifier: Apache-2.0
"""Who a process is: a pid alone is never trusted, for the kernel uses it again. Used by workers for QEMU, by the broker for workers."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Final

import msgspec

# Sent by the broker to a worker that is held up: it writes down where it is (worker/stack.py).
STACK_SIGNAL: Final = signal.SIGUSR1

_STARTTIME_FIELD: Final = 22  # /proc/PID/stat, counted from 1 (proc(5))
_STATE_FIELD: Final = 3


class ProcessGone(Exception):
    """The process is known not to exist any more."""


class NotTheProcess(Exception):
    """There is a process with this pid, but it is another one."""


class CannotTell(OSError):
    """The process may well live, but who it is cannot be seen: never read as gone, never signalled."""


class Identity(msgspec.Struct, frozen=True):
    """Which process: `started` in clock ticks after boot; `executable` is "" where it may not be read."""

    pid: int
    started: int
    executable: str


def identify(pid: int) -> Identity:
    """Who has this pid now. Raises `ProcessGone`; a zombie is gone: it ended, only nobody has asked for its status.

    Raises `CannotTell`, or another OSError (no free fd …), if that cannot be seen.
    """
    if not 0 < pid < 1 << 31:
        raise ProcessGone(f"{pid} is no pid")
    started = _started(pid)
    try:
        executable = os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
    except PermissionError:  # it has capabilities that we have not, or a security module says so
        executable = ""
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile, or is a thread of the kernel
        _started(pid)
        executable = ""
    return Identity(pid, started, executable)


def open_pidfd(pid: int) -> int:
    """A pidfd, the caller's to close. Raises `ProcessGone` if no process has this pid, OSError if that cannot be seen."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise ProcessGone(f"no process {pid}") from None
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):  # the number is that of a thread now
            raise ProcessGone(f"{pid} is a thread of another process") from None
        raise


def _started(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        raise _gone_or_hidden(pid) from None
    # The command name in parentheses may hold anything; the fields are counted from behind it.
    fields = stat[stat.rindex(b")") + 2 :].split()
    if fields[_STATE_FIELD - 3] in (b"Z", b"X"):
        raise ProcessGone(f"process {pid} has ended")
    return int(fields[_STARTTIME_FIELD - 3])


def _gone_or_hidden(pid: int) -> Exception:
    """/proc has nothing of this pid: with hidepid (proc(5)) it does so for processes of others, too."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ProcessGone(f"no process {pid}")
    except PermissionError:
        pass
    return CannotTell(errno.EACCES, f"process {pid} lives, but /proc does not show it (hidepid?)")


def boot_id() -> str:
    """The kernel's id of this boot: what ran in another boot cannot be alive."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
