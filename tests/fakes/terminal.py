# SPDX-License-Identifier: Apache-2.0
"""A terminal with a program in it that has it as its controlling terminal: what a person at a keyboard sees and types."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

SECONDS: Final = 30.0
# Takes the terminal on its standard input as its own, and becomes the program.
_LAUNCHER: Final = """
import fcntl, os, signal, sys, termios
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)  # whatever the test's own starter has chosen
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """Ended with its `with`: the program is killed if it still runs."""

    def __init__(self, argv: list[str], cwd: Path, env: Mapping[str, str]) -> None:
        self._keyboard, line = pty.openpty()
        self.before = termios.tcgetattr(line)
        self._line = line  # kept open, so that it can be looked at when the program has ended
        self.seen = b""
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCHER, *argv],
            stdin=line,
            stdout=line,
            stderr=line,
            cwd=cwd,
            env=dict(env),
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._line)
        os.close(self._keyboard)

    def type(self, keys: bytes) -> None:
        os.write(self._keyboard, keys)

    def attributes(self) -> list[Any]:
        return termios.tcgetattr(self._line)

    @property
    def is_raw(self) -> bool:
        return not self.attributes()[3] & termios.ICANON

    def see(self, *texts: bytes, seconds: float = SECONDS) -> None:
        """Wait until one of these has been shown; what came before it counts as seen."""
        deadline = time.monotonic() + seconds
        while not any(text in self.seen for text in texts):
            left = deadline - time.monotonic()
            assert left > 0, f"none of {texts} within {seconds} s; shown: {self.seen!r}"
            assert self._read(left) or self.process.poll() is None, f"it has ended; shown: {self.seen!r}"
        text = next(text for text in texts if text in self.seen)
        self.seen = self.seen.partition(text)[2]

    def end(self, seconds: float = SECONDS) -> int:
        """Its exit code; what it shows until then is in `seen`."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            left = deadline - time.monotonic()
            assert left > 0, f"it does not end; shown: {self.seen!r}"
            self._read(min(left, 0.1))
        while self._read(0):
            pass
        return self.process.wait()

    def _read(self, seconds: float) -> bool:
        if not select.select([self._keyboard], [], [], seconds)[0]:
            return False
        with contextlib.suppress(OSError):  # nobody has the other end
            self.seen += os.read(self._keyboard, 65536)
        return True
