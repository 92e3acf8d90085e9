# SPDX-License-Identifier: Apache-2.0
"""Every operation of docs/operations.md as a typed request: service, op, arguments, and the type of the answer.

The blocking client and the asyncio client both build their methods from these, so that names, defaults and types cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import msgspec

from ..common.capabilities import Capabilities, from_plain
from ..common.cursor import Cursor
from ..common.errors import BadRequest, Internal
from ..common.names import HOST_SERVICE, vm_name
from .results import (
    BrokerVersion,
    HostShutdown,
    VmChanged,
    VmDetails,
    VmStarted,
    VmStats,
    VmSummary,
    WorkersRestarted,
    typed,
)

T = TypeVar("T")

# A stop is given so much longer than the operation's own timeout: to kill QEMU, to reap it and to say so.
STOP_MARGIN: Final = 5.0

# Seconds for a program in the guest to end.
EXEC_TIMEOUT: Final = 60.0

# A hold on frozen file systems is given so much longer than its limit: to freeze them and to thaw them.
FREEZE_MARGIN: Final = 60.0
MAX_HOLD: Final = 3600.0  # seconds; the wire's limit for any request

# All workers of a host, one after the other, each with up to 40 s; the wire's limit for any request.
MAX_ROLLING: Final = 3600.0

# QMP commands that change nothing, beside query-*. They may be sent twice.
READING_COMMANDS: Final = frozenset(
    {"qom-get", "qom-list", "qom-list-types", "qom-list-properties", "device-list-properties"}
)

# Commands of the guest agent that change nothing, beside guest-get-*, guest-*-get-* and guest-*-status.
READING_AGENT_COMMANDS: Final = frozenset({"guest-ping", "guest-info", "guest-sync", "guest-sync-delimited"})
# The agent forgets a process, with its output, once it has told that it ended: a second answer would be another one.
TELLS_ONCE: Final = "guest-exec-status"


class Request(msgspec.Struct, Generic[T], frozen=True):
    """One request before it has a number. `key`: None for a random one (mutating requests), b"" for none at all."""

    service: str
    op: str
    arguments: Mapping[str, Any] | None
    result: Callable[[Any], T]
    timeout: float | None = None  # None: the connection's
    reading: bool = False
    key: bytes | None = None


def plain(value: Any) -> Any:
    """The answer as it came."""
    return value


# -- the host ------------------------------------------------------------------------------------------------------------


def ping() -> Request[float]:
    return Request(HOST_SERVICE, "ping", None, _time_of, reading=True)


def version() -> Request[BrokerVersion]:
    return Request(HOST_SERVICE, "version", None, lambda value: typed(value, BrokerVersion), reading=True)


def list_vms() -> Request[list[VmSummary]]:
    return Request(HOST_SERVICE, "list", None, lambda value: typed(value, list[VmSummary]), reading=True)


def stats(names: tuple[str, ...]) -> Request[list[VmStats]]:
    arguments = {"names": [vm_name(name) for name in names]} if names else None
    return Request(HOST_SERVICE, "stats", arguments, lambda value: typed(value, list[VmStats]), reading=True)


def define(definition: object) -> Request[None]:
    """`definition`: a common.definition.Definition or a map of the same shape."""
    return Request(HOST_SERVICE, "define", {"definition": msgspec.to_builtins(definition)}, _nothing)


def undefine(name: str) -> Request[None]:
    return Request(HOST_SERVICE, "undefine", {"name": vm_name(name)}, _nothing)


def start(name: str, paused: bool) -> Request[VmStarted]:
    arguments: dict[str, Any] = {"name": vm_name(name)}
    if paused:
        arguments["paused"] = True
    return Request(HOST_SERVICE, "start", arguments, _started)


def attach(name: str, qmp: str | Path, agent: str | Path | None, pid: int | None) -> Request[VmStarted]:
    arguments: dict[str, Any] = {"name": vm_name(name), "qmp": _absolute(qmp)}
    if agent is not None:
        arguments["agent"] = _absolute(agent)
    if pid is not None:
        arguments["pid"] = pid
    return Request(HOST_SERVICE, "attach", arguments, _started)


def capabilities(binary: str | Path | None, refresh: bool) -> Request[Capabilities]:
    """`binary`: a name that the host looks up, or a path; None: the one that a definition has by default."""
    arguments: dict[str, Any] = {}
    if binary is not None:
        arguments["binary"] = _absolute(binary) if "/" in str(binary) else str(binary)
    if refresh:
        arguments["refresh"] = True
    return Request(HOST_SERVICE, "capabilities", arguments or None, _capabilities, reading=True)


def shutdown(vms: str) -> Request[HostShutdown]:
    return Request(HOST_SERVICE, "shutdown", {"vms": vms}, lambda value: typed(value, HostShutdown))


def restart_workers(names: tuple[str, ...]) -> Request[WorkersRestarted]:
    """Asked for as a stream, each part is one VM that is done. Without a key: a repeat would replace the workers once more."""
    arguments = {"names": [vm_name(name) for name in names]} if names else None
    return Request(
        HOST_SERVICE,
        "restart-workers",
        arguments,
        lambda value: typed(value, WorkersRestarted),
        timeout=MAX_ROLLING,
        key=b"",
    )


# -- one VM; `service` is names.vm_service(NAME) -------------------------------------------------------------------------


def show(service: str) -> Request[VmDetails]:
    return Request(service, "show", None, lambda value: typed(value, VmDetails), reading=True)


def wait(service: str, state: str, timeout: float | None) -> Request[VmChanged]:
    return Request(service, "wait", {"for": state}, _changed, timeout=timeout, reading=True)


def stop(service: str, timeout: float, force: bool) -> Request[VmChanged]:
    arguments = {"timeout": timeout, "force": force}
    return Request(service, "stop", arguments, _changed, timeout=timeout + STOP_MARGIN)


def change(service: str, op: str) -> Request[VmChanged]:
    """`kill`, `reset`, `pause` or `resume`."""
    return Request(service, op, None, _changed)


def detach(service: str) -> Request[None]:
    return Request(service, "detach", None, _nothing)


def qmp(
    service: str,
    command: str,
    arguments: Mapping[str, Any] | None,
    oob: bool,
    wait_frozen: bool,
    timeout: float | None,
    reading: bool | None,
) -> Request[Any]:
    """`reading` None: as the command's name says."""
    body: dict[str, Any] = {"command": command}
    if arguments:
        body["arguments"] = arguments
    if oob:
        body["oob"] = True
    if wait_frozen:
        body["wait_frozen"] = True
    if reading is None:
        reading = command.startswith("query-") or command in READING_COMMANDS
    return Request(service, "qmp", body, plain, timeout, reading)


