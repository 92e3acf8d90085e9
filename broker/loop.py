# SPDX-License-Identifier: Apache-2.0
"""The broker's loop: the only place that waits. Reads sockets, exits and signals, hands them to the core, and does what the core decided.

run():  while not core.finished:  poll → clients, workers, processes, signals, time → perform the core's actions

A private broker (owner.py) goes on until its workers and its zygote have ended too.
"""

from __future__ import annotations

import logging
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

import zmq

from ..common.names import VmName, is_prober
from ..common.process import STACK_SIGNAL
from ..common.sockets import POLLIN, RECEIVE, SEND, SEND_MORE, edge_fd, readable
from .actions import (
    BootServed,
    DumpStack,
    EndZygote,
    Forget,
    Fork,
    KillWorker,
    Publish,
    RenewZygote,
    ToClient,
    ToWorker,
    WatchWorker,
)
from .host import HostCore
from .looker import ProcLooker
from .owner import Owner
from .spawner import Spawner

log = logging.getLogger(__name__)

# Messages taken from each door before processes, signals and deadlines get their turn.
BATCH: Final = 64
# An idle broker wakes this often, against a lost wake-up and a clock that jumped while the machine slept.
MAX_WAIT: Final = 60.0
# Of the workers of a private broker: for the last handlers of the last VMs (5 s), and for those that do not end (2 s).
FAREWELL_SECONDS: Final = 10.0
# For a zygote without workers to end, and for what was killed.
ZYGOTE_SECONDS: Final = 2.0

Socket = zmq.Socket[bytes]


