# SPDX-License-Identifier: Apache-2.0
"""What a QEMU is asked: a table of commands, each with what must be known before it makes sense. Pure; driven by conversation.py.

An error reply to any of them means "not there": it is noted and the rest goes on. Nothing is asked that the binary is known not to have.
QEMU 4.2 and later and every target are meant: what one of them lacks is empty in the document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from .schema import commands_of


class Reply(msgspec.Struct, frozen=True):
    """The answer to one question: the value of `return`, or why there is none."""

    value: Any = None
    error: str = ""


Replies = Mapping[str, Reply]  # by the question's name


class Question(msgspec.Struct, frozen=True):
    """One question. `name` is the command, with what it is about behind a slash where a command is asked several times."""

    name: str
    command: str
    arguments: dict[str, Any] | None = None
    after: tuple[str, ...] = ()  # questions that must have been answered, or refused, before
    when: Callable[[Replies], bool] = lambda _: True


# Device types whose properties are asked for. Not all of them: some cannot be made on `-machine none`, and take QEMU down with them (7.2 on
# x86_64 has one). These are the ones that libvirt has been asking for throughout, and the commonest beside them.
DEVICES: Final = (
    *("virtio-blk-pci", "virtio-net-pci", "virtio-scsi-pci", "virtio-blk-ccw", "virtio-net-ccw", "virtio-scsi-ccw"),
    *("virtio-balloon-pci", "virtio-balloon-ccw", "virtio-balloon-device", "virtio-gpu-pci", "virtio-gpu-device"),
    *(
        "virtio-iommu-pci",
        "virtio-mem-pci",
        "virtio-serial-pci",
        "virtio-rng-pci",
        "virtserialport",
        "vhost-user-fs-device",
    ),
    *(
        "vfio-pci",
        "scsi-hd",
        "scsi-cd",
        "ide-hd",
        "PIIX4_PM",
        "ICH9-LPC",
        "mch",
        "intel-iommu",
        "kvm-pit",
        "nvdimm",
        "pc-dimm",
    ),
    *(
        "usb-redir",
        "usb-storage",
        "usb-host",
        "qemu-xhci",
        "VGA",
        "vmware-svga",
        "qxl",
        "e1000",
        "pcie-root-port",
        "nvme",
    ),
)
OBJECTS: Final = (
    *("memory-backend-file", "memory-backend-memfd", "max-x86_64-cpu", "max-arm-cpu"),
    *("pseries-machine", "virt-machine", "none-machine"),
)

_X86: Final = frozenset({"x86_64", "i386"})
_ARM: Final = frozenset({"aarch64", "arm"})
_STATIC: Final = frozenset({"loongarch64"})  # targets that expand a CPU model in this one way only


def target_of(replies: Replies) -> str:
    """The target's architecture; "" if the QEMU has not said it."""
    reply = replies.get("query-target")
    arch = reply.value.get("arch") if reply is not None and isinstance(reply.value, dict) else None
    return arch if isinstance(arch, str) else ""


def kvm_enabled(replies: Replies) -> bool:
    """Whether the QEMU runs with KVM."""
    reply = replies.get("query-kvm")
    return reply is not None and isinstance(reply.value, dict) and reply.value.get("enabled") is True


def _has_device(name: str) -> Callable[[Replies], bool]:
    return lambda replies: name in names_in(replies.get("qom-list-types/device"))


def _target_in(targets: frozenset[str]) -> Callable[[Replies], bool]:
    return lambda replies: target_of(replies) in targets


def is_emulated(replies: Replies) -> bool:
    """Whether the QEMU runs with TCG. One that has neither that nor a usable KVM was started all the same, and runs nothing."""
    accelerators = names_in(replies.get("qom-list-types/accel"))
    return not kvm_enabled(replies) and (not accelerators or "tcg-accel" in accelerators)


