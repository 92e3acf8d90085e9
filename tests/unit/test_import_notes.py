# SPDX-License-Identifier: Apache-2.0
"""What works differently without libvirt, or cannot work, is told: for each such thing of a domain its note, and none for the others."""

from __future__ import annotations

import shlex
from xml.etree.ElementTree import Element, fromstring

import pytest

from vmloop.client.libvirt.domain_xml import read_domain
from vmloop.client.libvirt.importing import import_domain
from vmloop.client.libvirt.inventory import notes_of_domain
from vmloop.client.libvirt.preparation import prepare
from vmloop.client.libvirt.virsh import Translated

from ..fakes.recorded_libvirt import BARE


def told_of(inner: str) -> dict[str, str]:
    root = read_domain(f"<domain type='kvm'><name>a</name>{inner}</domain>".encode(), "here")
    return {note.what: note.why for note in notes_of_domain(root)}


def prepared(inner: str) -> tuple[Element, dict[str, str]]:
    """What libvirt is given, and the notes of that."""
    root = read_domain(f"<domain type='kvm'><name>a</name><uuid>12-34</uuid>{inner}</domain>".encode(), "here")
    found = prepare(root, "a")
    return fromstring(found.xml), {note.what: note.why for note in found.notes}


@pytest.mark.parametrize(
    ("inner", "what", "word"),
    [
        ("<memoryBacking><locked/></memoryBacking>", "memoryBacking locked", "LimitMEMLOCK="),
        ("<cpu mode='host-model'/>", "cpu host-model", "at each start"),
        ("<vcpu placement='auto'>2</vcpu>", "placement auto", "numad"),
        ("<devices><hostdev type='mdev'/></devices>", "hostdev 1", "mdevctl"),
        ("<devices><hostdev type='pci'/></devices>", "hostdev 1", "vfio-pci"),
        ("<devices><hostdev type='usb'/></devices>", "hostdev 1", "/dev/bus/usb"),
        ("<devices><hostdev type='scsi'/></devices>", "hostdev 1", "/dev/sgN"),
        ("<devices><disk type='nvme'><target dev='vda'/></disk></devices>", "disk vda nvme", "vfio-pci"),
        ("<devices><serial type='stdio'/></devices>", "serial 1 stdio", "qemu.log"),
        ("<devices><graphics type='sdl'/></devices>", "graphics 1 (sdl)", "DISPLAY"),
    ],
)
def test_what_libvirt_did_for_it_is_told(inner: str, what: str, word: str) -> None:
    found = told_of(inner)
    assert list(found) == [what]
    assert word in found[what]


@pytest.mark.parametrize(
    "inner",
    [
        "<memoryBacking><nosharepages/></memoryBacking>",
        "<cpu mode='host-passthrough'/>",
        "<vcpu placement='static'>2</vcpu>",
        "<devices><disk type='file'><target dev='vda'/></disk></devices>",
        "<devices><serial type='file'/><graphics type='vnc' port='5901'/></devices>",
    ],
)
def test_what_qemu_does_by_itself_is_not(inner: str) -> None:
    assert told_of(inner) == {}


def test_a_console_that_is_the_serial_port_by_another_name_is_told_once() -> None:
    port = "<target type='{}' port='0'/>"
    serial = f"<serial type='pty'>{port.format('isa-serial')}</serial>"
    same, other = (f"<console type='pty'>{port.format(kind)}</console>" for kind in ("serial", "virtio"))
    assert list(told_of(f"<devices>{serial}{same}</devices>")) == ["serial 1"]
    assert list(told_of(f"<devices>{serial}{other}</devices>")) == ["serial 1", "console 1"]


def test_a_usb_device_that_is_named_by_its_place_may_move() -> None:
    found = told_of("<devices><hostdev type='usb'><source><address bus='1' device='2'/></source></hostdev></devices>")
    assert list(found) == ["hostdev 1", "hostdev 1 address"]


# -- what libvirt is given ----------------------------------------------------------------------------------------------------


def test_what_a_helper_served_is_told_with_the_arguments_that_take_its_place() -> None:
    _, found = prepared(
        "<devices><tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
        "<tpm model='tpm-tis'><backend type='passthrough'><device path='/dev/tpm1'/></backend></tpm>"
        "<filesystem><driver type='virtiofs'/><source dir='/srv/a'/><target dir='share'/></filesystem></devices>"
    )
    assert "/var/lib/libvirt/swtpm/12-34/tpm2" in found["tpm tpm-crb"]
    assert "-device tpm-crb,tpmdev=tpm0" in found["tpm tpm-crb"]
    assert "-tpmdev passthrough,id=tpm0,path=/dev/tpm1 -device tpm-tis,tpmdev=tpm0" in found["tpm tpm-tis"]
    assert "/srv/a" in found["filesystem share"]
    assert "tag=share" in found["filesystem share"]


