# SPDX-License-Identifier: Apache-2.0
"""A real zygote on a socket of its own, without a broker. Used by the tests of zygote and spawner."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from vmloop.common.paths import Paths, paths_under
from vmloop.common.settings import Settings
from vmloop.common.zygote_wire import Fork, Forked, Packet, Quit, WorkerSpec, receive_packet, send_packet

SECONDS = 15.0  # nothing here takes a tenth of it on an idle machine


class Root:
    """A root directory with a short path, and the processes that belong to it; all of them are ended with it."""

    def __init__(self) -> None:
        self.paths: Paths = paths_under(Path(tempfile.mkdtemp(prefix="vml-")))
        self.paths.create()
        self._before = children()

    def close(self) -> None:
        root = self.paths.run.parent
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
            if pid in children():
                os.waitpid(pid, 0)
        for pid in children() - self._before:
            if self._is_ours(pid):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        shutil.rmtree(root)

    def _is_ours(self, pid: int) -> bool:
        """A child without a command line has ended by itself, or is in the midst of exec() and will have one at once."""
        wanted = os.fsencode(self.paths.run.parent) + b"/"
        deadline = time.monotonic() + SECONDS
        while not (command := Path(f"/proc/{pid}/cmdline").read_bytes()):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return True
            assert time.monotonic() < deadline, f"child {pid} has no command line, and has not ended"
        return wanted in command

    def processes(self) -> list[int]:
        """Zygotes of this root, and workers forked by them, which have the zygote's command line."""
        wanted = os.fsencode(self.paths.run.parent) + b"/"
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                if wanted in (directory / "cmdline").read_bytes():
                    found.append(int(directory.name))
            except OSError:
                continue  # it has ended meanwhile
        return found

    def connect(self) -> socket.socket:
        """A connection to whatever zygote listens here."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(SECONDS)
        connection.connect(os.fspath(self.paths.zygote_socket))
        return connection

    def fork_packet(self, vm: str) -> Fork:
        paths = self.paths
        spec = WorkerSpec(name=vm, run=str(paths.run), state=str(paths.state), etc=str(paths.etc), settings=Settings())
        return Fork(vm, msgspec.msgpack.encode(spec))


class ZygoteProcess(Root):
    """One zygote that a test started, with a log."""

    def __init__(self) -> None:
        super().__init__()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(os.fspath(self.paths.zygote_socket))
            listener.listen(128)
            self.child = subprocess.Popen(
                [
                    *(sys.executable, "-m", "vmloop.broker.zygote"),
                    *("--listen-fd", str(listener.fileno())),
                    *("--log", str(self.log_file)),
                    *("--path", str(self.paths.zygote_socket)),
                ],
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
        self._open: list[socket.socket] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._open:
            connection.close()
        self.child.kill()
        self.child.wait()
        self.close()

    @property
    def log_file(self) -> Path:
        return self.paths.state / "zygote.log"

    def connect(self) -> socket.socket:
        connection = super().connect()
        self._open.append(connection)
        return connection

    def fork(self, connection: socket.socket, vm: str = "web1") -> tuple[int, int]:
        """A worker's pid and pidfd; the pidfd is the caller's."""
        send_packet(connection, self.fork_packet(vm))
        packet, fds = receive_packet(connection)
        assert isinstance(packet, Forked), packet
        assert packet.vm == vm
        [pidfd] = fds
        return packet.pid, pidfd

    def ended(self, seconds: float = SECONDS) -> bool:
        """Whether the zygote ends by itself, and without an error."""
        try:
            assert self.child.wait(seconds) == 0, self.log_file.read_text()
        except subprocess.TimeoutExpired:
            return False
        return True

    def lives_after(self, connection: socket.socket) -> bool:
        """Whether it still answers, with everything dealt with that was sent on this connection before."""
        send_packet(connection, Fork("probe", b"no spec"))
        return type(receive_packet(connection)[0]).__name__ == "NotForked"


def children() -> set[int]:
    return {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def readable(thing: socket.socket | int, seconds: float = SECONDS) -> bool:
    """Whether there is something to read (for a pidfd: it has ended) within a time."""
    return bool(select.select([thing], [], [], seconds)[0])


def expect(connection: socket.socket, kind: type[Packet]) -> Packet:
    """The next packet, which is of this kind and has no fds."""
    packet, fds = receive_packet(connection)
    assert isinstance(packet, kind), packet
    assert not fds
    return packet


def quit_and_wait(root: Root) -> None:
    """Have the zygote of a root end with its last worker, and see it end."""
    pids = [pid for pid in root.processes() if pid in children()]
    with root.connect() as connection:
        send_packet(connection, Quit())
        for pid in pids:
            pidfd = os.pidfd_open(pid)
            assert readable(pidfd)
            os.close(pidfd)
            os.waitpid(pid, 0)
