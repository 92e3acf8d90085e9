# SPDX-License-Identifier: Apache-2.0
"""A worker that can be killed before any of its steps, as far as its guest agent goes, the guest at the other end, and who comes after it.

A step is what others can see: a figure stored on the page, an operation on the socket, the opening of a carry file, an answer. A kill is an
exception that nothing in the code under test catches. There is no real loop: `Bench.run` makes the turns, and time passes only when
nothing else happens. Used by tests/unit/test_worker_agent_killed.py.
"""

from __future__ import annotations

import json
import select
import socket
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, cast

from vmloop.common.errors import VmloopError
from vmloop.common.page import Page
from vmloop.common.paths import VmPaths
from vmloop.common.states import AgentState
from vmloop.worker.agent.commands import AgentCommand, adopted
from vmloop.worker.agent.ledger import AgentOwed, Part
from vmloop.worker.agent.session import AgentSession
from vmloop.worker.agent.standing import Standing
from vmloop.worker.agent.sync import encode_command, new_id

from .killed_worker import Killed, Steps

FAR: Final = 1000.0  # seconds of a clock that only the bench moves
TIMEOUT: Final = 5.0
MAX_TURNS: Final = 20_000


class Timer:
    def __init__(self, when: float, call: Callable[[], None]) -> None:
        self._when, self.call, self.cancelled = when, call, False

    def when(self) -> float:
        return self._when

    def cancel(self) -> None:
        self.cancelled = True


