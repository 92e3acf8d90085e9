# SPDX-License-Identifier: Apache-2.0
"""How a QEMU ended that is not this worker's child: the zygote, which inherits what dead workers leave, tells. For vm.py.

    announce(pid)   at the launch: should this worker die, the zygote remembers for the next one
    watch(pid)      in a worker that resumes a run: the zygote tells this worker, also what it has seen before
    status()        when the process is known to be gone: its exit status

The other side is broker/zygote.py; the packets are in common/zygote_wire.py.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import time
from pathlib import Path
from typing import Final

from ..common.errors import BadRequest
from ..common.names import VmName
from ..common.zygote_wire import Exited, Watch, receive_packet, send_packet

log = logging.getLogger(__name__)

# The zygote reaps and tells within a millisecond; a VM's end is not held up longer for it.
STATUS_SECONDS: Final = 0.05


class Orphan:
    """What the zygote knows of one VM's QEMU. Without a zygote the status is not known."""

    def __init__(self, path: Path, name: VmName) -> None:
        """`path`: run/zygote.sock."""
        self._path = path
        self._name = name
        self._pid: int | None = None
        self._own = False  # it is this worker's child, so far
        self._connection: socket.socket | None = None  # to the zygote, while it is to tell us

    def announce(self, pid: int) -> None:
        """This worker's own child: only the zygote must know whose it is."""
        self.close()
        self._pid, self._own = pid, True
        self._try()

    def watch(self, pid: int) -> None:
        """Somebody else's child: be told how it ends."""
        self.close()
        self._pid, self._own = pid, False
        self._try()

    def again(self) -> None:
        """Another zygote is there (the control `keep`): it must know too. What the one before has told stays.

        Raises OSError if it cannot be told now.
        """
        if self._pid is None or (self._connection is not None and self._has_been_told(self._connection)):
            return
        self.close()
        connection = self._say(self._pid)
        if self._own:
            connection.close()
        else:
            self._connection = connection

    def status(self, seconds: float = STATUS_SECONDS) -> int | None:
        """How it ended, negative for a signal, as in `os.waitstatus_to_exitcode`; None if that is not known within the time.

        Waits in the kernel, so only for a VM that is over: its process is known to have ended.
        """
        until = time.monotonic() + seconds
        while self._connection is not None:
            left = until - time.monotonic()
            if left < 0 or not select.select([self._connection], [], [], left)[0]:
                return None
            try:
                packet, fds = receive_packet(self._connection)
            except (OSError, BadRequest) as error:
                log.warning("VM %s: how its QEMU ended cannot be read: %s", self._name, error)
                return None
            for fd in fds:
                os.close(fd)
            if packet is None:
                return None
            if isinstance(packet, Exited) and packet.pid == self._pid:
                return packet.status
        return None

    def fileno(self) -> int:
        """The fd of the connection; -1 without one."""
        return self._connection.fileno() if self._connection is not None else -1

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @staticmethod
    def _has_been_told(connection: socket.socket) -> bool:
        try:
            return bool(connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:  # nothing, so far
            return False

    def _try(self) -> None:
        try:
            self.again()
        except OSError as error:
            log.warning(
                "the zygote was not told of QEMU %d: should it be orphaned now, its end is not known: %s",
                self._pid,
                error,
            )

    def _say(self, pid: int) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.setblocking(False)
        try:
            connection.connect(os.fspath(self._path))
            send_packet(connection, Watch(self._name, pid))
        except OSError:
            connection.close()
            raise
        return connection
