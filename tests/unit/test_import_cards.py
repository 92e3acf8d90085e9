# SPDX-License-Identifier: Apache-2.0
"""Network cards that do not sit in a PCI slot: what libvirt is given in their place, and what becomes of its answer."""

from __future__ import annotations

import shlex
from xml.etree.ElementTree import Element, fromstring

import pytest

from vmloop.client.libvirt.importing import Imported, import_domain
from vmloop.client.libvirt.virsh import Translated


def imported(interface: str, devices: str) -> tuple[Imported, Element]:
    """A domain with this card, for which libvirt has these devices; and what libvirt was given."""
    given: list[bytes] = []

    def translate(xml: bytes) -> Translated:
        given.append(xml)
        return Translated(f"/bin/qemu {devices}", "")

    xml = (
        "<domain type='qemu'><name>a</name><devices><interface type='user'>"
        f"<mac address='52:54:00:00:00:01'/>{interface}</interface></devices></domain>"
    )
    found = import_domain(xml.encode(), "x", translate, exists=lambda _: True)
    return found, fromstring(given[0])


def test_a_card_on_usb_takes_the_port_of_a_mouse() -> None:
    slot = '{"driver":"usb-mouse","id":"ua-vmloop-net0","bus":"usb.0","port":"2"}'
    found, given = imported(
        "<model type='usb-net'/><address type='usb' bus='0' port='2'/>", f"-device {shlex.quote(slot)}"
    )
    (mouse,) = given.findall("devices/input")
    assert (mouse.get("type"), mouse.get("bus"), mouse.find("address").attrib["port"]) == ("mouse", "usb", "2")  # type: ignore[union-attr]
    assert given.find("devices/rng") is None
    assert found.definition.qemu.args == [
        "-netdev",
        "user,id=hostnet0",
        "-device",
        '{"driver":"usb-net","netdev":"hostnet0","id":"net0","mac":"52:54:00:00:00:01","bus":"usb.0","port":"2"}',
    ]


@pytest.mark.parametrize(
    ("model", "address", "extra"),
    [
        ("spapr-vlan", "<address type='spapr-vio' reg='0x1000'/>", ',"reg":4096'),
        ("spapr-vlan", "", ""),
        ("ne2k_isa", "<address type='isa'/>", ""),
    ],
)
def test_a_card_without_a_slot_gets_none(model: str, address: str, extra: str) -> None:
    found, given = imported(f"<model type='{model}'/>{address}", "-device virtio-balloon-pci,id=balloon0")
    assert [each.tag for each in given.findall("devices/*")] == []
    assert found.definition.qemu.args[2:] == [
        "-netdev",
        "user,id=hostnet0",
        "-device",
        f'{{"driver":"{model}","netdev":"hostnet0","id":"net0","mac":"52:54:00:00:00:01"{extra}}}',
    ]
    assert not [note for note in found.notes if "no place" in note.why]


@pytest.mark.parametrize(("model", "told"), [("virtio", True), ("e1000", False)])
def test_only_a_virtio_card_can_tell_its_guest_the_mtu(model: str, told: bool) -> None:
    slot = "virtio-rng-pci,id=ua-vmloop-net0,rng=objua-vmloop-net0,bus=pci.0,addr=0x3"
    found, _ = imported(f"<model type='{model}'/><mtu size='1450'/>", f"-device {slot}")
    assert ("host_mtu=1450" in found.definition.qemu.args[-1]) is told
    assert "bus=pci.0,addr=0x3" in found.definition.qemu.args[-1]


@pytest.mark.parametrize(
    ("arch", "model"),
    [("x86_64", "rtl8139"), ("i686", "rtl8139"), ("ppc64le", "rtl8139"), ("aarch64", "virtio-net-pci")],
)
def test_a_card_without_a_model_is_the_one_that_libvirt_gives_on_that_architecture(arch: str, model: str) -> None:
    slot = "virtio-rng-pci,id=ua-vmloop-net0,rng=objua-vmloop-net0,bus=pci.0,addr=0x3"
    text = f"<domain type='qemu'><name>a</name><os><type arch='{arch}'>hvm</type></os><devices><interface type='user'/></devices></domain>"
    found = import_domain(
        text.encode(), "x", lambda _: Translated(f"/bin/qemu -device {slot}", ""), exists=lambda _: True
    )
    assert found.definition.qemu.args[-1].startswith(f"{model},")


@pytest.mark.parametrize(("mode", "waits"), [("server", True), ("client", False)])
def test_a_vhost_user_card_that_waits_for_its_switch_is_told_of(mode: str, waits: bool) -> None:
    text = (
        "<domain type='qemu'><name>a</name><devices><interface type='vhostuser'>"
        f"<source type='unix' path='/srv/vhu1' mode='{mode}'/><model type='virtio'/></interface></devices></domain>"
    )
    found = import_domain(text.encode(), "x", lambda _: Translated("/bin/qemu", ""), exists=lambda _: True)
    assert any("before a switch has connected to /srv/vhu1" in note.why for note in found.notes) is waits