class HandLoop:
    """What a session asks of a loop, turned by hand."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.readers: dict[int, Callable[[], None]] = {}
        self.writers: dict[int, Callable[[], None]] = {}
        self.timers: list[Timer] = []

    def time(self) -> float:
        return self.now

    def add_reader(self, sock: Any, call: Callable[[], None]) -> None:
        self.readers[sock.fileno()] = call

    def add_writer(self, sock: Any, call: Callable[[], None]) -> None:
        self.writers[sock.fileno()] = call

    def remove_reader(self, sock: Any) -> None:
        self.readers.pop(sock.fileno(), None)

    def remove_writer(self, sock: Any) -> None:
        self.writers.pop(sock.fileno(), None)

    def call_at(self, when: float, call: Callable[..., None], *arguments: Any) -> Timer:
        timer = Timer(when, lambda: call(*arguments))
        self.timers.append(timer)
        return timer

    def call_later(self, delay: float, call: Callable[..., None], *arguments: Any) -> Timer:
        return self.call_at(self.now + delay, call, *arguments)

    def call_soon(self, call: Callable[..., None], *arguments: Any) -> Timer:
        return self.call_at(self.now, call, *arguments)

    def turn(self) -> bool:
        """Everything that is ready once; False if nothing was."""
        due = [t for t in self.timers if t.when() <= self.now and not t.cancelled]
        self.timers = [t for t in self.timers if t.when() > self.now and not t.cancelled]
        for timer in due:
            timer.call()
        readable, writable, _ = select.select(list(self.readers), list(self.writers), [], 0)
        for fd in writable:
            self.writers.get(fd, _nothing)()
        for fd in readable:
            self.readers.get(fd, _nothing)()
        return bool(due or readable or writable)

    def pass_time(self) -> bool:
        """Until the next timer; False if there is none."""
        waiting = [t.when() for t in self.timers if not t.cancelled]
        if waiting:
            self.now = max(self.now, min(waiting))
        return bool(waiting)


class Guest:
    """An agent like qemu-ga: in order, throwing away at 0xFF what it has, complaining about that without an id."""

    def __init__(self, connection: socket.socket, *, ids: bool) -> None:
        self.carried_out: list[int] = []  # the request numbers of the commands
        self.silent = False  # it reads, and its answers wait
        self.size = 0  # bytes of padding in an answer
        self.before = b""  # what it says before each answer
        self._socket = connection
        self._ids = ids
        self._received = b""
        self._out = b""

    def act(self) -> bool:
        """Read, carry out, answer as much as goes; False if nothing was to do."""
        read = self._read()
        sent = 0
        if self._out and not self.silent:
            try:
                sent = self._socket.send(self._out)
            except BlockingIOError:
                sent = 0
            self._out = self._out[sent:]
        return read or sent > 0

    def _read(self) -> bool:
        try:
            data = self._socket.recv(1 << 20)
        except BlockingIOError:
            return False
        for byte in (data[i : i + 1] for i in range(len(data))):
            if byte == b"\xff":
                self._complain()
                self._received = b""
            elif byte == b"\n":
                self._received = b""
            else:
                self._received += byte
                if byte == b"}" and self._received.count(b"{") == self._received.count(b"}"):
                    self._carry_out(json.loads(self._received))
                    self._received = b""
        return bool(data)

    def _complain(self) -> None:
        self._out += b'{"error": {"class": "GenericError", "desc": "JSON parse error, stray byte"}}\n'

    def _carry_out(self, request: dict[str, Any]) -> None:
        reply: dict[str, Any] = {"id": request["id"]} if self._ids else {}
        if request["execute"] == "guest-sync-delimited":
            self._out += b"\xff" + json.dumps({"return": request["arguments"]["id"], **reply}).encode() + b"\n"
            return
        number = request["arguments"]["n"]
        self.carried_out.append(number)
        value = {"n": number, "padding": "x" * self.size}
        self._out += self.before + json.dumps({"return": value, **reply}).encode() + b"\n"


class _Words:
    def __init__(self, words: memoryview, steps: Steps) -> None:
        self._words, self._steps = words, steps

    def __getitem__(self, index: int) -> int:
        return self._words[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._steps.step()
        self._words[index] = value


class _Page:
    def __init__(self, page: Page, steps: Steps) -> None:
        self.words = _Words(page.words, steps)


class _Paths:
    def __init__(self, paths: VmPaths, steps: Steps) -> None:
        self._paths, self._steps = paths, steps

    def agent_carry(self, index: int) -> Path:
        self._steps.step()
        return self._paths.agent_carry(index)


class _Socket:
    def __init__(self, connection: socket.socket, steps: Steps, bench: Bench) -> None:
        self._connection, self._steps, self._bench = connection, steps, bench
        self.fileno = connection.fileno

    def send(self, data: bytes) -> int:
        self._steps.step()
        return self._connection.send(data[: self._bench.send_at_once])

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._connection, name)

        def call(*arguments: Any) -> Any:
            self._steps.step()
            return operation(*arguments)

        return call


class Worker:
    """One incarnation: its own mapping of the page, its own fd of the connection, its own loop."""

    def __init__(self, bench: Bench, steps: Steps) -> None:
        self.steps = steps
        self.bench = bench
        self.loop = HandLoop(bench.now)
        self.page = Page(bench.paths.page, writable=True)
        self.connection = bench.connection.dup()
        self.states: list[AgentState] = []
        page, paths = cast("Page", _Page(self.page, steps)), cast("VmPaths", _Paths(bench.paths, steps))
        self.standing = Standing(self.loop.time(), page, paths, max_reply=8 << 20)
        sock = cast("socket.socket", _Socket(self.connection, steps, bench))
        self.session = AgentSession(cast("Any", self.loop), sock, self.standing, TIMEOUT, self)

    def start(self) -> None:
        self.session.start()

    def take_over(self) -> None:
        self.session.take_over(self.standing.take_over(self.loop.time(), self._adopt))

    def _adopt(self, owed: AgentOwed) -> AgentCommand:
        command = adopted(owed)
        if owed.part is Part.CURRENT:
            self.bench.inherited.append(owed.request)
            command.done = self._teller(owed.request)
        return command

    def submit(self, request: int, *, seconds: float = FAR) -> None:
        number = new_id()
        text = encode_command("guest-x", {"n": request}, number)
        deadline = self.loop.time() + seconds
        self.session.submit(AgentCommand("guest-x", text, self._teller(request), number, deadline, request))

    def _teller(self, request: int) -> Callable[[Any, VmloopError | None], None]:
        def done(value: Any, error: VmloopError | None) -> None:
            self.steps.step()
            self.bench.told.setdefault(request, []).append(error if error is not None else value)

        return done

    def on_state(self, state: AgentState, reason: str) -> None:
        self.states.append(state)

    def on_late(self, command: AgentCommand, reply: dict[str, Any]) -> None:
        self.steps.step()
        self.bench.late.append((command.request, reply))

    def on_end(self, reason: str) -> None:
        self.bench.ends.append(reason)

    def close(self) -> None:
        self.page.close()
        self.connection.close()


class Bench:
    """One connection and the workers that hold it, one after the other.

    `kills`: how many steps each worker may make; who comes after the last of them lives on.
    """

    def __init__(self, kills: list[int] | None = None, *, ids: bool = True) -> None:
        self.told: dict[int, list[Any]] = {}
        self.late: list[tuple[int, dict[str, Any]]] = []
        self.ends: list[str] = []
        self.inherited: list[int] = []  # by the newest worker
        self.send_at_once = 1 << 20  # bytes that a send of the worker's takes
        self.while_dead: Callable[[], None] = _nothing
        self.now = 100.0
        self.deaths = 0
        self._kills = list(kills or ())
        self._directory = tempfile.TemporaryDirectory(prefix="vmloop-agent-")
        root = Path(self._directory.name)
        self.paths = VmPaths(root, root)
        self.peer, self.connection = socket.socketpair()
        self.peer.setblocking(False)
        self.connection.setblocking(False)
        self.guest = Guest(self.peer, ids=ids)
        self.worker = Worker(self, Steps())
        self.worker.start()
        self.run(lambda: self.worker.standing.conversation.synced)
        self._allow_steps()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.worker.close()
        self.peer.close()
        self.connection.close()
        self._directory.cleanup()

    def submit(self, request: int, **options: Any) -> None:
        """As the broker does it: what a worker has not written down before it died is given to the next one."""
        try:
            self.worker.submit(request, **options)
        except Killed:
            self.succeed()
            if request not in self.inherited and request not in self.told:
                assert request not in self.guest.carried_out
                self.submit(request, **options)

    def ask(self, request: int) -> None:
        """Submit, and wait until it is told. One that waited in the line of a worker that died is asked for again."""
        self.submit(request)
        while request not in self.told:
            before = self.deaths
            self.run(partial(self._told_or_dead, request, before))
            if request not in self.told and request not in self.inherited:
                assert request not in self.guest.carried_out
                self.submit(request)

    def _told_or_dead(self, request: int, deaths: int) -> bool:
        return request in self.told or self.deaths > deaths

    def run(self, condition: Callable[[], bool]) -> None:
        """Turns of whoever lives, and of the guest, until a condition holds."""
        for _ in range(MAX_TURNS):
            if condition():
                return
            moved = self.guest.act()
            try:
                moved = self.worker.loop.turn() or moved
            except Killed:
                self.succeed()
                moved = True
            if not moved:
                assert self.worker.loop.pass_time(), "nothing will ever happen"
                self.now = self.worker.loop.now
        raise AssertionError(f"not within {MAX_TURNS} turns")

    def succeed(self) -> None:
        """The worker is dead; the next one takes over, if need be several times."""
        while True:
            self.deaths += 1
            self.now = max(self.now, self.worker.loop.now)
            self.worker.close()
            self.while_dead()
            self.inherited = []
            self.worker = Worker(self, Steps())
            self._allow_steps()
            try:
                self.worker.take_over()
            except Killed:
                continue
            return

    def _allow_steps(self) -> None:
        self.worker.steps.made = 0
        self.worker.steps.allowed = self._kills.pop(0) if self._kills else None


def _nothing() -> None:
    """Nothing happens."""
