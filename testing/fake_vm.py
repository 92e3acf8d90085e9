# SPDX-License-Identifier: Apache-2.0
"""A VM as handlers see it (worker/handlers/context.py), without QEMU, guest or worker; for the tests of handlers.

vm = FakeVm(tmp_path)                                   # inside a coroutine, or with loop=...
vm.qmp_answers("query-status", {"status": "running"})   # several values: one after the other, the last one again and again
vm.qmp_answers("stop", QmpError("…"))                   # an exception is raised, a function is called with the arguments,
vm.agent_answers("guest-info", asyncio.Event().wait)    # and what it returns is awaited if it can be
event = vm.happen("STOP", {})                           # QEMU says it: numbered, kept, told to the listeners
vm.calls, vm.events, vm.moves, vm.kills, vm.intents     # what the handlers did
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..common.definition import Definition
from ..common.errors import AgentAbsent, DeadlineExceeded, NotRunning, QmpError
from ..common.names import VmName
from ..common.pack import pack
from ..common.paths import VmPaths
from ..common.states import VM_MOVES, AgentState, StateHolder, VmState
from ..worker.events import Event, Origin

FAKE_PID = 4194301  # near the kernel's highest, so no process of this machine is meant by accident


class Call(NamedTuple):
    """One command that a handler gave; `arguments` is {} if it gave none, `seconds` its deadline."""

    channel: Literal["qmp", "agent"]
    command: str
    arguments: dict[str, Any]
    seconds: float
    reading: bool


class FakeVm:
    """Implements `VmContext`. Every attribute may be set by a test."""

    def __init__(
        self,
        directory: Path,
        name: str = "web1",
        definition: Definition | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
        state: VmState = VmState.RUNNING,
    ) -> None:
        """`directory` gets the VM's `run` and `state`. Without `definition` the VM has one with every default."""
        self.name = VmName(name)
        self.paths = VmPaths(directory / "run", directory / "state")
        for path in (self.paths.run, self.paths.state):
            path.mkdir(parents=True, exist_ok=True)
        self.definition: Definition | None = definition or Definition(name=name)
        self.epoch = 1
        self.pid: int | None = FAKE_PID
        self.agent_state = AgentState.ABSENT
        self.facts: dict[str, Any] = {}
        self.calls: list[Call] = []
        self.events: list[Event] = []
        self.moves: list[tuple[VmState, VmState, str]] = []
        self.kills: list[str] = []
        self.intents: list[str] = []
        self.agent_ports_gone: list[str] = []
        self.agent_port_looks = 0
        self.abilities: set[str] = set()  # what `can` says yes to
        self._loop = loop
        self._seq = 0
        self._holder = StateHolder(f"VM {name}", state, VM_MOVES, self._on_move, "booted")
        self._answers: dict[tuple[str, str], list[Any]] = {}
        self._listeners: list[Callable[[Event], None]] = []

    # -- what a test prepares and sees ----------------------------------------------------------------------------------------

    def qmp_answers(self, command: str, *answers: Any) -> None:
        """What QEMU will answer to a command. Unprepared commands are CommandNotFound, as from a QEMU too old for them."""
        self._answers["qmp", command] = list(answers)

    def agent_answers(self, command: str, *answers: Any) -> None:
        """What the agent will answer. Without any answer prepared for the command there is no agent (`AgentAbsent`)."""
        self._answers["agent", command] = list(answers)

    def happen(self, event: str, data: dict[str, Any] | None = None, origin: Origin = "qmp", at: int = 0) -> Event:
        """An event from QEMU (or of another origin) joins the stream; `at`: microseconds since 1970."""
        return self._add(event, data if data is not None else {}, origin, at)

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Call `listener` with every event from now on, inside of `happen`, `emit` and `move`."""
        self._listeners.append(listener)

    def next_run(self) -> None:
        """The run is over and a new one has begun: its epoch, its numbers, no facts."""
        self.epoch += 1
        self._seq = 0
        self.facts = {}

    def commands(self, channel: Literal["qmp", "agent"] = "qmp") -> list[str]:
        """The names of the commands given so far."""
        return [call.command for call in self.calls if call.channel == channel]

    def emitted(self, event: str) -> list[dict[str, Any]]:
        """The data of every event of this name so far, oldest first."""
        return [seen.data for seen in self.events if seen.event == event]

    # -- VmContext ------------------------------------------------------------------------------------------------------------

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return self._loop

    @property
    def state(self) -> VmState:
        return self._holder.state

    @property
    def reason(self) -> str:
        return self._holder.reason

    async def qmp(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, seconds: float, reading: bool = True
    ) -> Any:
        self.calls.append(Call("qmp", command, dict(arguments or {}), seconds, reading))
        if ("qmp", command) not in self._answers:
            text = f"The command {command} has not been found"
            raise QmpError(text, **{"class": "CommandNotFound", "desc": text})
        return await self._answer("qmp", command, arguments, seconds)

    async def agent(self, command: str, arguments: Mapping[str, Any] | None = None, *, seconds: float) -> Any:
        self.calls.append(Call("agent", command, dict(arguments or {}), seconds, True))
        if ("agent", command) not in self._answers:
            raise AgentAbsent(f"VM {self.name}: no guest agent is connected")
        return await self._answer("agent", command, arguments, seconds)

    async def can(self, name: str, *, seconds: float) -> bool:  # noqa: ARG002 - as a VM's own
        return name in self.abilities

    def emit(self, event: str, data: dict[str, Any]) -> Event:
        return self._add(event, data, "vmloop", 0)

    def move(self, state: VmState, reason: str) -> None:
        if self._holder.can(state):
            self._holder.move(state, reason)

    def expect(self, intent: str) -> None:
        self.intents.append(intent)

    def set_fact(self, name: str, value: Any) -> None:
        pack(value)
        if value is None:
            self.facts.pop(name, None)
        else:
            self.facts[name] = value

    def kill(self, reason: str) -> None:
        if self.pid is None:
            raise NotRunning(f"VM {self.name} does not run")
        self.kills.append(reason)
        self.pid = None
        self.move(VmState.SHUTOFF, reason)

    def agent_port_gone(self, why: str) -> None:
        self.agent_ports_gone.append(why)

    def look_at_agent_port(self) -> None:
        self.agent_port_looks += 1

    # -- inside ---------------------------------------------------------------------------------------------------------------

    def _add(self, event: str, data: dict[str, Any], origin: Origin, at: int) -> Event:
        pack(data)  # the real stream raises TypeError for what cannot be packed
        self._seq += 1
        made = Event(vm=self.name, epoch=self.epoch, seq=self._seq, time=at, event=event, data=data, origin=origin)
        self.events.append(made)
        for listener in tuple(self._listeners):
            listener(made)
        return made

    def _on_move(self, old: VmState, new: VmState, reason: str) -> None:
        self.moves.append((old, new, reason))
        self.emit("VM_STATE", {"old": old.value, "new": new.value, "reason": reason})

    async def _answer(self, channel: str, command: str, arguments: Mapping[str, Any] | None, seconds: float) -> Any:
        answers = self._answers[channel, command]
        answer = answers.pop(0) if len(answers) > 1 else answers[0] if answers else {}
        await asyncio.sleep(0)  # a real answer never comes in the same turn of the loop
        if callable(answer) and not isinstance(answer, BaseException):
            takes = inspect.signature(answer).parameters
            answer = answer(dict(arguments or {})) if takes else answer()
        if inspect.isawaitable(answer):
            try:
                async with asyncio.timeout(seconds):
                    answer = await answer
            except TimeoutError:
                text = f"VM {self.name}: {command} was not answered within {seconds:g} s"
                raise DeadlineExceeded(text) from None
        if isinstance(answer, BaseException):
            raise answer
        return answer
