# SPDX-License-Identifier: Apache-2.0
"""The process that a private broker belongs to (client/embedding.py starts one). Made by __main__.py, watched by loop.py; never waits.

What it was started with is not meant for a daemon: signals that its owner blocks or ignores, and the owner's service manager.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

from ..common.errors import VmloopError
from ..common.ownership import NOT_ENDED, Ownership, send_report

LOG_BYTES: Final = 1 << 20  # of broker.log, and of the one before it

# What systemd tells a service's main process (sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3)): a private broker is none.
_MANAGERS_WORDS: Final = (
    *("NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"),
    *("WATCHDOG_PID", "WATCHDOG_USEC"),
)


class Owner:
    """Readable when it has ended."""

    def __init__(self, ownership: Ownership) -> None:
        self.ownership = ownership
        # Set by the loop: no VM, worker or zygote is left; and that there ought to be none.
        self.all_ended = self.all_to_end = False
        self._report_fd: int | None = ownership.report_fd
        for fd in (ownership.owner_fd, ownership.report_fd):
            os.set_inheritable(fd, False)

    def fileno(self) -> int:
        """Its pidfd."""
        return self.ownership.owner_fd

    def report(self, error: VmloopError | None = None) -> None:
        """Tell it, once, that it is served, or why it is not."""
        if self._report_fd is not None:
            fd, self._report_fd = self._report_fd, None
            send_report(fd, error)

    @property
    def exit_code(self) -> int:
        return NOT_ENDED if self.all_to_end and not self.all_ended else 0

    def close(self) -> None:
        os.close(self.ownership.owner_fd)

    def remove_root(self, root: Path) -> None:
        """The end of a root that was only for this owner, unless somebody still lives in it. Raises OSError if not all of it goes."""
        if self.ownership.temporary and self.all_ended:
            shutil.rmtree(root)


def forget_starter(environ: MutableMapping[str, str]) -> None:
    """Signals as in a process that nobody has done anything to, for this one and for all that it starts; and no manager's words."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    for word in _MANAGERS_WORDS:
        environ.pop(word, None)
