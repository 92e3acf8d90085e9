# SPDX-License-Identifier: Apache-2.0
"""The guest agent of a simulated VM: the protocol of qemu-ga on the other end of a virtio-serial port.

Made by `simulated.serve`. Replies and error texts are those of qemu-ga 7.2 (tests/contract holds both to them). While the guest does
not run, or before it has booted, what the host sends stays in the socket; once the agent has closed its port, it is thrown away.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from .simulated_faults import Faults
from .simulated_json import Input, JsonStream, to_line
from .simulated_monitor import garble
from .simulated_port import Port
from .simulated_requests import Argument, Refused, check_arguments, check_request, no_such_command
from .simulated_vm import FLOOD_TICK, SimulatedVm

AGENT_VERSION: Final = "7.2.22"
_MODES: Final = ("powerdown", "halt", "reboot")
_QUIET: Final = frozenset({"guest-shutdown"})  # commands that answer nothing when they succeed


class AgentPort(Port):
    """The host's end of the agent's port, with the agent behind it."""

    def __init__(self, listener: socket.socket, vm: SimulatedVm) -> None:
        super().__init__(listener)
        self._vm = vm
        self._stream = JsonStream()
        self._timer: asyncio.TimerHandle | None = None
        self._flood_timer: asyncio.TimerHandle | None = None
        self._flooded_at = 0.0

    # -- what the client does --

    def received(self, data: bytes, fds: list[int]) -> None:
        """Take what the host sent, if anybody listens."""
        for fd in fds:
            socket.close(fd)
        if self._vm.agent_open:
            self._stream.feed(data)
            self._work()

    # -- what the VM tells --

    def event(self, name: str, data: dict[str, Any] | None) -> None:  # noqa: ARG002 - Attachment has it
        """Follow the VM's state."""
        self.faults_changed(self._vm.faults)

    def faults_changed(self, faults: Faults) -> None:
        """Do what is possible now."""
        self.freeze(faults.stuck)  # the main loop carries the bytes
        if not self._vm.agent_open:
            self._stream = JsonStream()
        self.hold(not self._vm.running or not self._vm.agent_driver)
        if faults.agent_flood and self._flood_timer is None:
            self._flooded_at = time.monotonic()
            self._flood()
        self._work()

    def close(self) -> None:
        """The VM is gone."""
        for timer in (self._timer, self._flood_timer):
            if timer is not None:
                timer.cancel()
        super().close()

    # -- requests --

    def _work(self) -> None:
        """Answer what is complete, one request after another."""
        while self._timer is None and self._vm.running and not self._vm.faults.stuck:
            item = self._stream.take()
            if item is None:
                return
            if self._vm.faults.agent_silent:
                continue
            if self._vm.faults.agent_slow:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(self._vm.faults.agent_slow, self._waited, item)
                return
            self._respond(item)

    def _waited(self, item: Input) -> None:
        self._timer = None
        if self._vm.agent_open:
            self._respond(item)
        self._work()

    def _respond(self, item: Input) -> None:
        request = item.value
        ids = {"id": request["id"]} if isinstance(request, dict) and "id" in request else {}
        name = ""
        try:
            if item.error is not None:
                raise Refused(item.error)
            name, _, arguments = check_request(request)
            command = _COMMANDS.get(name)
            if command is None:
                raise no_such_command(name)
            check_arguments(command.arguments, arguments)
            value = command.run(self._vm, arguments)
        except Refused as error:
            self._send({**ids, "error": {"class": error.kind, "desc": error.desc}})
            return
        if name not in _QUIET:
            self._send({"return": value, **ids}, b"\xff" if name == "guest-sync-delimited" else b"")

    def _send(self, message: dict[str, Any], before: bytes = b"") -> None:
        line = before + to_line(message, b"\n")
        faults = self._vm.faults
        if faults.agent_garbled > 0:
            self._vm.change_faults(agent_garbled=faults.agent_garbled - 1)
            line = garble(line, message, faults.garbled_kind)
        self.write(line)

    def _flood(self) -> None:
        self._flood_timer = None
        faults = self._vm.faults
        now = time.monotonic()
        count = int((now - self._flooded_at) * faults.agent_flood)
        if count:
            self._flooded_at = now
        if self._vm.agent_open and self._vm.running and not faults.stuck:
            self.write(to_line({"return": 0}, b"\n") * count)
        if faults.agent_flood:
            self._flood_timer = asyncio.get_running_loop().call_later(FLOOD_TICK, self._flood)


# -- the commands --


class _Command(NamedTuple):
    run: Callable[[SimulatedVm, dict[str, Any]], Any]
    arguments: tuple[Argument, ...] = ()


def _sync(_vm: SimulatedVm, arguments: dict[str, Any]) -> Any:
    return arguments["id"]


def _ping(_vm: SimulatedVm, _: dict[str, Any]) -> Any:
    return {}


def _info(_vm: SimulatedVm, _: dict[str, Any]) -> Any:
    return {
        "version": AGENT_VERSION,
        "supported_commands": [
            {"enabled": True, "name": name, "success-response": name not in _QUIET} for name in reversed(_COMMANDS)
        ],
    }


def _osinfo(_vm: SimulatedVm, _: dict[str, Any]) -> Any:
    return {
        "name": "Simulated GNU/Linux",
        "kernel-release": "6.1.0",
        "version": "12 (simulated)",
        "pretty-name": "Simulated GNU/Linux 12",
        "version-id": "12",
        "kernel-version": "#1 SMP",
        "machine": "x86_64",
        "id": "simulated",
    }


def _time(_vm: SimulatedVm, _: dict[str, Any]) -> Any:
    return time.time_ns()


def _host_name(vm: SimulatedVm, _: dict[str, Any]) -> Any:
    return {"host-name": vm.name or "localhost"}


def _timezone(_vm: SimulatedVm, _: dict[str, Any]) -> Any:
    return {"zone": "UTC", "offset": 0}


def _interfaces(_vm: SimulatedVm, _: dict[str, Any]) -> Any:
    address = {"ip-address-type": "ipv4", "ip-address": "127.0.0.1", "prefix": 8}
    return [{"name": "lo", "ip-addresses": [address], "hardware-address": "00:00:00:00:00:00"}]


def _nothing_to_list(_vm: SimulatedVm, _: dict[str, Any]) -> Any:
    return []


def _freeze_status(_vm: SimulatedVm, _: dict[str, Any]) -> Any:
    return "thawed"


def _shutdown(vm: SimulatedVm, arguments: dict[str, Any]) -> Any:
    mode = arguments.get("mode", "powerdown")
    if mode not in _MODES:
        raise Refused("mode is invalid (valid values are: halt|powerdown|reboot")  # the bracket is qemu-ga's own
    if mode == "reboot":
        vm.reset(guest=True, reason="guest-reset")
    else:
        vm.guest_shutdown()


_COMMANDS: Final[dict[str, _Command]] = {
    "guest-sync-delimited": _Command(_sync, (Argument("id", "integer"),)),
    "guest-sync": _Command(_sync, (Argument("id", "integer"),)),
    "guest-ping": _Command(_ping),
    "guest-info": _Command(_info),
    "guest-get-time": _Command(_time),
    "guest-shutdown": _Command(_shutdown, (Argument("mode", optional=True),)),
    "guest-get-osinfo": _Command(_osinfo),
    "guest-get-host-name": _Command(_host_name),
    "guest-get-timezone": _Command(_timezone),
    "guest-get-users": _Command(_nothing_to_list),
    "guest-network-get-interfaces": _Command(_interfaces),
    "guest-fsfreeze-status": _Command(_freeze_status),
}
