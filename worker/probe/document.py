# SPDX-License-Identifier: Apache-2.0
"""From answers to the document of common/capabilities.py. Pure: a recorded dialogue gives what its QEMU gave. Used by probing.py.

Whatever a QEMU answers there is a document; an error, or an answer of another shape than expected, leaves its field empty.
"""

from __future__ import annotations

import re
from typing import Any, Final

from ...common.capabilities import Capabilities, Kvm
from .questions import DEVICES, OBJECTS, Replies, kvm_enabled, names_in, target_of
from .schema import MAX_NAME, commands_of, is_name, reduce_schema

MAX_DEPTH: Final = 8  # of what is taken over from QEMU as it is; what lies deeper is left out
MAX_ERROR: Final = 300  # characters of an answer that was an error

# name "virtio-net-pci", bus PCI, alias "virtio-net", desc "…"
_ALIAS: Final = re.compile(r'^name "([^"\n]{1,256})".*?, alias "([^"\n]{1,256})"', re.MULTILINE)

_INT64: Final = 1 << 63


def document(binary: str, replies: Replies, tcg: Replies | None = None) -> Capabilities:
    """The document of one dialogue, and of a second one under TCG if there was one. `binary`: the canonical path, or ""."""
    schema = reduce_schema(_value(replies, "query-qmp-schema"))
    version, package = _version(_value(replies, "query-version"))
    machines, cpus = _machines(replies), _details(_value(replies, "query-cpu-definitions"))
    options = _options(_value(replies, "query-command-line-options"))
    return Capabilities(
        binary=binary,
        version=version,
        package=package,
        target=target_of(replies),
        commands=schema.commands or sorted(commands_of(None, _value(replies, "query-commands"))),
        events=schema.events,
        oob=schema.oob,
        features=schema.features,
        machines=_with_aliases(machines),
        cpus=sorted(cpus),
        device_types=_names(replies, "qom-list-types/device"),
        accelerators=_accelerators(replies),
        options=sorted(options),
        migration=sorted(_capability_names(_value(replies, "query-migrate-capabilities"))),
        kvm=Kvm(present=_is_true(_value(replies, "query-kvm"), "present"), enabled=kvm_enabled(replies)),
        expansion=_expansion(replies),
        arguments=schema.arguments,
        types=schema.types,
        command_features=schema.command_features,
        machine_details=machines,
        cpu_details=cpus,
        device_aliases=_aliases(_value(replies, "info-qdm")),
        device_properties=_properties(replies, "device-list-properties", DEVICES),
        object_properties=_properties(replies, "qom-list-properties", OBJECTS),
        option_parameters=options,
        tpm={name: found for name in ("models", "types") if (found := _texts(_value(replies, f"query-tpm-{name}")))},
        gic=_maps(_value(replies, "query-gic-capabilities")),
        sev=_map(_value(replies, "query-sev-capabilities")),
        sgx=_map(_value(replies, "query-sgx-capabilities")),
        tcg=_tcg(tcg, cpus),
        missing={name: reply.error[:MAX_ERROR] for name, reply in sorted(replies.items()) if reply.error},
    )


# -- one answer each --------------------------------------------------------------------------------------------------------


def _version(value: Any) -> tuple[tuple[int, int, int], str]:
    value = value if isinstance(value, dict) else {}
    qemu = value.get("qemu")
    numbers = [qemu.get(name) if isinstance(qemu, dict) else None for name in ("major", "minor", "micro")]
    major, minor, micro = (number if type(number) is int and 0 <= number < _INT64 else 0 for number in numbers)
    package = value.get("package")
    return (major, minor, micro), package[:MAX_NAME] if isinstance(package, str) else ""


def _machines(replies: Replies) -> dict[str, dict[str, Any]]:
    return _details(_value(replies, "query-machines"))


def _with_aliases(machines: dict[str, dict[str, Any]]) -> list[str]:
    aliases = {alias for entry in machines.values() if is_name(alias := entry.get("alias"))}
    return sorted({*machines, *aliases})


