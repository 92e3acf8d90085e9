# SPDX-License-Identifier: Apache-2.0
"""The XML that libvirt is given: the domain without what libvirt would do on the host, or refuses to ordinary users. Used by importing.py.

What is taken out here is either listed by inventory.py (cgroups, labels), or noted here (devices that a helper of libvirt's stands behind).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Final
from xml.etree.ElementTree import Element, SubElement

import msgspec

from .domain_xml import domain_bytes
from .interfaces import Card, add_placeholder, cards_of
from .notes import Note, left_out

# At the top: inventory.py says why each is left out.
_TAKEN_OUT: Final = ("memtune", "blkiotune", "cputune", "resource", "perf", "seclabel", "metadata", "on_lockfailure")


class Prepared(msgspec.Struct, frozen=True):
    """What goes to libvirt, and the network cards whose placeholders are in it."""

    xml: bytes
    cards: list[Card]
    notes: list[Note]


def prepare(original: Element, name: str) -> Prepared:
    """`name`: what the VM is to be called. The tree stays as it is."""
    root = deepcopy(original)
    cards, notes = cards_of(root)
    _rename(root, name)
    _take_out(root)
    notes += _take_out_devices(root)
    for device in root.findall("devices/hostdev"):
        _name_driver(device)
    _put_placeholders(root, cards)
    return Prepared(domain_bytes(root), cards, notes)


def _rename(root: Element, name: str) -> None:
    found = root.find("name")
    assert found is not None  # read_domain has looked
    found.text = name


def _take_out(root: Element) -> None:
    for element in [each for each in root if each.tag in _TAKEN_OUT]:
        root.remove(element)
    for parent in list(root.iter()):
        for label in parent.findall("seclabel"):
            parent.remove(label)
    vcpu = root.find("vcpu")
    if vcpu is not None:
        vcpu.attrib.pop("cpuset", None)


def _take_out_devices(root: Element) -> list[Note]:
    notes = []
    for devices in root.findall("devices"):
        for device in list(devices):
            advice = _helper_behind(device)
            if advice is not None:
                devices.remove(device)
                notes.append(left_out(_label(device), advice))
    return notes


def _helper_behind(device: Element) -> str | None:
    """What to do, for a device behind which libvirt runs a program or opens a device file; None for others."""
    check = _HELPERS.get(device.tag)
    return check(device) if check is not None else None


def _tpm(device: Element) -> str | None:
    backend = device.find("backend")
    if backend is not None and backend.get("type") == "emulator":
        return "libvirt ran swtpm for it, on /var/lib/libvirt/swtpm: run it, and add -chardev socket, -tpmdev emulator, -device"
    return "libvirt opened the device and passed it on as an fd: add -tpmdev passthrough,path=/dev/tpm0 and its -device"


def _filesystem(device: Element) -> str | None:
    driver = device.find("driver")
    if driver is not None and driver.get("type") == "virtiofs":
        return "libvirt ran virtiofsd for it: run one, and add -chardev socket and -device vhost-user-fs-pci"
    return None


_HELPERS: Final[dict[str, Callable[[Element], str | None]]] = {"tpm": _tpm, "filesystem": _filesystem}


def _label(device: Element) -> str:
    """`filesystem TAG`, `tpm tpm-crb`: enough to find it in the XML."""
    target = device.find("target")
    name = target.get("dir", "") if target is not None else device.get("model", "")
    return f"{device.tag} {name[:64]}".strip()


def _name_driver(device: Element) -> None:
    """libvirt chooses it when it starts the domain, and cannot do without it before."""
    if device.get("type") == "pci" and device.find("driver") is None:
        SubElement(device, "driver", name="vfio")


def _put_placeholders(root: Element, cards: list[Card]) -> None:
    left = iter(cards)
    for devices in root.findall("devices"):
        for interface in devices.findall("interface"):
            devices.remove(interface)
            if interface.get("type") != "hostdev":
                add_placeholder(devices, interface, next(left))
