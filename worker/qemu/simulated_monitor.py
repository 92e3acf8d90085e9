# SPDX-License-Identifier: Apache-2.0
"""The monitor of a simulated VM: greeting, negotiation, the request queue with out-of-band beside it, replies and events.

Made by `simulated.serve`. The rules are those of QEMU 7.2 (tests/contract holds both to them): commands queue up to `QUEUE_LENGTH` behind
the one that runs, then the monitor stops reading, out-of-band commands included; without oob it reads one command at a time.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from .simulated_commands import COMMANDS, VERSION, run_command, wants_oob
from .simulated_damage import garbled, padded
from .simulated_dump import Dump
from .simulated_emitted import Emitted
from .simulated_faults import Faults
from .simulated_fds import FdSets
from .simulated_json import Input, JsonStream, to_line
from .simulated_port import Port
from .simulated_requests import Refused, check_request, no_such_command
from .simulated_table import Chardev, Jobs, Monitor
from .simulated_vm import FLOOD_EVENT, SimulatedVm

QUEUE_LENGTH: Final = 8  # QEMU's QMP_REQ_QUEUE_LEN_MAX; the command being carried out is not counted

# The stand-in's own command is obeyed whatever is wrong with the VM (unless it is frozen): it must be able to end the fault. So it
# overtakes what waits, in band too, as no command of QEMU's does; out of band it may be sent while others are in flight.
CONTROL_COMMAND: Final = "x-simulate"


class MonitorPort(Port):
    """A monitor: the session of one client after another."""

    def __init__(
        self,
        listener: socket.socket,
        vm: SimulatedVm,
        chardevs: Callable[[], list[Chardev]],
        dump: Dump | None = None,
        jobs: Jobs | None = None,
        emitted: Emitted | None = None,
    ) -> None:
        super().__init__(listener)
        self._vm = vm
        self._emitted = emitted or Emitted()
        self._monitor = Monitor(vm, FdSets(), chardevs, dump or Dump(vm), jobs or Jobs(), self._emitted)
        self._queue: deque[Input] = deque()
        self._current: Input | None = None  # taken from the queue and being carried out
        self._current_negotiated = False  # whether its client had negotiated; by its end another one may be there
        self._blocked = False  # a command holds up the main loop, as a dump does that is not detached
        self._responding = False  # in the middle of one reply no other is begun
        self._timer: asyncio.TimerHandle | None = None
        self._fresh_session()

    def _fresh_session(self) -> None:
        self._stream = JsonStream()
        self._greeted = False
        self._negotiated = False
        self._oob = False
        self._queue.clear()

    # -- a client comes, sends, goes --

    def opened(self) -> None:
        """Greet."""
        for number in range(self._vm.faults.early_events):
            self._send(_event(FLOOD_EVENT, {"number": number}))
        self._greet()

    def _greet(self) -> None:
        if self.connected and not self._greeted and not self._vm.faults.no_greeting:
            self._greeted = True
            self.write(to_line({"QMP": {"version": VERSION, "capabilities": ["oob"]}}))

    def received(self, data: bytes, fds: list[int]) -> None:
        """Take what the client sent, as far as the queue has room."""
        self._monitor.fds.passed(fds)
        self._stream.feed(data)
        self._pump()

    def lost(self) -> None:
        """Forget the client's queue. The command being carried out goes on, and its reply goes to the next client, as in QEMU."""
        self._fresh_session()
        if self._vm.running:
            self._monitor.fds.sweep(everything=True)

    def close(self) -> None:
        """The VM is gone."""
        if self._timer is not None:
            self._timer.cancel()
        super().close()
        self._monitor.fds.close()
        self._monitor.dump.close()
        self._emitted.close()

    # -- what the VM tells --

    def event(self, name: str, data: dict[str, Any] | None) -> None:
        """Pass an event on; before negotiation a client gets none."""
        if self._negotiated:
            event = _event(name, data)
            self._emitted.event(event)
            self._send(event)

    def faults_changed(self, faults: Faults) -> None:
        """Do what is possible now."""
        self.freeze(faults.frozen)
        if not faults.frozen:
            self._greet()
            if not self._responding:
                self._dispatch()
                self._pump()

    # -- the queue --

    def _full(self) -> bool:
        if self._oob:
            return len(self._queue) >= QUEUE_LENGTH
        return bool(self._queue) or self._current is not None or self._blocked

    def _pump(self) -> None:
        while not self._vm.faults.frozen and not self._full():
            item = self._stream.take()
            if item is None:
                break
            self._handle(item)
        self.hold(self._full())

    def _handle(self, item: Input) -> None:
        request = item.value if isinstance(item.value, dict) else {}
        own = CONTROL_COMMAND in (request.get("execute"), request.get("exec-oob"))
        if self._vm.faults.silent and not own:
            return
        if own or ("exec-oob" in request and "execute" not in request):
            self._respond(item, negotiated=self._negotiated)
            self._dispatch()  # the fault that held others up may be over
            return
        self._queue.append(item)
        self._dispatch()

    def _dispatch(self) -> None:
        """Carry out what is queued, one after another, as far as the faults let it."""
        while not self._vm.faults.frozen and self._timer is None and not self._blocked:
            if self._current is None:
                if not self._queue:
                    return
                self._current = self._queue.popleft()
                self._current_negotiated = self._negotiated
                if self._vm.faults.slow:
                    self._timer = asyncio.get_running_loop().call_later(self._vm.faults.slow, self._waited)
                    return
            if self._vm.faults.busy:
                return
            current, self._current = self._current, None
            self._respond(current, negotiated=self._current_negotiated)

    def _waited(self) -> None:
        self._timer = None
        self._dispatch()
        self._pump()

    # -- one request --

    def _respond(self, item: Input, *, negotiated: bool) -> None:
        request = item.value
        ids = {"id": request["id"]} if isinstance(request, dict) and "id" in request else {}
        self._responding = True
        try:
            if item.error is not None:
                raise Refused(item.error)
            value = self._carry_out(request, negotiated)
            if isinstance(value, asyncio.Future):
                self._blocked = True
                value.add_done_callback(lambda done: self._unblocked(done, ids))
            else:
                self._send_value(value, ids)
        except Refused as error:
            self._send_error(error, ids)
        finally:
            self._responding = False

    def _unblocked(self, done: asyncio.Future[Any], ids: dict[str, Any]) -> None:
        """The command that held up the main loop has ended."""
        self._blocked = False
        if done.cancelled():
            return
        error = done.exception()
        if isinstance(error, Refused):
            self._send_error(error, ids)
        else:
            self._send_value(done.result(), ids)
        self._dispatch()
        self._pump()

    def _send_value(self, value: Any, ids: dict[str, Any]) -> None:
        extra = self._vm.faults.big_reply
        self._send({"return": padded(value, extra) if extra else value, **ids})

    def _send_error(self, error: Refused, ids: dict[str, Any]) -> None:
        self._send({**ids, "error": {"class": error.kind, "desc": error.desc}})

    def _carry_out(self, request: object, negotiated: bool) -> Any:
        name, oob, arguments = check_request(request, oob_enabled=self._oob)
        if not negotiated:
            if name == "qmp_capabilities":
                self._oob = wants_oob(arguments)
                self._negotiated = True
                return {}
            if name != CONTROL_COMMAND:
                raise Refused("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
        command = COMMANDS.get(name)
        if command is None:
            raise no_such_command(name)
        if oob and not command.oob:
            raise Refused(f"The command {name} does not support OOB")
        value = run_command(name, self._monitor, arguments)
        self._emitted.command(name)
        return value

    # -- output --

    def _send(self, message: dict[str, Any]) -> None:
        line = to_line(message)
        faults = self._vm.faults
        if faults.garbled > 0:
            self._vm.change_faults(garbled=faults.garbled - 1)
            line = garbled(line, message, faults.garbled_kind, b"\r\n")
        if faults.close_midline:
            self._vm.change_faults(close_midline=False)
            self.write(line[: len(line) // 2])
            self.hang_up()
            return
        self.write(line)


def _event(name: str, data: dict[str, Any] | None) -> dict[str, Any]:
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    event: dict[str, Any] = {
        "timestamp": {"seconds": seconds, "microseconds": nanoseconds // 1000},
        "event": name,
    }
    if data is not None:
        event["data"] = data
    return event