def test_libvirt_need_not_ask_numad() -> None:
    given, _ = prepared(
        "<vcpu placement='auto' current='1'>2</vcpu>"
        "<numatune><memory mode='strict' placement='auto'/><memnode cellid='0' nodeset='0'/></numatune>"
    )
    assert given.find("vcpu").attrib == {"current": "1"}  # type: ignore[union-attr]
    assert [each.tag for each in given.findall("numatune/*")] == ["memnode"]


def test_a_helper_that_the_operator_runs_is_not_taken_for_libvirts() -> None:
    given, found = prepared(
        "<devices><tpm model='tpm-crb'><backend type='external'><source path='/srv/tpm.sock'/></backend></tpm>"
        "<filesystem><driver type='virtiofs'/><source socket='/srv/fs.sock'/><target dir='share'/></filesystem></devices>"
    )
    assert given.findall("devices/*") == []
    assert "path=/srv/tpm.sock" in found["tpm tpm-crb"]
    assert "as an fd" not in found["tpm tpm-crb"]
    assert "path=/srv/fs.sock" in found["filesystem share"]
    assert "virtiofsd" not in found["filesystem share"]


def test_firmware_that_is_named_and_chosen_is_only_named() -> None:
    given, _ = prepared(
        "<os firmware='efi'><firmware><feature name='secure-boot' enabled='no'/></firmware>"
        "<loader type='pflash'>/usr/share/OVMF/OVMF_CODE.fd</loader></os>"
    )
    system = given.find("os")
    assert system is not None
    assert (system.attrib, [each.tag for each in system]) == ({}, ["loader"])
    given, _ = prepared("<os firmware='efi'><firmware/><loader stateless='yes'/></os>")
    system = given.find("os")
    assert system is not None
    assert (system.attrib, [each.tag for each in system]) == ({"firmware": "efi"}, ["firmware", "loader"])


@pytest.mark.parametrize(
    ("answer", "made"),
    [
        (
            '{"driver":"usb-host","hostdevice":"/dev/bus/usb/999/001","id":"hostdev0"}',
            '{"driver":"usb-host","vendorid":4176,"productid":1031,"id":"hostdev0"}',
        ),
        ("usb-host,hostbus=999,hostaddr=1,id=hostdev0", "usb-host,vendorid=4176,productid=1031,id=hostdev0"),
        ("usb-host,hostbus=1,hostaddr=1,id=hostdev0", "usb-host,hostbus=1,hostaddr=1,id=hostdev0"),
    ],
)
def test_a_usb_device_by_vendor_and_product_is_looked_for_by_qemu(answer: str, made: str) -> None:
    given: list[bytes] = []

    def translate(xml: bytes) -> Translated:
        given.append(xml)
        return Translated(f"/bin/qemu -device {shlex.quote(answer)}", "")

    ids = "<vendor id='0x1050'/><product id='0407'/>"
    xml = BARE.replace(
        b"</domain>",
        f"<devices><hostdev type='usb'><source>{ids}</source></hostdev></devices></domain>".encode(),
    )
    found = import_domain(xml, "x", translate, exists=lambda _: True)
    assert found.definition.qemu.args == ["-device", made]
    source = fromstring(given[0]).find("devices/hostdev/source")
    assert source is not None
    assert [(each.tag, each.attrib) for each in source] == [("address", {"bus": "999", "device": "1"})]
    assert any("1050:0407" in note.why for note in found.notes)


@pytest.mark.parametrize(
    "source",
    [
        "<vendor id='0x1050'/><product id='0x0407'/><address bus='1' device='2'/>",
        "<vendor id='yubico'/><product id='0x0407'/>",
        "<vendor id='0x1050'/>",
    ],
)
def test_any_other_usb_device_is_given_to_libvirt_as_it_is(source: str) -> None:
    given, _ = prepared(f"<devices><hostdev type='usb'><source>{source}</source></hostdev></devices>")
    place = given.find("devices/hostdev/source")
    assert place is not None
    assert fromstring(f"<source>{source}</source>")[0].attrib == place[0].attrib
    assert len(fromstring(f"<source>{source}</source>")) == len(place)


@pytest.mark.parametrize(
    ("inner", "command"),
    [
        ("<devices><disk><iotune/></disk></devices>", "block_set_io_throttle id=… with the qdev of query-block"),
        ("<devices><graphics type='vnc' passwd='x'/></devices>", "set_password protocol=vnc password=…"),
        ("<devices><graphics type='spice' passwd='x'/></devices>", "set_password protocol=spice password=…"),
        (
            "<devices><memballoon><stats period='5'/></memballoon></devices>",
            "qom-set path=/machine/peripheral/balloon0 property=guest-stats-polling-interval value=SECONDS",
        ),
    ],
)
def test_what_libvirt_set_through_the_monitor_is_told_with_the_command_that_sets_it(inner: str, command: str) -> None:
    assert [why.endswith(f"vmloop qmp NAME {command}") for why in told_of(inner).values()] == [True]
