# SPDX-License-Identifier: Apache-2.0
"""Everything around the broker's core, played by the test: clients, workers, the spawner and the clock. No socket, no process, no waiting.

    desk = Desk()
    worker = desk.worker("web1")                     # a VM with a worker that has presented itself
    desk.ask("qmp", "vm/web1", id=7)                 # what a client sends
    [request] = desk.requests(worker)                # what the worker gets
    desk.reply(worker, request, {"return": {}})      # what it answers
    [answer] = desk.answers()                        # what the client gets

Actions that nobody has taken stay on `desk.core.actions`, in order.
"""

from __future__ import annotations

import itertools
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from vmloop.broker.actions import Fork, ToClient, ToWorker
from vmloop.broker.host import HostCore
from vmloop.broker.roster import VmEntry
from vmloop.common.names import VmName
from vmloop.common.pack import pack, unpack
from vmloop.common.settings import BrokerSettings, RestartSettings, Settings
from vmloop.common.wire import FLAG_READING, FLAG_REPEATED, Kind, Message, decode, encode

A = TypeVar("A")

CLIENT: Final = b"client-1"
FIRST_NUMBER: Final = 1000
START: Final = 5000.0  # the desk's clock when it is opened


class FakeLooker:
    """What can be seen of VMs and processes: what the test has put there. Notes who was looked at."""

    def __init__(self) -> None:
        self.blocked_for: dict[str, float] = {}
        self.processes: dict[int, dict[str, Any]] = {}
        self.tasks: dict[str, str] = {}
        self.stopped_pids: set[int] = set()
        self.looked_at: list[str | int] = []

    def blocked(self, name: VmName, pid: int | None) -> float:
        self.looked_at.append(name)
        return self.blocked_for.get(name, 0.0)

    def task(self, name: VmName) -> str:
        return self.tasks.get(name, "")

    def stopped(self, pid: int | None) -> bool:
        return pid in self.stopped_pids

    def process(self, pid: int | None) -> dict[str, Any] | None:
        if pid is None:
            return None
        self.looked_at.append(pid)
        return self.processes.get(pid)


class Worker(NamedTuple):
    """One worker process, by what it tells of itself, and its identity on the worker door."""

    name: VmName
    pid: int
    incarnation: int
    identity: bytes


class Answer(NamedTuple):
    """A native answer that went out to a client."""

    client: bytes
    message: Message

    @property
    def value(self) -> Any:
        return unpack(self.message.body)

    @property
    def code(self) -> str | None:
        """The error's code; None if it is no error."""
        return str(self.value["code"]) if self.message.kind is Kind.ERROR else None


