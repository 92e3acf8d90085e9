# SPDX-License-Identifier: Apache-2.0
"""The broker's program: lock the root, bind, find what an earlier broker left, run. `vmloop broker`, or `python -m vmloop.broker [DIR]`.

With `--owned JSON` (common/ownership.py) it is a private broker, as client/embedding.py starts it: it ends with its owner.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import logging
import os
import sys
import time
from pathlib import Path
from typing import Final

import zmq

from ..common.errors import Denied, Internal, VmloopError
from ..common.log import log_to_file, log_to_stderr
from ..common.ownership import ownership_from_argument
from ..common.paths import Paths, default_paths, paths_under
from ..common.process import boot_id
from ..common.settings import Settings, read_settings
from ..common.sockets import CLIENT_QUEUE, WORKER_QUEUE, bind_publisher, bind_router
from ..common.systemd import Notifier
from .catalogue import scan
from .fd_store import FdStore, take_stored
from .host import HostCore
from .looker import ProcLooker
from .loop import Loop
from .owner import LOG_BYTES, Owner, forget_starter
from .spawner import Spawner
from .systemd import take_passed_fds

log = logging.getLogger(__name__)

# Sockets, pages and pidfds: about four fds a VM.
WANTED_FDS: Final = 65536
_BOOT_BYTES: Final = 64  # of state/boot-id; the kernel's id has 36


def serve(paths: Paths, boot: str | None = None, owner: Owner | None = None) -> int:
    """Be the broker of a root until told to end. Returns the exit code; raises the error tree's members if it cannot start.

    `boot`: which boot of the host this is; None: ask the kernel. `owner`: whose private broker it is.
    """
    os.umask(0o077)
    paths.create()
    lock = _lock(paths.broker_lock)
    if owner is not None:
        owner.has_root = True
    settings = read_settings(paths.settings_file)
    if owner is None:
        log_to_stderr(settings.log.level)
    else:
        log_to_file(paths.broker_log, settings.log.level, LOG_BYTES)
    _raise_fd_limit()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 65535)
    clients = bind_router(context, paths.client_socket, CLIENT_QUEUE)
    workers = bind_router(context, paths.worker_socket, WORKER_QUEUE)
    publisher = bind_publisher(context, paths.events_socket)
    try:
        _run(paths, settings, clients, workers, publisher, boot or boot_id(), owner)
    finally:
        for socket in (clients, workers, publisher):
            socket.close()
        context.term()  # bounded by the sockets' linger
        for path in (paths.client_socket, paths.worker_socket, paths.events_socket):
            path.unlink(missing_ok=True)  # ours: we hold the lock
        if owner is not None and owner.all_ended:  # else a zygote listens there
            paths.zygote_socket.unlink(missing_ok=True)
        os.close(lock)
    return 0


def _run(
    paths: Paths,
    settings: Settings,
    clients: zmq.Socket[bytes],
    workers: zmq.Socket[bytes],
    publisher: zmq.Socket[bytes],
    boot: str,
    owner: Owner | None,
) -> None:
    notifier = Notifier(os.environ)
    passed = take_passed_fds(os.environ, os.getpid())
    store = FdStore(notifier, time.monotonic)
    looker = ProcLooker(paths)
    # A number that no earlier broker of this root has used: late answers to it are then known as such.
    core = HostCore(settings, time.time_ns(), looker, os.getpid())
    loop = Loop(core, clients, workers, publisher, looker)
    spawner = Spawner(
        paths,
        settings,
        loop.on_forked,
        loop.on_not_forked,
        loop.on_exit,
        loop.on_new_zygote,
        loop.on_renewed,
        store,
    )
    try:
        catalogue = scan(paths)
        alive = {found.name for found in catalogue if found.status.get("alive")}
        spawner.start(take_stored(passed, store, alive.__contains__))
        loop.use(spawner, lambda: _note_boot(paths.boot_file, boot), owner)
        now = time.monotonic()
        for found in catalogue:
            entry = core.roster.add(found.name, found.status)
            entry.epoch, entry.seq = found.newest
            if found.worker is not None:
                core.crew.expect(entry, found.worker, now)
            elif found.status.get("alive"):
                core.crew.adopt(entry, now)
        if owner is None and not _is_boot(paths.boot_file, boot):  # a private broker does not start with the host
            core.autostart.begin([found.name for found in catalogue if found.autostart], now)
        log.info("vmloop broker %d serves %s, %d VMs known", os.getpid(), paths.client_socket, len(core.roster))
        notifier.ready(f"{len(core.roster)} VMs known")
        loop.run()
        notifier.stopping("ended by request; VMs and workers run on")
        log.info("vmloop broker ended")
    finally:
        loop.close()
        spawner.close()
        store.close()
        looker.close()


def _is_boot(path: Path, boot: str) -> bool:
    """Whether a broker of this boot has started already what is to be started with the host."""
    try:
        return path.read_bytes()[:_BOOT_BYTES] == boot.encode()
    except FileNotFoundError:
        return False
    except OSError as error:
        log.error("%s cannot be read (%s): VMs with autostart are started", path, error)
        return False


def _note_boot(path: Path, boot: str) -> None:
    try:
        path.write_bytes(boot.encode())  # no fsync, for which the loop would wait: after a power cut it is another boot
    except OSError as error:
        log.error("%s cannot be written (%s): the next broker starts VMs with autostart again", path, error)


def _lock(path: Path) -> int:
    """The root's lock, held until the process ends. `Denied` naming the other broker's pid if there is one."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        other = os.read(fd, 32).decode("ascii", "replace").strip()
        os.close(fd)
        if error.errno != errno.EWOULDBLOCK:
            raise
        raise Denied(
            f"a broker serves {path.parent} already (pid {other or 'unknown'}); one root has one broker",
            pid=int(other) if other.isascii() and other.isdigit() else None,
        ) from error
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _raise_fd_limit() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(WANTED_FDS, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main() -> int:
    """`python -m vmloop.broker [ROOT] [--owned JSON]`."""
    parser = argparse.ArgumentParser(prog="vmloop-broker")
    parser.add_argument("root", nargs="?")
    parser.add_argument("--owned")
    arguments = parser.parse_args()
    try:
        paths = paths_under(Path(arguments.root)) if arguments.root else default_paths(os.environ, os.getuid())
        if arguments.owned is None:
            return serve(paths)
        return _serve_owner(paths, Owner(ownership_from_argument(arguments.owned)))
    except VmloopError as error:
        sys.stderr.write(f"vmloop: {error.code}: {error}\n")
        return 1


def _serve_owner(paths: Paths, owner: Owner) -> int:
    forget_starter(os.environ)
    owner.heed_sigterm()
    try:
        serve(paths, owner=owner)
        owner.remove_root(paths)
        owner.bid_farewell()
    except Exception as error:  # the edge of the process: its owner hears of it too
        owner.remove_unserved_root(paths)
        what = f"the private broker cannot serve {paths.run.parent}: {error!r:.500}"
        owner.report(error if isinstance(error, VmloopError) else Internal(what))
        raise
    finally:
        owner.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
