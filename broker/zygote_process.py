# SPDX-License-Identifier: Apache-2.0
"""Starting a zygote, and ending one that hangs. Used by spawner.py and handover.py; the zygote itself is zygote.py."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import msgspec

from ..common.names import VmName
from ..common.paths import Paths
from ..common.process import ProcessGone, identify
from ..common.settings import Settings
from ..common.zygote_wire import Fork, WorkerSpec
from .packets import BACKLOG, PacketEnd, PacketPoll

log = logging.getLogger(__name__)


def connect(path: Path) -> PacketEnd:
    """A connection to whoever listens there. Raises OSError: BlockingIOError if its queue of callers is full."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.setblocking(False)
    try:
        connection.connect(os.fspath(path))
    except OSError:
        connection.close()
        raise
    return PacketEnd(connection)


def start_zygote(paths: Paths, settings: Settings, at: Path) -> subprocess.Popen[bytes]:
    """Start a zygote that listens at a path, which is bound anew; one can connect at once. Raises OSError."""
    at.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(os.fspath(at))
        listener.listen(BACKLOG)
        child = subprocess.Popen(
            [
                *(sys.executable, "-m", "vmloop.broker.zygote"),
                *("--listen-fd", str(listener.fileno())),
                *("--log", os.fspath(_log_of(paths))),
                *("--level", settings.log.level),
                *("--path", os.fspath(paths.zygote_socket)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # A session of its own: a process group that is orphaned with a stopped member gets SIGHUP from the kernel, all of it.
            start_new_session=True,
            pass_fds=[listener.fileno()],
            cwd="/",
        )
    log.info("zygote started, pid %d", child.pid)
    return child


def kill_zygote(connection: PacketEnd, paths: Paths, started: int | None) -> bool:
    """End the zygote at the other end, if it surely is one of this root. False if it is left alone.

    The kernel says which process listens there (SO_PEERCRED); while the connection stands, that process lives and its pid is its own.
    `started`: when the zygote said that it was started, if it ever said anything.
    """
    pid, uid = _who_listens(connection, paths)
    try:
        pidfd = os.pidfd_open(pid)
    except (OSError, ValueError, OverflowError) as error:
        log.warning("the zygote (pid %d) cannot be ended: %s", pid, error)
        return False
    try:
        cut = select.poll()
        cut.register(connection, 0)
        identity = identify(pid)
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        ours = uid == os.getuid() and started in (None, identity.started) and os.fsencode(_log_of(paths)) in arguments
        if not ours or b"vmloop.broker.zygote" not in arguments or cut.poll(0):
            log.warning("process %d is not surely the zygote of %s: it is left alone", pid, paths.run)
            return False
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except (ProcessGone, OSError) as error:
        log.info("the zygote (pid %d) has gone meanwhile: %s", pid, error)
        return False
    finally:
        os.close(pidfd)
    return True


class Former:
    """Zygotes of ours that are not used any more: reaped when they end."""

    def __init__(self, poll: PacketPoll) -> None:
        self._poll = poll
        self._children: dict[int, subprocess.Popen[bytes]] = {}  # by pidfd
        self._unwatched: list[subprocess.Popen[bytes]] = []

    def __len__(self) -> int:
        return len(self._children)

    def add(self, child: subprocess.Popen[bytes] | None, *, kill: bool = False) -> None:
        """Part with one; `kill`: and end it."""
        if child is None or child.poll() is not None:
            return
        if kill:
            child.kill()
        self._unwatched = [other for other in self._unwatched if other.poll() is None]
        try:
            pidfd = os.pidfd_open(child.pid)
        except OSError as error:  # no fd is free: it is reaped when the next one comes
            log.warning("the former zygote %d is not watched: %s", child.pid, error)
            self._unwatched.append(child)
            return
        self._children[pidfd] = child
        self._poll.add_other(pidfd, lambda: self._reap(pidfd))

    def close(self) -> None:
        for pidfd, child in self._children.items():
            os.close(pidfd)
            let_go(child)
        for child in self._unwatched:
            let_go(child)
        self._children.clear()
        self._unwatched.clear()

    def _reap(self, pidfd: int) -> None:
        self._children.pop(pidfd).wait()  # it has ended
        self._poll.drop_other(pidfd)
        os.close(pidfd)


def let_go(child: subprocess.Popen[bytes] | None) -> None:
    """It outlives us by design; Popen must not warn about it."""
    if child is not None and child.poll() is None:
        child.returncode = 0


def _who_listens(connection: PacketEnd, paths: Paths) -> tuple[int, int]:
    """pid and uid of whoever called listen() last, as of a new connection if one can be made: ours may be older than that."""
    try:
        asked = connect(paths.zygote_socket)
    except OSError:
        asked = connection
    size = struct.calcsize("3i")
    pid, uid, _ = struct.unpack("3i", asked.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    if asked is not connection:
        asked.close()
    return pid, uid


def fork_packet(paths: Paths, settings: Settings, name: VmName) -> Fork:
    """What a zygote is asked for: a VM's worker, with all that it is told at its birth."""
    spec = WorkerSpec(
        name=name,
        run=os.fspath(paths.run),
        state=os.fspath(paths.state),
        etc=os.fspath(paths.etc),
        settings=settings,
    )
    return Fork(name, msgspec.msgpack.encode(spec))


def _log_of(paths: Paths) -> Path:
    return paths.state / "zygote.log"
