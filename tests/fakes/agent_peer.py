# SPDX-License-Identifier: Apache-2.0
"""A guest agent in the test's own hands, on a real unix socket, and a bench with a GuestAgent before it.

It answers like qemu-ga 7.2 (the complaint about 0xFF included) unless the test gives `answer` another function, and says whatever it is
told. Used by tests/unit/test_worker_agent_*.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

import msgspec

from vmloop.common.definition import AgentSection
from vmloop.common.errors import VmloopError
from vmloop.common.names import VmName
from vmloop.common.page import Page
from vmloop.common.paths import VmPaths
from vmloop.common.settings import WorkerSettings
from vmloop.worker.agent.agent import GuestAgent
from vmloop.worker.agent.ledger import AgentOwed
from vmloop.worker.events import Event, EventLog
from vmloop.worker.journal.store import EventStore

Request = dict[str, Any]
Answer = Callable[[Request], bytes | None]

PORT: Final = "vmloop-agent-port"
DEADLINE: Final = 10.0  # seconds; no test waits so long unless it fails
COMPLAINT: Final = b'{"error": {"class": "GenericError", "desc": "JSON parse error, stray \'\\\\uFFFD\'"}}\n'


def reply(request: Request, **content: Any) -> bytes:
    """A line of qemu-ga >= 4.0, which repeats the id."""
    return json.dumps({**content, "id": request["id"]}).encode() + b"\n"


def honest(request: Request) -> bytes | None:
    """What qemu-ga says."""
    if request["execute"] == "guest-sync-delimited":
        return COMPLAINT + b"\xff" + reply(request, **{"return": request["arguments"]["id"]})
    return reply(request, **{"return": {}})


def sync_only(request: Request) -> bytes | None:
    """Answers nothing but a sync."""
    return honest(request) if request["execute"] == "guest-sync-delimited" else None


class AgentPeer:
    """Listens at `path`, one client at a time, like a chardev of QEMU."""

    def __init__(self, path: Path) -> None:
        self.answer: Answer = honest
        self.requests: list[Request] = []
        self.connections = 0
        self._loop = asyncio.get_running_loop()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept)
        self._client: socket.socket | None = None
        self._received = b""
        self._later: bytes | None = None

    def say(self, data: bytes) -> int:
        """Send as much as the socket takes; how much that was. 0 without a client."""
        try:
            return self._client.send(data) if self._client is not None else 0
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            return 0

    async def say_all(self, data: bytes) -> None:
        """Send it all; answers that fall due meanwhile come after it."""
        assert self._client is not None
        self._later = b""
        await self._loop.sock_sendall(self._client, data)
        later, self._later = self._later, None
        self.say(later or b"")

    def names(self) -> list[str]:
        """The commands that came, syncs left out."""
        return [r["execute"] for r in self.requests if r["execute"] != "guest-sync-delimited"]

    def hang_up(self) -> None:
        if self._client is not None:
            self._loop.remove_reader(self._client)
            self._client.close()
            self._client = None

    def close(self) -> None:
        self.hang_up()
        self._loop.remove_reader(self._listener)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            client, _ = self._listener.accept()
            self.hang_up()
            client.setblocking(False)
            self._client, self._received = client, b""
            self.connections += 1
            self._loop.add_reader(client, self._read)

    def _read(self) -> None:
        assert self._client is not None
        try:
            data = self._client.recv(1 << 20)
        except OSError:
            data = b""
        if not data:
            self.hang_up()
            return
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            request = json.loads(line.rpartition(b"\xff")[2])
            self.requests.append(request)
            said = self.answer(request)
            if said and self._later is not None:
                self._later += said
            elif said:
                self.say(said)


class Outcome:
    """What became of one command."""

    def __init__(self) -> None:
        self.told = asyncio.Event()
        self.value: Any = None
        self.error: VmloopError | None = None

    def __call__(self, value: Any, error: VmloopError | None) -> None:
        assert not self.told.is_set(), "told twice"
        self.value, self.error = value, error
        self.told.set()

    async def code(self) -> str:
        """The error's code, "" if there was none."""
        await asyncio.wait_for(self.told.wait(), DEADLINE)
        return self.error.code if self.error is not None else ""


