# SPDX-License-Identifier: Apache-2.0
"""The guest agent of a simulated VM: the protocol of qemu-ga on the other end of a virtio-serial port.

Made by `simulated.serve`; simulated_guest carries its commands out. While the guest does not run, or before it has booted, what the host
sends stays in the socket; once the agent has closed its port, it is thrown away. Like the real one the agent waits while its output
is not read, so that nothing piles up in it.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from typing import Any, Final

from .simulated_damage import garbled, padded
from .simulated_emitted import Emitted
from .simulated_faults import Faults
from .simulated_guest import Guest
from .simulated_json import Input, JsonStream, to_line
from .simulated_port import Port
from .simulated_requests import Refused, check_request
from .simulated_vm import FLOOD_TICK, SimulatedVm, owed

MAX_LATE: Final = 256  # replies that are late at the same time; then nothing more is read

_SYNCS: Final = ("guest-sync", "guest-sync-delimited")
_FLOOD_LINE: Final = to_line({"return": 0}, b"\n")


class AgentPort(Port):
    """The host's end of the agent's port, with the agent behind it."""

    def __init__(self, listener: socket.socket, vm: SimulatedVm, emitted: Emitted | None = None) -> None:
        super().__init__(listener)
        self._vm = vm
        self._guest = Guest(vm, emitted or Emitted())
        self._stream = JsonStream()
        self._late: deque[tuple[float, bytes]] = deque()  # when due, and the line
        self._working = False  # in the middle of one command no other is begun, whatever the first brings about
        self._halved = False  # half a line was said, and nothing more is
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._flooded_at = 0.0

    # -- what the client does --

    def received(self, data: bytes, fds: list[int]) -> None:
        """Take what the host sent, if anybody listens."""
        for fd in fds:
            socket.close(fd)
        if self._vm.agent_open:
            self._stream.feed(data)
            self._work()

    def drained(self) -> None:
        """Go on with what waited for the host to read."""
        self._work()

    # -- what the VM tells --

    def event(self, name: str, data: dict[str, Any] | None) -> None:  # noqa: ARG002 - Attachment has it
        """Follow the VM's state."""
        if name == "RESET":
            self._guest.restart()
        self.faults_changed(self._vm.faults)

    def faults_changed(self, faults: Faults) -> None:
        """Do what is possible now."""
        self.freeze(faults.stuck)  # the main loop carries the bytes
        if not self._vm.agent_open:
            self._stream = JsonStream()
            self._late.clear()
        self._halved = self._halved and faults.agent_half_line
        if faults.agent_flood and "flood" not in self._timers:
            self._flooded_at = time.monotonic()
            self._flood()
        self._say_late()
        self._work()

    def close(self) -> None:
        """The VM is gone."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        super().close()

    # -- requests --

    @property
    def _able(self) -> bool:
        """Whether the agent can take its next command."""
        goes = self._vm.running and not self._vm.faults.stuck and "slow" not in self._timers
        return goes and not self.backed_up and len(self._late) < MAX_LATE

    def _work(self) -> None:
        """Answer what is complete, one request after another."""
        if self._working:
            return
        while self._able and (item := self._stream.take()) is not None:
            if self._vm.faults.agent_silent:
                continue
            if self._vm.faults.agent_slow:
                loop = asyncio.get_running_loop()
                self._timers["slow"] = loop.call_later(self._vm.faults.agent_slow, self._waited, item)
            else:
                self._respond(item)
        # A closed port takes everything, and loses it.
        self.hold(not (self._vm.agent_driver and self._vm.running and (self._able or not self._vm.agent_open)))

    def _waited(self, item: Input) -> None:
        del self._timers["slow"]
        if self._vm.agent_open and self._vm.running:
            self._respond(item)
        self._work()

    def _respond(self, item: Input) -> None:
        self._working = True
        try:
            self._carry_out(item)
        finally:
            self._working = False

    def _carry_out(self, item: Input) -> None:
        request, faults = item.value, self._vm.faults
        ids: dict[str, Any] = {}
        if isinstance(request, dict) and "id" in request and not faults.agent_idless:
            ids["id"] = request["id"]
        name = ""
        try:
            if item.error is not None:
                raise Refused(item.error)
            name, _, arguments = check_request(request)
            value = self._guest.run(name, arguments)
        except Refused as error:
            self._send({**ids, "error": {"class": error.kind, "desc": error.desc}})
            return
        if value is None:
            return
        if faults.agent_big_reply and name not in _SYNCS:
            value = padded(value, faults.agent_big_reply)
        self._send({"return": value, **ids}, b"\xff" if name == "guest-sync-delimited" else b"")

    # -- replies --

    def _send(self, message: dict[str, Any], before: bytes = b"") -> None:
        line = before + to_line(message, b"\n")
        faults = self._vm.faults
        if faults.agent_garbled > 0:
            self._vm.change_faults(agent_garbled=faults.agent_garbled - 1)
            line = garbled(line, message, faults.garbled_kind, b"\n")
        if faults.agent_half_line:
            if not self._halved:
                self._halved = True
                self.write(line[: len(line) // 2])
        elif faults.agent_late or self._late:
            self._late.append((time.monotonic() + faults.agent_late, line))
            self._say_late()
        else:
            self.write(line)

    def _say_late(self) -> None:
        """Say what is due, in order; all of it when the fault is over."""
        timer = self._timers.pop("late", None)
        if timer is not None:
            timer.cancel()
        if not self._late or not self._vm.running or self._vm.faults.stuck:
            return
        now = time.monotonic()
        while self._late and (self._late[0][0] <= now or not self._vm.faults.agent_late):
            self.write(self._late.popleft()[1])
        if self._late:
            self._timers["late"] = asyncio.get_running_loop().call_later(self._late[0][0] - now, self._late_due)

    def _late_due(self) -> None:
        self._say_late()
        self._work()

    def _flood(self) -> None:
        self._timers.pop("flood", None)
        rate = self._vm.faults.agent_flood
        count, self._flooded_at = owed(rate, self._flooded_at)
        if self._vm.agent_open and self._vm.running and not self._vm.faults.stuck and not self.backed_up:
            self.write(_FLOOD_LINE * count)
        if rate:
            self._timers["flood"] = asyncio.get_running_loop().call_later(FLOOD_TICK, self._flood)
