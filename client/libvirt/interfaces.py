# SPDX-License-Identifier: Apache-2.0
"""Network cards: a domain's <interface> becomes -netdev and -device. Used by preparation.py (placeholders) and takeover.py.

domxml-to-native forgets what a card was connected to and where it was plugged in, and creates a tap device as it goes. So libvirt gets a
virtio-rng in each card's place (a mouse for one on USB), which goes into the same slot and needs nothing of the host; in the arguments it
is made a card again. A card that has no slot is added to the arguments at their end.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any, Final
from xml.etree.ElementTree import Element, SubElement

import msgspec

from .argv import Option, Properties
from .domain_xml import child_text, children
from .notes import Note, changed, left_out, warning

PLACEHOLDER: Final = "ua-vmloop-net"  # libvirt keeps aliases that begin with ua-
RNG_DRIVER: Final = "virtio-rng"

# libvirt's own network of this name is shipped as NAT, for which QEMU's user-mode network can stand in.
NAT_NETWORK: Final = "default"

_SLOTS: Final = ("pci", "ccw", "virtio-mmio")  # kinds of addresses that a virtio device can have
_USB_MODEL: Final = "usb-net"
_WITHOUT_SLOT: Final = ("spapr-vlan", "ne2k_isa")  # models on buses that nothing is plugged into by a slot
# Where libvirt gives a card without a model this one.
_VIRTIO_BY_DEFAULT: Final = ("aarch64", "armv6l", "armv7l", "loongarch64", "riscv32", "riscv64", "s390", "s390x")
_MODEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_HEXADECIMAL: Final = re.compile(r"0x[0-9A-Fa-f]{1,16}")
_MAC: Final = re.compile(r"(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}")

# Children of <interface> that are in the arguments, or mean nothing without libvirt.
_REFLECTED: Final = frozenset({"source", "mac", "model", "address", "boot", "mtu", "rom", "alias", "acpi", "target"})
_NOT_KEPT: Final = {
    "bandwidth": "libvirt shaped the traffic with tc on the host's side",
    "filterref": "libvirt filtered the traffic: without it the guest may send with any address. Filter on the bridge",
    "vlan": "libvirt tagged the host's side; use the bridge's own VLANs",
    "virtualport": "of a switch that libvirt spoke to",
    "port": "isolation was set on the host's side of the bridge",
    "driver": "queues, vhost and offloads are not taken over; add them to -netdev and -device",
    "ip": "addresses were set by libvirt",
    "route": "routes were set by libvirt",
    "guest": "of containers",
    "backend": "libvirt's own choice of a backend; QEMU's default is used",
    "script": "it was run by libvirt",
    "downscript": "it was run by libvirt",
    "tune": "libvirt set it on the host's side",
    "coalesce": "libvirt set it on the host's side",
    "teaming": "add failover properties to the two devices",
    "portForward": "of passt; with -netdev user add hostfwd=",
}


class Card(msgspec.Struct, frozen=True):
    """One network card. `backend`: the properties of its -netdev, None for a card whose cable is not plugged in."""

    number: int  # from 0, as libvirt counts
    model: str  # as in the XML: virtio, e1000e, …
    mac: str
    backend: Properties | None
    chardev: Properties | None  # that the backend needs
    extra: dict[str, Any]  # further properties of the device

    @property
    def placeholder(self) -> str:
        return f"{PLACEHOLDER}{self.number}"

    @property
    def has_slot(self) -> bool:
        """Whether a placeholder stands for it in libvirt's arguments."""
        return self.model not in _WITHOUT_SLOT

    @property
    def starts_helper(self) -> bool:
        """QEMU starts a program for it."""
        return self.backend is not None and self.backend.text("type") in ("bridge", "tap")

    def options(self, slot: Properties) -> list[Option]:
        """The card, in the slot of its placeholder; `slot` has no values for one that has none."""
        driver = self.model
        if self.model.startswith("virtio"):  # virtio-rng-pci-transitional → virtio-net-pci-transitional
            driver = "virtio-net" + slot.text("driver").removeprefix(RNG_DRIVER)
        values: dict[str, Any] = {"driver": driver}
        if self.backend is not None:
            values["netdev"] = f"hostnet{self.number}"
        values |= {"id": f"net{self.number}", "mac": self.mac, **self.extra}
        values |= {
            key: value
            for key, value in slot.values.items()
            if key not in ("driver", "id", "rng", "max-bytes", "period")
        }
        device = Option("-device", Properties(values, slot.is_json, implied=not slot.is_json).render())
        before = [Option("-chardev", self.chardev.render())] if self.chardev is not None else []
        before += [Option("-netdev", self.backend.render())] if self.backend is not None else []
        return [*before, device]


