# SPDX-License-Identifier: Apache-2.0
"""A monitor that says what was recorded: the option -replay of the simulated VM (simulated). The file's format is in recording.

Nothing is simulated here: no state, no faults, no events but those of the recording. A command that was not recorded is refused, with the
words of simulated_script. One client after another; each is greeted, and what one has used up of the recording is not there for the next.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, Final

from .recording import Recording
from .simulated_faults import Faults
from .simulated_json import JsonStream, to_line
from .simulated_port import Port, close_all
from .simulated_requests import Refused, check_request
from .simulated_script import NEGOTIATION, Exchange, Said, Script, reply_to
from .simulated_vm import SimulatedVm

AT_ONCE: Final = 0.0  # the pace of a replay without waiting


class ReplayPort(Port):
    """The session of one client after another, out of one script."""

    def __init__(self, listener: socket.socket, vm: SimulatedVm, recording: Recording, pace: float = AT_ONCE) -> None:
        """`pace`: how long what was said after t seconds takes, as a part of t; 1 is as it was recorded. Raises `ConfigError`."""
        self.script = Script(recording)
        super().__init__(listener)
        self._vm = vm
        self._pace = pace
        self._timers: set[asyncio.TimerHandle] = set()
        self._stream = JsonStream()
        self._ending = False

    # -- a client comes, sends, goes --

    def opened(self) -> None:
        """Greet."""
        self._stream = JsonStream()
        self.write(to_line(self.script.greeting))
        opening, self.script.opening = self.script.opening, []
        self._say_all(opening)

    def received(self, data: bytes, fds: list[int]) -> None:
        """Answer what the client sent."""
        close_all(fds)
        self._stream.feed(data)
        while not self._ending and (item := self._stream.take()) is not None:
            if item.error is not None:
                self._refuse({}, Refused(item.error))
            else:
                self._answer(item.value)

    def lost(self) -> None:
        """What is still to be said is for this client alone."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def drained(self) -> None:
        """The last words have been taken."""
        if self._ending:
            self._vm.end(0)

    # -- what the VM tells: nothing of it is in the recording --

    def event(self, name: str, data: dict[str, Any] | None) -> None:
        """Not said."""

    def faults_changed(self, faults: Faults) -> None:
        """A recording has none."""

    # -- one command --

    def _answer(self, request: Any) -> None:
        try:
            # A request as QEMU takes it, out of band too: whether that was enabled is up to the recorded dialogue.
            name, _, _ = check_request(request, oob_enabled=True)
        except Refused as error:
            self._refuse(request if isinstance(request, dict) else {}, error)
            return
        found = self.script.take(request)
        if isinstance(found, Exchange):
            self._play(found, request)
        elif name == NEGOTIATION:
            self._say(0.0, reply_to(request, {"return": {}}))
        else:
            self._refuse(request, Refused(found))

    def _play(self, exchange: Exchange, request: dict[str, Any]) -> None:
        self._say_all(exchange.before)
        since = 0.0
        if exchange.reply is not None:
            since = exchange.reply.after
            self._say(since, reply_to(request, exchange.reply.message))
        self._say_all(exchange.after, since)
        if exchange.ends:
            said = [line.after for line in exchange.before] + [since + line.after for line in exchange.after]
            self._in(max([since, *said]), self._end)

    def _refuse(self, request: dict[str, Any], error: Refused) -> None:
        self._say(0.0, reply_to(request, {"error": {"class": error.kind, "desc": error.desc}}))

    # -- output --

    def _say_all(self, lines: list[Said], since: float = 0.0) -> None:
        for line in lines:
            self._say(since + line.after, line.message)

    def _say(self, seconds: float, message: dict[str, Any]) -> None:
        if self._pace == AT_ONCE:
            self.write(to_line(message))
        else:
            self._in(seconds, lambda: self.write(to_line(message)))

    def _in(self, seconds: float, action: Any) -> None:
        """Do something so much later, at this replay's pace."""
        loop = asyncio.get_running_loop()

        def due() -> None:
            self._timers.discard(timer)
            action()

        timer = loop.call_later(seconds * self._pace, due)
        self._timers.add(timer)

    def _end(self) -> None:
        self._ending = True
        if not self.backed_up:
            self._vm.end(0)
