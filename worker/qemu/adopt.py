# SPDX-License-Identifier: Apache-2.0
"""Adopting a QMP server that somebody else started: its monitor's connection and its process. Used by beginnings.py and others of a worker.

Whether a process may be killed is decided here: only when it is surely the one at the other end.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Final

import msgspec
import tenacity

from ...common.errors import BadRequest, Denied, MonitorLost
from ...common.paths import require_socket_path
from ...common.process import NotTheProcess, ProcessGone, identify
from .process import QemuProcess, peer_of

BUSY_SECONDS: Final = (
    1.0  # a QEMU that was stopped takes first, one by one, the connections that were given up meanwhile
)
BUSY_LOOK: Final = 0.02  # seconds between two tries at such a monitor


class MonitorBusy(MonitorLost):
    """Its listening socket takes no further connection at present."""


class Found(msgspec.Struct, frozen=True):
    """The process behind a monitor; None if it cannot be told."""

    process: QemuProcess | None
    may_kill: bool


def connect_monitor(path: str) -> socket.socket:
    """A connection to a QMP socket, non-blocking. Raises `MonitorLost` if nobody listens, of these `MonitorBusy` if too many
    wait there already, and `BadRequest` for a path that cannot be one.
    """
    if not os.path.isabs(path) or "\0" in path:
        raise BadRequest(f"{path!r:.200} is no absolute path of a socket")
    require_socket_path(Path(path))
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        connection.connect(path)
    except BlockingIOError:
        connection.close()
        raise MonitorBusy(
            f"{path}: another client is connected and more wait; a QMP socket serves one at a time"
        ) from None
    except OSError as error:
        connection.close()
        raise MonitorLost(f"{path}: {error.strerror}; is QEMU running, with a QMP socket there?") from error
    return connection


async def connect_in_turn(path: str, seconds: float) -> socket.socket:
    """`connect_monitor`, tried again for so long while too many wait there. Raises as that does."""

    async def connect() -> socket.socket:
        return connect_monitor(path)

    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(MonitorBusy),
        wait=tenacity.wait_fixed(BUSY_LOOK),
        stop=tenacity.stop_after_delay(max(0.0, seconds)),
        reraise=True,
    )
    return await retrying(connect)


def is_refused(path: str) -> bool:
    """Whether a socket is there and nobody listens at it. Of a QEMU that was launched with its listening socket this means that it is gone.

    Where there is no socket nothing is refused: its file may have been removed under a QEMU that lives.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except (BlockingIOError, FileNotFoundError):  # others wait there already; there is none
            return False
    return False


def find_process(connection: socket.socket, pid: int | None) -> Found:
    """The process of an attached VM. Raises `Denied` if a given pid is not alive.

    Without a pid the kernel's word counts (who made the listening socket), but only for a QEMU executable: the maker may be a
    launcher that passed the socket on, or a process that serves many VMs.
    """
    if pid is not None:
        try:
            return Found(QemuProcess(identify(pid)), True)
        except (ProcessGone, NotTheProcess, OSError) as error:
            raise Denied(f"--pid {pid}: {error}; give the pid of the VM's QEMU, or leave it out") from error
    try:
        identity = identify(peer_of(connection))
        if not Path(identity.executable).name.startswith("qemu"):
            return Found(None, False)
        return Found(QemuProcess(identity), True)
    except (ProcessGone, NotTheProcess, OSError):
        return Found(None, False)
