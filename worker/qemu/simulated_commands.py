# SPDX-License-Identifier: Apache-2.0
"""The QMP commands of a simulated VM: one table, from name to arguments and function. Called by simulated_monitor.

Here are the table itself and the commands that every client uses; simulated_machine has those about the machine, simulated_control the
stand-in's own.

Replies, error texts and the order of checks are those of QEMU 7.2 (tests/contract compares them). A function returns the value of
`return`, or raises `Refused`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

import msgspec

from . import simulated_machine
from .simulated_control import x_simulate
from .simulated_requests import Argument, Refused, check_arguments
from .simulated_table import Chardev, Command, Monitor
from .simulated_vm import EVENTS

VERSION: Final[dict[str, Any]] = {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "vmloop-simulated"}


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
        arguments = "any" if command.anything else "0"
        if command.arguments:
            arguments = str(len(types))
            types.append({"name": arguments, "members": _members(command), "meta-type": "object"})
        entry: dict[str, Any] = {"name": name, "ret-type": "any", "meta-type": "command", "arg-type": arguments}
        entries.append({**entry, "allow-oob": True} if command.oob else entry)
    entries += [{"name": name, "meta-type": "event", "arg-type": "0"} for name in EVENTS]
    return [*entries, *types, *_padding(monitor.vm.faults.schema_bytes)]


_BUILTIN: Final = {"str": "string", "int": "int", "bool": "boolean"}
_SCHEMA_NAMES: Final = {
    "string": "str",
    "integer": "int",
    "boolean": "bool",
    "array": "any",
    "strings": "any",
    "any": "any",
    "object": "any",
}


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
    monitor.dump.refuse_while_dumping()
    monitor.vm.stop()
    return {}


def _cont(monitor: Monitor, _: dict[str, Any]) -> Any:
    monitor.dump.refuse_while_dumping()
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
    "stop": Command(_stop),
    "cont": Command(_cont),
    "system_reset": Command(_system_reset),
    "system_powerdown": Command(_system_powerdown),
    "quit": Command(_quit),
    "getfd": Command(_getfd, (Argument("fdname"),)),
    "closefd": Command(_closefd, (Argument("fdname"),)),
    "add-fd": Command(_add_fd, (Argument("fdset-id", "integer", True), Argument("opaque", "string", True))),
    "remove-fd": Command(_remove_fd, (Argument("fdset-id", "integer"), Argument("fd", "integer", True))),
    "human-monitor-command": Command(
        _human_monitor_command, (Argument("command-line"), Argument("cpu-index", "integer", True))
    ),
    **simulated_machine.COMMANDS,
    "x-simulate": Command(x_simulate, oob=True, anything=True),
}
