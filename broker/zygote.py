# SPDX-License-Identifier: Apache-2.0
"""The zygote: a process of its own that has the worker's imports done and forks workers. `python -m vmloop.broker.zygote`.

It has no thread and no ZeroMQ context, so a fork of it is safe and costs a few milliseconds. It also keeps a duplicate of every monitor
and agent connection, so that a connection outlives its worker: the next worker of that VM inherits it with the fork. It is a subreaper:
a QEMU whose worker died becomes its child; how it ended is told to the VM's worker, or to the next one. It outlives the broker; it ends
by itself when nobody is connected, no child is left and nothing is kept, or, when another zygote has taken its place, with its last
child. Packets: common/zygote_wire.py.

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

from .. import __version__
from ..common.errors import BadRequest
from ..common.log import log_to_file
from ..common.process import identify
from ..common.zygote_wire import (
    Drop,
    Dropped,
    Exited,
    Fork,
    Forked,
    Hello,
    Keep,
    Kept,
    NotForked,
    Packet,
    Quit,
    Retire,
    Tell,
    Told,
    Watch,
    WorkerSpec,
)
from ..worker.entry import run_worker
from .packets import BACKLOG, PacketEnd

log = logging.getLogger(__name__)

_PR_SET_NAME: Final = 15  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER: Final = 36
# A zygote whose broker died before it connected goes away by itself.
LONELY_MS: Final = 30_000
LOG_BYTES: Final = 1 << 20


class Peer(PacketEnd):
    """One connection, with what its other end has turned out to be."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self.is_broker = False  # it has asked for a fork, or said who it is: it hears of exits
        self.follows = False  # it hears of everything that is kept
        self.watches = ""  # it is the worker of this VM, and hears of its QEMU's end


