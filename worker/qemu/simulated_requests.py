# SPDX-License-Identifier: Apache-2.0
"""What monitor and agent have in common: how a request is checked before it is carried out, and QEMU's words for what is wrong with it.

Called by simulated_monitor, simulated_commands and simulated_agent; tests/contract compares the texts with QEMU's and qemu-ga's.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

_TYPES: Final[dict[str, type]] = {"string": str, "boolean": bool, "array": list, "object": dict}


class Refused(Exception):
    """A command's error, as QEMU words it."""

    def __init__(self, desc: str, kind: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc = desc
        self.kind = kind


class Argument(NamedTuple):
    """One argument: its name, the type as QEMU names it ("strings": an array of them), and whether it may be left out."""

    name: str
    type: str = "string"
    optional: bool = False
    values: tuple[str, ...] = ()  # of an enumeration


def check_request(request: object, *, oob_enabled: bool = False) -> tuple[str, bool, dict[str, Any]]:
    """Command name, whether out of band, and arguments of a request; `Refused` if it is none."""
    if not isinstance(request, dict):
        raise Refused("QMP input must be a JSON object")
    allowed = ("execute", "exec-oob") if oob_enabled else ("execute",)
    for member, value in request.items():
        if member in allowed:
            if not isinstance(value, str):
                raise Refused(f"QMP input member '{member}' must be a string")
        elif member == "arguments":
            if not isinstance(value, dict):
                raise Refused("QMP input member 'arguments' must be an object")
        elif member != "id":
            raise Refused(f"QMP input member '{member}' is unexpected")
    commands = [member for member in allowed if member in request]
    if not commands:
        raise Refused("QMP input lacks member 'execute'")
    if len(commands) > 1:
        raise Refused("QMP input member 'execute' clashes with 'exec-oob'")
    return request[commands[0]], commands[0] == "exec-oob", request.get("arguments", {})


def no_such_command(name: str) -> Refused:
    """The error for a command that is in no table."""
    return Refused(f"The command {name} has not been found", "CommandNotFound")


def check_arguments(wanted: tuple[Argument, ...], given: dict[str, Any]) -> None:
    """`Refused` unless the arguments are all there, of their types, and no others."""
    for argument in wanted:
        if argument.name not in given:
            if not argument.optional:
                raise Refused(f"Parameter '{argument.name}' is missing")
        else:
            _check_value(argument, given[argument.name])
    known = {argument.name for argument in wanted}
    for name in given:
        if name not in known:
            raise Refused(f"Parameter '{name}' is unexpected")


def disabled_command(name: str, reason: str = "") -> Refused:
    """The error for a command that the agent knows and does not carry out."""
    return Refused(f"Command {name} has been disabled{': ' if reason else ''}{reason}", "CommandNotFound")


def _check_value(argument: Argument, value: object) -> None:
    kind = "array" if argument.type == "strings" else argument.type
    if not _fits(value, kind):
        raise Refused(f"Invalid parameter type for '{argument.name}', expected: {kind}")
    if argument.type == "strings" and isinstance(value, list):
        for position, item in enumerate(value):
            if not isinstance(item, str):
                raise Refused(f"Invalid parameter type for '{argument.name}[{position}]', expected: string")
    if argument.values and value not in argument.values:
        raise Refused(f"Parameter '{argument.name}' does not accept value '{value}'")


def _fits(value: object, kind: str) -> bool:
    if kind == "any":
        return True
    if kind == "integer":
        return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    return isinstance(value, _TYPES[kind])