def vm_capabilities(service: str, command: str | None, timeout: float | None) -> Request[Capabilities]:
    """`command`: only what is needed to check this one."""
    arguments = {"command": command} if command is not None else None
    return Request(service, "capabilities", arguments, _capabilities, timeout, reading=True)


def hmp(service: str, line: str, timeout: float | None) -> Request[str]:
    return Request(service, "hmp", {"line": line}, str, timeout)


def agent(
    service: str,
    command: str,
    arguments: Mapping[str, Any] | None = None,
    timeout: float | None = None,
    reading: bool | None = None,
    key: bytes | None = None,
    limit: float | None = None,
) -> Request[Any]:
    """A command for the guest agent. `reading` None: as the command's name says. `limit`: of a freeze, seconds until it is thawed."""
    body: dict[str, Any] = {"command": command}
    if arguments:
        body["arguments"] = arguments
    if limit is not None:
        body["limit"] = limit
    if reading is None:
        reading = only_looks(command)
    return Request(service, "agent", body, plain, timeout, reading, key)


def only_looks(command: str) -> bool:
    """Whether a command of the guest agent changes nothing, by its name."""
    if command in READING_AGENT_COMMANDS:
        return True
    return command.startswith("guest-") and (
        "-get-" in command or (command.endswith("-status") and command != TELLS_ONCE)
    )


def freeze(service: str, limit: float | None) -> Request[Any]:
    """Freeze the guest's file systems and hold them; asked for as a stream. `limit` None: the definition's.

    Without a key: a hold that was lost with its broker has been thawed, and its first answer is of no use to a repeat.
    """
    body: dict[str, Any] = {"command": "guest-fsfreeze-freeze", "hold": True}
    if limit is not None:
        body["limit"] = limit
    timeout = MAX_HOLD if limit is None else limit + FREEZE_MARGIN
    return Request(service, "agent", body, plain, timeout, key=b"")


def thaw(service: str) -> Request[Any]:
    """End a hold; how many file systems were frozen until then."""
    return agent(service, "guest-fsfreeze-thaw")


def events(service: str, since: str, limit: int, last: int | None = None) -> Request[Any]:
    """One page of a VM's events; asked for as a stream, each part is one event. `last`: no more than the newest so many."""
    arguments: dict[str, Any] = {"since": since, "limit": limit}
    if last is not None:
        arguments["last"] = last
    return Request(service, "events", arguments, plain, reading=True)


def newest(cursor: Cursor, shown: Any) -> Cursor:
    """The cursor of a `show`: of the reply's header or, for a VM that has no worker to fill it in, of the entry itself."""
    if not isinstance(shown, dict):
        return cursor
    epoch, seq = shown.get("epoch"), shown.get("seq")
    return max(cursor, Cursor(epoch, seq)) if isinstance(epoch, int) and isinstance(seq, int) else cursor


# -- types of answers ----------------------------------------------------------------------------------------------------


def _nothing(value: Any) -> None:
    del value


def _started(value: Any) -> VmStarted:
    return typed(value, VmStarted)


def _changed(value: Any) -> VmChanged:
    return typed(value, VmChanged)


def _capabilities(value: Any) -> Capabilities:
    try:
        return from_plain(value)
    except BadRequest as error:
        raise Internal(
            f"the broker's answer does not fit: {error}; do broker and client have the same version?"
        ) from error


def _time_of(value: Any) -> float:
    try:
        return float(value["time"])
    except (KeyError, TypeError, ValueError):
        raise Internal(f"the broker's answer to ping holds no time: {value!r:.100}") from None


def _absolute(path: str | Path) -> str:
    # The worker that opens it has another working directory.
    return str(Path(path).absolute())
