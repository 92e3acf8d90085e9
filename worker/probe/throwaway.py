# SPDX-License-Identifier: Apache-2.0
"""A QEMU that is started only to be asked: no machine, no guest, no files. Used by probing.py.

Its monitor listens on a socket that is made here and handed over as an fd; the socket's name is gone from the disk before QEMU starts. It
runs in a session of its own, its output goes into a buffer with a bound, and it dies with this process, whatever happens to that.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from ...common.errors import LaunchFailed
from ...common.process import ProcessGone, open_pidfd
from ..memory import unlimited_children
from ..qemu.process import describe_exit

OUTPUT_TAIL: Final = 4096  # bytes of its output that are kept
MAX_OUTPUT: Final = (
    1 << 20
)  # a QEMU that is only asked prints a few lines; what prints more is something else, and is ended
END_SECONDS: Final = 2.0  # for a process that was killed to be gone

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_LIBC: Final = ctypes.CDLL(None)


class Throwaway:
    """`async with Throwaway(path, "none,accel=tcg") as qemu:` one process, for as long as the block."""

    def __init__(self, binary: str, machine: str) -> None:
        self._binary = binary
        self._machine = machine
        self._loop = asyncio.get_running_loop()
        self._output = b""
        self._printed = 0
        self.ended: asyncio.Future[None] = self._loop.create_future()  # the process has ended, or prints without end

    # -- start, run, stop ---------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Start it. Raises `LaunchFailed`."""
        with contextlib.ExitStack() as on_failure:
            listener, connection = _monitor()
            on_failure.callback(connection.close)
            try:
                self._child = self._start(listener)
            except (OSError, subprocess.SubprocessError) as error:
                raise LaunchFailed(f"cannot start {self._binary}: {_reason(error)}", log="") from error
            finally:
                listener.close()
            assert self._child.stdout is not None
            on_failure.callback(self._child.stdout.close)
            on_failure.callback(self._kill)
            try:
                self._pidfd = open_pidfd(self._child.pid)
            except (OSError, ProcessGone) as error:
                raise LaunchFailed(f"{self._binary} was started and cannot be watched: {error}", log="") from error
            on_failure.pop_all()
        os.set_blocking(self._child.stdout.fileno(), False)
        self._loop.add_reader(self._child.stdout, self._read_output)
        self._loop.add_reader(self._pidfd, self._on_end)
        self.monitor = connection
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it, and whatever it has started."""
        assert self._child.stdout is not None
        self._kill()
        self._loop.remove_reader(self._pidfd)
        self._loop.remove_reader(self._child.stdout)
        if not self.ended.done():
            self.ended.cancel()
        self._child.stdout.close()
        os.close(self._pidfd)
        self.monitor.close()

    def _start(self, listener: socket.socket) -> subprocess.Popen[bytes]:
        us = os.getpid()

        def die_with_us() -> None:
            """Runs in the child: a prober that is killed leaves no QEMU behind."""
            _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
            if os.getppid() != us:
                os._exit(1)

        argv = [self._binary, "-S", "-no-user-config", "-nodefaults", "-nographic", "-machine", self._machine]
        argv += ["-chardev", f"socket,id=probe,fd={listener.fileno()},server=on,wait=off"]
        argv += ["-mon", "chardev=probe,mode=control"]
        with unlimited_children():
            return subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[listener.fileno()],
                preexec_fn=die_with_us,
                cwd="/",
            )

    def _kill(self) -> None:
        """The leader is not reaped before, so the group's number is surely its own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.kill()  # a wrapper may have left its group
        with contextlib.suppress(
            subprocess.TimeoutExpired
        ):  # it hangs in the kernel, and ends later as nobody's business
            self._child.wait(END_SECONDS)

    # -- what it says beside its monitor ------------------------------------------------------------------------------------

    async def how_it_ended(self, seconds: float) -> str:
        """In words, for an error; it may have a moment left to end in."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.shield(self.ended)
        self._read_output()
        if self._printed > MAX_OUTPUT:
            return f"it printed over {MAX_OUTPUT} bytes and was ended"
        return f"it {describe_exit(self._child.poll())}" if self.ended.done() else "it runs on"

    @property
    def output(self) -> str:
        """The end of what it printed."""
        return self._output.decode("utf-8", "replace").strip()

    def _read_output(self) -> None:
        assert self._child.stdout is not None
        for _ in range(16):  # then others have their turn
            try:
                piece = os.read(self._child.stdout.fileno(), 65536)
            except BlockingIOError:
                return
            if not piece:
                self._loop.remove_reader(self._child.stdout)
                return
            self._printed += len(piece)
            self._output = (self._output + piece)[-OUTPUT_TAIL:]
            if self._printed > MAX_OUTPUT:
                self._loop.remove_reader(self._child.stdout)
                self._on_end()
                return

    def _on_end(self) -> None:
        self._loop.remove_reader(self._pidfd)
        if not self.ended.done():
            self.ended.set_result(None)


def _monitor() -> tuple[socket.socket, socket.socket]:
    """A listening socket, and a connection to it. Its directory is removed at once. Raises `LaunchFailed`."""
    with contextlib.ExitStack() as made:
        listener = made.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        connection = made.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        try:
            with tempfile.TemporaryDirectory(prefix="vmloop-probe-") as directory:
                path = os.fspath(Path(directory) / "qmp")
                listener.bind(path)
                listener.listen(1)
                connection.connect(path)  # the backlog has room: this neither fails nor waits
        except OSError as error:
            raise LaunchFailed(f"no socket for a probe's monitor can be made: {error}", log="") from error
        connection.setblocking(False)
        made.pop_all()
    return listener, connection


def _reason(error: Exception) -> str:
    return str(error.strerror) if isinstance(error, OSError) and error.strerror else str(error)
