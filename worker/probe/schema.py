# SPDX-License-Identifier: Apache-2.0
"""The answer to query-qmp-schema, reduced to what the document keeps: commands with their arguments, events, features. Pure.

Used by questions.py and document.py. Every function takes any JSON value; what makes no sense in it is passed over.
"""

from __future__ import annotations

from typing import Any, Final, TypeGuard

import msgspec

from ...common.capabilities import Shape

MAX_NAME: Final = 256  # characters of a name; a longer one is nobody's
_DULL: Final = frozenset({"deprecated", "unstable"})  # said of a command, but no ability


class Schema(msgspec.Struct, frozen=True):
    """What is kept of a schema."""

    commands: list[str] = []
    events: list[str] = []
    oob: list[str] = []
    features: list[str] = []
    arguments: dict[str, Shape] = {}
    types: dict[str, Shape] = {}
    command_features: dict[str, list[str]] = {}


def is_name(value: object) -> TypeGuard[str]:
    """Whether this can be the name of something in QEMU."""
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME


def commands_of(schema: object, commands: object) -> set[str]:
    """All commands, as far as the schema or query-commands tells; none if neither does."""
    found = {entry["name"] for entry in _entries(schema) if entry.get("meta-type") == "command"}
    return found or {entry["name"] for entry in _entries(commands)}


def reduce_schema(value: object) -> Schema:
    """The schema in the `return` of query-qmp-schema; empty if that is none."""
    entries = {entry["name"]: entry for entry in _entries(value)}
    commands = {name: entry for name, entry in entries.items() if entry.get("meta-type") == "command"}
    features: set[str] = set()
    for entry in entries.values():
        features.update(_features(entry), *map(_features, _entries(entry.get("members"))))
    arguments = {name: shape for name, entry in commands.items() if (shape := _arguments(entry, entries)) is not None}
    return Schema(
        commands=sorted(commands),
        events=sorted(name for name, entry in entries.items() if entry.get("meta-type") == "event"),
        oob=sorted(name for name, entry in commands.items() if entry.get("allow-oob") is True),
        features=sorted(features - _DULL),
        arguments=arguments,
        types=_types_for(arguments, entries),
        command_features={name: found for name, entry in sorted(commands.items()) if (found := _features(entry))},
    )


def _arguments(command: dict[str, Any], entries: dict[str, dict[str, Any]]) -> Shape | None:
    """What a command takes; None where the schema does not say."""
    if "arg-type" not in command:
        return Shape()
    shape = _shape(entries.get(_text(command["arg-type"]), {}))
    return shape if shape is not None and shape.kind == "object" else None


def _types_for(arguments: dict[str, Shape], entries: dict[str, dict[str, Any]]) -> dict[str, Shape]:
    """The types that the arguments need, and those that these need."""
    types: dict[str, Shape] = {}
    left = [name for shape in arguments.values() for name in _names(shape)]
    while left:
        name = left.pop()
        if name in types or name not in entries:
            continue
        shape = _shape(entries[name])
        if shape is not None:
            types[name] = shape
            left += _names(shape)
    return dict(sorted(types.items()))


def _names(shape: Shape) -> list[str]:
    """The types that a shape is made of."""
    members = [name.removesuffix("?") for name in shape.members.values()]
    return [*members, *shape.variants.values(), shape.element, *shape.choices]


def _shape(entry: dict[str, Any]) -> Shape | None:
    """One entry of the schema that is a type."""
    match entry.get("meta-type"):
        case "object":
            members = {
                member["name"]: _text(member.get("type")) + ("?" if "default" in member else "")
                for member in _entries(entry.get("members"))
            }
            variants = {
                _text(variant.get("case")): _text(variant.get("type")) for variant in _dicts(entry.get("variants"))
            }
            return Shape(members=members, tag=_text(entry.get("tag")), variants=variants)
        case "enum":
            return Shape(kind="enum", values=_enum_values(entry))
        case "array":
            return Shape(kind="array", element=_text(entry.get("element-type")))
        case "alternate":
            return Shape(
                kind="alternate", choices=[_text(member.get("type")) for member in _dicts(entry.get("members"))]
            )
        case "builtin":
            return Shape(kind="json", json=_text(entry.get("json-type")))
        case _:
            return None


def _enum_values(entry: dict[str, Any]) -> list[str]:
    """`values` until 6.1, `members` beside them since."""
    values = entry.get("values")
    if isinstance(values, list):
        return [value for value in values if is_name(value)]
    return [member["name"] for member in _entries(entry.get("members"))]


def _features(entry: dict[str, Any]) -> list[str]:
    features = entry.get("features")
    return sorted(feature for feature in features if is_name(feature)) if isinstance(features, list) else []


def _entries(value: object) -> list[dict[str, Any]]:
    """Those entries of a list that are maps with a name."""
    return [entry for entry in _dicts(value) if is_name(entry.get("name"))]


def _dicts(value: object) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _text(value: object) -> str:
    return value if isinstance(value, str) and len(value) <= MAX_NAME else ""