def _expansions(model: str, runs: Callable[[Replies], bool]) -> tuple[Question, ...]:
    """What a CPU model consists of, asked in the way that the target has. Without an accelerator the answer would be made up."""

    def one(kind: str, is_way: Callable[[str], bool]) -> Question:
        return Question(
            f"query-cpu-model-expansion/{model}/{kind}",
            "query-cpu-model-expansion",
            {"type": kind, "model": {"name": model}},
            ("query-target", "query-kvm", "qom-list-types/accel", *_SCHEMA),
            lambda replies: runs(replies) and is_way(target_of(replies)),
        )

    return one("full", lambda target: target not in _STATIC), one("static", lambda target: target in _STATIC)


def _types(of: str) -> Question:
    return Question(f"qom-list-types/{of}", "qom-list-types", {"implements": of, "abstract": False}, _SCHEMA)


_SCHEMA: Final = ("query-qmp-schema", "query-commands")

# What one may ask of a QEMU that runs a guest, too.
_OF_ANY: Final = (
    Question("query-version", "query-version"),
    Question("query-target", "query-target"),
    Question("query-qmp-schema", "query-qmp-schema"),
    Question("query-commands", "query-commands"),
    Question("query-kvm", "query-kvm"),
)

_ROWS: Final = (
    *_OF_ANY,
    _types("device"),
    _types("accel"),
    # The text that `-device help` prints: the only place where aliases are named.
    Question("info-qdm", "human-monitor-command", {"command-line": "info qdm"}, _SCHEMA),
    Question("query-machines", "query-machines", None, _SCHEMA),
    Question("query-cpu-definitions", "query-cpu-definitions", None, _SCHEMA),
    Question("query-command-line-options", "query-command-line-options", None, _SCHEMA),
    Question("query-migrate-capabilities", "query-migrate-capabilities", None, _SCHEMA),
    Question("query-tpm-models", "query-tpm-models", None, _SCHEMA),
    Question("query-tpm-types", "query-tpm-types", None, _SCHEMA),
    Question("query-gic-capabilities", "query-gic-capabilities", None, ("query-target", *_SCHEMA), _target_in(_ARM)),
    Question("query-sev-capabilities", "query-sev-capabilities", None, ("query-target", *_SCHEMA), _target_in(_X86)),
    Question("query-sgx-capabilities", "query-sgx-capabilities", None, ("query-target", *_SCHEMA), _target_in(_X86)),
    *(
        Question(
            f"device-list-properties/{name}",
            "device-list-properties",
            {"typename": name},
            ("qom-list-types/device",),
            _has_device(name),
        )
        for name in DEVICES
    ),
    *(Question(f"qom-list-properties/{name}", "qom-list-properties", {"typename": name}, _SCHEMA) for name in OBJECTS),
    *_expansions("host", kvm_enabled),
    *_expansions("max", is_emulated),
)

# The second run, under TCG, of a binary that the first has found to use KVM: what differs there.
_OF_TCG: Final = (
    Question("query-target", "query-target"),
    Question("query-kvm", "query-kvm"),
    Question("query-machines", "query-machines"),
    Question("query-cpu-definitions", "query-cpu-definitions"),
    *_expansions("max", lambda _: True),
)

PROBE: Final = _ROWS
PROBE_TCG: Final = _OF_TCG
RUNNING: Final = _OF_ANY


def due(table: tuple[Question, ...], replies: Replies) -> list[Question]:
    """What can be asked now; nothing once all is asked that makes sense."""
    known = commands_of(_value(replies, "query-qmp-schema"), _value(replies, "query-commands"))
    found = []
    for question in table:
        if question.name in replies or not all(name in replies or not _is_in(table, name) for name in question.after):
            continue
        if known and question.after and question.command not in known:
            continue
        if question.when(replies):
            found.append(question)
    return found


def names_in(reply: Reply | None) -> set[str]:
    """The `name` of every entry of an answer that is a list of such."""
    entries = reply.value if reply is not None and isinstance(reply.value, list) else []
    return {name for entry in entries if isinstance(entry, dict) and isinstance(name := entry.get("name"), str)}


def _value(replies: Replies, name: str) -> Any:
    reply = replies.get(name)
    return reply.value if reply is not None else None


def _is_in(table: tuple[Question, ...], name: str) -> bool:
    return any(question.name == name for question in table)
