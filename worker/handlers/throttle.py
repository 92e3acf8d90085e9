# SPDX-License-Identifier: Apache-2.0
"""A handler that computes for long gets a share of one CPU, so that the workers of other VMs find it free. Used by calls.py and thread.py.

Priorities are not enough: on a host with few CPUs a process that wakes up beside one that spins may wait for the scheduler's next tick
(4 ms at 250 Hz), whatever their nice values are. Each handler has `FREE` seconds of CPU time without any restraint. After that:

- on the loop, a timer that counts CPU time interrupts it (a signal's handler runs between two lines of Python) and sleeps for a while;
- on the handler thread, the loop's thread keeps the interpreter to itself for a while. That holds up its own VM's loop too, by `PAUSE`.

What spins in C code without giving up the interpreter notices nothing of this; the broker replaces such a worker (broker/watch.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Final

FREE: Final = 0.05  # seconds of CPU time for one step, or one call on the thread
RUN: Final = 0.004  # seconds of CPU time between two pauses
PAUSE: Final = 0.2  # seconds

# How soon a thread that computes gives up the interpreter once another one wants it; Python's own 5 ms would double what it runs.
_SWITCH: Final = 0.0005
_SIGNAL: Final = signal.SIGPROF
_with_interpreter: Final = ctypes.PyDLL(None)  # calls through it keep the interpreter's lock


class OverLimit(BaseException):
    """Raised inside of a handler that computes beyond its time limit."""


class LoopThrottle:
    """For steps on the loop. One per dispatcher; without effect outside of a process's main thread, where signals have no handlers."""

    def __init__(self) -> None:
        self._until = 0.0
        self._able = threading.current_thread() is threading.main_thread()
        if self._able:
            signal.signal(_SIGNAL, self._hold_back)

    @contextlib.contextmanager
    def step(self, until: float) -> Iterator[None]:
        """Within the block foreign code runs; `until`: monotonic time after which it gets `OverLimit`."""
        if not self._able:
            yield
            return
        self._until = until
        signal.setitimer(signal.ITIMER_PROF, FREE, RUN)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            self._until = 0.0

    def close(self) -> None:
        if self._able:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            signal.signal(_SIGNAL, signal.SIG_IGN)

    def _hold_back(self, _: int, __: FrameType | None) -> None:
        if not self._until:  # the step is over
            return
        if time.monotonic() >= self._until:
            raise OverLimit
        select.select([], [], [], PAUSE)


class ThreadThrottle:
    """For one call on a handler thread. Asked now and then by the loop's thread while the call lasts."""

    def __init__(self, thread: threading.Thread) -> None:
        assert thread.ident is not None
        self._clock = time.pthread_getcpuclockid(thread.ident)
        self._thread = thread
        self._interval = sys.getswitchinterval()
        self._free_until = self._used() + FREE

    def hold_back(self) -> float:
        """Keep the interpreter from the thread for a while if it has computed for long; seconds until this should be asked again."""
        if not self._thread.is_alive() or self._used() < self._free_until:
            return FREE
        self._free_until = self._used() + RUN
        sys.setswitchinterval(_SWITCH)
        _with_interpreter.usleep(int(PAUSE * 1e6))
        return RUN

    def close(self) -> None:
        """The call is over."""
        sys.setswitchinterval(self._interval)

    def _used(self) -> float:
        return time.clock_gettime(self._clock)