class Keeper:
    """Keeps a duplicate of the connection, as the zygote does."""

    def __init__(self) -> None:
        self.kept: dict[str, socket.socket] = {}

    def keep(self, slot: str, fd: int) -> None:
        self.release(slot)
        self.kept[slot] = socket.socket(fileno=os.dup(fd))

    def release(self, slot: str) -> None:
        old = self.kept.pop(slot, None)
        if old is not None:
            old.close()


class Bench:
    """A GuestAgent, its peer, and what it said."""

    def __init__(self, directory: Path, section: AgentSection, settings: WorkerSettings) -> None:
        self.loop = asyncio.get_running_loop()
        self.path = directory / "agent.sock"
        self.paths = VmPaths(directory, directory)
        self.inherited: dict[int, Outcome] = {}  # by the newest worker, by request number
        self.page = Page(directory / "page", writable=True)
        self.events: list[Event] = []
        self.log = EventLog(VmName("vm1"), self.page, lambda _: None, EventStore(directory / "journal"))
        self.log.listen(self.events.append)
        self.section = section
        self.peer = AgentPeer(self.path)
        self.keeper = Keeper()
        self._settings = settings
        self.agent = self._new_agent()

    def _new_agent(self) -> GuestAgent:
        return GuestAgent(self.loop, "vm1", self.log, self.page, self.paths, self._settings, self.keeper, lambda: None)

    def begin(self) -> None:
        self.agent.begin(str(self.path), self.section, PORT)

    def succeed(self, *, kept: bool = True) -> None:
        """The worker leaves, and another one takes over; not kept: without the connection."""
        fd = self.agent.fileno()
        self.agent.close("the worker ends", over=False)
        if fd >= 0:
            os.close(fd)  # its own, which a worker keeps as long as its process lives
        connection = self.keeper.kept.pop("agent", None)
        if connection is not None and not kept:
            connection.close()
            connection = None
        self.inherited.clear()
        self.agent = self._new_agent()
        self.agent.begin(str(self.path), self.section, PORT, taken_over=True)
        self.agent.take_over(connection, self._inherit)

    def _inherit(self, owed: AgentOwed) -> Outcome | None:
        if not owed.request:
            return None
        return self.inherited.setdefault(owed.request, Outcome())

    def port(self, opened: bool) -> None:
        self.agent.on_qmp_event("VSERPORT_CHANGE", {"id": PORT, "open": opened})

    def submit(self, command: str, seconds: float = DEADLINE, *, reading: bool = False, **arguments: Any) -> Outcome:
        outcome = Outcome()
        deadline = self.loop.time() + seconds
        self.agent.submit(command, arguments or None, done=outcome, deadline=deadline, request=7, reading=reading)
        return outcome

    def states(self) -> list[str]:
        return [e.data["new"] for e in self.events if e.event == "AGENT_STATE"]

    def seen(self, event: str) -> list[dict[str, Any]]:
        return [e.data for e in self.events if e.event == event]

    async def until(self, condition: Callable[[], bool], seconds: float = DEADLINE) -> None:
        """Wait for a condition; it is looked at every few milliseconds."""
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110 - any condition at all
                await asyncio.sleep(0.005)

    async def ready(self) -> None:
        if self.agent.state.state.value == "absent":
            self.begin()
        self.port(True)
        await self.until(lambda: self.agent.state.state.value == "ready")


def on_bench(
    directory: Path,
    work: Callable[[Bench], Coroutine[Any, Any, None]],
    *,
    timeout: float = 0.2,
    freeze_limit: float = 60.0,
    max_reply: int = 1 << 20,
) -> None:
    """Run `work` with a bench; nothing is left after it."""

    async def run() -> None:
        section = AgentSection(enabled=True, timeout=timeout, freeze_limit=freeze_limit)
        settings = msgspec.structs.replace(WorkerSettings(), max_agent_reply=max_reply)
        bench = Bench(directory, section, settings)
        try:
            await work(bench)
        finally:
            bench.agent.close("the test is over")
            bench.keeper.release("agent")
            bench.peer.close()
            await asyncio.sleep(0)
            bench.page.close()

    asyncio.run(run())
