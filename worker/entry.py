# SPDX-License-Identifier: Apache-2.0
"""What runs in a worker process, from the fork to the exit. Called by broker/zygote.py in the child it has forked.

Nothing here runs in the zygote itself: a context of ZeroMQ and a loop may only be made after the fork.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import gc
import logging
import os
import signal
import socket
from collections.abc import Coroutine
from enum import IntEnum
from pathlib import Path
from typing import Any

import tenacity
import zmq

from ..common.durable import set_aside
from ..common.log import log_to_file
from ..common.names import VmName, vm_name
from ..common.page import Page, PageDamaged, Word
from ..common.paths import Paths, VmPaths
from ..common.process import identify
from ..common.settings import Settings
from ..common.zygote_wire import WorkerSpec
from .app import App
from .epochs import leave_epoch
from .handlers.forks import forked, guard_forks
from .loop import WorkerLoop
from .memory import limit_memory
from .predecessor import Predecessor
from .runfile import remove_directory
from .stack import StackFile

log = logging.getLogger(__name__)

_PR_SET_NAME = 15  # linux/prctl.h
# The predecessor's lock falls with its last thread, a moment after its pidfd reports it.
LOCK_SECONDS = 3.0


class WorkerExit(IntEnum):
    """Exit codes of a worker; the broker starts another one after anything but DONE, if there is still something to do."""

    DONE = 0  # said goodbye
    FAILED = 1  # a defect; see worker.log
    LOCKED = 3  # another worker has this VM


def run_worker(spec: WorkerSpec, kept: dict[str, int], last_exit: int | None = None) -> int:
    """Be the worker of one VM until there is nothing left to do. `kept`: slot → fd of connections that outlived earlier workers.

    `last_exit`: how the worker before this one ended (negative: by that signal), if anybody knows. Returns the exit code. Never raises.
    """
    name = vm_name(spec.name)
    paths = Paths(Path(spec.run), Path(spec.state), Path(spec.etc))
    vm_paths = paths.vm(name)
    try:
        vm_paths.run.mkdir(mode=0o700, exist_ok=True)
        vm_paths.state.mkdir(mode=0o700, exist_ok=True)
        log_to_file(vm_paths.worker_log, spec.settings.log.level, spec.settings.worker.log_bytes)
        _name_process(f"vml:{name}")
        lock = _lock(vm_paths.lock)
        if lock is None:
            log.error("VM %s: another worker holds %s", name, vm_paths.lock)
            return WorkerExit.LOCKED
        limit_memory(spec.settings.worker.memory_limit)
        stack = StackFile(vm_paths.stack)
        page, predecessor = _open_page(vm_paths, stack, last_exit)
        stack.arm()
        try:
            return _serve(name, paths, spec.settings, page, kept, predecessor, stack, lock)
        finally:
            stack.close()
    except Exception:  # the edge of the process: whatever it is, it is written down
        log.exception("VM %s: the worker failed", name)
        return WorkerExit.FAILED


def _serve(
    name: VmName,
    paths: Paths,
    settings: Settings,
    page: Page,
    kept: dict[str, int],
    predecessor: Predecessor,
    stack: StackFile,
    lock: int,
) -> int:
    loop = WorkerLoop(page, settings.broker.blocked_after)
    asyncio.set_event_loop(loop)
    loop.set_exception_handler(_report)
    # Ctrl-C in a terminal is not for workers, and SIGTERM means the host is going down: QEMU's own end is awaited, not ours.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    monitor, agent = (_connection(slot, kept.pop(slot)) if slot in kept else None for slot in ("monitor", "agent"))
    for fd in kept.values():
        os.close(fd)
    app = App(loop, context, name, paths, settings, page, predecessor, stack)
    loop.add_signal_handler(signal.SIGTERM, app.leave)
    loop.page_selector.forked = forked
    guard_forks(lambda: (lock, loop.page_selector.fileno(), *app.private_fds()))
    gc.freeze()
    try:
        _run(loop, app.run(monitor, agent))
    finally:
        loop.close()
        context.term()  # bounded by the sockets' linger
    if app.forget:
        _forget(app)
    return WorkerExit.DONE


def _connection(slot: str, fd: int) -> socket.socket | None:
    """A connection that the zygote kept. None if the fd is none of ours, which is closed: the VM is served over a new one."""
    try:
        connection = socket.socket(fileno=fd)
    except OSError as error:
        log.error("what was kept as the %s is no connection: %s", slot, error)
        os.close(fd)
        return None
    if (connection.family, connection.type) == (socket.AF_UNIX, socket.SOCK_STREAM):
        return connection
    log.error("what was kept as the %s is another kind of socket: %s", slot, connection)
    connection.close()
    return None


def _run(loop: WorkerLoop, work: Coroutine[Any, Any, None]) -> None:
    """Run the worker to its end. asyncio lets a SystemExit out of any task; one that a handler has made does not end the worker."""
    main = loop.create_task(work)
    while True:
        try:
            return loop.run_until_complete(main)
        except (SystemExit, KeyboardInterrupt) as error:
            if main.done():
                raise
            log.error("a task of a handler tried to end the worker: %r", error)


def _forget(app: App) -> None:
    """Remove the VM's directories; its last epoch stays, if need be on the page."""
    kept = leave_epoch(app.paths, app.vm.run, app.events.newest_epoch)
    logging.shutdown()
    remove_directory(app.paths.state)
    if kept or leave_epoch(app.paths, app.vm.run, app.events.newest_epoch):  # on a full disk there is room now
        remove_directory(app.paths.run)