class Zygote:
    """The loop of the zygote process. Single-threaded; waits only in `select.poll`."""

    def __init__(self, listener: socket.socket, path: Path | None = None) -> None:
        """`path`: where a zygote is looked for; it is superseded when another socket is there than its own. None: it never is."""
        self._listener = listener
        self._path = path
        self._inode = _inode(Path(listener.getsockname())) if path is not None else None
        self._peers: dict[int, Peer] = {}
        self._kept: dict[str, dict[str, int]] = {}  # VM → slot → fd
        self._workers: dict[int, str] = {}  # pid → VM
        self._exits: dict[str, int] = {}  # VM → how its last worker ended, if not in order
        self._watched: dict[int, str] = {}  # pid of a QEMU → VM, as workers say
        self._orphans: dict[str, Exited] = {}  # VM → how its QEMU ended as an orphan
        self._ending = False
        self._retired = False
        self._childless = False
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
            for fd, events in ready:
                if fd == self._listener.fileno():
                    self._accept()
                elif fd == self._wake_read.fileno():
                    self._wake_read.recv(4096)
                elif fd in self._peers:
                    self._serve(self._peers[fd], events)
            self._reap()
            if self._nothing_left() or not (ready or self._met_somebody):
                return

    def _nothing_left(self) -> bool:
        if self._retired:
            return self._childless
        if self._ending and not self._workers:
            return True
        if not self._met_somebody or self._peers or self._workers or self._kept:
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
        self._met_somebody = True
        peer = self._peers[connection.fileno()] = Peer(connection)
        self._poll.register(peer, select.POLLIN)

    def _serve(self, peer: Peer, events: int) -> None:
        try:
            if events & select.POLLOUT:
                peer.flush()
                self._poll.modify(peer, select.POLLIN | (select.POLLOUT if peer.waits else 0))
            if events & ~select.POLLOUT:
                packet, fds = peer.receive()
            else:
                return
        except BlockingIOError:
            return
        except (OSError, BadRequest) as error:
            log.warning("connection %d: %s", peer.fileno(), error)
            self._hang_up(peer)
            return
        if packet is None:
            self._hang_up(peer)
        elif isinstance(packet, Keep) and len(fds) == 1:
            self._keep(packet, fds[0])
        else:
            for spare in fds:
                os.close(spare)
            self._obey(packet, peer)

    def _obey(self, packet: Packet, peer: Peer) -> None:
        match packet:
            case Fork():
                peer.is_broker = True
                self._fork(packet, peer)
            case Drop():
                self._drop(packet)
            case Hello():
                peer.is_broker = True
                self._tell(peer, Hello(__version__, os.getpid(), identify(os.getpid()).started))
            case Tell():
                self._tell_all(peer)
            case Watch():
                self._watch(packet, peer)
            case Exited() if packet.vm:
                self._former_ended(packet)
            case Exited():
                self._orphan_ended(packet.pid, packet.status)
            case Quit():
                self._ending = True
            case Retire():
                self._retire()
            case _:
                log.warning("nobody sends the zygote a %s", type(packet).__name__)

    def _hang_up(self, peer: Peer) -> None:
        del self._peers[peer.fileno()]
        self._poll.unregister(peer)
        peer.close()
        if self._superseded():
            log.info("another zygote has taken this one's place")
            self._retire()

    def _tell(self, peer: Peer, packet: Packet, fd: int | None = None) -> None:
        """Tell a peer; `fd` is closed here."""
        try:
            peer.send(packet, fd)
        except OSError as error:  # gone: its end is read in its turn; a broker learns of its workers by their pidfds
            log.warning("%s could not be told: %s", type(packet).__name__, error)
        else:
            self._poll.modify(peer, select.POLLIN | (select.POLLOUT if peer.waits else 0))

    def _brokers(self) -> list[Peer]:
        return [peer for peer in self._peers.values() if peer.is_broker]

    # -- what is kept -------------------------------------------------------------------------------------------------------

    def _keep(self, packet: Keep, fd: int) -> None:
        if self._retired:  # a worker that has not heard of it: its broker passes it on
            for peer in self._brokers():
                self._tell_kept(peer, packet.vm, packet.slot, fd)
            os.close(fd)
            return
        slots = self._kept.setdefault(packet.vm, {})
        if packet.spare and packet.slot in slots:
            os.close(fd)
            return
        old = slots.pop(packet.slot, None)
        if old is not None:
            os.close(old)
        slots[packet.slot] = fd
        for peer in self._peers.values():
            if peer.follows:
                self._tell_kept(peer, packet.vm, packet.slot, fd)

    def _drop(self, packet: Drop) -> None:
        slots = self._kept.get(packet.vm, {})
        if packet.slot:
            gone = [slots.pop(packet.slot)] if packet.slot in slots else []
        else:
            gone = list(slots.values())
            slots.clear()
            self._exits.pop(packet.vm, None)
            self._orphans.pop(packet.vm, None)
            self._forget_watched(packet.vm)
        if not slots:
            self._kept.pop(packet.vm, None)
        for fd in gone:
            os.close(fd)
        for peer in self._peers.values():
            if (peer.follows and gone) or (self._retired and peer.is_broker):
                self._tell(peer, Dropped(packet.vm, packet.slot))

    def _tell_all(self, peer: Peer) -> None:
        peer.follows = True
        for vm, slots in self._kept.items():
            for slot, fd in slots.items():
                self._tell_kept(peer, vm, slot, fd)
        self._tell(peer, Told())

    def _tell_kept(self, peer: Peer, vm: str, slot: str, fd: int) -> None:
        """With a duplicate; without one if no fd is free: so that nobody thinks he has everything, and this zygote stays."""
        try:
            duplicate = os.dup(fd)
        except OSError as error:
            log.error("VM %s: its %s cannot be passed on: %s", vm, slot, error)
            self._tell(peer, Kept(vm, slot))
        else:
            self._tell(peer, Kept(vm, slot), duplicate)

    def _retire(self) -> None:
        if self._retired:
            return
        self._retired = True
        for peer in self._peers.values():
            peer.follows = False
        for slots in self._kept.values():
            for fd in slots.values():
                os.close(fd)
        self._kept.clear()

    def _superseded(self) -> bool:
        """Whether whoever looks for a zygote finds another one. A path where nothing is tells nothing."""
        there = _inode(self._path) if self._path is not None else None
        return there is not None and there != self._inode

    # -- children -----------------------------------------------------------------------------------------------------------

    def _fork(self, packet: Fork, peer: Peer) -> None:
        self._reap()  # how the worker before this one ended is told to the new one
        self._hear_workers()  # and what that one said before it died: a connection that comes late would be nobody's
        try:
            spec = msgspec.msgpack.decode(packet.spec, type=WorkerSpec)
            pid = os.fork()
        except (OSError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            log.error("no worker for %s: %s", packet.vm, error)
            return self._tell(peer, NotForked(packet.vm, str(error)))
        if pid == 0:
            self._child(spec)
        self._workers[pid] = packet.vm
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:  # no fds left; an unreaped child keeps its pid, so this hits nobody else
            os.kill(pid, signal.SIGKILL)
            return self._tell(peer, NotForked(packet.vm, str(error)))
        self._tell(peer, Forked(packet.vm, pid), pidfd)
        return None

    def _hear_workers(self) -> None:
        for _ in range(BACKLOG):
            waiting = [fd for fd, _ in self._poll.poll(0) if fd == self._listener.fileno() or self._is_worker(fd)]
            if not waiting:
                return
            for fd in waiting:
                if fd == self._listener.fileno():
                    self._accept()
                elif fd in self._peers:
                    self._serve(self._peers[fd], select.POLLIN)

    def _is_worker(self, fd: int) -> bool:
        peer = self._peers.get(fd)
        return peer is not None and not peer.is_broker

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
            for peer in self._peers.values():
                peer.close()
            for connection in (self._listener, self._wake_read, self._wake_write):
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
                self._childless = True
                return
            self._childless = False
            if not pid:
                return
            vm = self._workers.pop(pid, "")
            code = os.waitstatus_to_exitcode(status)
            if not vm:
                log.info("an orphan %d ended with status %d", pid, code)
                self._orphan_ended(pid, code)
            elif code:
                log.info("the worker of %s %d ended with status %d", vm, pid, code)
                self._exits[vm] = code
            else:
                self._exits.pop(vm, None)
            for peer in self._brokers():
                self._tell(peer, Exited(pid, code, vm))

    def _former_ended(self, packet: Exited) -> None:
        """A worker that a retired zygote had made. Once the next one of its VM lives, it comes too late to be told."""
        if packet.status and packet.vm not in self._workers.values():
            self._exits[packet.vm] = packet.status

    # -- QEMUs whose worker died ----------------------------------------------------------------------------------------------

    def _watch(self, packet: Watch, peer: Peer) -> None:
        peer.watches = packet.vm
        known = self._orphans.get(packet.vm)
        if known is not None and known.pid == packet.pid:
            self._tell(peer, known)
            return
        self._orphans.pop(packet.vm, None)
        self._forget_watched(packet.vm)
        self._watched[packet.pid] = packet.vm

    def _orphan_ended(self, pid: int, status: int) -> None:
        vm = self._watched.pop(pid, "")
        if not vm:
            return
        ended = self._orphans[vm] = Exited(pid, status, vm)
        for peer in self._peers.values():
            if peer.watches == vm:
                self._tell(peer, ended)

    def _forget_watched(self, vm: str) -> None:
        for pid in [pid for pid, of in self._watched.items() if of == vm]:
            del self._watched[pid]


def _inode(path: Path) -> tuple[int, int] | None:
    """Which file this is; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _open_spare() -> int:
    """An fd to give up when there are no others."""
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


def main() -> int:
    """Be the zygote. Arguments: --listen-fd N --log FILE --level LEVEL [--path SOCKET]."""
    parser = argparse.ArgumentParser(prog="vmloop-zygote")
    parser.add_argument("--listen-fd", type=int, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--level", default="info")
    parser.add_argument("--path", type=Path)
    arguments = parser.parse_args()
    log_to_file(arguments.log, arguments.level, LOG_BYTES)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NAME, b"vml-zygote", 0, 0, 0)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        log.warning("not a subreaper: the exit status of an orphaned QEMU will not be known")
    listener = socket.socket(fileno=arguments.listen_fd)
    # Again: from now on SO_PEERCRED names this process, and not the broker that bound the socket.
    listener.listen(BACKLOG)
    gc.collect()
    gc.freeze()  # a collection in a worker would otherwise copy every page of ours that it looks at
    Zygote(listener, arguments.path).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
