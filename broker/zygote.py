# SPDX-License-Identifier: Apache-2.0
"""The zygote: a process of its own that has the worker's imports done and forks workers. `python -m vmloop.broker.zygote`.

It has no thread and no ZeroMQ context, so a fork of it is safe and costs a few milliseconds. It also keeps a duplicate of every monitor
and agent connection, so that a connection outlives its worker: the next worker of that VM inherits it with the fork. It is a subreaper:
a QEMU whose worker died becomes its child, and its exit status is seen. It outlives the broker; it ends by itself when nobody is
connected, no child is left and nothing is kept. Packets: common/zygote_wire.py.

Runs as: started by broker/spawner.py, which hands it the listening socket. `main` and `Zygote` run in the zygote, `_child` in the worker.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import logging
import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from ..common.errors import BadRequest
from ..common.log import log_to_file
from ..common.zygote_wire import (
    Drop,
    Exited,
    Fork,
    Forked,
    Keep,
    NotForked,
    Packet,
    Quit,
    WorkerSpec,
    receive_packet,
    send_packet,
)
from ..worker.entry import run_worker

log = logging.getLogger(__name__)

_PR_SET_NAME: Final = 15  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER: Final = 36
# A zygote whose broker died before it connected goes away by itself.
LONELY_MS: Final = 30_000
LOG_BYTES: Final = 1 << 20


class Zygote:
    """The loop of the zygote process. Single-threaded; waits only in `select.poll`."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._connections: dict[int, socket.socket] = {}
        self._brokers: set[int] = set()  # connections that have asked for a fork
        self._kept: dict[str, dict[str, int]] = {}  # VM → slot → fd
        self._workers: dict[int, str] = {}  # pid → VM
        self._exits: dict[str, int] = {}  # VM → how its last worker ended, if not in order
        self._ending = False
        self._met_somebody = False
        self._spare = _open_spare()
        self._wake_read, self._wake_write = socket.socketpair()
        self._poll = select.poll()

    def run(self) -> None:
        """Serve until there is nothing left to do."""
        self._listener.setblocking(False)
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # the wake-up fd is what counts
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_ending", True))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._poll.register(self._listener, select.POLLIN)
        self._poll.register(self._wake_read, select.POLLIN)
        while True:
            ready = self._poll.poll(None if self._met_somebody else LONELY_MS)
            for fd, _ in ready:
                if fd == self._listener.fileno():
                    self._accept()
                elif fd == self._wake_read.fileno():
                    self._wake_read.recv(4096)
                elif fd in self._connections:
                    self._receive(fd)
            self._reap()
            if self._nothing_left() or not (ready or self._met_somebody):
                return

    def _nothing_left(self) -> bool:
        if self._ending and not self._workers:
            return True
        if not self._met_somebody or self._connections or self._workers or self._kept:
            return False
        return not select.select([self._listener], [], [], 0)[0]  # somebody may be connecting just now

    # -- packets ------------------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # no fds left: turn the caller away rather than hear of it for ever
            log.error("a connection cannot be taken: %s", error)
            os.close(self._spare)
            with contextlib.suppress(OSError):
                self._listener.accept()[0].close()
            self._spare = _open_spare()
            return
        connection.setblocking(False)
        self._met_somebody = True
        self._connections[connection.fileno()] = connection
        self._poll.register(connection, select.POLLIN)

    def _receive(self, fd: int) -> None:
        connection = self._connections[fd]
        try:
            packet, fds = receive_packet(connection)
        except BlockingIOError:
            return None
        except (OSError, BadRequest) as error:
            log.warning("connection %d: %s", fd, error)
            return self._hang_up(fd)
        if packet is None:
            return self._hang_up(fd)
        if isinstance(packet, Keep) and len(fds) == 1:
            return self._keep(packet, fds[0])
        for spare in fds:
            os.close(spare)
        if isinstance(packet, Fork):
            self._brokers.add(fd)
            self._fork(packet, connection)
        elif isinstance(packet, Drop):
            self._drop(packet)
        elif isinstance(packet, Quit):
            self._ending = True
        else:
            log.warning("nobody sends the zygote a %s", type(packet).__name__)
        return None

    def _hang_up(self, fd: int) -> None:
        connection = self._connections.pop(fd)
        self._brokers.discard(fd)
        self._poll.unregister(connection)
        connection.close()

    def _tell(self, connection: socket.socket, packet: Packet, fds: list[int] | None = None) -> None:
        try:
            send_packet(connection, packet, fds)
        except OSError as error:  # a broker that is gone or stuck learns of its workers by their pidfds
            log.warning("%s could not be told: %s", type(packet).__name__, error)

    def _keep(self, packet: Keep, fd: int) -> None:
        old = self._kept.setdefault(packet.vm, {}).pop(packet.slot, None)
        if old is not None:
            os.close(old)
        self._kept[packet.vm][packet.slot] = fd

    def _drop(self, packet: Drop) -> None:
        if packet.slot:
            slots = self._kept.get(packet.vm, {})
            fd = slots.pop(packet.slot, None)
            if fd is not None:
                os.close(fd)
            if not slots:
                self._kept.pop(packet.vm, None)
            return
        self._exits.pop(packet.vm, None)
        for fd in self._kept.pop(packet.vm, {}).values():
            os.close(fd)

    # -- children -----------------------------------------------------------------------------------------------------------

    def _fork(self, packet: Fork, connection: socket.socket) -> None:
        self._reap()  # how the worker before this one ended is told to the new one
        try:
            spec = msgspec.msgpack.decode(packet.spec, type=WorkerSpec)
            pid = os.fork()
        except (OSError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            log.error("no worker for %s: %s", packet.vm, error)
            return self._tell(connection, NotForked(packet.vm, str(error)))
        if pid == 0:
            self._child(spec)
        self._workers[pid] = packet.vm
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:  # no fds left; an unreaped child keeps its pid, so this hits nobody else
            os.kill(pid, signal.SIGKILL)
            return self._tell(connection, NotForked(packet.vm, str(error)))
        self._tell(connection, Forked(packet.vm, pid), [pidfd])
        os.close(pidfd)
        return None

    def _child(self, spec: WorkerSpec) -> NoReturn:
        """Runs in the new worker: let go of everything of the zygote's but this VM's connections, and be the worker."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            mine = self._kept.pop(spec.name, {})
            for slots in self._kept.values():
                for fd in slots.values():
                    os.close(fd)
            for connection in (*self._connections.values(), self._listener, self._wake_read, self._wake_write):
                connection.close()
            code = run_worker(spec, mine, self._exits.get(spec.name))
            logging.shutdown()
        finally:
            os._exit(code)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            vm = self._workers.pop(pid, "")
            code = os.waitstatus_to_exitcode(status)
            if vm and code:
                self._exits[vm] = code
            else:
                self._exits.pop(vm, None)
            if not vm or code:
                log.info("%s %d ended with status %d", f"the worker of {vm}" if vm else "an orphan", pid, code)
            for fd in self._brokers & self._connections.keys():
                self._tell(self._connections[fd], Exited(pid, code, vm))


def _open_spare() -> int:
    """An fd to give up when there are no others."""
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


def main() -> int:
    """Be the zygote. Arguments: --listen-fd N --log FILE --level LEVEL."""
    parser = argparse.ArgumentParser(prog="vmloop-zygote")
    parser.add_argument("--listen-fd", type=int, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--level", default="info")
    arguments = parser.parse_args()
    log_to_file(arguments.log, arguments.level, LOG_BYTES)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NAME, b"vml-zygote", 0, 0, 0)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        log.warning("not a subreaper: the exit status of an orphaned QEMU will not be known")
    listener = socket.socket(fileno=arguments.listen_fd)
    gc.collect()
    gc.freeze()  # a collection in a worker would otherwise copy every page of ours that it looks at
    Zygote(listener).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
