# SPDX-License-Identifier: Apache-2.0
"""A definition's arguments against a document: names that this QEMU surely does not know. Pure; used by worker/run_capabilities.py.

Only what is plainly there is looked at: the machine type, the accelerators, the driver of each -device, the CPU model. What comes from a
-readconfig, or is asked to be listed (help), is QEMU's business; where the document says nothing, nothing is wrong.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

from ...common.capabilities import Capabilities

# Targets whose query-cpu-definitions names every model that -cpu takes.
_CPU_TARGETS: Final = frozenset({"x86_64", "i386", "aarch64", "arm", "s390x"})
# Options that take no value (qemu-options.hx, of 4.2 and since).
_FLAGS: Final = frozenset(
    (
        *("-S", "-s", "-snapshot", "-nodefaults", "-no-user-config", "-nographic", "-enable-kvm", "-no-reboot"),
        *("-no-shutdown", "-no-acpi", "-no-hpet", "-no-fd-bootchk", "-usb", "-full-screen", "-only-migratable"),
        *("-singlestep", "-one-insn-per-tb", "-win2k-hack", "-rtc-td-hack", "-mem-prealloc", "-preconfig", "-portrait"),
        *("-daemonize", "-no-quit", "-old-param", "-semihosting", "-enable-sync-profile", "-h", "-help", "-version"),
    )
)
_HELP: Final = frozenset({"help", "?"})
_SHOWN: Final = 64  # characters of an argument in an error
_NEAR: Final = 3  # names that are suggested
# An alias stands for one of these, according to the machine (system/qdev-monitor.c); where -device help could not be asked.
_SUFFIXES: Final = ("-pci", "-ccw", "-device")
_OLD_ALIASES: Final = frozenset({"ac97", "ahci", "e1000-82540em", "es1370", "lsi", "kvm-pci-assign"})


class Wrong(NamedTuple):
    """An argument with a name that is not there."""

    option: str
    name: str
    near: list[str]

    def __str__(self) -> str:
        hint = f"; did you mean {' or '.join(map(repr, self.near))}?" if self.near else ""
        return f"{self.option} {self.name:.{_SHOWN}}: this QEMU has none of that name{hint}"


def checkable(args: list[str]) -> bool:
    """Whether there is anything in these arguments that a document could find wrong."""
    return any(True for _ in _named(args))


def wrong_arguments(capabilities: Capabilities, args: list[str]) -> list[Wrong]:
    """Everything that is surely wrong, in the order of the arguments."""
    found: list[Wrong] = []
    accelerators: list[str] = []
    for option, name in _named(args):
        if option == "-accel":
            accelerators += name.split(":")
        elif option == "-machine" and not _knows_machine(capabilities, name):
            found.append(_wrong(option, name, capabilities.machines))
        elif option == "-device" and not _knows_device(capabilities, name):
            found.append(_wrong(option, name, [*capabilities.device_types, *capabilities.device_aliases]))
        elif option == "-cpu" and not _knows_cpu(capabilities, name):
            found.append(_wrong(option, name, capabilities.cpus))
    known = capabilities.accelerators
    if known and accelerators and not set(accelerators) & {*known, "qtest"}:  # QEMU takes the first that it can
        found.append(_wrong("-accel", accelerators[0], known))
    return found


def _wrong(option: str, name: str, known: Iterable[str]) -> Wrong:
    return Wrong(option, name, difflib.get_close_matches(name[:_SHOWN], list(known), n=_NEAR))


# -- what is named ----------------------------------------------------------------------------------------------------------


def _named(args: list[str]) -> Iterator[tuple[str, str]]:
    """Option and name of what can be checked; accelerators as `-accel`, wherever they stand."""
    for option, value in _pairs(args):
        match option:
            case "-machine" | "-M":
                keys = _keys(value, "type")
                yield from (("-machine", name) for name in [keys.get("type", "")] if _is_name(name))
                yield from (("-accel", name) for name in [keys.get("accel", "")] if _is_name(name))
            case "-accel":
                yield from (("-accel", name) for name in [_keys(value, "accel").get("accel", "")] if _is_name(name))
            case "-device":
                keys = _json(value) if value.startswith("{") else _keys(value, "driver")
                name = keys.get("driver", "")
                if isinstance(name, str) and _is_name(name) and not _HELP & set(keys):
                    yield "-device", name
            case "-cpu":
                name = value.split(",", 1)[0]
                if _is_name(name):
                    yield "-cpu", name


def _pairs(args: list[str]) -> Iterator[tuple[str, str]]:
    """Options with their values, as QEMU pairs them. Behind an option that is not known to take none, no other one is seen."""
    position = 0
    while position < len(args) - 1:
        argument = args[position]
        position += 1
        option = argument[1:] if argument.startswith("--") else argument
        if option.startswith("-") and option not in _FLAGS:
            yield option, args[position]
            position += 1


def _is_name(name: str) -> bool:
    return bool(name) and name not in _HELP


def _keys(value: str, implied: str) -> dict[str, Any]:
    """`first,key=value,…`, where the first may stand without its key; a doubled comma is one that belongs to a value."""
    keys: dict[str, Any] = {}
    for position, part in enumerate(value.replace(",,", "\0").split(",")):
        key, equals, text = part.partition("=")
        if equals:
            keys[key] = text.replace("\0", ",")
        elif position == 0:
            keys[implied] = part.replace("\0", ",")
        else:
            keys[part] = "on"
    return keys


def _json(value: str) -> dict[str, Any]:
    try:
        keys = json.loads(value)
    except (ValueError, RecursionError):
        return {}  # QEMU says what is wrong with it
    return keys if isinstance(keys, dict) else {}


# -- what is known ----------------------------------------------------------------------------------------------------------


def _knows_machine(capabilities: Capabilities, name: str) -> bool:
    return not capabilities.machines or name == "none" or name in capabilities.machines


def _knows_device(capabilities: Capabilities, name: str) -> bool:
    types = capabilities.device_types
    if not types or name in types or name in capabilities.device_aliases or name in _OLD_ALIASES:
        return True
    return any(f"{name}{suffix}" in types for suffix in _SUFFIXES)


def _knows_cpu(capabilities: Capabilities, name: str) -> bool:
    """Also by the name of its type, and whatever is known without KVM."""
    if capabilities.target not in _CPU_TARGETS or not capabilities.cpus:
        return True
    others = capabilities.tcg.get("cpus") if capabilities.tcg is not None else None
    known = {*capabilities.cpus, *(others if isinstance(others, list) else ()), "host", "max", "base"}
    return name.lower() in {str(cpu).lower() for cpu in known} or name in capabilities.device_types
