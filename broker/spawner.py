# SPDX-License-Identifier: Apache-2.0
"""The broker's hold on processes: the zygote, and the pidfds of all workers. Driven by loop.py; never waits.

A zygote that runs (an earlier broker's) is used; else one is started on a listening socket made here, so that connecting to it needs no
retry. Worker pidfds come from the zygote with the news of the fork, or are opened here for workers that outlived an earlier broker.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

import msgspec

from ..common.errors import BadRequest
from ..common.names import VmName
from ..common.paths import Paths
from ..common.process import ProcessGone, identify, open_pidfd
from ..common.settings import Settings
from ..common.zygote_wire import FdsLost, Fork, Forked, NotForked, Packet, Quit, WorkerSpec, receive_packet, send_packet

log = logging.getLogger(__name__)


class Spawner:
    """Forks through the zygote, and tells of exits. Everything it waits for is in one epoll, `fileno`."""

    def __init__(
        self,
        paths: Paths,
        settings: Settings,
        on_forked: Callable[[VmName, int], None],
        on_not_forked: Callable[[VmName, str], None],
        on_exit: Callable[[VmName, int], None],
        on_new_zygote: Callable[[], None],
    ) -> None:
        self._paths = paths
        self._settings = settings
        self._on_forked = on_forked
        self._on_not_forked = on_not_forked
        self._on_exit = on_exit
        self._on_new_zygote = on_new_zygote
        self._epoll = select.epoll()
        self._zygote: socket.socket | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._workers: dict[int, tuple[VmName, int]] = {}  # pidfd → VM, pid
        self._ending = False

    # -- start --------------------------------------------------------------------------------------------------------------

    def start(self) -> bool:
        """Connect to the zygote, or start one. True if it is a new one. Raises OSError, also for one that lives and is only busy."""
        try:
            self._use(self._connect())
        except (ConnectionRefusedError, FileNotFoundError):  # nobody listens
            self._start_zygote()
            self._use(self._connect())
            return True
        return False

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.setblocking(False)
        try:
            connection.connect(os.fspath(self._paths.zygote_socket))
        except OSError:
            connection.close()
            raise
        return connection

    def _use(self, connection: socket.socket) -> None:
        self._zygote = connection
        self._epoll.register(connection, select.EPOLLIN)

    def _start_zygote(self) -> None:
        path = self._paths.zygote_socket
        path.unlink(missing_ok=True)  # nobody listens there, as `start` has just found
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(os.fspath(path))
            listener.listen(128)
            self._child = subprocess.Popen(
                [
                    *(sys.executable, "-m", "vmloop.broker.zygote"),
                    *("--listen-fd", str(listener.fileno())),
                    *("--log", os.fspath(self._paths.state / "zygote.log")),
                    *("--level", self._settings.log.level),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # A session of its own: a process group that is orphaned with a stopped member gets SIGHUP from the kernel, all of it.
                start_new_session=True,
                pass_fds=[listener.fileno()],
                cwd="/",
            )
        log.info("zygote started, pid %d", self._child.pid)

    # -- run ----------------------------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        return self._epoll.fileno()

    def fork(self, name: VmName) -> None:
        """Ask for a worker; `on_forked` or `on_not_forked` follows."""
        spec = WorkerSpec(
            name=name,
            run=os.fspath(self._paths.run),
            state=os.fspath(self._paths.state),
            etc=os.fspath(self._paths.etc),
            settings=self._settings,
        )
        self._send(Fork(name, msgspec.msgpack.encode(spec)), name)

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
        self._hold(name, pid, pidfd)
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

    def end_zygote(self) -> None:
        """The zygote shall end with its last worker."""
        self._ending = True
        self._send(Quit(), None)

    def turn(self) -> None:
        """Take what has happened: packets of the zygote, exits of workers."""
        for fd, _ in self._epoll.poll(0):
            if self._zygote is not None and fd == self._zygote.fileno():
                self._receive(self._zygote)
            elif fd in self._workers:
                name, pid = self._workers[fd]
                self._release(fd)
                self._on_exit(name, pid)

    def close(self) -> None:
        """Let go of everything; zygote and workers run on."""
        for pidfd in self._workers:
            os.close(pidfd)
        self._workers.clear()
        if self._zygote is not None:
            self._zygote.close()
            self._zygote = None
        if self._child is not None and self._child.poll() is None:
            self._child.returncode = 0  # it outlives us by design; Popen must not warn about it
        self._epoll.close()

    def _hold(self, name: VmName, pid: int, pidfd: int) -> None:
        self._workers[pidfd] = (name, pid)
        self._epoll.register(pidfd, select.EPOLLIN)

    def _release(self, pidfd: int) -> None:
        del self._workers[pidfd]
        self._epoll.unregister(pidfd)
        os.close(pidfd)

    def _send(self, packet: Fork | Quit, name: VmName | None) -> None:
        try:
            if self._zygote is None:
                self._renew()
            if self._zygote is not None:
                send_packet(self._zygote, packet)
        except OSError as error:
            if name is not None:
                self._on_not_forked(name, f"the zygote cannot be asked: {error}")

    def _receive(self, zygote: socket.socket) -> None:
        try:
            packet, fds = receive_packet(zygote)
        except BlockingIOError:
            return
        except FdsLost as error:  # a worker was made; it presents itself all the same, and is watched then
            log.error("zygote: %s", error)
            return
        except (OSError, BadRequest) as error:
            log.error("zygote: %s", error)
            packet, fds = None, []
        if packet is None:
            self._zygote_lost()
        elif isinstance(packet, Forked) and len(fds) == 1:
            name = VmName(packet.vm)
            self._hold(name, packet.pid, fds.pop())
            self._on_forked(name, packet.pid)
        else:
            self._on_packet(packet)
        for fd in fds:
            os.close(fd)

    def _on_packet(self, packet: Packet) -> None:
        if isinstance(packet, NotForked):
            self._on_not_forked(VmName(packet.vm), packet.error)

    def _zygote_lost(self) -> None:
        assert self._zygote is not None
        self._epoll.unregister(self._zygote)
        self._zygote.close()
        self._zygote = None
        if self._child is not None:
            self._child.poll()
        if not self._ending:
            log.error("the zygote is gone; another one takes its place")
            try:
                self._renew()
            except OSError as error:
                log.error("no zygote can be started (%s); the next worker that is needed tries again", error)

    def _renew(self) -> None:
        if self.start():
            self._on_new_zygote()