def cards_of(root: Element) -> tuple[list[Card], list[Note]]:
    """The domain's network cards, and what the operator must know of them."""
    notes: list[Note] = []
    cards: list[Card] = []
    for number, interface in children(root, "devices/interface"):
        if interface.get("type") == "hostdev":
            notes.append(
                left_out(
                    f"interface {number} (hostdev)",
                    "libvirt set its address and gave it to vfio-pci: do that, and add -device vfio-pci,host=…",
                )
            )
            continue
        cards.append(_card(root, interface, number, len(cards), notes))
    return cards, notes


def add_placeholder(devices: Element, interface: Element, card: Card) -> None:
    """What libvirt is given in the card's place."""
    if not card.has_slot:
        return
    on_usb = card.model == _USB_MODEL
    if on_usb:
        stand_in = SubElement(devices, "input", type="mouse", bus="usb")
    else:
        stand_in = SubElement(devices, "rng", model=card.model if card.model.startswith("virtio") else "virtio")
        SubElement(stand_in, "backend", model="builtin")
    SubElement(stand_in, "alias", name=card.placeholder)
    address = interface.find("address")
    if address is not None and address.get("type") in (("usb",) if on_usb else _SLOTS):
        stand_in.append(address)


def _card(root: Element, interface: Element, number: int, at: int, notes: list[Note]) -> Card:
    name = f"interface {number} ({interface.get('type', '')[:16]})"
    backend, chardev = _backend(interface, name, at, notes)
    model = _model(root, interface, name, notes)
    for child in interface:
        if child.tag == "link" and child.get("state") == "down":
            notes.append(left_out(f"{name} link", f"after the start: vmloop qmp NAME set_link name=net{at} up=false"))
        elif child.tag not in _REFLECTED and child.tag != "link":
            reason = _NOT_KEPT.get(child.tag, "vmloop does not know this element")
            notes.append(left_out(f"{name} {child.tag[:64]}", reason))
    return Card(
        at,
        model,
        _mac(root, interface, name, notes),
        backend,
        chardev,
        _extra(root, interface, at, model),
    )


def _model(root: Element, interface: Element, name: str, notes: list[Note]) -> str:
    model = interface.find("model")
    chosen = model.get("type", "") if model is not None else ""
    if _MODEL.fullmatch(chosen):
        return chosen
    kind = root.find("os/type")
    arch = kind.get("arch", "x86_64") if kind is not None else "x86_64"
    default = "virtio" if arch in _VIRTIO_BY_DEFAULT else "rtl8139"
    notes.append(changed(f"{name} model", f"none is named; {default}, as libvirt chooses"))
    return default


def _mac(root: Element, interface: Element, name: str, notes: list[Note]) -> str:
    mac = interface.find("mac")
    address = mac.get("address", "") if mac is not None else ""
    if _MAC.fullmatch(address):
        return address.lower()
    seed = f"{child_text(root, 'uuid')} {child_text(root, 'name')} {name}"
    made = "52:54:00:" + hashlib.sha256(seed.encode()).digest()[:3].hex(":")
    notes.append(changed(f"{name} mac", f"libvirt would make one up; {made}, made of the domain's uuid and name"))
    return made


