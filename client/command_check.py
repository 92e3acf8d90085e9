# SPDX-License-Identifier: Apache-2.0
"""A QMP command against a VM's capabilities, before it is sent: what is missing, unknown, of a wrong type. Pure; used by cli/monitor.py.

Where the document says nothing, nothing is wrong: QEMU has the last word, and other words than a document may come to have.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from ..common.capabilities import Capabilities, Shape

# Commands that take arguments beyond their schema ("gen": false in QEMU's source, which the schema does not show), some of old QEMUs only.
_OPEN_ALWAYS: Final = frozenset({"device_add"})
_OPEN_WITHOUT_VARIANTS: Final = frozenset({"netdev_add", "object-add"})
MAX_DEPTH: Final = 16  # of nested arguments; what lies deeper is QEMU's to judge
_SHOWN: Final = 60  # characters of a value in a complaint
_NEAR: Final = 3

_PLAIN: Final[dict[str, tuple[tuple[type, ...], str]]] = {
    "string": ((str,), "a text"),
    "int": ((int,), "a whole number"),
    "number": ((int, float), "a number"),
    "boolean": ((bool,), "true or false"),
    "null": ((type(None),), "null"),
}


def wrong_arguments(capabilities: Capabilities, command: str, arguments: Mapping[str, Any]) -> list[str]:
    """What is wrong with a command's arguments, a sentence each; nothing for a command that the document does not describe."""
    shape = capabilities.arguments.get(command)
    if shape is None:
        return []
    is_open = command in _OPEN_ALWAYS or (command in _OPEN_WITHOUT_VARIANTS and not shape.variants)
    return _Check(capabilities.types).members(shape, arguments, "", 0, is_open=is_open)


def unfit_for_oob(capabilities: Capabilities, command: str) -> bool:
    """Whether a command is known not to be one that may be executed out of band."""
    return command in capabilities.arguments and command not in capabilities.oob


def argument_names(capabilities: Capabilities, command: str) -> list[str]:
    """The arguments of a command, those first that must be given."""
    shape = capabilities.arguments.get(command)
    if shape is None:
        return []
    members = {**shape.members}
    for variant in shape.variants.values():
        members |= capabilities.types.get(variant, Shape()).members
    return sorted(members, key=lambda name: (members[name].endswith("?"), name))


def argument_values(capabilities: Capabilities, command: str, argument: str) -> list[str]:
    """What an argument may be, where that is a list of words."""
    shape = capabilities.arguments.get(command)
    wanted = shape.members.get(argument, "").removesuffix("?") if shape is not None else ""
    found = capabilities.types.get(wanted, Shape())
    if found.kind == "json" and found.json == "boolean":
        return ["true", "false"]
    return found.values


def near(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?`, or nothing."""
    found = difflib.get_close_matches(name[:_SHOWN], list(known), n=_NEAR)
    return f"; did you mean {' or '.join(found)}?" if found else ""


class _Check:
    """`path`: where a value stands, as dotted keys."""

    def __init__(self, types: Mapping[str, Shape]) -> None:
        self._types = types

    def members(
        self, shape: Shape, given: Mapping[str, Any], path: str, depth: int, *, is_open: bool = False
    ) -> list[str]:
        """An object's members."""
        members, certain = self._members_of(shape, given, 0)
        found = []
        for name, wanted in members.items():
            if name in given:
                found += self.value(wanted.removesuffix("?"), given[name], f"{path}{name}", depth)
            elif not wanted.endswith("?"):
                found.append(f"{path}{name} is missing")
        if certain and not is_open:
            unknown = [name for name in given if name not in members]
            takes = ", ".join(members) or "nothing"
            found += [
                f"{path}{name} is unknown{near(name, members) or f'; it takes: {takes:.300}'}" for name in unknown
            ]
        return found

    def _members_of(self, shape: Shape, given: Mapping[str, Any], depth: int) -> tuple[dict[str, str], bool]:
        """All members that an object has, with its variant's; and whether these are surely all."""
        if not shape.variants or depth > MAX_DEPTH:
            return shape.members, depth <= MAX_DEPTH
        variant = shape.variants.get(str(given.get(shape.tag)))
        if variant is None:  # a tag without members of its own; one that is missing or unknown is told of as a member
            return shape.members, shape.tag in given
        if variant not in self._types:
            return shape.members, False
        more, certain = self._members_of(self._types[variant], given, depth + 1)
        return shape.members | more, certain

    def value(self, wanted: str, value: Any, path: str, depth: int) -> list[str]:
        """Any value against a type's name."""
        shape = self._types.get(wanted)
        if shape is None or depth > MAX_DEPTH:
            return []
        match shape.kind:
            case "json":
                return _plain_value(shape.json, value, path)
            case "enum":
                return _enum_value(shape.values, value, path)
            case "array":
                if not isinstance(value, list):
                    return [f"{path} must be a list, not {_shown(value)}"]
                return [
                    text
                    for position, item in enumerate(value)
                    for text in self.value(shape.element, item, f"{path}[{position}]", depth + 1)
                ]
            case "alternate":
                return self._alternate(shape.choices, value, path, depth)
            case _:
                if not isinstance(value, Mapping):
                    return [f"{path} must be an object, not {_shown(value)}"]
                return self.members(shape, value, f"{path}.", depth + 1)

    def _alternate(self, choices: list[str], value: Any, path: str, depth: int) -> list[str]:
        """Any of several types: told is what is wrong with the one that QEMU would take, which it chooses by the kind of JSON value."""
        likely = [choice for choice in choices if self._takes(self._types.get(choice), value)]
        tried = [self.value(choice, value, path, depth + 1) for choice in likely or choices]
        return min(tried, key=len, default=[])

    @staticmethod
    def _takes(shape: Shape | None, value: Any) -> bool:
        if shape is None:
            return True
        if shape.kind == "json":
            return not _plain_value(shape.json, value, "")
        return isinstance(value, {"object": Mapping, "array": list, "enum": str}.get(shape.kind, object))


def _plain_value(wanted: str, value: Any, path: str) -> list[str]:
    if wanted not in _PLAIN:
        return []
    types, text = _PLAIN[wanted]
    if isinstance(value, types) and (isinstance(value, bool) is (bool in types)):
        return []
    hint = f"""; write {path}='"{value}"'""" if wanted == "string" and isinstance(value, int | float) else ""
    return [f"{path} must be {text}, not {_shown(value)}{hint}"]


def _enum_value(values: list[str], value: Any, path: str) -> list[str]:
    if value in values or not values:
        return []
    hint = near(value, values) if isinstance(value, str) else ""
    known = ", ".join(values)
    return [f"{path} must not be {_shown(value)}{hint or f'; it is one of: {known:.300}'}"]


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = repr(type(value).__name__)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
