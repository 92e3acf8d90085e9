# SPDX-License-Identifier: Apache-2.0
"""QEMU's command line as libvirt prints it: shell-quoted text → environment, binary, options; and the properties inside an option's value.

Pure, and without a shell. Used by takeover.py, devices_of_libvirt.py, host_paths.py.
"""

from __future__ import annotations

import json
import re
import shlex
from typing import Any, Final

import msgspec

from ...common.errors import ConfigError

# The largest domain that was tried, with 250 disks, has 150 KiB.
MAX_LINE_BYTES: Final = 4 * 1024 * 1024

# Options of QEMU's that take no value; what follows any other is its value, even if it begins with a dash (-append '-v').
FLAGS: Final = frozenset(
    {
        *(
            "-S",
            "-daemonize",
            "-enable-fips",
            "-enable-kvm",
            "-enable-sync-profile",
            "-full-screen",
            "-mem-prealloc",
            "-no-acpi",
        ),
        *(
            "-no-fd-bootchk",
            "-no-frame",
            "-no-hpet",
            "-no-kvm",
            "-no-quit",
            "-no-reboot",
            "-no-shutdown",
            "-no-user-config",
        ),
        *(
            "-nodefaults",
            "-nodefconfig",
            "-nographic",
            "-old-param",
            "-only-migratable",
            "-portrait",
            "-preconfig",
            "-semihosting",
        ),
        *("-singlestep", "-snapshot", "-usb", "-win2k-hack", "-xen-attach", "-xen-domid-restrict"),
    }
)

_ASSIGNMENT: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
_COMMA: Final = re.compile(r"((?:[^,]++|,,)*+)(?:,|\Z)")


class Option(msgspec.Struct, frozen=True):
    """`name` with its dash; `value` is None for one that takes none."""

    name: str
    value: str | None = None

    def words(self) -> list[str]:
        return [self.name] if self.value is None else [self.name, self.value]


class CommandLine(msgspec.Struct, frozen=True):
    """What libvirt would start."""

    environment: dict[str, str]
    binary: str
    options: list[Option]


def parse_command_line(text: str) -> CommandLine:
    """`ConfigError` for text that is no command line."""
    if len(text) > MAX_LINE_BYTES:
        raise ConfigError(f"libvirt's command line is over {MAX_LINE_BYTES} characters")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"libvirt's command line cannot be read: {error}") from error
    environment: dict[str, str] = {}
    while words and _ASSIGNMENT.match(words[0]):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    if not words or not words[0].startswith("/"):
        raise ConfigError(f"libvirt printed no command line, but {text[:80]!r}")
    return CommandLine(environment, words[0], options_of(words[1:]))


def options_of(words: list[str]) -> list[Option]:
    """QEMU's arguments in pairs. A word that is no option stands alone, as the disk image that QEMU takes it for."""
    options = []
    at = 0
    while at < len(words):
        name = words[at]
        single = name.removeprefix("-") if name.startswith("--") else name
        if not name.startswith("-") or single in FLAGS or at + 1 == len(words):
            options.append(Option(single))
            at += 1
        else:
            options.append(Option(single, words[at + 1]))
            at += 2
    return options


class Properties(msgspec.Struct, frozen=True):
    """An option's value taken apart. `implied`: the first key is not written, as in `-chardev socket,id=…`."""

    values: dict[str, Any]  # text, or for JSON any value; None: a key that stands alone
    is_json: bool = False
    implied: bool = False

    def text(self, key: str) -> str:
        """The value if it is text, else empty."""
        value = self.values.get(key)
        return value if isinstance(value, str) else ""

    def replaced(self, **values: Any) -> Properties:
        """With other values under some keys (`_` stands for `-`)."""
        new = {key.replace("_", "-"): value for key, value in values.items()}
        return Properties({**self.values, **new}, self.is_json, self.implied)

    def without(self, *keys: str) -> Properties:
        return Properties(
            {key: value for key, value in self.values.items() if key not in keys}, self.is_json, self.implied
        )

    def render(self) -> str:
        """As QEMU reads it: JSON, or key=value with commas doubled."""
        if self.is_json:
            return json.dumps(self.values, separators=(",", ":"), ensure_ascii=False)
        parts = []
        for position, (key, value) in enumerate(self.values.items()):
            text = "" if value is None else str(value).replace(",", ",,")
            if position == 0 and self.implied:
                parts.append(text)
            else:
                parts.append(key if value is None else f"{key}={text}")
        return ",".join(parts)


# The key that the first word of an option's value belongs to if it has no `=`.
IMPLIED: Final = {
    "-accel": "accel",
    "-audiodev": "driver",
    "-blockdev": "driver",
    "-chardev": "backend",
    "-device": "driver",
    "-display": "type",
    "-fsdev": "fsdriver",
    "-machine": "type",
    "-mon": "chardev",
    "-name": "guest",
    "-netdev": "type",
    "-object": "qom-type",
    "-sandbox": "enable",
    "-tpmdev": "type",
    "-vnc": "vnc",
}


def properties_of(option: Option) -> Properties:
    """The properties of an option's value. `ConfigError` for JSON that is none."""
    value = option.value or ""
    if value.startswith("{"):
        try:
            found = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ConfigError(f"{option.name} {value[:80]}: not JSON: {error}") from error
        return Properties(found, is_json=True)
    return _from_key_values(value, IMPLIED.get(option.name, ""))


def _from_key_values(text: str, implied_key: str) -> Properties:
    values: dict[str, Any] = {}
    implied = not text and bool(implied_key)
    if implied:
        values[implied_key] = ""
    at = 0
    while at < len(text):
        found = _COMMA.match(text, at)
        assert found is not None  # it matches the empty text
        part = found[1].replace(",,", ",")
        key, equals, value = part.partition("=")
        if at == 0 and not equals and implied_key:
            implied = True
            values[implied_key] = part
        else:
            values[key] = value if equals else None
        at = found.end()
    return Properties(values, implied=implied)
