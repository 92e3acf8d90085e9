# SPDX-License-Identifier: Apache-2.0
"""Where a worker is when it cannot say so itself: its stack, written to a file in C while the interpreter is held up or dying.

The broker sends STACK_SIGNAL to a worker whose loop is held up (broker/watch.py); a crash (SIGSEGV, SIGBUS, SIGABRT …) writes the same. The
worker reads the file when it moves again, its successor when it does not. Used by entry.py and app.py.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from pathlib import Path
from typing import Final

from ..common.process import STACK_SIGNAL

# The newest frames of some threads; the file may hold more, an event should not.
MAX_BYTES: Final = 8192


class StackFile:
    """run/vms/NAME/stack of one worker."""

    def __init__(self, path: Path) -> None:
        """Open it, and read what a predecessor has left: `left`. Raises OSError."""
        # Opened for appending: the dumps are written from signal handlers, and the file is emptied between them.
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.left_age = time.time() - os.fstat(self._fd).st_mtime  # seconds since it was written
        self.left = self.take()

    def arm(self) -> None:
        """From now on the signal, and a crash, write here."""
        signal.signal(STACK_SIGNAL, signal.SIG_IGN)  # what `close` brings back: the signal may be on its way then
        faulthandler.enable(self._fd, all_threads=True)
        faulthandler.register(STACK_SIGNAL, self._fd, all_threads=True, chain=False)

    def take(self) -> str:
        """What was written since the last time, at most `MAX_BYTES` of it; the file is empty after that."""
        text = os.pread(self._fd, MAX_BYTES, 0)
        if text:
            os.ftruncate(self._fd, 0)
        return text.decode("utf-8", "replace").strip()

    def close(self) -> None:
        """Let go. The signal is ignored from here on: it may be on its way."""
        faulthandler.unregister(STACK_SIGNAL)
        faulthandler.disable()
        os.close(self._fd)
