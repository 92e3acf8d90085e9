# SPDX-License-Identifier: Apache-2.0
"""The capabilities document: what one QEMU binary, or one running QEMU, can do. docs/capabilities.md is its reference.

Made by worker/probe/document.py, kept in state/capabilities/, sent over the wire, read by clients. Names are lists; what is known beyond
the names stands under further keys. A document may come from a later vmloop: fields that this one does not know are kept as they are.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from .errors import BadRequest

FORMAT: Final = 1  # a field more is the same format; a field whose meaning changes is another one


class Kvm(msgspec.Struct, frozen=True):
    """`present`: the binary has KVM compiled in; `enabled`: it could use it here, when it was asked."""

    present: bool = False
    enabled: bool = False


class Shape(msgspec.Struct, frozen=True, omit_defaults=True):
    """One type of the schema, or the arguments of one command. `kind` says which of the other fields mean something.

    object: `members`, name → type, with a "?" behind the type of one that may be left out; `tag` names the member that chooses one of
    `variants`, value → type of the further members. enum: `values`. array: `element`. alternate: `choices`, any of these types. json: a
    plain value, `json` as the schema says: string, int, number, boolean, null, value.
    """

    kind: Literal["object", "enum", "array", "alternate", "json"] = "object"
    members: dict[str, str] = {}
    tag: str = ""
    variants: dict[str, str] = {}
    values: list[str] = []
    element: str = ""
    choices: list[str] = []
    json: str = ""


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """One document. Every field has a default: what a QEMU cannot tell is empty, and `missing` says what it answered instead."""

    format: int = FORMAT
    binary: str = ""  # canonical path; "" when a running QEMU was asked
    version: tuple[int, int, int] = (0, 0, 0)
    package: str = ""
    target: str = ""
    commands: list[str] = []
    events: list[str] = []
    oob: list[str] = []  # commands that may be executed out of band
    features: list[str] = []  # of the schema, but deprecated and unstable
    machines: list[str] = []  # aliases among them
    cpus: list[str] = []
    device_types: list[str] = []
    accelerators: list[str] = []
    options: list[str] = []  # of the command line
    migration: list[str] = []  # capabilities of migration
    kvm: Kvm = Kvm()
    expansion: dict[str, Any] = {}  # CPU model → {type, name, props}
    # More about the names above.
    arguments: dict[str, Shape] = {}  # command → what it takes
    types: dict[str, Shape] = {}  # those that the arguments need; their names mean something within this document alone
    command_features: dict[str, list[str]] = {}
    machine_details: dict[str, dict[str, Any]] = {}
    cpu_details: dict[str, dict[str, Any]] = {}
    device_aliases: dict[str, str] = {}  # alias → device type
    device_properties: dict[str, dict[str, str]] = {}  # device type → property → its type
    object_properties: dict[str, dict[str, str]] = {}
    option_parameters: dict[str, list[str]] = {}
    tpm: dict[str, list[str]] = {}  # models, types
    gic: list[dict[str, Any]] | None = None
    sev: dict[str, Any] | None = None
    sgx: dict[str, Any] | None = None
    tcg: dict[str, Any] | None = None  # under TCG, of a binary that can use KVM: {cpus, machines, expansion}
    missing: dict[str, str] = {}  # question → what the answer was instead
    more: dict[str, Any] = {}  # fields of a later vmloop's

    def has(self, name: str) -> bool:
        """Whether there is a command, an event or a feature of the schema of this name."""
        return name in self.commands or name in self.events or name in self.features


_KNOWN: Final = frozenset(Capabilities.__struct_fields__) - {"more"}


def to_plain(capabilities: Capabilities) -> dict[str, Any]:
    """The document as plain values, for JSON and for the wire."""
    plain: dict[str, Any] = msgspec.to_builtins(capabilities)
    more: dict[str, Any] = plain.pop("more")
    return more | plain


def from_plain(value: object) -> Capabilities:
    """A document in plain values. `BadRequest` for what is none, or one of a later format."""
    if not isinstance(value, dict):
        raise BadRequest("no capabilities document: it is no map")
    number = value.get("format")
    if type(number) is not int or not 1 <= number <= FORMAT:
        raise BadRequest(f"a capabilities document of format {number!r:.40}; this vmloop reads format {FORMAT}")
    more = {name: field for name, field in value.items() if name not in _KNOWN}
    try:
        return msgspec.convert({**{name: value[name] for name in value.keys() & _KNOWN}, "more": more}, Capabilities)
    except (msgspec.ValidationError, RecursionError) as error:
        raise BadRequest(f"no capabilities document: {error}") from error


def part_about(capabilities: Capabilities, command: str) -> Capabilities:
    """The part of a document that is needed to say what is wrong with a command: small enough to be asked for each time."""
    shape = capabilities.arguments.get(command)
    types: dict[str, Shape] = {}
    left = _used_by(shape) if shape is not None else []
    while left:
        name = left.pop().removesuffix("?")
        if name in capabilities.types and name not in types:
            types[name] = capabilities.types[name]
            left += _used_by(types[name])
    return Capabilities(
        binary=capabilities.binary,
        version=capabilities.version,
        package=capabilities.package,
        target=capabilities.target,
        commands=capabilities.commands,
        oob=capabilities.oob,
        arguments={command: shape} if shape is not None else {},
        types=types,
    )


def _used_by(shape: Shape) -> list[str]:
    return [
        *shape.members.values(),
        *shape.variants.values(),
        *([shape.element] if shape.element else []),
        *shape.choices,
    ]
