# SPDX-License-Identifier: Apache-2.0
"""The workers' comings and goings: who presents himself, says goodbye, dies, is made again, and what that means for requests. Pure.

    ABSENT ─ make_worker ─► STARTING ─ on_hello ─► READY ─ on_bye ─► LEAVING ─ on_exit ─► ABSENT
                               ▲                     └── on_exit ─► LOST ─ delay over ─┐
                               └───────────────────────────────────────────────────────┘

Part of the core; used by core.py only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

from ..common.errors import NoSuchVm, NotRunning, OutcomeUnknown, VmloopError
from ..common.names import VmName, host_topic, vm_service
from ..common.pack import pack
from ..common.process import Identity
from ..common.settings import Settings
from ..common.wire import FLAG_ASKING, FLAG_REPEATED, Kind, Message, encode, repeated
from ..common.worker_protocol import PROTOCOLS, agree
from .actions import Action, Forget, Fork, KillWorker, Publish, RenewZygote, ToWorker, WatchWorker
from .inflight import WORKER_GRACE, Entry, InFlight
from .restarts import counts_as_stable, delay_before_restart
from .roster import Roster, VmEntry, WorkerState

log = logging.getLogger(__name__)

# A process's end is seen at once, its last messages come through a socket and a thread: this long they are waited for.
LAST_WORDS: Final = 0.02
# A request that is nearly over is given to the next worker all the same: it may know the answer.
REPEAT_SECONDS: Final = 0.05
# Where the page says that it went by itself, its goodbye is on the way, however much is in front of it.
GOODBYE: Final = 5.0


class Crew:
    """All workers of a broker."""

    def __init__(
        self,
        settings: Settings,
        roster: Roster,
        inflight: InFlight,
        act: Callable[[Action], None],
        answer_error: Callable[[Entry, VmloopError, float], None],
        on_changed: Callable[[VmEntry, float], None],
        wall_micros: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        """`act` takes an action for the loop; `on_changed` is told when a VM's status is new; `wall_micros`: the time that events carry."""
        self._settings = settings
        self._roster = roster
        self._inflight = inflight
        self._act = act
        self._answer_error = answer_error
        self._on_changed = on_changed
        self._wall_micros = wall_micros
        self._watches: set[VmName] = set()  # VMs whose worker's state has a `due`

    # -- they speak ---------------------------------------------------------------------------------------------------------

    def on_hello(self, identity: bytes, name: VmName, message: Message, status: dict[str, Any], now: float) -> None:
        """A worker presents itself, on every connection that it makes."""
        vm = self._roster.add(name)
        pid, incarnation = _whole(status.get("worker_pid")), _whole(status.get("incarnation"))
        if vm.worker.state is WorkerState.READY and incarnation < vm.incarnation:
            log.warning("VM %s: an older worker (pid %d) still speaks; it is told to leave", name, pid)
            self._act(ToWorker(identity, _control("leave"), 0))
            return
        named = status.get("protocols")
        protocol = agree(named)
        if protocol is None:
            self._refuse(identity, vm, pid, status, now)
            return
        vm.protocol = protocol
        if named is not None:
            self._act(ToWorker(identity, _control("agreed", {"protocol": protocol}), 0))
        same = vm.worker_pid == pid and vm.incarnation == incarnation
        ended = vm.exited and vm.worker_pid == pid  # then these are its last words, and it gets nothing to do
        if vm.worker_pid != pid:
            self._act(WatchWorker(name, pid, _whole(status.get("worker_ticks"))))
        if not same and vm.incarnation:
            vm.restarts += 1
        vm.worker_pid, vm.incarnation, vm.born = pid, incarnation, vm.born if same else now
        vm.heard, vm.epoch, vm.seq = now, message.epoch, message.seq
        if not ended:
            vm.exited, vm.due = False, None
            self._watches.discard(name)
        inherited = status.pop("inherited", [])
        self._roster.present(vm, identity)
        # The zygote may have come after it, and with an earlier broker: then nobody has asked for its connections yet.
        if not ended:
            self._act(ToWorker(identity, _control("keep"), 0))
        vm.worker.move(WorkerState.READY, f"pid {pid}")
        vm.take_status(status)
        for entry in self._inflight.of_vm(name) if not ended else ():
            self._settle_with_new_worker(entry, vm, same, inherited if isinstance(inherited, list) else [], now)
        self._on_changed(vm, now)

    def _refuse(self, identity: bytes, vm: VmEntry, pid: int, status: dict[str, Any], now: float) -> None:
        """A worker that speaks no protocol of ours: it leaves, and one with our own code takes its place. The VM runs on."""
        spoken = str(status.get("protocols"))[:100]
        log.error(
            "VM %s: its worker (pid %d, version %.20s) speaks the protocols %s, this broker %s: it is replaced",
            *(vm.name, pid, status.get("version"), spoken, list(PROTOCOLS)),
        )
        self.publish_host("WORKER_REFUSED", vm, {"pid": pid, "version": str(status.get("version"))[:20]})
        self._act(ToWorker(identity, _control("leave"), 0))
        if vm.worker.state is WorkerState.READY and vm.worker_pid != pid:
            return  # another one speaks for the VM
        self._roster.absent(vm)
        if vm.worker.state is not WorkerState.STARTING:
            if vm.worker.state in (WorkerState.READY, WorkerState.LEAVING):
                vm.worker.move(WorkerState.ABSENT, "its protocol is not ours")
            vm.worker.move(WorkerState.STARTING, "it leaves, and the next one comes")
        vm.take_status(status)
        if vm.worker_pid != pid:
            self._act(WatchWorker(vm.name, pid, _whole(status.get("worker_ticks"))))
        vm.worker_pid, vm.exited = pid, False
        vm.due = now + self._settings.broker.worker_hello  # if it does not leave by then, it is ended
        self._watches.add(vm.name)
        self._act(RenewZygote(even_fresh=False))

    def _settle_with_new_worker(
        self, entry: Entry, vm: VmEntry, same: bool, inherited: list[object], now: float
    ) -> None:
        """What becomes of a request when a worker presents itself: the same one, its successor, or the first."""
        if entry.waits_for is not None:
            return
        if entry.sent_to is None:
            self.send(entry, vm, entry.frame)
        elif entry.number in inherited or (same and not vm.repeats):
            entry.sent_to = vm.identity
            self.tell_cancelled(entry)
        elif vm.repeats:
            self._repeat(entry, vm, now)
        elif entry.reading and entry.frame:
            self.send(entry, vm, entry.frame)
        else:
            self._inflight.take(entry.number)
            text = f"VM {vm.name}: its worker died while it had '{entry.op}'; look at the VM before you repeat it"
            self._answer_error(entry, OutcomeUnknown(text), entry.received)

    def _repeat(self, entry: Entry, vm: VmEntry, now: float) -> None:
        """Give a worker a request that another one, or itself on a connection that was cut, had been given: it knows what became of it."""
        entry.given = True
        seconds = max(entry.deadline - WORKER_GRACE - now, REPEAT_SECONDS)
        if entry.frame:
            self.send(entry, vm, repeated(entry.frame, seconds))
            return
        asking = Message(
            kind=Kind.REQUEST,
            service=vm_service(vm.name),
            op=entry.op,
            id=entry.number,
            flags=FLAG_REPEATED | FLAG_ASKING,
            seconds=seconds,
        )
        self.send(entry, vm, encode(asking))

    def on_bye(self, vm: VmEntry, now: float) -> None:
        """A worker says goodbye: nothing more is sent to it, and its exit follows."""
        vm.worker.move(WorkerState.LEAVING, "goodbye")
        vm.due = None
        if vm.exited:
            self._left(vm, now)

    def send(self, entry: Entry, vm: VmEntry, frame: bytes) -> None:
        """Hand a request to a VM's ready worker."""
        vm.requests += 1
        self._act(ToWorker(vm.identity, frame, entry.number))
        self._inflight.sent(entry, vm.identity)
        self.tell_cancelled(entry)

    def tell_cancelled(self, entry: Entry) -> None:
        """The worker that has a request hears if nobody waits for it any more: some end with their caller."""
        if entry.cancelled and entry.sent_to is not None:
            self._act(ToWorker(entry.sent_to, encode(Message(kind=Kind.CONTROL, op="cancel", id=entry.number)), 0))

    # -- they come and go ---------------------------------------------------------------------------------------------------

    def make_worker(self, vm: VmEntry, now: float, why: str) -> None:
        """Have a worker made; it will present itself."""
        vm.worker.move(WorkerState.STARTING, why)
        vm.exited = False
        vm.due = now + self._settings.broker.worker_hello
        self._watches.add(vm.name)
        self._act(Fork(vm.name))

    def adopt(self, vm: VmEntry, now: float) -> None:
        """Make a worker for a VM that a broker before this one left running, unless its worker presents itself first."""
        vm.status["alive"] = True
        if vm.worker.state is WorkerState.ABSENT:
            self.make_worker(vm, now, "the VM was running")

    def expect(self, vm: VmEntry, worker: Identity, now: float) -> None:
        """A worker that a broker before this one had made lives: it will present itself, and another one would only be in its way."""
        vm.worker.move(WorkerState.STARTING, f"its worker lives, pid {worker.pid}")
        vm.worker_pid = worker.pid
        vm.due = now + self._settings.broker.worker_hello
        self._watches.add(vm.name)
        self._act(WatchWorker(vm.name, worker.pid, worker.started))

    def on_forked(self, name: VmName, pid: int) -> None:
        """The zygote has made the worker; it will present itself."""
        vm = self._roster.get(name)
        if vm is not None and vm.worker.state is WorkerState.STARTING and not vm.exited:
            vm.worker_pid = pid

    def on_not_forked(self, name: VmName, error: str, now: float) -> None:
        """The zygote could not make one (no memory, no processes)."""
        vm = self._roster.get(name)
        if vm is not None and vm.worker.state is WorkerState.STARTING:
            log.error("VM %s: no worker can be made: %s", name, error)
            self._lost(vm, now, error)

    def on_exit(self, name: VmName, pid: int, now: float, went: bool = False) -> None:
        """A worker's pidfd says that it has ended; `went`: by itself, with a goodbye."""
        vm = self._roster.get(name)
        if vm is None or vm.worker_pid != pid:
            return
        vm.exited = True
        if vm.worker.state is WorkerState.LEAVING:
            self._left(vm, now)
        else:
            vm.due = now + (GOODBYE if went and vm.worker.state is WorkerState.READY else LAST_WORDS)
            self._watches.add(name)

    def _died(self, vm: VmEntry, now: float) -> None:
        """A worker has ended, and no goodbye of its was on the way."""
        pid = vm.worker_pid
        if counts_as_stable(now - vm.born, self._settings.restart):
            vm.deaths = 0
        self._roster.absent(vm)
        # The doorbell. In the VM's own stream the next worker says it, with a number.
        self.publish_host("WORKER_LOST", vm, {"pid": pid})
        self._lost(vm, now, f"worker {pid} ended without a goodbye")

    def publish_host(self, event: str, vm: VmEntry, data: dict[str, Any]) -> None:
        """An event of the host's stream: nobody numbers it, and nobody keeps it."""
        body = {"vm": vm.name, "epoch": vm.epoch, "seq": 0, "time": self._wall_micros(), "event": event}
        self._act(Publish(host_topic(event), pack({**body, "data": data, "origin": "vmloop"})))

    def _left(self, vm: VmEntry, now: float) -> None:
        """A worker that had said goodbye is gone; what it has not answered goes to the next one, which knows what became of it.

        Of a worker that does not remember for the next one, and whose VM is over: what it had taken up it has answered.
        """
        self._roster.absent(vm)
        vm.due, vm.deaths = None, 0
        vm.worker.move(WorkerState.ABSENT, "it had said goodbye")
        pending = [entry for entry in self._inflight.of_vm(vm.name) if entry.waits_for is None]
        for entry in pending:
            if entry.frame and entry.spawns and not vm.repeats:
                entry.sent_to = None
            elif entry.sent_to is not None and not vm.alive and not vm.repeats:
                self._inflight.take(entry.number)
                self._answer_error(entry, NotRunning(f"VM {vm.name} does not run (it is {vm.state})"), entry.received)
        waiting = any(entry.waits_for is None for entry in self._inflight.of_vm(vm.name))
        if waiting or vm.alive:
            self.make_worker(vm, now, "requests wait" if waiting else "the VM runs on")
        elif vm.status.get("forget") or not vm.known:
            self.forget(vm)

    def _lost(self, vm: VmEntry, now: float, why: str) -> None:
        vm.deaths += 1
        waiting = any(entry.waits_for is None for entry in self._inflight.of_vm(vm.name))
        if not vm.alive and not waiting:
            vm.worker.move(WorkerState.ABSENT, why)
            self._watches.discard(vm.name)
            if not vm.known:
                self.forget(vm)
            return
        vm.worker.move(WorkerState.LOST, why)
        delay = delay_before_restart(vm.deaths, self._settings.restart)
        kill = any(entry.op == "kill" for entry in self._inflight.of_vm(vm.name))  # which waits for no delay
        if delay and not kill:
            vm.due = now + delay
            self._watches.add(vm.name)
        else:
            self.make_worker(vm, now, "at once")

    def forget(self, vm: VmEntry) -> None:
        """There is nothing behind this name any more."""
        for entry in self._inflight.of_vm(vm.name):
            self._inflight.take(entry.number)
            self._answer_error(entry, NoSuchVm(f"VM {vm.name} is no more"), entry.received)
        self._watches.discard(vm.name)
        self._roster.remove(vm)
        self._act(Forget(vm.name))

    def on_new_zygote(self) -> None:
        """A zygote that holds nothing has taken the place of one that died: workers hand it their connections."""
        for vm in self._roster:
            if vm.worker.state is WorkerState.READY:
                self._act(ToWorker(vm.identity, _control("keep"), 0))

    def dismiss(self, vm: VmEntry) -> None:
        """A ready worker shall leave; the VM runs on, and its next worker is made when this one is gone."""
        self._act(ToWorker(vm.identity, _control("leave"), 0))

    def end(self, vm: VmEntry) -> None:
        """A worker that does not leave is ended."""
        self._act(KillWorker(vm.name))

    def dismiss_idle(self) -> None:
        """All VMs are ended: workers without one need not wait for further requests."""
        for vm in self._roster:
            if vm.worker.state is WorkerState.READY and not vm.alive:
                self._act(ToWorker(vm.identity, _control("leave"), 0))

    # -- time ---------------------------------------------------------------------------------------------------------------

    def next_due(self) -> float | None:
        """When `on_tick` has something to do; None: not by itself."""
        if not self._watches:  # nearly always, and this is asked before every wait
            return None
        watched = (self._roster.get(name) for name in self._watches)
        return min((vm.due for vm in watched if vm is not None and vm.due is not None), default=None)

    def on_tick(self, now: float) -> None:
        """Workers whose time to say something is over."""
        for name in tuple(self._watches):
            vm = self._roster.get(name)
            if vm is None or vm.due is None:
                self._watches.discard(name)
            elif vm.due <= now:
                self._watches.discard(name)
                self._overdue(vm, now)

    def _overdue(self, vm: VmEntry, now: float) -> None:
        match vm.worker.state:
            case WorkerState.READY if vm.exited:
                self._died(vm, now)
            case WorkerState.LOST:
                self.make_worker(vm, now, "its delay is over")
            case WorkerState.STARTING if vm.exited:
                self._roster.absent(vm)
                self._lost(vm, now, "it ended before it presented itself")
            case WorkerState.STARTING:
                log.error("VM %s: its worker has not presented itself in time; it is ended", vm.name)
                self._act(KillWorker(vm.name))
                self._roster.absent(vm)
                self._lost(vm, now, "it never presented itself")
            case _:
                vm.due = None


def is_pid(value: object) -> bool:
    """Whether this can be a process of ours; 0 and 1 are nobody's worker."""
    return 1 < _whole(value) < 1 << 31


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _control(op: str, body: dict[str, Any] | None = None) -> bytes:
    return encode(Message(kind=Kind.CONTROL, op=op, body=pack(body) if body is not None else b""))
