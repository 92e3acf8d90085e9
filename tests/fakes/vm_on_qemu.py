# SPDX-License-Identifier: Apache-2.0
"""A real QEMU under the shipped handlers and nothing else of a worker: events move the state as in vm.py and go to the handlers.

Used by tests/contract/test_shipped_on_qemu.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Final

from vmloop.common.definition import Definition
from vmloop.common.errors import MonitorLost, VmloopError
from vmloop.common.states import VmState
from vmloop.testing.fake_vm import FakeVm
from vmloop.worker.events import Event
from vmloop.worker.handlers.power import prepare
from vmloop.worker.handlers.shipped import TABLE
from vmloop.worker.qmp.commands import microseconds, qmp_error
from vmloop.worker.transitions import of_event

from ..conftest import QEMU

MACHINE: Final = ("-nodefaults", "-machine", "q35,accel=tcg", "-m", "64", "-display", "none", "-S")
DEADLINE: Final = 15.0  # seconds for what a test waits for


class VmOnQemu(FakeVm):
    """The fake context of handlers, whose `qmp`, `expect` and `kill` are meant."""

    def __init__(self, directory: Path, definition: Definition) -> None:
        super().__init__(directory, definition=definition, state=VmState.STARTING)
        self.failures: list[VmloopError] = []
        self._intent = ""
        self._ids = 0
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._changed = asyncio.Event()

    async def qmp(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, seconds: float, reading: bool = True
    ) -> Any:
        self._ids += 1
        number = self._ids
        answer = self._waiting[number] = self.loop.create_future()
        self._writer.write(json.dumps({"execute": command, "arguments": dict(arguments or {}), "id": number}).encode())
        async with asyncio.timeout(seconds):
            reply = await answer
        if "error" in reply:
            raise qmp_error(command, reply["error"])
        return reply["return"]

    def expect(self, intent: str) -> None:
        self._intent = intent

    def kill(self, reason: str) -> None:
        self.process.kill()
        super().kill(reason)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is true that an event or a handler brings about."""
        async with asyncio.timeout(DEADLINE):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def until_event(self, name: str, count: int = 1) -> dict[str, Any]:
        """The data of the event, once it has happened so many times."""
        await self.until(lambda: len(self.emitted(name)) >= count)
        return self.emitted(name)[count - 1]

    def _launch(self, argv: list[str], listener: int) -> None:
        self.process = subprocess.Popen(argv, pass_fds=[listener])

    # -- inside ---------------------------------------------------------------------------------------------------------------

    def _add(self, event: str, data: dict[str, Any], origin: Any, at: int) -> Event:
        made = super()._add(event, data, origin, at)
        self._changed.set()
        return made

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionResetError):
            while line := await reader.readline():
                message = json.loads(line)
                if "event" in message:
                    self._on_event(message)
                elif (answer := self._waiting.pop(message.get("id", 0), None)) is not None and not answer.done():
                    answer.set_result(message)
        for answer in self._waiting.values():
            answer.set_exception(MonitorLost("QEMU closed the connection"))
        self.move(VmState.SHUTOFF, "ended")

    def _on_event(self, message: dict[str, Any]) -> None:
        data = message.get("data", {})
        event = self.happen(message["event"], data, at=microseconds(message["timestamp"]))
        move = of_event(self.state, event.event, data, self._intent)
        if move is not None:
            self.move(move.state, move.reason)
        self._queue.put_nowait(event)

    async def _handle(self) -> None:
        while True:
            event = await self._queue.get()
            for function in [function for name, function in TABLE if name == event.event]:
                try:
                    await function(self, event)
                except VmloopError as error:
                    self.failures.append(error)
            self._changed.set()

    @contextlib.asynccontextmanager
    async def running(self, args: list[str]) -> AsyncIterator[None]:
        """Launch it, prepare it, let it run; killed at the end."""
        path = self.paths.run / "m"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(1)
            monitor = (
                "-chardev",
                f"socket,id=m,fd={listener.fileno()},server=on,wait=off",
                "-mon",
                "chardev=m,mode=control",
            )
            self._launch([QEMU, *MACHINE, *args, *monitor], listener.fileno())
        reader, self._writer = await asyncio.open_unix_connection(str(path), limit=1 << 22)
        tasks = [asyncio.create_task(self._read(reader)), asyncio.create_task(self._handle())]
        try:
            await self.qmp("qmp_capabilities", seconds=DEADLINE)
            await prepare(self)
            await self.qmp("cont", seconds=DEADLINE)
            yield
        finally:
            self.process.kill()
            self.process.wait(DEADLINE)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._writer.close()
