# SPDX-License-Identifier: Apache-2.0
"""A fork inside a handler must never go on as a second worker: with the same monitor, the same page, the same sockets to the broker.

The child of an `os.fork()` loses the worker's connections and locks at once, dies with its worker (PR_SET_PDEATHSIG), may do what it was
forked for, and is ended where it would return into vmloop: after the handler (calls.py, thread.py) and in the loop's selector
(worker/loop.py). subprocess, os.posix_spawn and what stands on them run other programs and are not concerned.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Final

CHILD_EXIT: Final = 70  # EX_SOFTWARE of sysexits.h: the child came back to where it has no business

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_libc: Final = ctypes.CDLL(None)  # looked up before the fork: the child should do as little as it can


class _Guard:
    """What the child has to know. One per process, for os.register_at_fork cannot be undone."""

    def __init__(self) -> None:
        self.fds: Callable[[], Iterable[int]] | None = None
        self.worker = 0
        self.registered = False
        self.forked = False

    def in_child(self) -> None:
        if self.fds is None:
            return
        self.forked = True
        for fd in tuple(self.fds()):
            with contextlib.suppress(OSError):  # closed already
                os.close(fd)
        # A Popen with a preexec_fn comes along here, too, and goes on to its exec; that program may outlive the worker.
        if sys._getframe(1).f_globals.get("__name__") == "subprocess":
            return
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != self.worker:  # it died before the prctl
            os._exit(CHILD_EXIT)


_guard: Final = _Guard()


def guard_forks(fds: Callable[[], Iterable[int]]) -> Callable[[], None]:
    """From now on a fork of this process is no second worker; returns what ends that (for tests).

    `fds` is called in the child and gives what it must not keep: monitor, agent, lock, the epoll fd (a child that took an fd out of it
    would take it out of the worker's), ZeroMQ's. Call it in the worker, never in the zygote, whose forks are the workers.
    """
    _guard.fds = fds
    _guard.worker = os.getpid()
    if not _guard.registered:
        _guard.registered = True
        os.register_at_fork(after_in_child=_guard.in_child)

    def end() -> None:
        _guard.fds = None

    return end


def forked() -> bool:
    """Whether this process is a child that a handler forked, not the worker."""
    return _guard.forked


def end_if_forked() -> None:
    """Does not return in a child that a handler forked: no cleaning up, no flushing, all of that is the worker's."""
    if _guard.forked:
        os._exit(CHILD_EXIT)