class Desk:
    """A core with everything around it. `now` is the clock; move it, or `tick(to)`."""

    def __init__(self, broker: BrokerSettings | None = None, restart: RestartSettings | None = None) -> None:
        settings = Settings(broker=broker or BrokerSettings(), restart=restart or RestartSettings())
        self.now = START
        self.looker = FakeLooker()
        self.asked_to_keep: list[
            bytes
        ] = []  # workers that were asked at their HELLO to hand the zygote their connections
        self.core = HostCore(settings, FIRST_NUMBER, self.looker, 4242)
        self._pids = itertools.count(101)
        self._identities = itertools.count(1)

    def take(self, kind: type[A]) -> list[A]:
        """The actions of one kind, which are then done."""
        taken: list[A] = [action for action in self.core.actions if isinstance(action, kind)]
        self.core.actions = [action for action in self.core.actions if not isinstance(action, kind)]
        return taken

    def vm(self, name: str) -> VmEntry:
        entry = self.core.roster.get(VmName(name))
        assert entry is not None, f"the broker does not know {name}"
        return entry

    def tick(self, ahead: float = 0.0) -> None:
        """Let time pass, and tell the core."""
        self.now += ahead
        self.core.on_tick(self.now)

    # -- clients ------------------------------------------------------------------------------------------------------------

    def ask(
        self,
        op: str,
        service: str = "vmloop",
        args: dict[str, Any] | None = None,
        *,
        id: int = 7,  # noqa: A002 — as the wire calls it
        client: bytes = CLIENT,
        seconds: float = 10.0,
        key: bytes = b"",
        reading: bool = False,
        again: bool = False,
    ) -> bytes:
        """Send a native request; the frame that was sent. `again`: as one that was sent before."""
        frame = encode(
            Message(
                kind=Kind.REQUEST,
                service=service,
                op=op,
                id=id,
                body=pack(args or {}),
                key=key,
                flags=(FLAG_READING if reading else 0) | (FLAG_REPEATED if again else 0),
                seconds=seconds,
            )
        )
        self.core.on_client(client, [frame], self.now)
        return frame

    def answers(self) -> list[Answer]:
        """What has gone out to native clients since the last look."""
        return [Answer(action.identity, decode(action.frames[0])) for action in self.take(ToClient)]

    def answer(self) -> Answer:
        """The only one that has gone out."""
        [answer] = self.answers()
        return answer

    def value(self, op: str, args: dict[str, Any] | None = None, service: str = "vmloop") -> Any:
        """Ask for what is answered at once."""
        self.ask(op, service, args)
        answer = self.answer()
        assert answer.message.kind is Kind.REPLY, answer.value
        return answer.value

    def code(self, op: str, args: dict[str, Any] | None = None, service: str = "vmloop") -> str | None:
        """Ask for what is refused at once: the error's code."""
        self.ask(op, service, args)
        return self.answer().code

    # -- workers ------------------------------------------------------------------------------------------------------------

    def known(self, name: str, **status: Any) -> VmEntry:
        """A VM without a worker, as a starting broker finds it on disk."""
        return self.core.roster.add(VmName(name), {"defined": True, "state": "shutoff", "reason": "unknown", **status})

    def worker(self, name: str, **status: Any) -> Worker:
        """A running VM whose worker has presented itself."""
        worker = self.process(name)
        self.hello(worker, **status)
        self.core.actions.clear()
        return worker

    def process(self, name: str, incarnation: int | None = None) -> Worker:
        """A worker that has not presented itself yet."""
        if incarnation is None:
            entry = self.core.roster.get(VmName(name))
            incarnation = 1 if entry is None else entry.incarnation + 1
        return Worker(VmName(name), next(self._pids), incarnation, self.identity())

    def identity(self) -> bytes:
        return b"w%d" % next(self._identities)

    def forked(self, name: str) -> Worker:
        """The one worker that was asked for is made; it has not presented itself yet."""
        assert [action.name for action in self.take(Fork)] == [name]
        worker = self.process(name)
        self.core.crew.on_forked(worker.name, worker.pid)
        return worker

    def hello(
        self, worker: Worker, *, inherited: list[int] | None = None, epoch: int = 1, seq: int = 0, **status: Any
    ) -> None:
        self.say(Kind.HELLO, worker, {"inherited": inherited or [], **status}, epoch, seq)
        keep = ToWorker(worker.identity, encode(Message(kind=Kind.CONTROL, op="keep")), 0)
        self.asked_to_keep += [action.identity for action in self.core.actions if action == keep]
        self.core.actions = [action for action in self.core.actions if action != keep]

    def status(self, worker: Worker, *, epoch: int = 1, seq: int = 0, **status: Any) -> None:
        self.say(Kind.STATUS, worker, status, epoch, seq)

    def bye(self, worker: Worker, **status: Any) -> None:
        self.say(Kind.BYE, worker, {"alive": False, "state": "shutoff", "reason": "guest", **status})

    def say(self, kind: Kind, worker: Worker, status: dict[str, Any], epoch: int = 1, seq: int = 0) -> None:
        """HELLO, STATUS or BYE with the map of a running VM, changed by `status`."""
        body = {
            "worker_pid": worker.pid,
            "worker_ticks": worker.pid * 10,
            "incarnation": worker.incarnation,
            "state": "running",
            "reason": "resumed",
            "defined": True,
            "alive": True,
            "started": 1_700_000_000.0,
            "forget": False,
            **status,
        }
        message = Message(kind=kind, service=f"vm/{worker.name}", body=pack(body), epoch=epoch, seq=seq)
        self.core.on_worker(worker.identity, [encode(message)], self.now)

    def requests(self, worker: Worker) -> list[Message]:
        """What has gone out to a worker since the last look; nothing may have gone to another one."""
        sent = self.take(ToWorker)
        assert {action.identity for action in sent} <= {worker.identity}
        return [decode(action.frame) for action in sent]

    def reply(
        self,
        worker: Worker,
        request: Message,
        value: object = None,
        *,
        kind: Kind = Kind.REPLY,
        epoch: int = 1,
        seq: int = 0,
    ) -> bytes:
        """A worker's answer to a request it got; the frame that it sent."""
        frame = encode(Message(kind=kind, id=request.id, body=pack(value), seconds=0.5, epoch=epoch, seq=seq))
        self.core.on_worker(worker.identity, [frame], self.now)
        return frame

    def exit(self, worker: Worker, *, went: bool = False) -> None:
        """A worker's pidfd tells its end; `went`: its page says that it went by itself."""
        self.core.crew.on_exit(worker.name, worker.pid, self.now, went)

    def reconnected(self, worker: Worker) -> Worker:
        """The same worker on a new connection; it has not presented itself on it yet."""
        return worker._replace(identity=self.identity())


def same_but(frame: bytes, **changes: Any) -> Message:
    """The message of a frame with other fields."""
    return msgspec.structs.replace(decode(frame), **changes)
