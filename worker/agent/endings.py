# SPDX-License-Identifier: Apache-2.0
"""Commands that end the guest: qemu-ga answers them with silence, or is gone before it can, and it is QEMU's event that says they are done.

An error of the agent's ends them. Its success, its silence and the closing of its port do not: the event does, or the caller's deadline.
Used by agent.py, which puts `Ending.on_answer` between the session and the caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from ...common.errors import DeadlineExceeded, VmloopError
from ..qmp.commands import Done
from .commands import AgentCommand
from .ledger import AgentLedger

_SHUTDOWN_EVENTS: Final[Mapping[str, frozenset[str]]] = {
    "reboot": frozenset({"RESET", "SHUTDOWN"}),  # SHUTDOWN: QEMU runs with -no-reboot
}
_EVENTS: Final[Mapping[str, frozenset[str]]] = {
    "guest-shutdown": frozenset({"SHUTDOWN"}),
    "guest-suspend-ram": frozenset({"SUSPEND"}),
    "guest-suspend-hybrid": frozenset({"SUSPEND"}),
    "guest-suspend-disk": frozenset({"SUSPEND_DISK", "SHUTDOWN"}),
}


def events_that_end(command: str, arguments: dict[str, Any] | None) -> frozenset[str]:
    """The QMP events any of which completes a command; empty for ordinary commands."""
    if command == "guest-shutdown" and arguments is not None:
        mode = arguments.get("mode")
        if isinstance(mode, str) and mode in _SHUTDOWN_EVENTS:
            return _SHUTDOWN_EVENTS[mode]
    return _EVENTS.get(command, frozenset())


class Endings:
    """The commands of one VM that wait for the guest's end."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: set[Ending] = set()

    def await_end(self, command: AgentCommand, events: frozenset[str], done: Done, ledger: AgentLedger) -> Done:
        """What to give the session instead of `done`, for a command that any of these events completes."""

        def told(value: Any, error: VmloopError | None) -> None:
            done(value, error)
            ledger.told(command.number)

        ending = Ending(command, events, told, self._waiting)
        ending.timer = self._loop.call_at(command.deadline, ending.on_deadline)
        return ending.on_answer

    def on_event(self, name: str) -> None:
        """QEMU said that something happened to the guest."""
        for ending in tuple(self._waiting):
            if name in ending.events and ending.sent:
                ending.finish({}, None)

    def leave(self) -> None:
        """The worker ends: the next one waits for the guest's end."""
        for ending in self._waiting:
            if ending.timer is not None:
                ending.timer.cancel()
        self._waiting.clear()

    def close(self, error: VmloopError) -> None:
        """The run is over: whoever waits still is told."""
        for ending in tuple(self._waiting):
            ending.finish(None, error)


class Ending:
    """One command that ends the guest."""

    def __init__(self, command: AgentCommand, events: frozenset[str], done: Done, waiting: set[Ending]) -> None:
        self.name = command.name
        self.events = events
        self.command = command
        self.timer: asyncio.TimerHandle | None = None
        self._done: Done | None = done
        self._waiting = waiting
        waiting.add(self)

    @property
    def sent(self) -> bool:
        """Whether it has left for the guest, so that an event may be its doing."""
        return self.command.sent > 0

    def on_answer(self, _: Any, error: VmloopError | None) -> None:
        """What the session says. Once the command has been sent, only the agent's own refusal ends the wait."""
        if error is not None and (error.code == "agent-error" or not error.fields.get("sent")):
            self.finish(None, error)

    def on_deadline(self) -> None:
        text = f"{self.name}: none of {', '.join(sorted(self.events))} has come in time; the guest may still do it"
        self.finish(None, DeadlineExceeded(text, command=self.name, sent=self.sent))

    def finish(self, value: Any, error: VmloopError | None) -> None:
        """Tell the caller, once."""
        self._waiting.discard(self)
        if self.timer is not None:
            self.timer.cancel()
        done, self._done = self._done, None
        if done is not None:
            done(value, error)
