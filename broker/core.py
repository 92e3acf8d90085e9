# SPDX-License-Identifier: Apache-2.0
"""The broker's decisions: takes a message, an exit or a tick, and leaves actions. Touches no socket, process or clock; driven by loop.py.

A request's way: `on_client` checks it, numbers it, writes it down (inflight.py) and leaves `ToWorker`; the worker's answer comes in
`on_worker`, finds its entry by that number, and leaves `ToClient`. Payloads are passed on packed. Requests to the host are answered in
host.py; those that need a worker that is not there wait for it (`_wait_for_worker`).
"""

from __future__ import annotations

import logging
import math
from typing import Any, Final

from ..common.errors import (
    BadRequest,
    Busy,
    NoSuchVm,
    NotRunning,
    TooLarge,
    VmloopError,
)
from ..common.majordomo import (
    BadMajordomo,
    Dialect,
    MmiRequest,
    build_mmi_reply,
    is_majordomo,
    parse_request,
)
from ..common.names import HOST_SERVICE, vm_of_service
from ..common.pack import MAX_MESSAGE_BYTES, pack, unpack_map
from ..common.settings import Settings
from ..common.wire import (
    FLAG_READING,
    FLAG_REPEATED,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    BadFrame,
    Kind,
    Message,
    decode,
    encode,
    forwarded,
    with_id,
)
from .actions import Action, Publish, ToClient
from .crew import Crew, is_pid
from .inflight import WORKER_GRACE, Entry, InFlight
from .replies import majordomo_reply, own_reply
from .roster import Roster, VmEntry, WorkerState
from .unanswered import cut_off, overdue, undelivered

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT: Final = 30.0  # design, section 5
MAX_TIMEOUT: Final = 3600.0
# From the last answer to the end: libzmq throws away what a client has not read yet when its connection is cut.
FAREWELL: Final = 0.1

_REQUEST: Final = int(Kind.REQUEST)
_ANSWERED_HERE: Final = frozenset({"show", "wait"})
# A worker carries these out too, but only for the host's sake: their requests may have to wait for a worker to be made.
_OF_THE_HOST: Final = frozenset({"start", "attach", "define", "undefine"})
_PARTIAL: Final = int(Kind.PARTIAL)
_ANSWERS: Final = frozenset({int(Kind.REPLY), int(Kind.PARTIAL), int(Kind.ERROR)})
_STATUSES: Final = frozenset({Kind.HELLO, Kind.STATUS, Kind.BYE})


