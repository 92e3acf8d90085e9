# SPDX-License-Identifier: Apache-2.0
"""A guest's serial console on this program's standard input and output; for `vmloop run --console`. Driven by foreground.py.

On a terminal it is raw: what is typed goes to the guest as it is, until Ctrl-] leaves the console. Ctrl-C stays this program's unless it
is wanted for the guest. A job in the background shows what the guest says and takes nothing from the terminal: whoever reads there, or
changes its ways, is stopped by the kernel.

Nothing here waits: `interests` says for what to wait, `turn` does what is possible, and each direction has a window: who does not read
makes the other end wait.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
import sys
import termios
import time
import tty
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from ...common.errors import LaunchFailed

CONSOLE_ID: Final = "vmloop-console"  # of the character device that vmloop adds
LEAVE: Final = b"\x1d"  # Ctrl-], as in virsh console and telnet
# What waits in one direction; beyond it nothing more is read from the other side.
WINDOW_BYTES: Final = 64 * 1024
CHUNK_BYTES: Final = 4096  # a pipe that polls as writable takes so much without waiting
# For a terminal that has stopped reading, once the VM is gone.
FLUSH_SECONDS: Final = 2.0

_LOCAL_FLAGS, _CONTROL_CHARACTERS = 3, 6  # places in what tcgetattr returns
_DISABLED: Final = b"\0"  # _POSIX_VDISABLE on Linux


class Console:
    """The two ends. `raw`: the terminal is at present the guest's."""

    def __init__(self, *, guest_interrupt: bool, on_left: Callable[[], None]) -> None:
        """`guest_interrupt`: Ctrl-C goes to the guest. `on_left` is called when the user has left the console."""
        self.raw = False
        self._guest_interrupt = guest_interrupt
        self._on_left = on_left
        self._guest: socket.socket | None = None
        self._input: int | None = None  # what is read there goes to the guest
        self._output: int | None = None
        self._terminal: tuple[int, list[Any]] | None = None  # what is raw, and how it was before
        self._to_guest = bytearray()
        self._to_user = bytearray()

    # -- start, run, stop ---------------------------------------------------------------------------------------------------

    def open(self, path: Path) -> bool:
        """Connect to the guest's port and take the terminal. `LaunchFailed` if QEMU has no such port.

        False if the terminal was not to be had, for this is a job in the background.
        """
        guest = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            guest.connect(os.fspath(path))
        except OSError as error:
            guest.close()
            raise LaunchFailed(f"QEMU has no console at {path}: {error.strerror}", log="") from error
        guest.setblocking(False)
        self._guest = guest
        # Python has None for a standard stream that is closed.
        self._output = _own_description(sys.stdout.fileno()) if sys.stdout is not None else None
        self._input = sys.stdin.fileno() if sys.stdin is not None else None
        if self._input is not None and os.isatty(self._input):
            if _in_background(self._input):
                self._input = None
                return False
            self._terminal = self._input, termios.tcgetattr(self._input)
            self._make_raw(*self._terminal)
        return True

    def interests(self) -> dict[int, int]:
        """fd → events of poll(2) that something can be done about."""
        wanted: dict[int, int] = {}
        if self._input is not None and self._guest is not None and len(self._to_guest) < WINDOW_BYTES:
            wanted[self._input] = select.POLLIN
        if self._guest is not None:
            reads = select.POLLIN if len(self._to_user) < WINDOW_BYTES else 0
            writes = select.POLLOUT if self._to_guest else 0
            if reads or writes:
                wanted[self._guest.fileno()] = reads | writes
        if self._output is not None and self._to_user:
            wanted[self._output] = select.POLLOUT
        return wanted

    def turn(self, ready: dict[int, int]) -> None:
        """Do what has become possible."""
        if self._input in ready:
            self._read_input()
        if self._guest is not None and self._guest.fileno() in ready:
            self._serve_guest(ready[self._guest.fileno()])
        if self._output in ready:
            self._write_output()

    def restore(self) -> None:
        """Give the terminal back; what the guest still says is shown, what is typed is not the guest's any more."""
        if self._terminal is not None:
            fd, before = self._terminal
            with contextlib.suppress(termios.error):  # it has been closed
                if not _in_background(fd):  # else its shell has set it for whoever is in front
                    termios.tcsetattr(fd, termios.TCSANOW, before)
        self._terminal, self._input, self.raw = None, None, False

    def close(self) -> None:
        """The VM is gone: show its last words, and let go of everything."""
        self._input = None
        try:
            self._show_rest(time.monotonic() + FLUSH_SECONDS)
        finally:
            self.restore()
            if self._guest is not None:
                self._guest.close()
            if self._output is not None:
                os.close(self._output)
            self._guest = self._output = None

    # -- the terminal -------------------------------------------------------------------------------------------------------

    def _make_raw(self, fd: int, before: list[Any]) -> None:
        self.raw = True
        tty.setraw(fd, termios.TCSADRAIN)
        if self._guest_interrupt:
            return
        attributes = termios.tcgetattr(fd)
        attributes[_LOCAL_FLAGS] |= termios.ISIG
        characters = attributes[_CONTROL_CHARACTERS] = list(before[_CONTROL_CHARACTERS])
        characters[termios.VQUIT] = characters[termios.VSUSP] = _DISABLED
        characters[termios.VMIN], characters[termios.VTIME] = 1, 0
        termios.tcsetattr(fd, termios.TCSADRAIN, attributes)

    def _read_input(self) -> None:
        assert self._input is not None
        try:
            data = os.read(self._input, CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:  # the terminal is gone
            data = b""
        if not data:
            self._input = None
            return
        typed, left, _ = data.partition(LEAVE) if self.raw else (data, b"", b"")
        if self._guest is not None:
            self._to_guest += typed
        if left:
            self.restore()
            self._to_user.clear()
            self._drop_output()
            self._on_left()

    # -- bytes ----------------------------------------------------------------------------------------------------------------

    def _serve_guest(self, events: int) -> None:
        assert self._guest is not None
        try:
            if events & select.POLLOUT and self._to_guest:
                del self._to_guest[: self._guest.send(self._to_guest[:CHUNK_BYTES])]
            if events & ~select.POLLOUT:
                said = self._guest.recv(CHUNK_BYTES)
                if not said:
                    self._hang_up()
                elif self._output is not None:
                    self._to_user += said
        except BlockingIOError:
            return
        except OSError:
            self._hang_up()

    def _hang_up(self) -> None:
        assert self._guest is not None
        self._guest.close()
        self._guest = None
        self._to_guest.clear()

    def _write_output(self) -> None:
        assert self._output is not None
        try:
            del self._to_user[: os.write(self._output, self._to_user[:CHUNK_BYTES])]
        except BlockingIOError:
            return
        except OSError:  # nobody reads any more; the guest goes on
            self._to_user.clear()
            self._drop_output()

    def _drop_output(self) -> None:
        if self._output is not None:
            os.close(self._output)
            self._output = None

    def _show_rest(self, deadline: float) -> None:
        while self._guest is not None or (self._to_user and self._output is not None):
            poll = select.poll()
            for fd, events in self.interests().items():
                poll.register(fd, events)
            left = deadline - time.monotonic()
            ready = dict(poll.poll(left * 1000)) if left > 0 else {}
            if not ready:
                return
            self.turn(ready)


def console_arguments(path: Path) -> list[str]:
    """What QEMU is given for the console: a serial port of the guest's on a socket."""
    escaped = os.fspath(path).replace(",", ",,")
    return ["-chardev", f"socket,id={CONSOLE_ID},path={escaped},server=on,wait=off", "-serial", f"chardev:{CONSOLE_ID}"]


def _in_background(fd: int) -> bool:
    """Whether others have the terminal at present."""
    try:
        return os.tcgetpgrp(fd) != os.getpgrp()
    except OSError:  # it is not the one that controls this process, which nobody stops then; or it is gone
        return False


def _own_description(fd: int) -> int:
    """An fd for the same terminal or pipe that never waits, without making everybody else's never wait; else a duplicate."""
    kind = os.fstat(fd).st_mode
    if stat.S_ISFIFO(kind) or os.isatty(fd):
        with contextlib.suppress(OSError):  # not ours to open; then a write may wait, for as long as its reader likes
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    return os.dup(fd)
