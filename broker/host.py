# SPDX-License-Identifier: Apache-2.0
"""Operations of the host, and the two of a VM that the broker answers itself (show, wait). Completes core.py; used by __main__.py.

Looking is free: list, show and stats come from the roster, the status pages and /proc, and never go to a worker or to QEMU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar

import msgspec

from .. import __version__
from ..common.definition import DEFAULT_BINARY
from ..common.errors import AlreadyRunning, BadRequest, Busy, NoSuchVm, NotRunning, VmloopError
from ..common.majordomo import Dialect
from ..common.names import PROBER_SERVICE_PREFIX, vm_name, vm_service
from ..common.pack import pack, unpack_map
from ..common.settings import Settings
from ..common.states import VmState
from ..common.wire import HEADER_BYTES, BadFrame, Kind, Message, decode, encode, forwarded
from .actions import BootServed, EndZygote, RenewZygote
from .autostart import Autostart
from .core import Core
from .ending import SHUTDOWN_SECONDS, Ending
from .inflight import WORKER_GRACE, Entry
from .probes import Probes
from .rolling import Rolling
from .roster import VmEntry
from .watch import Looker, Watch

PROTOCOL: Final = 1  # of the native wire
_PROBER_SERVICE: Final = PROBER_SERVICE_PREFIX.encode()


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """No arguments."""


class Named(msgspec.Struct, frozen=True):
    """At least a name; the worker checks the rest."""

    name: str


class DefineArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    definition: dict[str, Any]


class StatsArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    names: list[str] | None = None


class RestartArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    names: list[str] | None = None


class ShutdownArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    vms: Literal["leave", "kill"] = "leave"


class CapabilitiesArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    binary: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)] = DEFAULT_BINARY
    refresh: bool = False


class WaitArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"state": "for"}):
    state: str


class Ask(NamedTuple):
    """One request to the host: its entry, its frame, its timeout, and the time now."""

    entry: Entry
    frame: bytes
    seconds: float
    now: float


A = TypeVar("A", bound=msgspec.Struct)


class HostCore(Core):
    """The core with its operations."""

    def __init__(self, settings: Settings, first_number: int, looker: Looker, pid: int) -> None:
        super().__init__(settings, first_number)
        self._looker = looker
        self.watch = Watch(
            settings.broker,
            self.roster,
            self.inflight,
            looker,
            act=lambda action: self.actions.append(action),
            wall_micros=lambda: time.time_ns() // 1000,
        )
        self._pid = pid
        self._started = time.time()
        self.leaves_nothing = False  # the broker ends when nothing of its processes is left
        self._ending = Ending(self.roster, self._ask_vm, self._on_all_ended)
        self._operations: dict[str, Callable[[Ask], None]] = {
            "ping": self._ping,
            "version": self._version,
            "list": self._list,
            "stats": self._stats,
            "define": self._define,
            "undefine": self._undefine,
            "start": self._start,
            "attach": self._attach,
            "capabilities": self._capabilities,
            "restart-workers": self._restart_workers,
            "shutdown": self._shutdown,
        }
        self.probes = Probes(
            self.inflight,
            settings.broker.worker_hello,
            act=lambda action: self.actions.append(action),
            answer_error=self._answer_error,
        )
        self._rolling = Rolling(
            self.roster,
            self.crew,
            waits=self._is_waiting,
            tell=self._tell_part,
            answer=self._answer_entered,
            answer_error=self._refuse_entered,
        )
        self.autostart = Autostart(
            self.roster,
            start=self._start_for_host,
            on_failed=lambda vm, why: self.crew.publish_host("AUTOSTART_FAILED", vm, {"error": why}),
            on_done=lambda: self.actions.append(BootServed()),
            may_start=lambda: not self._ending.under_way and self._draining_until is None,
        )

    def on_host(self, entry: Entry, frame: bytes, seconds: float, now: float) -> None:
        operation = self._operations.get(entry.op)
        if operation is None:
            there = ", ".join(sorted(self._operations))
            raise BadRequest(f"the host has no operation {entry.op!r:.60}; there are: {there}")
        self.inflight.require_room(entry.client, None)
        operation(Ask(entry, frame, seconds, now))

    def on_lookup(self, entry: Entry, vm: VmEntry, frame: bytes, seconds: float, now: float) -> None:
        if entry.op == "show":
            _arguments(entry.op, Nothing, frame)
            entry.vm = vm.name
            self.answer(entry, vm.details(now, self._blocked(vm)), now)
            return
        wanted = _arguments(entry.op, WaitArguments, frame).state
        if wanted not in (state.value for state in VmState):
            raise BadRequest(
                f"wait: {wanted!r:.60} is no state; there are: {', '.join(state.value for state in VmState)}"
            )
        entry.waits_for = wanted
        self._enter(entry, vm, now + seconds)
        self._answer_wait(entry, vm, now)

    def on_vm_changed(self, vm: VmEntry, now: float) -> None:
        for entry in self.inflight.of_vm(vm.name):
            if entry.waits_for is not None:
                self._answer_wait(entry, vm, now)
        self._ending.on_vm_changed(vm, now)
        self._rolling.on_vm_changed(vm, now)
        self.autostart.look(now)
        self._ending.forget(self._is_waiting)
        self._ending.look(now)
        if self.leaves_nothing and self.finished:
            self.crew.dismiss_idle()  # one that has come up only now, for a last request

    def next_due(self) -> float | None:
        dues = (
            super().next_due(),
            self._rolling.next_due(),
            self.autostart.next_due(),
            self.probes.next_due(),
            self._ending.due,
        )
        return min((due for due in dues if due is not None), default=None)

    def on_tick(self, now: float) -> None:
        super().on_tick(now)
        self._rolling.on_tick(now)
        self.probes.on_tick(now)
        self.autostart.look(now)
        self._ending.on_tick(now)

    def on_own_answer(self, entry: Entry, failed: bool, frame: bytes, now: float) -> None:
        self._ending.on_answer(entry.number, failed, now)
        self.autostart.on_answer(entry, failed, decode(frame).body, now)

    def on_renewed(self, error: str, now: float) -> None:
        """Another zygote has taken the place of the one before, or an error why not."""
        self._rolling.on_renewed(error, now)

    def on_kill(self, entry: Entry) -> None:
        self.watch.on_kill(entry)

    def _answer_wait(self, entry: Entry, vm: VmEntry, now: float) -> None:
        if vm.state == entry.waits_for:
            self.inflight.take(entry.number)
            self.answer(entry, {"state": vm.state, "reason": vm.status.get("reason"), "epoch": vm.epoch}, now)

    def _blocked(self, vm: VmEntry) -> float:
        """For how long the worker's loop has been held up; a worker that is gone holds up nobody."""
        return self._looker.blocked(vm.name, vm.worker_pid) if vm.worker_pid is not None else 0.0

    # -- looking ------------------------------------------------------------------------------------------------------------

    def _ping(self, ask: Ask) -> None:
        _arguments(ask.entry.op, Nothing, ask.frame)
        self.answer(ask.entry, {"time": time.time()}, ask.now)

    def _version(self, ask: Ask) -> None:
        _arguments(ask.entry.op, Nothing, ask.frame)
        result = {"version": __version__, "protocol": PROTOCOL, "pid": self._pid, "started": self._started}
        self.answer(ask.entry, result, ask.now)

    def _list(self, ask: Ask) -> None:
        _arguments(ask.entry.op, Nothing, ask.frame)
        self.answer(ask.entry, [vm.summary(ask.now, self._blocked(vm)) for vm in self.roster if vm.known], ask.now)

    def _stats(self, ask: Ask) -> None:
        names = _arguments(ask.entry.op, StatsArguments, ask.frame).names
        vms = [vm for vm in self.roster if vm.known] if names is None else [self._require(name) for name in names]
        self.answer(ask.entry, [self._figures(vm, ask.now) for vm in vms], ask.now)

    def _figures(self, vm: VmEntry, now: float) -> dict[str, Any]:
        pid = vm.status.get("pid")
        return {
            "name": vm.name,
            "state": vm.state,
            "epoch": vm.epoch,
            "seq": vm.seq,
            "age": None if vm.heard is None else round(now - vm.heard, 3),
            "in_flight": self.inflight.count_of_vm(vm.name),
            "requests": vm.requests,
            "restarts": vm.restarts,
            "qemu": self._looker.process(pid if isinstance(pid, int) else None),
            "worker": self._looker.process(vm.worker_pid),
        }

    def _require(self, name: str) -> VmEntry:
        vm = self.roster.get(vm_name(name))
        if vm is None or not vm.known:
            raise NoSuchVm(f"there is no VM {name!r}; 'vmloop list' shows all, 'vmloop define' makes one")
        return vm

    # -- what needs a worker ------------------------------------------------------------------------------------------------

    def _define(self, ask: Ask) -> None:
        name = _arguments(ask.entry.op, DefineArguments, ask.frame).definition.get("name")
        self._through_worker(ask, self.roster.add(vm_name(name)))

    def _undefine(self, ask: Ask) -> None:
        self._through_worker(ask, self._require(_arguments(ask.entry.op, Named, ask.frame).name))

    def _start(self, ask: Ask) -> None:
        vm = self._require(_arguments(ask.entry.op, Named, ask.frame).name)
        if vm.alive and not ask.entry.again:
            raise AlreadyRunning(f"VM {vm.name} is {vm.state} already")
        self._through_worker(ask, vm)

    def _attach(self, ask: Ask) -> None:
        vm = self.roster.add(vm_name(_arguments(ask.entry.op, Named, ask.frame).name))
        if vm.alive and not ask.entry.again:
            raise AlreadyRunning(f"VM {vm.name} is {vm.state} already; detach it first, or choose another name")
        self._through_worker(ask, vm)

    def _through_worker(self, ask: Ask, vm: VmEntry) -> None:
        """Pass a request of the host to a VM's worker, which does everything that touches the VM's files and processes."""
        self._ending.forget(self._is_waiting)
        if self._ending.under_way:
            raise Busy("the host is being shut down, with all its VMs; ask again when it is back")
        ask.entry.spawns = True
        message = decode(ask.frame)
        passed = encode(msgspec.structs.replace(message, service=vm_service(vm.name)))
        self.wait_for_worker(ask.entry, vm, passed, ask.seconds, ask.now)

    def _start_for_host(self, vm: VmEntry, seconds: float, now: float) -> int:
        """Ask for a VM's start without a client; the request's number."""
        entry = Entry(0, b"", 0, None, None, "start", False, now, spawns=True)
        request = Message(kind=Kind.REQUEST, service=vm_service(vm.name), op="start", body=pack({"name": vm.name}))
        self.wait_for_worker(entry, vm, encode(request), seconds, now)
        return entry.number

    # -- workers ------------------------------------------------------------------------------------------------------------

    def _restart_workers(self, ask: Ask) -> None:
        names = _arguments(ask.entry.op, RestartArguments, ask.frame).names
        if self._ending.under_way:
            raise Busy("the host is being shut down; its workers are not restarted")
        self._rolling.require_none()
        vms = list(self.roster) if names is None else [self._require(name) for name in names]
        idle = [vm.name for vm in vms if not vm.alive]
        if names is not None and idle:
            raise NotRunning(f"VM {idle[0]} does not run: it has no worker to restart")
        self._enter(ask.entry, None, ask.now + ask.seconds)
        self._rolling.begin(ask.entry, [vm.name for vm in vms if vm.alive])
        self.actions.append(RenewZygote(even_fresh=True))

    def _tell_part(self, entry: Entry, part: Any, now: float) -> None:
        if entry.envelope is None or entry.envelope.dialect is not Dialect.V01:  # which knows one answer only
            self._answer(entry, Kind.PARTIAL, pack(part), now)

    def _answer_entered(self, entry: Entry, value: Any, now: float) -> None:
        self.inflight.take(entry.number)
        self.answer(entry, value, now)

    def _refuse_entered(self, entry: Entry, error: VmloopError, now: float) -> None:
        if self.inflight.take(entry.number) is not None:
            self._answer_error(entry, error, now)

    # -- probes -------------------------------------------------------------------------------------------------------------

    def _capabilities(self, ask: Ask) -> None:
        arguments = _arguments(ask.entry.op, CapabilitiesArguments, ask.frame)
        self.probes.require_room(arguments.binary)
        body = pack(msgspec.to_builtins(arguments))
        frame = encode(msgspec.structs.replace(decode(ask.frame), body=body))
        self._enter(ask.entry, None, ask.now + ask.seconds + WORKER_GRACE)
        self._hold(ask.entry, forwarded(frame, ask.entry.number, ask.seconds))
        self.probes.ask(ask.entry, arguments.binary, ask.now)

    def _on_status(self, identity: bytes, frame: bytes, now: float) -> None:
        """A worker's, or a prober's, which has no VM and says nothing but HELLO."""
        if not frame.startswith(_PROBER_SERVICE, HEADER_BYTES):
            return super()._on_status(identity, frame, now)
        try:
            message = decode(frame)
        except BadFrame as error:
            return self._drop(f"a prober's {frame[4]}: {error}")
        if message.kind is not Kind.HELLO or not message.service.startswith(PROBER_SERVICE_PREFIX):
            return self._drop(f"a prober sent a {message.kind.name}")
        return self.probes.on_hello(identity, message.service.removeprefix(PROBER_SERVICE_PREFIX), message.body)

    # -- end ----------------------------------------------------------------------------------------------------------------

    def _shutdown(self, ask: Ask) -> None:
        how = _arguments(ask.entry.op, ShutdownArguments, ask.frame).vms
        self._rolling.stop(Busy("the host is being shut down; not all workers were restarted"), ask.now)
        if how == "leave":
            count = sum(vm.alive for vm in self.roster)
            self.answer(ask.entry, {"vms": "left running", "count": count}, ask.now)
            self.drain(ask.now)
            return
        self._ending.forget(self._is_waiting)
        self.actions.append(EndZygote())
        self.probes.dismiss()
        self.crew.dismiss_idle()
        self._enter(ask.entry, None, ask.now + SHUTDOWN_SECONDS)
        self._ending.begin(ask.entry, ask.now)

    def end(self, vms: str, stop_timeout: float, now: float) -> None:
        """The owner of a private broker has ended, or wants the broker to: what it chose becomes of the VMs, then the broker ends.

        `vms`: stop (guests have `stop_timeout` seconds to power down), kill or leave. May be called again to kill what is being stopped.
        """
        self._rolling.stop(Busy("the host is being shut down; not all workers were restarted"), now)
        if vms == "leave":
            self.drain(now)
            return
        self.leaves_nothing = True
        self._ending.begin(None, now, stop_timeout if vms == "stop" else None)

    def _ask_vm(self, vm: VmEntry, op: str, arguments: Mapping[str, Any], seconds: float, now: float) -> int:
        """A request of the broker's own to a VM; a kill is `reading`, for its worker's successor may be told again."""
        entry = Entry(0, b"", 0, None, None, op, op == "kill", now)
        frame = encode(Message(kind=Kind.REQUEST, service=vm_service(vm.name), op=op, body=pack(arguments)))
        self.wait_for_worker(entry, vm, frame, seconds, now)
        return entry.number

    def _is_waiting(self, entry: Entry) -> bool:
        return self.inflight.get(entry.number) is entry

    def _on_all_ended(self, entries: list[Entry], count: int, now: float) -> None:
        self.actions.append(EndZygote())
        self.probes.dismiss()
        self.crew.dismiss_idle()
        self.leaves_nothing = self.leaves_nothing and not any(vm.alive for vm in self.roster)
        for entry in entries:
            self._answer_entered(entry, {"vms": "killed", "count": count}, now)
        self.drain(now)


def _arguments(op: str, model: type[A], frame: bytes) -> A:
    values = unpack_map(decode(frame).body)
    try:
        return msgspec.convert(values, model)
    except (msgspec.ValidationError, RecursionError) as error:
        raise BadRequest(f"{op}: {error}") from error
