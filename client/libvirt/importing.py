# SPDX-License-Identifier: Apache-2.0
"""A domain's XML becomes a definition, and notes of what did not fit into one. Pure but for what is passed in. Used by client/cli."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final, Literal
from xml.etree.ElementTree import Element

import msgspec

from ...common.definition import AgentSection, Definition, HandlersSection, QemuSection, definition_from_mapping
from ...common.errors import BadRequest, ConfigError
from ...common.names import vm_name
from .argv import Option, parse_command_line, properties_of
from .domain_xml import child_text, read_domain
from .host_paths import path_notes
from .huge_pages import host_mounts, place_of
from .inventory import notes_of_domain
from .notes import Note, changed, left_out
from .preparation import prepare
from .takeover import Takeover
from .virsh import Translated

Translate = Callable[[bytes], Translated]

_Crash = Literal["preserve", "destroy", "restart", "dump"]
_PowerOff = Literal["off", "restart", "preserve"]

# libvirt's actions → ours, and a reason where that is not the same.
_CRASH: Final[dict[str, tuple[_Crash, str]]] = {
    "destroy": ("destroy", ""),
    "restart": ("restart", ""),
    "preserve": ("preserve", ""),
    "coredump-destroy": ("dump", "after the dump the guest is preserved, until you kill it"),
    "coredump-restart": ("dump", "after the dump the guest is preserved, until you reset and resume it"),
}
_POWER_OFF: Final[dict[str, tuple[_PowerOff, str]]] = {
    "destroy": ("off", ""),
    "restart": ("restart", ""),
    "preserve": ("preserve", ""),
}
_HOOKS: Final = ("/etc/libvirt/hooks/qemu", "/etc/libvirt/hooks/qemu.d")
_NOT_KNOWN: Final = "vmloop has nothing like it"


class Imported(msgspec.Struct, frozen=True):
    """`options`: the definition's arguments in pairs, for a file that people read."""

    definition: Definition
    options: list[Option]
    notes: list[Note]


def import_domain(
    text: bytes,
    origin: str,
    translate: Translate,
    *,
    name: str | None = None,
    autostart: bool = False,
    exists: Callable[[str], bool] = os.path.exists,
    mounts: Callable[[], str] = host_mounts,
) -> Imported:
    """`translate`: libvirt's part, from the XML that it is given to QEMU's command line. `ConfigError` for what cannot be imported."""
    root = read_domain(text, origin)
    chosen = _name(root, name, origin)
    prepared = prepare(root, chosen)
    translated = translate(prepared.xml)
    line = parse_command_line(translated.command_line)
    huge_pages = place_of(prepared.huge_pages, mounts()) if prepared.huge_pages is not None else ""
    takeover = Takeover(line, prepared, chosen, translated.own_directory, huge_pages)
    options = takeover.run()
    handlers, notes = _handlers(root)
    options = _clock(root, options, notes) + _no_reboot(root, options, handlers, notes)
    definition = Definition(
        chosen,
        QemuSection(line.binary, [word for option in options for word in option.words()]),
        AgentSection(enabled=takeover.agent),
        handlers,
        autostart,
    )
    notes = [
        *notes_of_domain(root),
        *prepared.notes,
        *notes,
        *takeover.notes,
        *path_notes(line.binary, options, exists),
        *_hooks(exists),
    ]
    return Imported(_checked(definition, origin), options, notes)


def _name(root: Element, name: str | None, origin: str) -> str:
    if name is not None:
        return name
    found = child_text(root, "name")
    try:
        return vm_name(found)
    except BadRequest as error:
        raise ConfigError(f"{origin}: {error}; give the VM another with --name") from error


def _checked(definition: Definition, origin: str) -> Definition:
    """As `define` will check it: limits, arguments that clash."""
    return definition_from_mapping(msgspec.to_builtins(definition), f"{origin}: the definition made of it")


def _handlers(root: Element) -> tuple[HandlersSection, list[Note]]:
    notes: list[Note] = []
    on_crash, why = _CRASH.get(child_text(root, "on_crash") or "destroy", ("preserve", _NOT_KNOWN))
    if why:
        notes.append(changed(f"on_crash {child_text(root, 'on_crash')[:32]}", f"{on_crash}: {why}"))
    on_poweroff, why = _POWER_OFF.get(child_text(root, "on_poweroff") or "destroy", ("off", _NOT_KNOWN))
    if why:
        notes.append(changed(f"on_poweroff {child_text(root, 'on_poweroff')[:32]}", f"{on_poweroff}: {why}"))
    dump = any(device.get("action") == "dump" for device in root.findall("devices/watchdog"))
    return HandlersSection(on_crash=on_crash, on_watchdog="dump" if dump else "none", on_poweroff=on_poweroff), notes


def _hooks(exists: Callable[[str], bool]) -> list[Note]:
    if not any(exists(place) for place in _HOOKS):
        return []
    return [
        left_out(
            "hooks",
            f"{_HOOKS[0]} was run by libvirt for this domain too: vmloop has handlers, and hooks of its own in etc/hooks.d",
        )
    ]


def _clock(root: Element, options: list[Option], notes: list[Note]) -> list[Option]:
    """A clock that the guest may set begins, in libvirt's arguments, at the time of this very import."""
    clock = root.find("clock")
    if clock is None or clock.get("offset") != "variable":
        return options
    base = "localtime" if clock.get("basis") == "localtime" else "utc"
    notes.append(
        changed(
            "clock",
            f"base={base}: libvirt kept how far the guest had set its clock for the next start, vmloop does not",
        )
    )
    return [_begin_clock_at(option, base) for option in options]


def _begin_clock_at(option: Option, base: str) -> Option:
    return Option(option.name, properties_of(option).replaced(base=base).render()) if option.name == "-rtc" else option


def _no_reboot(root: Element, options: list[Option], handlers: HandlersSection, notes: list[Note]) -> list[Option]:
    """on_reboot: QEMU can end at a reset by itself, where libvirt did it."""
    on_reboot = child_text(root, "on_reboot") or "restart"
    if on_reboot == "restart" or Option("-no-reboot") in options:
        return []
    if on_reboot == "destroy" and "restart" not in (handlers.on_crash, handlers.on_poweroff):
        notes.append(changed("on_reboot destroy", "-no-reboot: QEMU ends by itself when the guest reboots"))
        return [Option("-no-reboot")]
    notes.append(left_out(f"on_reboot {on_reboot[:32]}", "the guest is reset when it reboots, as QEMU does it"))
    return []
