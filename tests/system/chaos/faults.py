# SPDX-License-Identifier: Apache-2.0
"""Carries a plan out: signals to the processes that have the parts at that moment, SIGCONT later, and a new broker for a dead one."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from ..site import Site
from .cast import Actor
from .claims import Claims
from .plan import ALL_WORKERS, BROKER, KILL, QEMU, STOP, WORKER, ZYGOTE, Blow, Strike
from .recording import Injected
from .truth import Census

LOOK_EVERY: Final = 0.1  # seconds between two looks whether the broker lives


class Faults:
    """Runs in its caller's thread, for the time that the plan takes."""

    def __init__(self, site: Site, actors: list[Actor], census: Census, claims: Claims, broken: list[str]) -> None:
        self._site = site
        self._actors = actors
        self._census = census
        self._claims = claims
        self._broken = broken
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._broker_back: float | None = None  # when a dead broker is started again
        self._stopped: dict[int, tuple[int, list[int]]] = {}  # pid under SIGSTOP → pidfd, places in `injected`
        self._tick = threading.Event()  # never set: what is waited for is the time
        self.injected: list[Injected] = []
        self.missed = 0

    def run(self, strikes: list[Strike], seconds: float) -> None:
        """Everything in the plan, until so many seconds are over; then whoever is stopped goes on, and there is a broker."""
        began = time.monotonic()
        for strike in strikes:
            self._at(began + strike.at, lambda strike=strike: self._strike(strike))  # type: ignore[misc]
        while (now := time.monotonic()) < began + seconds:
            while self._due and self._due[0][0] <= now:
                heapq.heappop(self._due)[2]()
            self._look_after_broker()
            until = min(self._due[0][0] if self._due else now + LOOK_EVERY, now + LOOK_EVERY, began + seconds)
            self._tick.wait(max(0.0, until - time.monotonic()))
        self._set_right()

    def _set_right(self) -> None:
        for pid in [*self._stopped]:
            self._continue(pid)
        if self._broker_back is not None:
            self._start_broker()

    # -- strikes ------------------------------------------------------------------------------------------------------------

    def _strike(self, strike: Strike) -> None:
        for blow in strike.blows:
            hit = self._kill(blow) if blow.what == KILL else self._stop(blow)
            self.missed += not hit

    def _kill(self, blow: Blow) -> bool:
        vm = self._actors[blow.vm].name
        if blow.whom == BROKER:
            return self._kill_broker(blow.seconds)
        if blow.whom == QEMU:
            at = time.monotonic()
            return self._census.signal(vm, signal.SIGKILL) is not None and self._note(at, KILL, QEMU, vm)
        if blow.whom == ALL_WORKERS:
            return sum(self._kill_worker(actor.name) for actor in self._actors) > 0
        if blow.whom == WORKER:
            return self._kill_worker(vm)
        pid, at = self._census.zygote(), time.monotonic()
        return pid is not None and self._send(pid, signal.SIGKILL) and self._note(at, KILL, ZYGOTE)

    def _kill_broker(self, seconds: float) -> bool:
        if self._broker_back is not None:
            return False
        at = time.monotonic()
        self._site.kill_broker()
        self._broker_back = time.monotonic() + seconds
        return self._note(at, KILL, BROKER)

    def _kill_worker(self, vm: str) -> bool:
        pid, at = self._claims.workers.get(vm), time.monotonic()
        return pid is not None and self._send(pid, signal.SIGKILL) and self._note(at, KILL, WORKER, vm)

    def _stop(self, blow: Blow) -> bool:
        vm = self._actors[blow.vm].name
        pid: int | None
        at = time.monotonic()
        if blow.whom == BROKER:
            pid = self._site.broker.pid if self._site.broker is not None and self._broker_back is None else None
        elif blow.whom == ZYGOTE:
            pid = self._census.zygote()
        elif blow.whom == WORKER:
            pid = self._claims.workers.get(vm)
        else:
            pid = self._census.signal(vm, 0)
        if pid is None or pid in self._stopped or not self._send(pid, signal.SIGSTOP):
            return False
        names = [actor.name for actor in self._actors if not actor.own_process] if blow.whom == QEMU else []
        places = []
        for name in names if vm in names else [vm]:  # attached ones share a process
            places.append(len(self.injected))
            self._note(at, STOP, blow.whom, name if blow.whom in (WORKER, QEMU) else "")
        with contextlib.suppress(ProcessLookupError):
            self._stopped[pid] = os.pidfd_open(pid), places
            self._at(at + blow.seconds, lambda: self._continue(pid))
        return True

    def _continue(self, pid: int) -> None:
        pidfd, places = self._stopped.pop(pid, (-1, []))
        if pidfd < 0:
            return
        with contextlib.suppress(ProcessLookupError):  # killed, or replaced by the broker
            signal.pidfd_send_signal(pidfd, signal.SIGCONT)
        os.close(pidfd)
        for place in places:
            self.injected[place] = msgspec.structs.replace(self.injected[place], until=time.monotonic())

    def _send(self, pid: int, number: int) -> bool:
        """Only to a process of this site: what `list` said may be old, and the pid somebody else's."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        try:
            if not self._belongs(pid):
                return False
            signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(pidfd)
        return True

    def _belongs(self, pid: int) -> bool:
        wanted = os.fsencode(self._site.root)
        try:
            return any(wanted in Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
        except OSError:
            return False

    def _note(self, at: float, what: str, whom: str, vm: str = "") -> bool:
        self.injected.append(Injected(at, what, whom, vm))
        return True

    # -- the broker, as an operator's init looks after it -------------------------------------------------------------------

    def _look_after_broker(self) -> None:
        broker = self._site.broker
        if self._broker_back is not None:
            if time.monotonic() >= self._broker_back:
                self._start_broker()
        elif broker is not None and broker.poll() is not None:
            self._broken.append(f"the broker ended by itself, with {broker.returncode}: {self._site.log()[-2000:]}")
            self._start_broker()

    def _start_broker(self) -> None:
        self._broker_back = None
        self._site.start_broker()

    def _at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._due, (when, next(self._numbers), act))
