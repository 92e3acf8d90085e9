# SPDX-License-Identifier: Apache-2.0
"""A QMP session between a scripted peer and a recording VM, and the workers that hold it one after another.

Each `run` is one worker's life, on a loop of its own. A life that does not close its session ends as a killed worker's does: the page, the
carry files and the connection stay as they are. Used by tests/unit/test_worker_session*.py and test_worker_successor.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from vmloop.common.errors import VmloopError
from vmloop.common.names import VmName
from vmloop.common.page import Page
from vmloop.common.paths import VmPaths
from vmloop.common.settings import WorkerSettings
from vmloop.common.states import MonitorState
from vmloop.worker.events import EventLog
from vmloop.worker.journal.store import EventStore
from vmloop.worker.qmp.commands import Command, Done
from vmloop.worker.qmp.framing import LineReader
from vmloop.worker.qmp.ledger import Ledger, Owed
from vmloop.worker.qmp.session import QmpSession

from .qmp_peer import QmpPeer
from .raw_qmp import DEADLINE, LOOK_AGAIN

FAR = 60.0  # seconds; no test waits for it

# Silence means nothing, unless a test is about that.
PATIENT = msgspec.structs.replace(WorkerSettings(), probe_after=FAR, frozen_after=FAR)


class Outcome:
    """What became of one command."""

    def __init__(self) -> None:
        self.told = 0
        self.value: Any = None
        self.error: VmloopError | None = None

    def __call__(self, value: Any, error: VmloopError | None) -> None:
        self.told += 1
        self.value = value
        self.error = error

    @property
    def code(self) -> str:
        assert self.told == 1, f"told {self.told} times"
        assert self.error is not None, f"no error, but {self.value!r}"
        return self.error.code


class RecordingVm:
    """The listener of a session."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any], int]] = []
        self.states: list[MonitorState] = []
        self.late: list[tuple[str, int, dict[str, Any]]] = []
        self.ends: list[str] = []

    def on_event(self, name: str, data: dict[str, Any], at: int) -> None:
        self.events.append((name, data, at))

    def on_monitor_state(self, state: MonitorState, reason: str) -> None:
        self.states.append(state)

    def on_late(self, command: Command, reply: dict[str, Any]) -> None:
        self.late.append((command.name, command.request, reply))

    def on_end(self, reason: str) -> None:
        self.ends.append(reason)


class Life:
    """One worker's session and what its VM hears of it."""

    def __init__(self, bench: SessionBench) -> None:
        self.loop = asyncio.get_running_loop()
        self.vm = RecordingVm()
        self.page = Page(bench.paths.page, writable=True)
        self.connection = bench.peer.connection.dup()
        self.connection.setblocking(False)
        events = EventLog(VmName("web1"), self.page, lambda frame: None, EventStore(bench.paths.journal))
        reader = LineReader(self.connection, self.page, bench.paths, events, bench.max_line)
        self.session = QmpSession(self.loop, self.connection, reader, self.page, bench.settings, self.vm)

    def submit(self, name: str, arguments: dict[str, Any] | None = None, **options: Any) -> Outcome:
        """Send a mutating command, unless said otherwise."""
        outcome = Outcome()
        options = {"deadline": self.loop.time() + FAR, "reading": False, **options}
        self.session.submit(name, arguments, done=outcome, **options)
        return outcome

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE):
            while not condition():  # noqa: ASYNC110 - of anything, which nobody announces
                await asyncio.sleep(LOOK_AGAIN / 10)

    async def told(self, *outcomes: Outcome) -> None:
        await self.until(lambda: all(outcome.told for outcome in outcomes))

    async def negotiate(self, peer: QmpPeer, *capabilities: str) -> None:
        """Greeting and negotiation, over and done with."""
        peer.greet(*capabilities)
        negotiation = asyncio.create_task(self.session.negotiate(DEADLINE))
        peer.answer(await peer.request())
        await negotiation

    def take_over(self, *, oob: bool = True, answer: Callable[[Owed], Done | None] | None = None) -> dict[int, Outcome]:
        """Go on where the last worker was killed; the outcomes of what it owed, by request number."""
        outcomes: dict[int, Outcome] = {}

        def to_whom(owed: Owed) -> Done | None:
            return outcomes.setdefault(owed.request, Outcome()) if owed.request else None

        self.session.take_over(oob=oob, answer=answer or to_whom)
        return outcomes


class SessionBench:
    """The connection with a peer at its other end, the page, and the settings."""

    def __init__(self, directory: Path, settings: WorkerSettings = PATIENT, max_line: int = 8 << 20) -> None:
        self.paths = VmPaths(directory, directory)
        self.settings = settings
        self.max_line = max_line
        self.peer = QmpPeer()
        Page(self.paths.page, writable=True).close()

    def run(self, live: Callable[[Life, QmpPeer], Coroutine[Any, Any, None]], *, killed: bool = False) -> None:
        """A worker's life, up to its own end or, if it is to be killed, to wherever `live` returns."""

        async def main() -> None:
            life = Life(self)
            try:
                await live(life, self.peer)
            finally:
                if not killed:
                    life.session.close("the test is over")
                    life.page.close()  # raises if the session still holds a part of it
                elif life.connection.fileno() >= 0:
                    life.loop.remove_reader(life.connection)
                    life.loop.remove_writer(life.connection)
                    life.connection.close()

        asyncio.run(main())

    def owed(self) -> list[Owed]:
        """What the page says that QEMU owes."""
        with Page(self.paths.page, writable=True) as page:
            ledger = Ledger(page)
            try:
                return list(ledger)
            finally:
                ledger.release()

    def close(self) -> None:
        self.peer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