class Core:
    """The whole state of a broker. `actions` is what the loop has yet to do."""

    def __init__(self, settings: Settings, first_number: int) -> None:
        self.settings = settings
        self.actions: list[Action] = []
        self.roster = Roster()
        self.inflight = InFlight(first_number, settings.broker.requests_per_client, settings.broker.requests_per_vm)
        self.dropped = 0  # messages that could not be answered
        self.finished = False
        self._draining_until: float | None = None
        self._last_answer = 0.0
        self.crew = Crew(
            settings,
            self.roster,
            self.inflight,
            act=lambda action: self.actions.append(action),
            answer_error=self._answer_error,
            on_changed=lambda vm, now: self.on_vm_changed(vm, now),
        )

    # -- from clients -------------------------------------------------------------------------------------------------------

    def on_client(self, identity: bytes, parts: list[bytes], now: float) -> None:
        """A message at the client door, without its identity frame. Any bytes are survived."""
        if len(parts) == 1 and parts[0][:4] == MAGIC:
            self._on_native(identity, parts[0], now)
        elif is_majordomo(parts):
            self._on_majordomo(identity, parts, now)
        else:
            self._drop(f"neither a native frame nor Majordomo: {len(parts)} frames")

    def _on_native(self, identity: bytes, frame: bytes, now: float) -> None:
        if len(frame) < HEADER_BYTES:
            return self._drop("a native frame shorter than its header")
        _, kind, flags, service_len, op_len, client_id, seconds, _, key_len, _ = HEADER.unpack_from(frame)
        entry = Entry(0, identity, client_id, None, None, "", bool(flags & FLAG_READING), now)
        entry.again = bool(flags & FLAG_REPEATED and key_len)
        try:
            if len(frame) > MAX_MESSAGE_BYTES:
                text = f"a message is at most {MAX_MESSAGE_BYTES} bytes, this one has {len(frame)}"
                raise TooLarge(text, limit=MAX_MESSAGE_BYTES)
            op_at = HEADER_BYTES + service_len
            if kind != _REQUEST or key_len > 64 or op_at + op_len + key_len > len(frame):
                decode(frame)  # says what is wrong
                raise BadFrame("a client sends requests: kind 1")
            service = frame[HEADER_BYTES:op_at]
            try:
                entry.op = frame[op_at : op_at + op_len].decode()
            except UnicodeDecodeError:
                raise BadFrame("service and op must be UTF-8") from None
            seconds = _checked_timeout(seconds)
            vm = self.roster.by_service.get(service)
            if vm is not None and vm.worker.state is WorkerState.READY and self._goes_to_worker(entry.op):
                self._forward(entry, vm, frame, seconds, now)
            else:
                self._dispatch(entry, service.decode("utf-8", "replace"), frame, seconds, now)
        except VmloopError as error:
            self._answer_error(entry, error, now)
        return None

    def _on_majordomo(self, identity: bytes, parts: list[bytes], now: float) -> None:
        try:
            request = parse_request(parts)
        except BadMajordomo as error:
            if error.envelope is None:
                return self._drop(str(error))
            entry = Entry(0, identity, error.client_id, error.envelope, None, "", True, now)
            return self._answer_error(entry, error, now)
        if isinstance(request, MmiRequest):
            status = "501" if request.envelope.service != "mmi.service" else self._mmi_status(request.asked)
            self.actions.append(ToClient(identity, build_mmi_reply(request.envelope, status)))
            return None
        entry = Entry(0, identity, request.client_id, request.envelope, None, request.op, request.reading, now)
        entry.again = bool(request.key)  # which Majordomo does not tell
        try:
            size = sum(map(len, parts))
            if size > MAX_MESSAGE_BYTES:
                text = f"a message is at most {MAX_MESSAGE_BYTES} bytes, this one has {size}"
                raise TooLarge(text, limit=MAX_MESSAGE_BYTES)
            seconds = _checked_timeout(request.timeout or 0.0)
            frame = encode(
                Message(
                    kind=Kind.REQUEST,
                    service=request.envelope.service,
                    op=request.op,
                    body=request.body,
                    key=request.key,
                    flags=FLAG_READING if request.reading else 0,
                    seconds=seconds,
                )
            )
            self._dispatch(entry, request.envelope.service, frame, seconds, now)
        except VmloopError as error:
            self._answer_error(entry, error, now)
        return None

    def _mmi_status(self, service: str) -> str:
        vm = self.roster.by_service.get(service.encode())
        return "200" if service == HOST_SERVICE or (vm is not None and vm.known) else "404"

    # -- dispatch -----------------------------------------------------------------------------------------------------------

    @staticmethod
    def _goes_to_worker(op: str) -> bool:
        return op not in _ANSWERED_HERE and op not in _OF_THE_HOST

    def _dispatch(self, entry: Entry, service: str, frame: bytes, seconds: float, now: float) -> None:
        """Everything but the short way: requests to the host, and to VMs without a ready worker."""
        if self._draining_until is not None:
            raise Busy("the broker is going down; VMs and workers run on, ask again when it is back")
        if service == HOST_SERVICE:
            self.on_host(entry, frame, seconds, now)
            return
        name = vm_of_service(service)
        vm = self.roster.get(name)
        if vm is None or not vm.known:
            raise NoSuchVm(f"there is no VM {name!r}; 'vmloop list' shows all, 'vmloop define' makes one")
        if entry.op in _OF_THE_HOST:
            raise BadRequest(
                f"{entry.op} is an operation of the host: send it to the service 'vmloop', with the name as an argument"
            )
        if entry.op in _ANSWERED_HERE:
            self.on_lookup(entry, vm, frame, seconds, now)
        elif vm.worker.state is WorkerState.READY:
            self._forward(entry, vm, frame, seconds, now)
        elif vm.alive or entry.again or entry.op in ("events", "detach"):
            self.wait_for_worker(entry, vm, frame, seconds, now)
        else:
            reason = vm.status.get("reason", "unknown")
            raise NotRunning(f"VM {name} does not run (it is {vm.state}: {reason}); start it first")

    def on_host(self, entry: Entry, frame: bytes, seconds: float, now: float) -> None:
        """A request to the host; host.py puts its own function here."""
        raise NotImplementedError

    def on_lookup(self, entry: Entry, vm: VmEntry, frame: bytes, seconds: float, now: float) -> None:
        """`show` and `wait`; host.py puts its own function here."""
        raise NotImplementedError

    def _forward(self, entry: Entry, vm: VmEntry, frame: bytes, seconds: float, now: float) -> None:
        """The short way: to the VM's worker, at once."""
        if self._draining_until is not None:
            raise Busy("the broker is going down; VMs and workers run on, ask again when it is back")
        self._enter(entry, vm, now + seconds + WORKER_GRACE)
        frame = forwarded(frame, entry.number, seconds)
        self.inflight.keep_frame(entry, frame)
        self.crew.send(entry, vm, frame)

    def wait_for_worker(self, entry: Entry, vm: VmEntry, frame: bytes, seconds: float, now: float) -> None:
        """Keep a request until the VM has a ready worker, and have one made if none is on its way."""
        self._enter(entry, vm, now + seconds + WORKER_GRACE)
        self._hold(entry, forwarded(frame, entry.number, seconds))
        if vm.worker.state is WorkerState.READY:
            self.crew.send(entry, vm, entry.frame)
        elif vm.worker.state is WorkerState.ABSENT:
            self.crew.make_worker(vm, now, "a request came")
        elif vm.worker.state is WorkerState.LOST and entry.op == "kill":
            self.crew.make_worker(vm, now, "a kill does not wait for its delay")

    def _enter(self, entry: Entry, vm: VmEntry | None, deadline: float) -> None:
        name = vm.name if vm is not None else None
        kill = entry.op == "kill"
        # A VM that answers nothing has many requests in flight, and must be killed all the same.
        self.inflight.require_room(entry.client, None if kill else name)
        entry.number = self.inflight.next_number()
        entry.vm = name
        self.inflight.add(entry, deadline)
        if kill:
            entry.reading = True  # it may be told to the next worker too
            self.on_kill(entry)

    def _hold(self, entry: Entry, frame: bytes) -> None:
        try:
            self.inflight.hold_frame(entry, frame)
        except Busy:
            self.inflight.take(entry.number)
            raise

    def on_undeliverable(self, number: int, *, full: bool) -> None:
        """The loop could not hand a request to its worker."""
        entry = self.inflight.get(number)
        if entry is None:
            return
        if not full and entry.given:
            return  # a worker before this one may have done it: the next one that presents itself is given it marked
        if not full and entry.frame:
            entry.sent_to = None  # nobody ever had it: it goes to the next worker as it is
            return
        self.inflight.take(number)
        self._answer_error(entry, undelivered(entry, full=full), entry.received)

    def on_client_gone(self, identity: bytes) -> None:
        """A client is not there any more: the workers that have its requests hear of it, and some requests end with their caller."""
        for entry in self.inflight:
            if entry.client == identity and not entry.cancelled:
                entry.cancelled = True
                self.crew.tell_cancelled(entry)

    # -- from workers -------------------------------------------------------------------------------------------------------

    def on_worker(self, identity: bytes, parts: list[bytes], now: float) -> None:
        """A message at the worker door, without its identity frame."""
        if len(parts) != 1 or len(parts[0]) < HEADER_BYTES or parts[0][:4] != MAGIC:
            return self._drop("a worker sent something that is no native frame")
        frame = parts[0]
        _, kind, _, service_len, op_len, number, _, epoch, key_len, seq = HEADER.unpack_from(frame)
        body_at = HEADER_BYTES + service_len + op_len + key_len
        if body_at > len(frame):
            return self._drop("a worker sent a frame whose lengths do not fit")
        vm = self.roster.by_identity.get(identity)
        if vm is not None:
            vm.heard = now
            vm.epoch, vm.seq = max(
                (vm.epoch, vm.seq), (epoch, seq)
            )  # an answer that is given again has the cursor of then
        if kind in _ANSWERS:
            self._last_answer = now
            return self._on_answer(number, kind, frame, now)
        if kind == Kind.EVENT:
            service_end = HEADER_BYTES + service_len
            topic = frame[HEADER_BYTES:service_end] + b"/" + frame[service_end : service_end + op_len]
            self.actions.append(Publish(topic, frame[body_at:]))
            return None
        return self._on_status(identity, frame, now)

    def _on_answer(self, number: int, kind: int, frame: bytes, now: float) -> None:
        entry = self.inflight.get(number)
        if entry is None:
            return  # its caller's deadline has passed, or an earlier broker asked
        try:
            message = decode(frame) if entry.envelope is not None else None
        except BadFrame as error:
            self._drop(f"a worker's answer: {error}")
            return
        if kind != _PARTIAL:
            self.inflight.take(number)
        if message is None or entry.envelope is None:
            if entry.client:
                self.actions.append(ToClient(entry.client, [with_id(frame, entry.client_id)]))
            elif kind != _PARTIAL:
                self.on_own_answer(entry, kind == Kind.ERROR, frame, now)
            return
        if kind == _PARTIAL and entry.envelope.dialect is Dialect.V01:
            return  # MDP/0.1 knows one answer only
        self.actions.append(majordomo_reply(entry, entry.envelope, message))

    def _on_status(self, identity: bytes, frame: bytes, now: float) -> None:
        try:
            message = decode(frame)
            name = vm_of_service(message.service)
            status = unpack_map(message.body)
        except BadRequest as error:
            return self._drop(f"a worker's {frame[4]}: {error}")
        if message.kind not in _STATUSES:
            return self._drop(f"a worker sent a {message.kind.name}")
        if message.kind is Kind.HELLO:
            if not is_pid(status.get("worker_pid")):
                return self._drop(f"a worker of VM {name} presents itself without its pid")
            return self.crew.on_hello(identity, name, message, status, now)
        vm = self.roster.by_identity.get(identity)
        if vm is None or vm.name != name:
            return self._drop(f"a worker that is not the one of VM {name} speaks for it")
        vm.take_status(status)
        self.on_vm_changed(vm, now)
        if message.kind is Kind.BYE:
            self.crew.on_bye(vm, now)
        return None

    def on_kill(self, entry: Entry) -> None:
        """A kill is on its way to a worker; host.py puts its own function here."""
        raise NotImplementedError

    def on_own_answer(self, entry: Entry, failed: bool, frame: bytes, now: float) -> None:
        """A request of the broker's own has been answered; host.py puts its own function here."""
        raise NotImplementedError

    def on_vm_changed(self, vm: VmEntry, now: float) -> None:
        """A VM's status is new: whoever waits for its state; host.py puts its own function here."""
        raise NotImplementedError

    # -- time ---------------------------------------------------------------------------------------------------------------

    def next_due(self) -> float | None:
        """When `on_tick` has something to do; None: not by itself."""
        draining = None if self.finished else self._draining_until
        if draining is not None and not len(self.inflight):
            return min(self._last_answer + FAREWELL, draining)
        due = self.inflight.next_due()
        for other in (self.crew.next_due(), draining):
            if other is not None and (due is None or other < due):
                due = other
        return due

    def on_tick(self, now: float) -> None:
        """Deadlines of requests and of workers."""
        for entry in self.inflight.take_due(now):
            vm = self.roster.get(entry.vm) if entry.vm is not None else None
            self._answer_error(entry, overdue(entry, vm), now)
        self.crew.on_tick(now)
        if self._draining_until is not None and not self.finished:
            all_answered = not len(self.inflight) and now >= self._last_answer + FAREWELL
            if all_answered or now >= self._draining_until:
                self._end_drain(now)

    # -- end ----------------------------------------------------------------------------------------------------------------

    def drain(self, now: float) -> None:
        """Take no more requests; finish when what is in flight is answered, or its time is over. VMs and workers run on."""
        if self._draining_until is None:
            self._draining_until = now + self.settings.broker.drain
            self._last_answer = now
            for entry in self.inflight:
                if entry.waits_for is not None:
                    self.inflight.take(entry.number)
                    self._answer_error(entry, Busy("the broker is going down; ask again when it is back"), now)

    def _end_drain(self, now: float) -> None:
        for entry in self.inflight:
            self.inflight.take(entry.number)
            self._answer_error(entry, cut_off(entry), now)
        self.finished = True

    # -- answers ------------------------------------------------------------------------------------------------------------

    def answer(self, entry: Entry, value: Any, now: float) -> None:
        """Answer a request with a result."""
        self._answer(entry, Kind.REPLY, pack(value), now)

    def _answer_error(self, entry: Entry, error: VmloopError, now: float) -> None:
        self._answer(entry, Kind.ERROR, pack(error.to_wire()), now)

    def _answer(self, entry: Entry, kind: Kind, body: bytes, now: float) -> None:
        self._last_answer = max(self._last_answer, now)
        vm = self.roster.get(entry.vm) if entry.vm is not None else None
        reply = own_reply(entry, vm, kind, body, now)
        if reply is not None:
            self.actions.append(reply)
        else:
            self.on_own_answer(entry, kind is Kind.ERROR, encode(Message(kind=kind, body=body)), now)

    def _drop(self, why: str) -> None:
        """The one place where a message that cannot be answered ends."""
        self.dropped += 1
        if self.dropped <= 10 or self.dropped % 1000 == 0:
            log.warning("message dropped (%d so far): %s", self.dropped, why)


def _checked_timeout(seconds: float) -> float:
    """The timeout that holds: the default for 0. `BadRequest` for what is no time."""
    if seconds == 0.0:
        return DEFAULT_TIMEOUT
    if not math.isfinite(seconds) or seconds < 0 or seconds > MAX_TIMEOUT:
        raise BadRequest(f"timeout {seconds!r} is not within 0 and {MAX_TIMEOUT:g} seconds")
    return seconds
