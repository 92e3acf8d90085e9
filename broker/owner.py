# SPDX-License-Identifier: Apache-2.0
"""The process that a private broker belongs to (client/embedding.py starts one). Made by __main__.py, watched by loop.py; never waits.

What it was started with is not meant for a daemon: signals that its owner blocks or ignores, and the owner's service manager.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import MutableMapping
from types import FrameType
from typing import Final

from ..common.errors import VmloopError
from ..common.ownership import Ownership, send_farewell, send_report
from ..common.paths import Paths

LOG_BYTES: Final = 1 << 20  # of broker.log, and of the one before it

# What systemd tells a service's main process (sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3)): a private broker is none.
_MANAGERS_WORDS: Final = (
    *("NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"),
    *("WATCHDOG_PID", "WATCHDOG_USEC"),
)


class Owner:
    """The process itself, and its end of the socket for reports."""

    def __init__(self, ownership: Ownership) -> None:
        self.ownership = ownership
        # Set by the loop: no VM, worker or zygote is left; and that there ought to be none.
        self.all_ended = self.all_to_end = False
        self.has_root = False  # set when the root's lock is held: no other broker is in it
        self.gone = False  # set by the loop
        self.asked_to_end = False  # by a signal that came before the loop could take it
        self._report = socket.socket(fileno=ownership.report_fd)
        self._reported = False
        for fd in self.filenos():
            os.set_inheritable(fd, False)

    def filenos(self) -> tuple[int, int]:
        """Its pidfd, readable when it has ended; the socket, hung up when it has let this broker go."""
        return self.ownership.owner_fd, self._report.fileno()

    def report(self, error: VmloopError | None = None) -> None:
        """Tell it, once, that it is served, or why it is not."""
        if not self._reported:
            self._reported = True
            send_report(self._report, error)

    def heed_sigterm(self) -> None:
        """Until the loop does: half a broker would leave a zygote, or a temporary root."""
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.asked_to_end = True

    def bid_farewell(self) -> None:
        """The last word, when nothing more is done."""
        send_farewell(self._report, all_ended=self.all_ended or not self.all_to_end)

    def close(self) -> None:
        os.close(self.ownership.owner_fd)
        self._report.close()

    def remove_root(self, paths: Paths) -> None:
        """The end of a root that was only for this owner, unless somebody still lives in it. Raises OSError if not all of it goes."""
        if self.ownership.temporary and self.all_ended:
            shutil.rmtree(paths.run.parent)

    def remove_unserved_root(self, paths: Paths) -> None:
        """The same after a start that failed: the owner may be gone. Where a zygote was started something may live."""
        if self.ownership.temporary and self.has_root and not paths.zygote_socket.exists():
            shutil.rmtree(paths.run.parent, ignore_errors=True)


def forget_starter(environ: MutableMapping[str, str]) -> None:
    """Signals as in a process that nobody has done anything to, for this one and for all that it starts; and no manager's words."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    for word in _MANAGERS_WORDS:
        environ.pop(word, None)
