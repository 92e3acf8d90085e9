# SPDX-License-Identifier: Apache-2.0
"""A host around the broker's core, played: workers with queues and ledgers, VMs that live and end, a spawner. For random tests.

It keeps to what the real ones promise (one worker holds a VM's lock; a greeting comes first on every connection; before its goodbye
a worker answers all but what QEMU owes it; last words arrive within LAST_WORDS), and to nothing else: any order is possible.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from vmloop.broker.actions import Forget, Fork, KillWorker, ToClient, ToWorker, WatchWorker
from vmloop.broker.crew import LAST_WORDS
from vmloop.broker.roster import WorkerState
from vmloop.common.names import VmName
from vmloop.common.pack import pack, unpack
from vmloop.common.wire import Kind, Message, decode, encode

from .broker_desk import Desk

# Errors that say of a request that nobody has it any more.
GIVEN_UP = ("outcome-unknown", "worker-lost", "not-running")


@dataclass
class Process:
    """One worker process. `has`: the requests it has taken up; `out`: what it has sent and the broker not yet received."""

    name: VmName
    pid: int
    living: bool = True
    incarnation: int = 0  # 0: it waits for the VM's lock
    identity: bytes = b""
    left: bool = False  # it has sent its goodbye
    cut: bool = False  # dead, and its connection is known to be
    watched: bool = False
    exit_told: bool = False
    has: dict[int, Message] = field(default_factory=dict)
    inherited: list[int] = field(default_factory=list)
    out: list[tuple[Kind, bytes]] = field(default_factory=list)


@dataclass
class Machine:
    """One VM: what is true of it, whoever knows."""

    living: bool = False
    defined: bool = True
    incarnation: int = 0
    owed: dict[int, Message] = field(default_factory=dict)  # what QEMU has been sent and not answered


class World:
    """Call its steps in any order; `perform` after each has the core's actions done."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.machines: dict[VmName, Machine] = defaultdict(Machine)
        self.processes: list[Process] = []
        self.wanted: list[VmName] = []  # forks asked for
        self.untold: list[Process] = []  # forked, and the broker has not heard of it
        self.asked: dict[int, str] = {}
        self.answered: Counter[int] = Counter()
        self.client_ids: dict[int, int] = {}  # the broker's number → the client's
        self.taken_up: Counter[int] = Counter()  # mutating requests, by the broker's number
        self._ids = itertools.count(1)
        self._pids = itertools.count(100)

    # -- clients ------------------------------------------------------------------------------------------------------------

    def ask(self, op: str, name: str, seconds: float, *, reading: bool = False) -> None:
        number = next(self._ids)
        self.asked[number] = op
        service, args = f"vm/{name}", dict[str, Any]({"for": "shutoff"} if op == "wait" else {})
        if op in ("start", "undefine"):
            service, args = "vmloop", {"name": name}
        elif op == "define":
            service, args = "vmloop", {"definition": {"name": name}}
        self.desk.ask(op, service, args, id=number, seconds=seconds, reading=reading)
        self.perform()

    # -- the core's actions -------------------------------------------------------------------------------------------------

    def perform(self) -> None:
        core = self.desk.core
        while core.actions:
            actions, core.actions = core.actions, []
            for action in actions:
                if isinstance(action, ToClient):
                    self._to_client(decode(action.frames[0]))
                elif isinstance(action, ToWorker):
                    self._to_worker(action)
                elif isinstance(action, Fork):
                    assert core.roster.get(action.name) is not None, "a fork for a forgotten VM"
                    self.wanted.append(action.name)
                elif isinstance(action, KillWorker):
                    assert core.roster.get(action.name) is not None, "a kill for a forgotten VM"
                    for process in self.of(action.name):
                        if process.watched:
                            self.kill(process, sent_to_qemu=True, cut=True)
                elif isinstance(action, WatchWorker):
                    self._watch(action)
                elif isinstance(action, Forget):
                    assert core.roster.get(action.name) is None

    def _to_client(self, message: Message) -> None:
        self.answered[message.id] += 1
        if message.kind is Kind.ERROR and unpack(message.body)["code"] in GIVEN_UP:
            held = [number for process in self.processes if process.living for number in process.has]
            owed = [number for machine in self.machines.values() for number in machine.owed]
            still = {self.client_ids.get(number) for number in (*held, *owed)}
            assert message.id not in still, (
                f"{self.asked[message.id]} {message.id} was given up, and may yet be answered"
            )

    def _to_worker(self, action: ToWorker) -> None:
        process = next((process for process in self.processes if process.identity == action.identity), None)
        if process is None or process.cut:
            self.desk.core.on_undeliverable(action.number, full=False)
            return
        entry = self.desk.core.inflight.get(action.number)
        if entry is not None:
            self.client_ids[action.number] = entry.client_id
        message = decode(action.frame)
        vm = self.desk.core.roster.get(process.name)
        assert vm is None or vm.identity == action.identity or message.kind is Kind.CONTROL, "sent to another worker"
        if message.kind is Kind.REQUEST and process.living and not process.left:
            assert message.id == action.number
            self.taken_up[message.id] += not message.reading
            process.has[message.id] = message

    def _watch(self, action: WatchWorker) -> None:
        process = next(process for process in self.processes if process.pid == action.pid)
        assert process.name == action.name
        if process.living:
            process.watched = True
        else:
            process.exit_told = True
            self.desk.core.crew.on_exit(process.name, process.pid, self.desk.now)

    # -- processes ----------------------------------------------------------------------------------------------------------

    def of(self, name: VmName) -> list[Process]:
        return [process for process in self.processes if process.name == name and process.living]

    def fork(self) -> None:
        process = Process(self.wanted.pop(0), next(self._pids))
        self.processes.append(process)
        self.untold.append(process)

    def refuse_fork(self) -> None:
        self.desk.core.crew.on_not_forked(self.wanted.pop(0), "no memory", self.desk.now)
        self.perform()

    def tell_forked(self) -> None:
        process = self.untold.pop(0)
        process.watched = True
        self.desk.core.crew.on_forked(process.name, process.pid)
        self.perform()

    def begin(self, process: Process) -> None:
        """It gets the VM's lock and connects; or, if another worker holds it, it gives up."""
        if any(other.incarnation for other in self.of(process.name)):
            process.living = False
            process.cut = True
            return
        machine = self.machines[process.name]
        machine.incarnation += 1
        process.incarnation = machine.incarnation
        if machine.living:
            process.inherited = list(machine.owed)
            process.has.update(machine.owed)
        machine.owed.clear()
        self.connect(process)

    def connect(self, process: Process) -> None:
        """A new connection, and the greeting on it before anything else."""
        process.identity = self.desk.identity()
        process.out = [said for said in process.out if said[0] is not Kind.HELLO]
        process.out.insert(0, (Kind.HELLO, self._status(process, Kind.HELLO)))

    def kill(self, process: Process, *, sent_to_qemu: bool, cut: bool) -> None:
        """It ends in the middle of things. What was sent to QEMU is still owed there."""
        if process.incarnation and self.machines[process.name].living and sent_to_qemu:
            qmp = {number: message for number, message in process.has.items() if message.op == "qmp"}
            self.machines[process.name].owed.update(qmp)
        process.living = False
        process.cut = cut
        process.has.clear()

    def leave(self, process: Process, *, forget: bool = False) -> None:
        """It answers what it can and says goodbye; if its VM lives, QEMU's debts go to the next one."""
        machine = self.machines[process.name]
        for message in list(process.has.values()):
            if machine.living and message.op == "qmp":
                machine.owed[message.id] = message
            else:
                self._say(process, Kind.ERROR, id=message.id, body=pack({"code": "not-running", "message": "ended"}))
        process.has.clear()
        process.left = True
        forget = forget or not (machine.defined or machine.living)
        if forget:
            self.machines[process.name] = Machine(defined=False)
        process.out.append((Kind.BYE, self._status(process, Kind.BYE, forget)))

    def end(self, process: Process) -> None:
        process.living = False

    def answer(self, process: Process, number: int) -> None:
        """One of its requests is done."""
        message = process.has.pop(number)
        machine = self.machines[process.name]
        if message.op == "start":
            machine.living = True
        elif message.op == "stop":
            machine.living = False
        elif message.op == "define":
            machine.defined = True
        process.out.append((Kind.STATUS, self._status(process, Kind.STATUS)))
        self._say(process, Kind.REPLY, id=number, body=pack(None))
        if message.op == "undefine" and not machine.living:
            self.leave(process, forget=True)
        elif message.op == "stop":
            self.leave(process)

    def vm_ends(self, name: VmName) -> None:
        self.machines[name].living = False
        self.machines[name].owed.clear()
        for process in self.of(name):
            if process.incarnation and not process.left:
                self.leave(process)

    def deliver(self, process: Process) -> None:
        """The broker gets the first of what a worker has sent."""
        _, frame = process.out.pop(0)
        self.desk.core.on_worker(process.identity, [frame], self.desk.now)
        self.perform()

    def tell_exit(self, process: Process) -> None:
        process.exit_told = True
        self.desk.core.crew.on_exit(process.name, process.pid, self.desk.now)
        self.perform()

    def tick(self, ahead: float) -> None:
        """Time passes; the last words of whoever is known to be dead arrive before it does."""
        if ahead >= LAST_WORDS / 2:
            for process in self.processes:
                while process.exit_told and process.out:
                    self.deliver(process)
        self.desk.tick(ahead)
        self.perform()

    def _say(self, process: Process, kind: Kind, **fields: Any) -> None:
        process.out.append((kind, encode(Message(kind, **fields))))

    def _status(self, process: Process, kind: Kind, forget: bool = False) -> bytes:
        machine = self.machines[process.name]
        status = {
            "worker_pid": process.pid,
            "incarnation": process.incarnation,
            "inherited": process.inherited if kind is Kind.HELLO else [],
            "alive": machine.living,
            "state": "running" if machine.living else "shutoff",
            "defined": machine.defined,
            "forget": forget,
        }
        return encode(Message(kind, service=f"vm/{process.name}", body=pack(status)))

    # -- what must be true after every step ---------------------------------------------------------------------------------

    def check(self) -> None:
        core = self.desk.core
        in_flight = Counter(entry.client_id for entry in core.inflight)
        for number, op in self.asked.items():
            assert self.answered[number] + in_flight[number] == 1, (
                f"{op} {number}: answered {self.answered[number]} times"
            )
        assert core.next_due() is not None or not len(core.inflight)
        assert all(times <= 1 for times in self.taken_up.values()), "a mutating request was carried out twice"
        presented = [vm.identity for vm in core.roster if vm.identity]
        assert sorted(presented) == sorted(core.roster.by_identity)
        for vm in core.roster:
            assert vm.worker.state in (WorkerState.READY, WorkerState.LEAVING) or not vm.identity
            if vm.worker.state in (WorkerState.STARTING, WorkerState.LOST):
                assert vm.due is not None, f"nothing will ever happen to {vm.name}, which is {vm.worker.state}"
            elif vm.worker.state is not WorkerState.ABSENT:
                process = next(process for process in self.processes if process.pid == vm.worker_pid)
                assert process.watched or process in self.untold, f"{vm.name}: nobody watches its worker"
                assert process.living or not process.exit_told or vm.due is not None, f"{vm.name}: its worker is dead"