def _extra(root: Element, interface: Element, at: int, model: str) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    boot, mtu, rom, acpi, address = (interface.find(tag) for tag in ("boot", "mtu", "rom", "acpi", "address"))
    order = boot.get("order", "") if boot is not None else _boot_order(root) if at == 0 else ""
    if _number(order):
        extra["bootindex"] = int(order)
    if mtu is not None and _number(mtu.get("size", "")) and model.startswith("virtio"):  # no other can tell its guest
        extra["host_mtu"] = int(mtu.get("size", ""))
    if rom is not None and (rom.get("enabled") == "no" or rom.get("file") is not None):
        extra["romfile"] = rom.get("file", "") if rom.get("enabled") != "no" else ""
    if rom is not None and rom.get("bar") in ("on", "off"):
        extra["rombar"] = int(rom.get("bar") == "on")
    if acpi is not None and _number(acpi.get("index", "")):
        extra["acpi-index"] = int(acpi.get("index", ""))
    if address is not None and address.get("type") == "spapr-vio" and _HEXADECIMAL.fullmatch(address.get("reg", "")):
        extra["reg"] = int(address.get("reg", ""), 16)
    return extra


def _boot_order(root: Element) -> str:
    """<os><boot dev='network'/> means the first card, after the kinds named before it."""
    order = [boot.get("dev") for boot in root.findall("os/boot")]
    return str(order.index("network") + 1) if "network" in order else ""


def _number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


# -- what a card is connected to ------------------------------------------------------------------------------------------


def _backend(interface: Element, name: str, at: int, notes: list[Note]) -> tuple[Properties | None, Properties | None]:
    """-netdev, and the -chardev that it needs."""
    source = interface.find("source")
    given = dict(source.attrib) if source is not None else {}
    kind = interface.get("type", "")
    net = f"hostnet{at}"
    if kind == "user" or (kind == "network" and given.get("network") == NAT_NETWORK):
        if kind == "network":
            notes.append(
                changed(
                    f"{name} {NAT_NETWORK}",
                    _NO_NETWORK + " The card is on QEMU's user-mode network, which does NAT too",
                )
            )
        return _netdev("user", net), None
    if kind == "bridge" and given.get("bridge"):
        notes.append(
            warning(
                name,
                f"qemu-bridge-helper connects it: the bridge must be there, and /etc/qemu/bridge.conf say: allow {given['bridge'][:64]}",
            )
        )
        return _netdev("bridge", net, br=given["bridge"]), None
    if kind == "ethernet":
        return _tap(interface, name, net, notes), None
    if kind == "vhostuser" and given.get("path"):
        socket = {"backend": "socket", "id": f"charnet{at}", "path": given["path"]}
        if given.get("mode") == "server":
            socket |= {"server": "on", "wait": "off"}
            notes.append(warning(name, f"QEMU does not begin before a switch has connected to {given['path'][:120]}"))
        return _netdev("vhost-user", net, chardev=f"charnet{at}"), Properties(socket, implied=True)
    if kind == "vdpa" and given.get("dev"):
        return _netdev("vhost-vdpa", net, vhostdev=given["dev"]), None
    if kind in _SOCKETS and given.get("port"):
        return _netdev("socket", net, **{_SOCKETS[kind]: f"{given.get('address', '')}:{given['port']}"}), None
    advice = (
        _NO_NETWORK if kind == "network" else _NO_MACVTAP if kind == "direct" else "vmloop cannot make this connection."
    )
    what = f"{name} {given.get('network') or given.get('dev') or ''}".strip()[:120]
    notes.append(left_out(what, f"{advice} The card has no cable: add -netdev and netdev={net}"))
    return None, None


_SOCKETS: Final = {"mcast": "mcast", "server": "listen", "client": "connect"}
_NO_NETWORK: Final = (
    "virtual networks are libvirt's: their bridge, DHCP and NAT are there only while it runs them. "
    "To stay on one: -netdev bridge,br=BRIDGE with the bridge that virsh net-info names."
)
_NO_MACVTAP: Final = "libvirt made a macvtap device and passed it on as an fd: make a tap or bridge of your own."


def _netdev(kind: str, net: str, **values: Any) -> Properties:
    return Properties({"type": kind, "id": net, **values}, implied=True)


def _tap(interface: Element, name: str, net: str, notes: list[Note]) -> Properties:
    target, script = interface.find("target"), interface.find("script")
    device = target.get("dev", "") if target is not None else ""
    names = {"ifname": device} if device else {}
    notes.append(
        warning(
            name,
            "QEMU opens the tap device itself: it must be there and belong to QEMU's user, or QEMU be allowed to make it",
        )
    )
    path = script.get("path", "") if script is not None else ""
    return _netdev("tap", net, **names, script=path or "no", downscript="no")
