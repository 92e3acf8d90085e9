# SPDX-License-Identifier: Apache-2.0
"""The QMP commands of a simulated VM: one table, from name to arguments and function. Called by simulated_monitor.

Replies, error texts and the order of checks are those of QEMU 7.2 (tests/contract compares them). A function returns the value of
`return`, or raises `Refused`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec

from .simulated_faults import changed
from .simulated_fds import FdSets
from .simulated_requests import Argument, Refused, check_arguments
from .simulated_vm import EVENTS, SimulatedVm

VERSION: Final[dict[str, Any]] = {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "vmloop-simulated"}


class Chardev(NamedTuple):
    """A line of query-chardev."""

    label: str
    address: str
    connected: bool
    frontend_open: bool


class Monitor(msgspec.Struct):
    """What commands may use of the monitor that they came through."""

    vm: SimulatedVm
    fds: FdSets
    chardevs: Callable[[], list[Chardev]]


class Command(NamedTuple):
    """One command."""

    run: Callable[[Monitor, dict[str, Any]], Any]
    arguments: tuple[Argument, ...] = ()
    oob: bool = False
    anything: bool = False  # the arguments are checked by the command itself


def run_command(name: str, monitor: Monitor, arguments: dict[str, Any]) -> Any:
    """Check the arguments and carry the command out."""
    command = COMMANDS[name]
    if not command.anything:
        check_arguments(command.arguments, arguments)
    return command.run(monitor, arguments)


# -- queries --


def _query_status(monitor: Monitor, _: dict[str, Any]) -> Any:
    return {"status": monitor.vm.status, "singlestep": False, "running": monitor.vm.running}


def _query_version(_monitor: Monitor, _: dict[str, Any]) -> Any:
    return VERSION


def _query_name(monitor: Monitor, _: dict[str, Any]) -> Any:
    return {"name": monitor.vm.name} if monitor.vm.name else {}


def _query_uuid(monitor: Monitor, _: dict[str, Any]) -> Any:
    return {"UUID": monitor.vm.uuid}


def _query_kvm(_monitor: Monitor, _: dict[str, Any]) -> Any:
    return {"enabled": False, "present": True}


def _nothing_to_list(_monitor: Monitor, _: dict[str, Any]) -> Any:
    return []


def _query_commands(_monitor: Monitor, _: dict[str, Any]) -> Any:
    return [{"name": name} for name in reversed(COMMANDS)]


def _query_chardev(monitor: Monitor, _: dict[str, Any]) -> Any:
    return [
        {"frontend-open": chardev.frontend_open, "filename": _filename(chardev), "label": chardev.label}
        for chardev in monitor.chardevs()
    ]


def _filename(chardev: Chardev) -> str:
    return f"{'' if chardev.connected else 'disconnected:'}unix:{chardev.address},server=on"


def _query_yank(monitor: Monitor, _: dict[str, Any]) -> Any:
    return [{"type": "chardev", "id": chardev.label} for chardev in monitor.chardevs()]


def _query_fdsets(monitor: Monitor, _: dict[str, Any]) -> Any:
    return monitor.fds.listed()


def _query_schema(monitor: Monitor, _: dict[str, Any]) -> Any:
    """A schema of what is here: commands with their arguments, events, the types that these name."""
    types: list[dict[str, Any]] = [
        {"name": "0", "members": [], "meta-type": "object"},
        {"name": "any", "meta-type": "any"},
        *({"name": kind, "json-type": json, "meta-type": "builtin"} for kind, json in _BUILTIN.items()),
    ]
    entries: list[dict[str, Any]] = []
    for name, command in COMMANDS.items():
        arguments = "0"
        if command.arguments:
            arguments = str(len(types))
            types.append({"name": arguments, "members": _members(command), "meta-type": "object"})
        entry: dict[str, Any] = {"name": name, "ret-type": "any", "meta-type": "command", "arg-type": arguments}
        entries.append({**entry, "allow-oob": True} if command.oob else entry)
    entries += [{"name": name, "meta-type": "event", "arg-type": "0"} for name in EVENTS]
    return [*entries, *types, *_padding(monitor.vm.faults.schema_bytes)]


_BUILTIN: Final = {"str": "string", "int": "int", "bool": "boolean"}
_SCHEMA_NAMES: Final = {"string": "str", "integer": "int", "boolean": "bool", "array": "any", "object": "any"}


def _members(command: Command) -> list[dict[str, Any]]:
    members: list[dict[str, Any]] = []
    for argument in command.arguments:
        member: dict[str, Any] = {"name": argument.name, "type": _SCHEMA_NAMES[argument.type]}
        members.append({**member, "default": None} if argument.optional else member)
    return members


def _padding(size: int) -> list[dict[str, Any]]:
    """Object types that nothing names, of together at least `size` bytes."""
    member = {"name": "padding", "type": "str"}
    each = {"name": "x-padding-00000", "members": [member] * 10, "meta-type": "object"}
    count = -(-size // (len(msgspec.json.encode(each)))) if size else 0
    return [{**each, "name": f"x-padding-{number:05}"} for number in range(count)]


# -- the VM --


def _stop(monitor: Monitor, _: dict[str, Any]) -> Any:
    monitor.vm.stop()
    return {}


def _cont(monitor: Monitor, _: dict[str, Any]) -> Any:
    if monitor.vm.status == "shutdown":
        raise Refused("Resetting the Virtual Machine is required")
    monitor.vm.cont()
    return {}


def _system_reset(monitor: Monitor, _: dict[str, Any]) -> Any:
    monitor.vm.reset(guest=False, reason="host-qmp-system-reset")
    return {}


def _system_powerdown(monitor: Monitor, _: dict[str, Any]) -> Any:
    monitor.vm.powerdown()
    return {}


def _system_wakeup(_monitor: Monitor, _: dict[str, Any]) -> Any:
    raise Refused("Unable to wake up: guest is not in suspended state")


def _quit(monitor: Monitor, _: dict[str, Any]) -> Any:
    monitor.vm.shutdown(guest=False, reason="host-qmp-quit")
    return {}


def wants_oob(arguments: dict[str, Any]) -> bool:
    """Whether these arguments of qmp_capabilities enable out-of-band commands."""
    check_arguments((Argument("enable", "array", True),), arguments)
    enable = arguments.get("enable", [])
    for position, capability in enumerate(enable):
        if not isinstance(capability, str):
            raise Refused(f"Invalid parameter type for 'enable[{position}]', expected: string")
        if capability != "oob":
            raise Refused(f"Parameter 'null' does not accept value '{capability}'")  # 'null' is QEMU's own
    return bool(enable)


def _qmp_capabilities(_monitor: Monitor, arguments: dict[str, Any]) -> Any:
    wants_oob(arguments)
    raise Refused("Capabilities negotiation is already complete, command ignored", "CommandNotFound")


# -- file descriptors --


def _getfd(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    fd = _passed(monitor)
    name = arguments["fdname"]
    if name[:1].isdigit():
        os.close(fd)
        raise Refused("Parameter 'fdname' expects a name not starting with a digit")
    monitor.fds.name(name, fd)
    return {}


def _closefd(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    if not monitor.fds.forget(arguments["fdname"]):
        raise Refused(f"File descriptor named '{arguments['fdname']}' not found")
    return {}


def _add_fd(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    fd = _passed(monitor)
    number = arguments.get("fdset-id")
    if number is not None and number < 0:
        os.close(fd)
        raise Refused("Parameter 'fdset-id' expects a non-negative value")
    return {"fd": fd, "fdset-id": monitor.fds.add(fd, number, arguments.get("opaque"))}


def _remove_fd(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    number, fd = arguments["fdset-id"], arguments.get("fd")
    if not monitor.fds.remove(number, fd):
        wanted = f"fdset-id:{number}" if fd is None else f"fdset-id:{number}, fd:{fd}"
        raise Refused(f"File descriptor named '{wanted}' not found")
    if monitor.vm.running:  # QEMU sweeps only then; a paused VM keeps listing what was removed
        monitor.fds.sweep()
    return {}


def _passed(monitor: Monitor) -> int:
    fd = monitor.fds.take_passed()
    if fd is None:
        raise Refused("No file descriptor supplied via SCM_RIGHTS")
    return fd


# -- the human monitor --


def _human_monitor_command(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    words = arguments["command-line"].split()
    if not words:
        return ""
    known = 2 if words[0] == "info" else 1
    answer = _HUMAN.get(" ".join(words[:known]))
    if answer is None:
        return f"unknown command: '{' '.join(words[:known])}'\r\n"
    text = _surplus(words[:known]) if len(words) > known else answer(monitor)
    return text.replace("\n", "\r\n")


def _surplus(words: list[str]) -> str:
    name = _WITH_SHORT_NAME.get(words[-1], words[-1])
    return f'{name}: extraneous characters at the end of line\nTry "help {" ".join(words)}" for more information\n'


def _human(name: str) -> Callable[[Monitor], str]:
    def run(monitor: Monitor) -> str:
        try:
            run_command(name, monitor, {})
        except Refused as error:
            return f"Error: {error.desc}\n"
        return ""

    return run


def _info_status(monitor: Monitor) -> str:
    status = monitor.vm.status
    if monitor.vm.running:
        return "VM status: running\n"
    return "VM status: paused\n" if status == "paused" else f"VM status: paused ({status})\n"


def _info_version(_monitor: Monitor) -> str:
    number = VERSION["qemu"]
    return f"{number['major']}.{number['minor']}.{number['micro']}{VERSION['package']}\n"


def _info_chardev(monitor: Monitor) -> str:
    return "".join(f"{chardev.label}: filename={_filename(chardev)}\n" for chardev in monitor.chardevs())


def _info_name(monitor: Monitor) -> str:
    return f"{monitor.vm.name}\n" if monitor.vm.name else ""


_WITH_SHORT_NAME: Final = {"stop": "stop|s", "cont": "cont|c", "quit": "quit|q"}

_HUMAN: Final[dict[str, Callable[[Monitor], str]]] = {
    "info status": _info_status,
    "info version": _info_version,
    "info chardev": _info_chardev,
    "info name": _info_name,
    "info uuid": lambda monitor: f"{monitor.vm.uuid}\n",
    "info kvm": lambda _: "kvm support: disabled\n",
    **{name: _human(name) for name in ("stop", "cont", "system_reset", "system_powerdown", "system_wakeup", "quit")},
}


# -- the stand-in's own --


def _x_simulate(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    """Switch faults, for a time if `for` is given, and emit events. Returns the faults in force."""
    changes = dict(arguments)
    seconds = changes.pop("for", None)
    event = changes.pop("emit", None)
    count = changes.pop("count", 1)
    before = monitor.vm.faults
    try:
        wanted = msgspec.convert({"emit": event, "count": count, "seconds": seconds}, _Once)
        faults = changed(before, changes)
    except msgspec.ValidationError as error:
        raise Refused(str(error)) from None
    if wanted.emit is not None:
        for _ in range(wanted.count):
            monitor.vm.emit(wanted.emit.event, wanted.emit.data)
    if faults.frozen:
        monitor.vm.freeze_soon(faults)
    else:
        monitor.vm.set_faults(faults)
    if wanted.seconds is not None:
        monitor.vm.after_a_while(wanted.seconds, before)
    return msgspec.to_builtins(faults)


class _Emitted(msgspec.Struct, forbid_unknown_fields=True):
    event: str
    data: dict[str, Any] | None = None


class _Once(msgspec.Struct):
    emit: _Emitted | None
    count: int
    seconds: float | None


COMMANDS: Final[dict[str, Command]] = {
    "qmp_capabilities": Command(_qmp_capabilities, anything=True),
    "query-version": Command(_query_version),
    "query-status": Command(_query_status),
    "query-name": Command(_query_name),
    "query-uuid": Command(_query_uuid),
    "query-kvm": Command(_query_kvm),
    "query-commands": Command(_query_commands),
    "query-qmp-schema": Command(_query_schema),
    "query-chardev": Command(_query_chardev),
    "query-yank": Command(_query_yank, oob=True),
    "query-fdsets": Command(_query_fdsets),
    "query-block": Command(_nothing_to_list),
    "query-blockstats": Command(_nothing_to_list),
    "query-block-jobs": Command(_nothing_to_list),
    "query-jobs": Command(_nothing_to_list),
    "stop": Command(_stop),
    "cont": Command(_cont),
    "system_reset": Command(_system_reset),
    "system_powerdown": Command(_system_powerdown),
    "system_wakeup": Command(_system_wakeup),
    "quit": Command(_quit),
    "getfd": Command(_getfd, (Argument("fdname"),)),
    "closefd": Command(_closefd, (Argument("fdname"),)),
    "add-fd": Command(_add_fd, (Argument("fdset-id", "integer", True), Argument("opaque", "string", True))),
    "remove-fd": Command(_remove_fd, (Argument("fdset-id", "integer"), Argument("fd", "integer", True))),
    "human-monitor-command": Command(
        _human_monitor_command, (Argument("command-line"), Argument("cpu-index", "integer", True))
    ),
    "x-simulate": Command(_x_simulate, oob=True, anything=True),
}
