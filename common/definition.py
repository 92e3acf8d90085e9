# SPDX-License-Identifier: Apache-2.0
"""The definition of a VM: the TOML that an operator writes, checked (design, section 10).

    name = "web1"
    autostart = true                     # start it when the host has started
    [qemu]
    binary = "qemu-system-x86_64"        # or "simulated"
    args = ["-machine", "q35,accel=kvm:tcg", "-m", "512"]
    directory = "/srv/images"            # where QEMU runs: relative paths in args; state/vms/NAME if left out
    [agent]
    enabled = true
    timeout = 5.0                        # seconds in which the agent must answer
    freeze_limit = 60.0                  # a file system frozen for longer is thawed
    [handlers]
    limit = 30.0                         # seconds that one handler may take for one event
    load = ["mail"]                      # of etc/handlers/*.py; all of them if left out
    on_crash = "preserve"                # the guest panicked: or destroy, restart, dump
    on_watchdog = "none"                 # beside what QEMU's own watchdog action does: or dump
    on_poweroff = "off"                  # the guest powered off: or restart, preserve

Read by the command line (to fail early), checked again by the worker, which writes it to state/vms/NAME/vm.toml and launches from it.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

import msgspec

from .config import from_mapping, parse_toml
from .errors import BadRequest, ConfigError
from .names import vm_name

DEFAULT_BINARY: Final = "qemu-system-x86_64"
SIMULATED: Final = "simulated"

# Ids of the objects that vmloop adds to QEMU's command line; a user's argument may not use them.
MONITOR_ID: Final = "vmloop-monitor"
AGENT_ID: Final = "vmloop-agent"

Argument = Annotated[str, msgspec.Meta(max_length=65536)]
HandlerName = Annotated[
    str, msgspec.Meta(pattern="^[A-Za-z_][A-Za-z0-9_]{0,63}$")
]  # of a file in etc/handlers, without .py


class QemuSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[qemu]"""

    binary: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)] = DEFAULT_BINARY
    args: Annotated[list[Argument], msgspec.Meta(max_length=4096)] = []
    directory: Annotated[str, msgspec.Meta(pattern="^/[^\\0]*$", max_length=4096)] | None = None


class AgentSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[agent]"""

    enabled: bool = False
    timeout: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 5.0
    freeze_limit: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 60.0


class HandlersSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[handlers]"""

    limit: Annotated[float, msgspec.Meta(gt=0, le=86400)] = 30.0
    load: Annotated[list[HandlerName], msgspec.Meta(max_length=1024)] | None = None
    on_crash: Literal["preserve", "destroy", "restart", "dump"] = "preserve"
    on_watchdog: Literal["none", "dump"] = "none"
    on_poweroff: Literal["off", "restart", "preserve"] = "off"


class Definition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One VM as its operator wants it."""

    name: str
    qemu: QemuSection = QemuSection()
    agent: AgentSection = AgentSection()
    handlers: HandlersSection = HandlersSection()
    autostart: bool = False  # started when the host has started


def definition_from_toml(text: bytes, origin: str) -> Definition:
    """The checked definition in TOML text. `ConfigError` naming the key; `origin` names the text."""
    return _checked(parse_toml(text, Definition, origin), origin)


def definition_from_mapping(data: object, origin: str) -> Definition:
    """The checked definition in plain values, as they come over the wire."""
    return _checked(from_mapping(data, Definition, origin), origin)


def definition_to_toml(definition: Definition) -> bytes:
    """TOML text that reads back as the same definition. JSON strings are valid TOML basic strings."""
    lines = [f"name = {_quoted(definition.name)}", f"autostart = {_toml_value(definition.autostart)}"]
    sections: dict[str, dict[str, Any]] = msgspec.to_builtins(definition)
    for section, values in sections.items():
        if isinstance(values, dict):
            written = {key: value for key, value in values.items() if value is not None}  # TOML has no null
            lines += ["", f"[{section}]", *(f"{key} = {_toml_value(value)}" for key, value in written.items())]
    return ("\n".join(lines) + "\n").encode()


def _checked(definition: Definition, origin: str) -> Definition:
    try:
        vm_name(definition.name)
    except BadRequest as error:
        raise ConfigError(f"{origin}: name: {error}") from error
    refuse_clashing_arguments(definition.qemu.args, origin)
    return definition


def refuse_clashing_arguments(args: list[str], origin: str) -> None:
    """`ConfigError` for arguments that would take QEMU out of vmloop's hands; further monitors of the user's own are fine."""
    for position, argument in enumerate(args):
        if "\0" in argument:
            raise ConfigError(f"{origin}: qemu.args[{position}] holds a zero byte")
        option = argument.removeprefix("-") if argument.startswith("--") else argument
        following = args[position + 1] if position + 1 < len(args) else ""
        if option == "-daemonize":
            raise ConfigError(f"{origin}: qemu.args: -daemonize is refused: the VM's worker starts QEMU and watches it")
        if option in ("-qmp", "-qmp-pretty", "-monitor", "-serial") and following.split(",")[0] in (
            "stdio",
            "mon:stdio",
        ):
            raise ConfigError(f"{origin}: qemu.args: {option} {following} is refused: QEMU runs without a terminal")
        if option == "-nographic":
            raise ConfigError(f"{origin}: qemu.args: -nographic is refused (it takes the terminal); use -display none")
        for own in (MONITOR_ID, AGENT_ID):
            if own in _ids_in(following):
                raise ConfigError(f"{origin}: qemu.args: {option} {following}: the id '{own}' is vmloop's own")


def _ids_in(value: str) -> set[object]:
    """The ids that an option's value gives or refers to; QEMU takes key=value,… and for some options JSON."""
    if not value.startswith("{"):
        pairs = (part.partition("=") for part in value.split(","))
        return {text for key, _, text in pairs if key in ("id", "chardev")}
    try:
        found = msgspec.json.decode(value, type=dict[str, object])
    except (msgspec.MsgspecError, RecursionError):
        return set()  # no JSON: QEMU will say so
    return {text for key, text in found.items() if key in ("id", "chardev") and isinstance(text, str)}


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)


def _quoted(text: str) -> str:
    # TOML wants DEL escaped too, which JSON leaves as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