def _open_page(paths: VmPaths, stack: StackFile, last_exit: int | None) -> tuple[Page, Predecessor]:
    """The VM's page, with this worker's identity on it, and what it said of the worker before.

    A damaged one is set aside: what was in flight, and how far the connections were read, went with it (docs/architecture.md, "A worker is
    killed"), and whoever wants to know how that came about has it still.
    """
    try:
        page = _map_page(paths.page)
    except PageDamaged as error:
        log.error("%s; it was moved to %s", error, set_aside(paths.page))
        page = _map_page(paths.page)
    crashed = last_exit is not None and last_exit < 0 and last_exit != -signal.SIGKILL
    predecessor = Predecessor(
        incarnation=page.words[Word.INCARNATION],
        in_order=bool(page.words[Word.LEFT]),
        task=page.task(),
        stack=stack.left if crashed or stack.left_age <= page.blocked_seconds() else "",  # else of an earlier trouble
        exit=last_exit,
    )
    page.doing("")
    page.busy()
    page.words[Word.WORKER_PID] = os.getpid()
    page.words[Word.WORKER_STARTED] = identify(os.getpid()).started
    page.words[Word.INCARNATION] += 1
    return page, predecessor


def _map_page(path: Path) -> Page:
    """The page; where the disk has no room for a new one, one in memory: a VM that runs is served, but none can be started on it."""
    try:
        return Page(path, writable=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # others pass, or leave an old page in the way
            raise
        page = Page(None, writable=True)
        page.unkept = f"{path} cannot be made: {error.strerror}"
        log.error("%s; nothing of this worker's would outlive it", page.unkept)
        return page


def _lock(path: Path) -> int | None:
    """The VM's lock, held until this process ends; None if somebody else keeps it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _try_lock(fd)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _try_lock(fd: int) -> None:
    """Lock, trying again for a while. Raises BlockingIOError. The first try is made plainly: it nearly always succeeds, and what a
    worker never touches of the zygote's memory it never copies."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(BlockingIOError),
            wait=tenacity.wait_fixed(0.01),
            stop=tenacity.stop_after_delay(LOCK_SECONDS),
            reraise=True,
        )(fcntl.flock, fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _name_process(name: str) -> None:
    """What `ps -e` and `top` show; the kernel keeps 15 bytes."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def _report(_: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    error = context.get("exception")
    log.error("loop: %s", context.get("message"), exc_info=error if isinstance(error, BaseException) else None)
