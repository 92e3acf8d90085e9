# SPDX-License-Identifier: Apache-2.0
"""Dialogues of other QEMUs than the installed one: old and new, x86 and not, without TCG. Each was recorded from the real binary.

No 4.2 was at hand: what it lacks is taken out of the dialogue of a 5.2.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from vmloop.common.capabilities import from_plain, to_plain
from vmloop.common.pack import pack, unpack
from vmloop.worker.probe.arguments import wrong_arguments
from vmloop.worker.probe.probing import ANY
from vmloop.worker.probe.questions import PROBE

from ..fakes.recorded_qemu import DATA, Recording, load

RECORDINGS = sorted(DATA.glob("*.json.gz"))

# What came to QEMU after 4.2 and is in a 5.2 (the `Since` of its QAPI schema).
AFTER_4_2 = frozenset(
    (
        *("block-export-add", "block-export-del", "query-block-exports", "calc-dirty-rate", "query-dirty-rate"),
        *("query-replay", "replay-break", "replay-delete-break", "replay-seek", "MEMORY_FAILURE"),
    )
)


def named(text: str) -> Recording:
    return load(DATA / f"qemu-{text}.json.gz")


def qemu_4_2() -> Recording:
    """A 5.2 without what came since."""
    recording = copy.deepcopy(named("5.2.0-x86_64"))
    recording.greeting["version"]["qemu"] = {"major": 4, "minor": 2, "micro": 0}
    for entry in recording.runs[ANY]:
        value: Any = entry.get("return")
        if entry["execute"] == "query-version":
            value["qemu"] = {"major": 4, "minor": 2, "micro": 0}
        elif isinstance(value, list):
            entry["return"] = [
                item for item in value if not isinstance(item, dict) or item.get("name") not in AFTER_4_2
            ]
        if entry["execute"] == "query-qmp-schema":
            for item in entry["return"]:
                item.pop("features", None)
        elif entry["execute"] == "query-machines":
            for item in entry["return"]:
                item.pop("default-ram-id", None)
    return recording


# -- all of them --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.name)
def test_the_document_says_which_qemu_it_was(path: Path) -> None:
    _, version, target = path.name.removesuffix(".json.gz").split("-", 2)
    found = load(path).document()
    assert ".".join(map(str, found.version)) == version
    assert found.target == target.removesuffix("-microvm")


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.name)
def test_what_every_qemu_has_is_there(path: Path) -> None:
    found = load(path).document()
    assert {"query-version", "device_add", "qmp_capabilities"} <= set(found.commands)
    assert {"migrate-recover", "migrate-pause"} <= set(found.oob)
    assert {"STOP", "SHUTDOWN", "VSERPORT_CHANGE"} <= set(found.events)
    assert {"none"} < set(found.machines)
    assert {"netdev", "device", "drive"} <= set(found.options)
    assert "xbzrle" in found.migration
    assert found.device_types
    assert set(found.arguments) == set(found.commands)
    assert from_plain(unpack(pack(to_plain(found)))) == found


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.name)
def test_what_is_asked_today_was_asked_then(path: Path) -> None:
    """Else the recording must be made anew, or the answers below are those of nobody."""
    recording = load(path)
    assert set(recording.replay(ANY, PROBE)) == {entry["name"] for entry in recording.runs[ANY]}


# -- one by one ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "machine", "device", "cpus"),
    [
        ("5.2.0-x86_64", "q35", "virtio-net-pci", True),
        ("5.2.0-ppc64", "pseries", "spapr-vlan", True),
        ("5.2.0-s390x", "s390-ccw-virtio", "virtio-blk-ccw", True),
        ("5.2.0-sparc", "SS-5", "lance", False),
        ("5.2.0-x86_64-microvm", "microvm", "virtio-serial-device", True),
        ("10.0.13-x86_64", "q35", "virtio-net-pci", True),
        ("10.0.13-aarch64", "virt", "virtio-net-pci", True),
        ("10.0.13-riscv64", "virt", "virtio-net-pci", True),
        ("10.0.13-loongarch64", "virt", "virtio-net-pci", True),
    ],
)
def test_its_machine_and_its_devices_are_known(name: str, machine: str, device: str, cpus: bool) -> None:
    found = named(name).document()
    assert machine in found.machines
    assert device in found.device_types
    assert bool(found.cpus) is cpus
    assert wrong_arguments(found, ["-machine", machine, "-device", device]) == []
    (wrong,) = wrong_arguments(found, ["-machine", f"{machine}x"])
    assert machine in wrong.near


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("5.2.0-x86_64", "full"),
        ("5.2.0-ppc64", None),
        ("5.2.0-s390x", "full"),
        ("5.2.0-sparc", None),
        ("5.2.0-x86_64-microvm", None),
        ("10.0.13-x86_64", "full"),
        ("10.0.13-aarch64", "full"),
        ("10.0.13-riscv64", "full"),
        ("10.0.13-loongarch64", "static"),
    ],
)
def test_the_largest_cpu_model_is_expanded_where_it_can_be(name: str, kind: str | None) -> None:
    found = named(name).document().expansion
    assert {model: entry["type"] for model, entry in found.items()} == ({"max": kind} if kind else {})


def test_only_arm_has_gic() -> None:
    gic = named("10.0.13-aarch64").document().gic
    assert gic is not None
    assert [entry["version"] for entry in gic] == [3, 2]
    assert named("10.0.13-x86_64").document().gic is None


def test_a_binary_without_tcg_is_known_without_kvm_too() -> None:
    """Debian's microvm has KVM alone; where that cannot be used it was started with qtest."""
    found = named("5.2.0-x86_64-microvm").document()
    assert found.accelerators == ["kvm", "qtest"]
    assert (found.kvm.present, found.kvm.enabled) == (True, False)


# -- 4.2 ------------------------------------------------------------------------------------------------------------------------


def test_a_4_2_gives_a_whole_document() -> None:
    found = qemu_4_2().document()
    assert found.version == (4, 2, 0)
    assert found.commands
    assert not AFTER_4_2 & {*found.commands, *found.events}
    assert found.features == []
    assert "q35" in found.machines
    assert found.expansion["max"]["props"]
    errors: dict[str, Any] = {name: text for name, text in found.missing.items() if not name.startswith("qom-list")}
    assert list(errors) == ["query-sev-capabilities"]
