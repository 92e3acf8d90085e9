# SPDX-License-Identifier: Apache-2.0
"""QEMU as a process: who it is, whether it lives, and signals that can only hit it. Used by vm.py.

Who a process is: common/process.py. It is held by a pidfd, and signals go through that: the kernel then refuses rather than hit a later
process with the same number.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
import subprocess
from collections.abc import Callable

from ...common.process import CannotTell, Identity, NotTheProcess, identify, open_pidfd


def peer_of(connection: socket.socket) -> int:
    """The pid that made the listening end of a connected unix socket, as the kernel noted it (SO_PEERCRED)."""
    pid: int = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid


class QemuProcess:
    """A process held by its pidfd. `fileno` turns readable when it has ended."""

    def __init__(
        self,
        identity: Identity,
        child: subprocess.Popen[bytes] | None = None,
        vouch: Callable[[Identity], bool] = lambda _: False,
    ) -> None:
        """Raises `ProcessGone` or `NotTheProcess` if `identity` is not alive; OSError if that cannot be told, `CannotTell` among them.

        Pid and start time are one process for as long as the host is up. If its executable is not the noted one, it has gone on to run
        another program, or its file was replaced or may not be read: then `vouch` is asked whether it is the VM's all the same.
        """
        self.identity = identity
        self._child = child
        self._pidfd = open_pidfd(identity.pid)
        if child is None:
            try:  # after the pidfd is open: from now on it cannot become another one unseen
                self.identity = _same_process(identity, vouch)
            except BaseException:
                os.close(self._pidfd)
                raise

    @property
    def pid(self) -> int:
        return self.identity.pid

    @property
    def own(self) -> bool:
        """Whether it is this worker's own child."""
        return self._child is not None

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


def _same_process(identity: Identity, vouch: Callable[[Identity], bool]) -> Identity:
    found = identify(identity.pid)
    if found.started != identity.started:
        raise NotTheProcess(
            f"process {identity.pid} is another one now: {found.executable or 'its executable is not shown'}"
        )
    if found.executable != identity.executable and not vouch(found):
        now = f"now runs {found.executable}" if found.executable else "does not show its executable"
        text = f"process {identity.pid}, noted as {identity.executable or 'an unknown program'}, lives and {now}"
        raise CannotTell(errno.EPERM, text)
    return found


def describe_exit(status: int | None) -> str:
    """An exit status in words."""
    if status is None:
        return "ended; nobody has told its exit status"
    if status < 0:
        try:
            return f"was ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"was ended by signal {-status}"
    return f"exited with status {status}"
