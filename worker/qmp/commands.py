# SPDX-License-Identifier: Apache-2.0
"""What is said on a monitor, as values: commands, the greeting, QEMU's errors and times; and who is told. Pure; used by session.py.

From the other side nothing is taken for granted: every function here takes any JSON value.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

import msgspec

from ...common.errors import BadRequest, MonitorLost, NotRunning, OutcomeUnknown, QmpError, TooLarge, VmloopError
from ...common.states import MonitorState

MAX_COMMAND_BYTES: Final = 16 * 1024 * 1024
ERROR_TEXT: Final = 2000  # characters of QEMU's error text that are passed on

Done = Callable[[Any, VmloopError | None], None]  # (the value of `return`, or the error)


class Command(msgspec.Struct):
    """One command on its way. `done` is None once nobody waits any more."""

    name: str
    text: bytes
    done: Done | None
    qmp_id: int
    request: int = 0
    reading: bool = False
    oob: bool = False
    deadline: float = 0.0
    key: bytes = b""
    fds: tuple[int, ...] = ()
    sent: float = 0.0
    entered: Callable[[], None] = lambda: None  # called when it is written down, before it is sent


class Greeting(msgspec.Struct, frozen=True):
    """What QEMU said first."""

    version: tuple[int, int, int]
    package: str
    capabilities: tuple[str, ...]


class Listener(Protocol):
    """What a session tells its VM. None of these may raise."""

    def on_event(self, name: str, data: dict[str, Any], at: int) -> None: ...
    def on_monitor_state(self, state: MonitorState, reason: str) -> None: ...
    def on_late(self, command: Command, reply: dict[str, Any]) -> None: ...
    def on_end(self, reason: str) -> None: ...


def awaited(loop: asyncio.AbstractEventLoop) -> tuple[asyncio.Future[Any], Done]:
    """A future, and the `done` that ends it; who has given up waiting is not told any more."""
    future: asyncio.Future[Any] = loop.create_future()

    def done(value: Any, error: VmloopError | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)

    return future, done


def encode_command(name: str, arguments: dict[str, Any] | None, qmp_id: int, *, oob: bool) -> bytes:
    """The line to send. Raises `BadRequest` for arguments that JSON does not have, `TooLarge` over `MAX_COMMAND_BYTES`."""
    message: dict[str, Any] = {"exec-oob" if oob else "execute": name, "id": qmp_id}
    if arguments:
        message["arguments"] = arguments
    try:
        text = msgspec.json.encode(message) + b"\n"
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise BadRequest(f"{name}: the arguments are no JSON: {error}") from error
    if len(text) > MAX_COMMAND_BYTES:
        raise TooLarge(f"{name}: the command has {len(text)} bytes", limit=MAX_COMMAND_BYTES)
    return text


def qmp_error(name: str, error: object) -> QmpError:
    """QEMU's error reply as one of ours."""
    error = error if isinstance(error, dict) else {}
    kind = str(error.get("class", "GenericError"))[:100]
    desc = str(error.get("desc", "no description"))[:ERROR_TEXT]
    return QmpError(f"{name}: {desc}", **{"class": kind, "desc": desc})


def end_of(command: Command, reason: str) -> VmloopError:
    """What a caller is told whose command was not answered before the connection ended."""
    if not command.sent:
        return NotRunning(f"{command.name}: not sent: {reason}")
    if command.reading:
        return MonitorLost(f"{command.name}: {reason} before it answered")
    return OutcomeUnknown(f"{command.name}: {reason} before it answered; look at the VM's state before you repeat it")


def read_greeting(content: object) -> Greeting:
    """The greeting in what stood under "QMP"; zeros and nothing for what is missing."""
    content = content if isinstance(content, dict) else {}
    version = content.get("version")
    version = version if isinstance(version, dict) else {}
    qemu = version.get("qemu")
    qemu = qemu if isinstance(qemu, dict) else {}
    numbers = tuple(part if isinstance(part := qemu.get(name), int) else 0 for name in ("major", "minor", "micro"))
    capabilities = content.get("capabilities")
    names = tuple(str(name) for name in capabilities) if isinstance(capabilities, list) else ()
    return Greeting((numbers[0], numbers[1], numbers[2]), str(version.get("package", ""))[:200], names)


def microseconds(timestamp: object) -> int:
    """QEMU's timestamp; now if it sent none that can be used (it says -1 when its own clock failed)."""
    if isinstance(timestamp, dict):
        seconds, micros = timestamp.get("seconds"), timestamp.get("microseconds")
        if type(seconds) is int and type(micros) is int and 0 <= seconds < 1 << 40 and 0 <= micros < 1_000_000:
            return seconds * 1_000_000 + micros
    return time.time_ns() // 1000
