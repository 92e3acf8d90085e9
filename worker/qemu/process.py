# SPDX-License-Identifier: Apache-2.0
"""QEMU as a process: who it is, whether it lives, and signals that can only hit it. Used by vm.py.

Who a process is: common/process.py. It is held by a pidfd, and signals go through that: the kernel then refuses rather than hit a later
process with the same number.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess

from ...common.process import Identity, NotTheProcess, ProcessGone, identify


def peer_of(connection: socket.socket) -> int:
    """The pid that made the listening end of a connected unix socket, as the kernel noted it (SO_PEERCRED)."""
    pid: int = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid


class QemuProcess:
    """A process held by its pidfd. `fileno` turns readable when it has ended."""

    def __init__(self, identity: Identity, child: subprocess.Popen[bytes] | None = None) -> None:
        """Raises `ProcessGone` or `NotTheProcess` if `identity` is not alive."""
        self.identity = identity
        self._child = child
        try:
            self._pidfd = os.pidfd_open(identity.pid)
        except ProcessLookupError:
            raise ProcessGone(f"no process {identity.pid}") from None
        if child is None:
            try:
                found = identify(
                    identity.pid
                )  # after the pidfd is open: from now on it cannot become another one unseen
                if found != identity:
                    raise NotTheProcess(f"process {identity.pid} is {found.executable}, not {identity.executable}")
            except BaseException:
                os.close(self._pidfd)
                raise

    @property
    def pid(self) -> int:
        return self.identity.pid

    def fileno(self) -> int:
        return self._pidfd

    def ended(self) -> bool:
        """Whether the process is known to be gone."""
        return bool(select.select([self._pidfd], [], [], 0)[0])

    def kill(self, signal_number: int = signal.SIGKILL) -> None:
        """Send a signal; nothing happens if the process is gone."""
        try:
            signal.pidfd_send_signal(self._pidfd, signal_number)
        except ProcessLookupError:
            return

    def status(self) -> int | None:
        """After the end: the exit status as subprocess gives it (negative: a signal); None if it is not our child."""
        return self._child.poll() if self._child is not None else None

    def close(self) -> None:
        """Let go of the process; it is not touched."""
        if self._child is not None and self._child.poll() is None:
            self._child.returncode = 0  # it lives on without us: Popen must neither wait for it nor warn
        os.close(self._pidfd)


def describe_exit(status: int | None) -> str:
    """An exit status in words."""
    if status is None:
        return "ended; its status went to its parent, which is not this worker"
    if status < 0:
        try:
            return f"was ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"was ended by signal {-status}"
    return f"exited with status {status}"
