# SPDX-License-Identifier: Apache-2.0
"""Who a process is: a pid alone is never trusted, for the kernel uses it again. Used by workers for QEMU, by the broker for workers."""

from __future__ import annotations

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


class Identity(msgspec.Struct, frozen=True):
    """Which process: `started` in clock ticks after boot."""

    pid: int
    started: int
    executable: str


def identify(pid: int) -> Identity:
    """Who has this pid now. Raises `ProcessGone`; a zombie is gone: it ended, only nobody has asked for its status."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessGone(f"no process {pid}") from None
    # The command name in parentheses may hold anything; the fields are counted from behind it.
    fields = stat[stat.rindex(b")") + 2 :].split()
    if fields[_STATE_FIELD - 3] in (b"Z", b"X"):
        raise ProcessGone(f"process {pid} has ended")
    try:
        executable = os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
    except FileNotFoundError:
        raise ProcessGone(f"process {pid} has ended") from None
    return Identity(pid, int(fields[_STARTTIME_FIELD - 3]), executable)


def boot_id() -> str:
    """The kernel's id of this boot: what ran in another boot cannot be alive."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