class Loop:
    """One broker's loop. The sockets are bound by the caller, who also closes them."""

    def __init__(self, core: HostCore, clients: Socket, workers: Socket, publisher: Socket, looker: ProcLooker) -> None:
        self.undelivered = 0  # answers to clients that are gone or do not read
        self._core = core
        self._clients = clients
        self._workers = workers
        self._publisher = publisher
        self._looker = looker
        self._signals: deque[int] = deque()
        self._wake_read, self._wake_write = socket.socketpair()
        self._epoll = select.epoll()
        self._doors = [(clients, POLLIN), (workers, POLLIN)]
        self._spawner: Spawner | None = None
        self._owner: Owner | None = None
        self._on_boot_served: Callable[[], None] = lambda: None

    # -- start, run, stop ---------------------------------------------------------------------------------------------------

    def use(
        self, spawner: Spawner, on_boot_served: Callable[[], None] = lambda: None, owner: Owner | None = None
    ) -> None:
        """The process side; its callbacks are the `on_…` below. `on_boot_served`: what this boot had to start has been started.

        `owner`: whose private broker this is.
        """
        self._spawner = spawner
        self._on_boot_served = on_boot_served
        self._owner = owner
        self._epoll.register(spawner.fileno(), select.EPOLLIN)
        if owner is not None:
            of_process, of_reports = owner.filenos()
            self._epoll.register(of_process, select.EPOLLIN)
            self._epoll.register(of_reports, select.EPOLLHUP)

    def run(self) -> None:
        """Until the core is finished, and, where nothing is to be left, everything has ended."""
        self._catch_signals()
        if self._owner is not None:
            self._owner.report()  # not before: it may end us by a signal at once
            if self._owner.asked_to_end:
                self._end_as_owned(self._owner, time.monotonic())
        for source, _ in self._doors:
            self._epoll.register(edge_fd(source), select.EPOLLIN)
        self._perform()
        self._turn_until(lambda: self._core.finished)
        if self._core.leaves_nothing and self._spawner is not None and self._owner is not None:
            self._owner.all_ended = self._see_off(self._spawner)

    def _see_off(self, spawner: Spawner) -> bool:
        """Wait for the end of workers and zygote; end those that do not end by themselves. False if some are still there."""

        def turn_for(seconds: float, over: Callable[[], bool]) -> bool:
            deadline = time.monotonic() + seconds
            self._turn_until(lambda: over() or time.monotonic() >= deadline, deadline)
            return over()

        self._core.crew.dismiss_idle()
        self._perform()
        turn_for(FAREWELL_SECONDS, lambda: not spawner.pidfds)
        if turn_for(ZYGOTE_SECONDS, lambda: spawner.nothing_left):  # it ends with its last worker
            return True
        log.error("workers or the zygote do not end: they are killed")
        spawner.kill_rest()
        return turn_for(ZYGOTE_SECONDS, lambda: spawner.nothing_left)

    def _turn_until(self, over: Callable[[], bool], at_most: float | None = None) -> None:
        """`at_most`: when `over` is to be asked again, whatever happens."""
        waited: list[tuple[int, int]] = []
        while not over():  # this is the broker's event loop
            now = time.monotonic()
            quiet = self._receive(now)
            self._turn_side(waited, now)
            due = self._next_due()
            if due is not None and due <= now:
                self._core.on_tick(now)
                self._core.watch.on_tick(now)
                if self._spawner is not None:
                    self._spawner.on_tick(now)
                due = self._next_due()
            if self._perform() or not quiet:
                waited = self._epoll.poll(0.0)  # what was sent may have taken in news: look at the doors again
            elif not over():
                waited = self._epoll.poll(self._wait_seconds(due if at_most is None else min(due or at_most, at_most)))

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        self._epoll.close()
        self._wake_read.close()
        self._wake_write.close()

    def _next_due(self) -> float | None:
        spawner = self._spawner.next_due() if self._spawner is not None else None
        dues = (self._core.next_due(), self._core.watch.next_due(), spawner)
        return min((due for due in dues if due is not None), default=None)

    @staticmethod
    def _wait_seconds(due: float | None) -> float:
        return MAX_WAIT if due is None else max(0.0, min(MAX_WAIT, due - time.monotonic()))

    # -- in -----------------------------------------------------------------------------------------------------------------

    def _receive(self, now: float) -> bool:
        """Take messages from both doors in turns; True when there are no more, False when others must get their turn.

        ZeroMQ's FD only tells of changes, and a send may take in such a change unseen: so both doors are asked again until, with
        nothing done in between, neither has anything. Only then may the loop sleep.
        """
        for _ in range(BATCH):
            ready = readable(self._doors)
            if not ready:
                return True
            for source, _ in ready:
                self._take(source, self._core.on_client if source is self._clients else self._core.on_worker, now)
        return False

    def _take(self, source: Socket, handle: Callable[[bytes, list[bytes], float], None], now: float) -> None:
        identity = source.recv(RECEIVE)
        parts = [source.recv()]
        while source.getsockopt(zmq.RCVMORE):
            parts.append(source.recv())
        try:
            handle(identity, parts, now)
        except Exception:  # the edge of the loop: a defect costs one message, not the broker
            log.exception("a message of %d frames could not be dealt with", len(parts))
        self._perform()

    def _turn_side(self, ready: list[tuple[int, int]], now: float) -> None:
        """What is rare: signals, and news of processes."""
        for fd, _ in ready:
            if fd == self._wake_read.fileno():
                self._wake_read.recv(4096)
                while self._signals:
                    self._on_signal(self._signals.popleft(), now)
            elif self._spawner is not None and fd == self._spawner.fileno():
                self._spawner.turn()
            elif self._owner is not None and fd in self._owner.filenos():
                self._on_owner_gone(self._owner, now)

    def _on_signal(self, number: int, now: float) -> None:
        if self._owner is not None:
            # A second one takes the patience out of it, as with a second Ctrl-C at `vmloop run`.
            self._end_as_owned(self._owner, now, kill=self._owner.all_to_end)
            return
        log.info("%s: answering what is in flight, then ending; VMs and workers run on", signal.Signals(number).name)
        self._core.drain(now)

    def _on_owner_gone(self, owner: Owner, now: float) -> None:
        if not owner.gone:
            owner.gone = True
            for fd in owner.filenos():
                self._epoll.unregister(fd)
            log.info("the process that this broker belongs to has ended, or let it go")
            self._end_as_owned(owner, now)

    def _end_as_owned(self, owner: Owner, now: float, *, kill: bool = False) -> None:
        vms = "kill" if kill else owner.ownership.vms
        log.info("ending; what becomes of the VMs: %s", vms)
        owner.all_to_end = vms != "leave"
        self._core.end(vms, owner.ownership.stop_timeout, now)

    def on_forked(self, name: VmName, pid: int) -> None:
        (self._core.probes if is_prober(name) else self._core.crew).on_forked(name, pid)

    def on_not_forked(self, name: VmName, error: str) -> None:
        (self._core.probes if is_prober(name) else self._core.crew).on_not_forked(name, error, time.monotonic())

    def on_exit(self, name: VmName, pid: int) -> None:
        if is_prober(name):
            self._core.probes.on_exit(name, pid, time.monotonic())
            return
        went = self._looker.went(name)
        self._looker.forget(name)
        self._core.crew.on_exit(name, pid, time.monotonic(), went)

    def on_new_zygote(self) -> None:
        self._core.crew.on_new_zygote()

    def on_renewed(self, error: str) -> None:
        self._core.on_renewed(error, time.monotonic())

    # -- out ----------------------------------------------------------------------------------------------------------------

    def _perform(self) -> bool:
        """Do what the core decided, in order; doing may lead to more. False if there was nothing."""
        if not self._core.actions:
            return False
        while self._core.actions:
            actions, self._core.actions = self._core.actions, []
            for action in actions:
                if type(action) is ToClient:
                    self._send_to_client(action)
                elif type(action) is ToWorker:
                    self._send_to_worker(action)
                elif type(action) is Publish:
                    self._publisher.send(action.topic, SEND_MORE)
                    self._publisher.send(action.body, SEND)
                else:
                    self._act_on_process(action)
        return True

    def _send_to_client(self, action: ToClient) -> None:
        try:
            self._clients.send(action.identity, SEND_MORE)
            *first, last = action.frames
            for frame in first:
                self._clients.send(frame, SEND_MORE)
            self._clients.send(last, SEND)
        except zmq.ZMQError as error:  # gone, or it does not read what it asked for
            self.undelivered += 1
            if self.undelivered <= 10 or self.undelivered % 1000 == 0:
                log.warning("an answer could not be delivered (%d so far): %s", self.undelivered, error)
            if error.errno == zmq.EHOSTUNREACH:
                self._core.on_client_gone(action.identity)

    def _send_to_worker(self, action: ToWorker) -> None:
        try:
            self._workers.send(action.identity, SEND_MORE)
            self._workers.send(action.frame, SEND)
        except zmq.Again:
            self._core.on_undeliverable(action.number, full=True)
        except zmq.ZMQError as error:
            log.info("a worker is not there any more: %s", error)
            self._core.on_undeliverable(action.number, full=False)

    def _act_on_process(self, action: Any) -> None:
        assert self._spawner is not None
        match action:
            case Fork(name):
                self._spawner.fork(name)
            case KillWorker(name):
                self._spawner.pidfds.kill(name)
            case DumpStack(name):
                self._spawner.pidfds.kill(name, STACK_SIGNAL)
            case WatchWorker(name, pid, started):
                self._looker.forget(name)
                self._spawner.pidfds.watch(name, pid, started)
            case Forget(name):
                self._looker.forget(name)
            case EndZygote():
                self._spawner.end_zygote()
            case RenewZygote(even_fresh):
                self._spawner.renew(even_fresh=even_fresh)
            case BootServed():
                self._on_boot_served()

    # -- signals ------------------------------------------------------------------------------------------------------------

    def _catch_signals(self) -> None:
        """Handlers only enqueue; the loop is woken through a socket."""
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._epoll.register(self._wake_read.fileno(), select.EPOLLIN)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._enqueue)

    def _enqueue(self, number: int, _: FrameType | None) -> None:
        self._signals.append(number)