def _accelerators(replies: Replies) -> list[str]:
    """`tcg-accel` is `tcg` on the command line; `accel` itself is only their base."""
    found = names_in(replies.get("qom-list-types/accel"))
    return sorted(name.removesuffix("-accel") for name in found if name.endswith("-accel"))


def _options(value: Any) -> dict[str, list[str]]:
    entries = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
    return {
        entry["option"]: sorted(_entry_names(entry.get("parameters")))
        for entry in entries
        if is_name(entry.get("option"))
    }


def _capability_names(value: Any) -> set[str]:
    entries = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
    return {name for entry in entries if is_name(name := entry.get("capability"))}


def _aliases(text: Any) -> dict[str, str]:
    return {alias: name for name, alias in _ALIAS.findall(text)} if isinstance(text, str) else {}


def _expansion(replies: Replies) -> dict[str, Any]:
    """CPU model → what query-cpu-model-expansion made of it, and by which type of expansion."""
    found = {}
    for name, reply in sorted(replies.items()):
        command, _, rest = name.partition("/")
        model = reply.value.get("model") if isinstance(reply.value, dict) else None
        if command == "query-cpu-model-expansion" and isinstance(model, dict):
            asked, _, kind = rest.partition("/")
            found[asked] = {"type": kind, **_plain(model)}
    return found


def _properties(replies: Replies, command: str, types: tuple[str, ...]) -> dict[str, dict[str, str]]:
    found = {}
    for name in types:
        value = _value(replies, f"{command}/{name}")
        if isinstance(value, list):
            entries = [entry for entry in value if isinstance(entry, dict) and is_name(entry.get("name"))]
            found[name] = {entry["name"]: _short(entry.get("type")) for entry in entries}
    return found


def _tcg(replies: Replies | None, with_kvm: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """`cpu_details` holds those that are not the same with KVM."""
    if replies is None:
        return None
    cpus = _details(_value(replies, "query-cpu-definitions"))
    return {
        "cpus": sorted(cpus),
        "cpu_details": {name: entry for name, entry in cpus.items() if entry != with_kvm.get(name)},
        "machines": _with_aliases(_machines(replies)),
        "expansion": _expansion(replies),
    }


# -- any answer ---------------------------------------------------------------------------------------------------------------


def _value(replies: Replies, name: str) -> Any:
    reply = replies.get(name)
    return reply.value if reply is not None else None


def _names(replies: Replies, name: str) -> list[str]:
    return sorted(name for name in names_in(replies.get(name)) if is_name(name))


def _entry_names(value: Any) -> set[str]:
    entries = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
    return {name for entry in entries if is_name(name := entry.get("name"))}


def _details(value: Any) -> dict[str, dict[str, Any]]:
    """The entries of an answer by their name, with all that QEMU says of them, whether this vmloop knows it or not."""
    entries = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
    return {entry["name"]: _plain(entry) for entry in entries if is_name(entry.get("name"))}


def _texts(value: Any) -> list[str]:
    return sorted({text for text in value if is_name(text)}) if isinstance(value, list) else []


def _map(value: Any) -> dict[str, Any] | None:
    return _plain(value) if isinstance(value, dict) else None


def _maps(value: Any) -> list[dict[str, Any]] | None:
    return [_plain(entry) for entry in value if isinstance(entry, dict)] if isinstance(value, list) else None


def _is_true(value: Any, name: str) -> bool:
    return isinstance(value, dict) and value.get(name) is True


def _short(value: Any) -> str:
    return value[:MAX_NAME] if isinstance(value, str) else ""


def _plain(value: dict[str, Any], depth: int = MAX_DEPTH) -> dict[str, Any]:
    """A map as it is, but for what msgpack cannot carry or lies too deep."""
    return {name: _plain_value(item, depth - 1) for name, item in value.items() if _fits(item, depth - 1)}


def _plain_value(value: Any, depth: int) -> Any:
    if isinstance(value, dict):
        return _plain(value, depth)
    if isinstance(value, list):
        return [_plain_value(item, depth - 1) for item in value if _fits(item, depth - 1)]
    return value


def _fits(value: Any, depth: int) -> bool:
    if type(value) is int:
        return -_INT64 <= value < 2 * _INT64
    return depth > 0 or not isinstance(value, dict | list)
