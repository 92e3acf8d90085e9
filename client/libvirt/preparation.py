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

from .domain_xml import child_text, domain_bytes
from .huge_pages import ask_for_a_file
from .interfaces import Card, add_placeholder, cards_of
from .notes import Note, left_out
from .usb_devices import Wanted, put_stand_ins

# At the top: inventory.py says why each is left out.
_TAKEN_OUT: Final = ("memtune", "blkiotune", "cputune", "resource", "perf", "seclabel", "metadata", "on_lockfailure")


class Prepared(msgspec.Struct, frozen=True):
    """What goes to libvirt, and the network cards and USB devices for which others stand in it."""

    xml: bytes
    cards: list[Card]
    usb: Wanted
    huge_pages: int | None  # their size, as huge_pages.py has it
    notes: list[Note]


def prepare(original: Element, name: str) -> Prepared:
    """`name`: what the VM is to be called. The tree stays as it is."""
    root = deepcopy(original)
    cards, notes = cards_of(root)
    usb, of_usb = put_stand_ins(root)
    notes += of_usb
    huge_pages = ask_for_a_file(root)
    _rename(root, name)
    _name_firmware_once(root)
    _take_out(root)
    notes += _take_out_devices(root)
    for device in root.findall("devices/hostdev"):
        _name_driver(device)
    _put_placeholders(root, cards)
    return Prepared(domain_bytes(root), cards, usb, huge_pages, notes)


def _rename(root: Element, name: str) -> None:
    found = root.find("name")
    assert found is not None  # read_domain has looked
    found.text = name


def _name_firmware_once(root: Element) -> None:
    """libvirt prints, beside the loader that it has chosen, what it has chosen it by; 9.0 refuses to read both."""
    system = root.find("os")
    if system is None or not child_text(system, "loader"):
        return
    system.attrib.pop("firmware", None)
    for choice in system.findall("firmware"):
        system.remove(choice)


def _take_out(root: Element) -> None:
    for element in [each for each in root if each.tag in _TAKEN_OUT]:
        root.remove(element)
    for parent in list(root.iter()):
        for label in parent.findall("seclabel"):
            parent.remove(label)
    vcpu = root.find("vcpu")
    if vcpu is not None:
        vcpu.attrib.pop("cpuset", None)
        vcpu.attrib.pop("placement", None)  # auto: libvirt asks numad when it starts the domain, and refuses before
    for numatune in root.findall("numatune"):
        for memory in numatune.findall("memory"):
            if memory.get("placement") == "auto":
                numatune.remove(memory)


def _take_out_devices(root: Element) -> list[Note]:
    notes = []
    for devices in root.findall("devices"):
        for device in list(devices):
            advice = _helper_behind(device, root)
            if advice is not None:
                devices.remove(device)
                notes.append(left_out(_label(device), advice))
    return notes


def _helper_behind(device: Element, root: Element) -> str | None:
    """What to do, for a device behind which libvirt runs a program or opens a device file; None for others."""
    check = _HELPERS.get(device.tag)
    return check(device, root) if check is not None else None


def _tpm(device: Element, root: Element) -> str | None:
    backend = device.find("backend")
    driver = device.get("model", "tpm-tis")[:64]
    kind = backend.get("type") if backend is not None else None
    options = "-chardev socket,id=chrtpm,path={} -tpmdev emulator,id=tpm0,chardev=chrtpm -device {},tpmdev=tpm0"
    if backend is not None and kind == "external":  # the operator runs it
        source = backend.find("source")
        path = source.get("path", "")[:200] if source is not None else ""
        return f"libvirt translates it only where swtpm is installed; add {options.format(path, driver)}"
    if backend is not None and kind == "emulator":
        version = "tpm1.2" if backend.get("version") == "1.2" else "tpm2"
        state = f"/var/lib/libvirt/swtpm/{child_text(root, 'uuid')[:64] or 'UUID'}/{version}"
        return (
            f"libvirt ran swtpm for it, with its state in {state}: "
            f"run swtpm on a socket of yours, and add {options.format('SOCKET', driver)}"
        )
    device_file = device.find("backend/device")
    path = device_file.get("path", "")[:200] if device_file is not None else ""
    return (
        "libvirt opened the device and passed it on as an fd: add "
        f"-tpmdev passthrough,id=tpm0,path={path or '/dev/tpm0'} -device {driver},tpmdev=tpm0"
    )


def _filesystem(device: Element, _: Element) -> str | None:
    driver, source = device.find("driver"), device.find("source")
    if driver is None or driver.get("type") != "virtiofs":
        return None
    given = dict(source.attrib) if source is not None else {}
    socket, directory = given.get("socket", "")[:200], given.get("dir", "")[:200]
    why = (
        "libvirt translates it only as the system's daemon"  # the operator runs it
        if socket
        else f"libvirt ran virtiofsd for it{f' on {directory}' if directory else ''}: run one on a socket of yours"
    )
    return (
        f"{why}; add -chardev socket,id=fs0,path={socket or 'SOCKET'} "
        f"-device vhost-user-fs-pci,chardev=fs0,tag={_target(device) or 'TAG'}"
    )


_HELPERS: Final[dict[str, Callable[[Element, Element], str | None]]] = {"tpm": _tpm, "filesystem": _filesystem}


def _label(device: Element) -> str:
    """`filesystem TAG`, `tpm tpm-crb`: enough to find it in the XML."""
    return f"{device.tag} {_target(device) or device.get('model', '')[:64]}".strip()


def _target(device: Element) -> str:
    target = device.find("target")
    return target.get("dir", "")[:64] if target is not None else ""


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
