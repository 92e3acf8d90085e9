# SPDX-License-Identifier: Apache-2.0
"""The pidfds of all workers: who of them ends, and signals to them. Used by spawner.py and loop.py; never waits."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
from collections.abc import Callable

from ..common.names import VmName
from ..common.process import ProcessGone, identify, open_pidfd

log = logging.getLogger(__name__)


class Pidfds:
    """Workers as the kernel knows them. What it waits for is in one epoll, `fileno`."""

    def __init__(self, on_exit: Callable[[VmName, int], None]) -> None:
        self._on_exit = on_exit
        self._epoll = select.epoll()
        self._workers: dict[int, tuple[VmName, int]] = {}  # pidfd → VM, pid

    def fileno(self) -> int:
        return self._epoll.fileno()

    def __len__(self) -> int:
        return len(self._workers)

    def hold(self, name: VmName, pid: int, pidfd: int) -> None:
        """Watch a worker by a pidfd, which is this object's from now on."""
        self._workers[pidfd] = (name, pid)
        self._epoll.register(pidfd, select.EPOLLIN)

    def watch(self, name: VmName, pid: int, started: int) -> None:
        """Watch a worker that presented itself without having been forked for this broker; `started` as in common/process.py."""
        if any(known == (name, pid) for known in self._workers.values()):
            return
        try:
            pidfd = open_pidfd(pid)
        except (ProcessGone, ValueError, OverflowError):  # gone, or no pid at all
            self._on_exit(name, pid)
            return
        except OSError as error:  # no free fd: it is served unwatched; what is sent to it after its end comes back
            log.error("VM %s: worker %d cannot be watched: %s", name, pid, error)
            return
        self.hold(name, pid, pidfd)
        try:
            if identify(pid).started == started:
                return
        except ProcessGone:
            return  # the pidfd tells
        except OSError as error:
            log.warning("VM %s: process %d cannot be looked at: %s", name, pid, error)
        log.warning("VM %s: process %d is not the worker that presented itself", name, pid)
        self._release(pidfd)
        self._on_exit(name, pid)

    def kill(self, name: VmName, number: int = signal.SIGKILL) -> None:
        """Send the workers of a VM (not the VM) a signal; by default they end."""
        for pidfd, (worker_of, _) in self._workers.items():
            if worker_of == name:
                with contextlib.suppress(ProcessLookupError):  # it ended by itself in this instant
                    signal.pidfd_send_signal(pidfd, number)

    def kill_all(self) -> None:
        """End every worker."""
        for name, _ in set(self._workers.values()):
            self.kill(name)

    def turn(self) -> None:
        """Tell of those that have ended."""
        for fd, _ in self._epoll.poll(0):
            name, pid = self._workers[fd]
            self._release(fd)
            self._on_exit(name, pid)

    def close(self) -> None:
        """Let go of them; they run on."""
        for pidfd in self._workers:
            os.close(pidfd)
        self._workers.clear()
        self._epoll.close()

    def _release(self, pidfd: int) -> None:
        del self._workers[pidfd]
        self._epoll.unregister(pidfd)
        os.close(pidfd)
