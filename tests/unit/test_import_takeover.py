# SPDX-License-Identifier: Apache-2.0
"""Single arguments of libvirt's on their way into a definition: what is taken over as it is, what moves, what goes."""

from __future__ import annotations

import pytest

from vmloop.client.libvirt.devices_of_libvirt import in_libvirts_place
from vmloop.client.libvirt.importing import Imported, import_domain
from vmloop.client.libvirt.notes import Kind
from vmloop.client.libvirt.virsh import Translated

from ..fakes.recorded_libvirt import BARE

OWN = "/tmp/vmloop-import-x"


def made(arguments: str) -> Imported:
    """Of a domain for which libvirt has these arguments; every file is there."""
    return import_domain(BARE, "x", lambda _: Translated(f"/bin/qemu {arguments}", OWN), exists=lambda _: True)


def args(found: Imported) -> str:
    return " ".join(found.definition.qemu.args)


def notes(found: Imported, kind: Kind) -> dict[str, str]:
    return {note.what: note.why for note in found.notes if note.kind is kind and note.what != "hooks"}


@pytest.mark.parametrize(
    "chardev",
    [
        "file,id=charserial0,path=/var/log/libvirt/qemu/a-serial.log",
        "file,id=charserial0,path=/run/libvirt/a.log",
        "pipe,id=charserial0,path=/var/lib/libvirt/qemu/a.pipe",
        "pty,id=charserial0,logfile=/var/log/libvirt/qemu/a.log,logappend=off",
        "socket,id=charserial0,path=/srv/libvirt/qemu/a.sock",
        "socket,id=charserial0,path=/srv/libvirt/qemu/a.sock,server=on,wait=off",
        "socket,id=charserial0,path=/var/log/libvirt/qemu/a.sock",
    ],
)
def test_a_serial_port_stays_where_it_is_unless_its_socket_was_libvirts_own(chardev: str) -> None:
    found = made(f"-chardev {chardev} -device isa-serial,chardev=charserial0,id=serial0")
    assert args(found) == f"-chardev {chardev} -device isa-serial,chardev=charserial0,id=serial0"
    assert notes(found, Kind.LEFT_OUT) == {}


def test_a_socket_in_a_directory_of_libvirts_moves_or_goes_with_its_device() -> None:
    own = made("-chardev socket,id=c,path=/run/user/1000/libvirt/qemu/a.sock,server=on -device isa-serial,chardev=c")
    assert args(own) == "-chardev socket,id=c,path=a.sock,server=on -device isa-serial,chardev=c"
    helper = made("-chardev socket,id=c,path=/run/libvirt/qemu/a.sock -device isa-serial,chardev=c")
    assert args(helper) == ""
    assert "/run/libvirt/qemu/a.sock" in notes(helper, Kind.LEFT_OUT)["-chardev c"]


@pytest.mark.parametrize(
    ("path", "theirs"),
    [
        ("/run/libvirt/qemu/x.sock", True),
        ("/var/run/libvirt/qemu/x.sock", True),
        ("/run/user/1000/libvirt/qemu/run/x.sock", True),
        ("/var/lib/libvirt/qemu/channel/target/x", True),
        ("/var/lib/libvirt/qemu/domain-1-a/monitor.sock", True),
        ("/var/lib/libvirt/swtpm/x", True),
        ("/home/a/.config/libvirt/qemu/lib/channel/x", True),
        ("/home/a/.cache/libvirt/qemu/x", True),
        (f"{OWN}/lib/x", True),
        ("/var/lib/libvirt/qemu/nvram/x", False),
        ("/var/lib/libvirt/qemu/save/x", False),
        ("/var/lib/libvirt/qemu/dump/x", False),
        ("/home/a/.config/libvirt/qemu/nvram/x", False),
        ("/home/a/.config/libvirt/qemu/save/x", False),
        ("/var/lib/libvirt/images/x", False),
        ("/var/log/libvirt/qemu/x.log", False),
        ("/srv/libvirt/qemu/x.sock", False),
        ("/srv/libvirt/common/x", False),
        (f"{OWN}yz/x", False),
    ],
)
def test_libvirts_own_directories_are_known_and_no_others_taken_for_them(path: str, theirs: bool) -> None:
    assert in_libvirts_place(OWN)(path) is theirs


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ("/dev/hugepages/libvirt/qemu/-1-a", "/dev/hugepages"),
        ("/mnt/huge 2M/libvirt/qemu/7-a/", "/mnt/huge 2M"),
        ("/dev/hugepages/libvirt/qemu", "/dev/hugepages"),
        (f"{OWN}/lib/qemu/ram/-1-a/pc.ram", "."),
        ("/var/lib/libvirt/qemu/ram/7-a/pc.ram", "."),
        ("/srv/libvirt/qemu/nvdimm.img", "/srv/libvirt/qemu/nvdimm.img"),
    ],
)
def test_guest_memory_leaves_libvirts_directories_and_only_those(given: str, place: str) -> None:
    found = made(f"-object 'memory-backend-file,id=m,mem-path={given}'")
    assert found.definition.qemu.args == ["-object", f"memory-backend-file,id=m,mem-path={place}"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("-vnc vnc=unix:/run/libvirt/qemu/1-a/vnc.sock,audiodev=a", "-vnc vnc=unix:vnc.sock,audiodev=a"),
        (f"-vnc unix:{OWN}/lib/vnc.sock", "-vnc unix:vnc.sock"),
        (f"-spice unix,addr={OWN}/lib/spice.sock,seamless=on", "-spice unix,addr=spice.sock,seamless=on"),
    ],
)
def test_a_screen_on_a_socket_of_libvirts_is_shown_in_the_vms_own_directory(given: str, kept: str) -> None:
    found = made(given)
    assert args(found) == kept
    assert (
        "state/vms/NAME"
        in notes(found, Kind.CHANGED)[f"socket {kept.partition('.sock')[0].split(':')[-1].split('=')[-1]}.sock"]
    )


@pytest.mark.parametrize(
    "argument",
    [
        "-vnc unix:/srv/a.sock",
        "-vnc 127.0.0.1:0,audiodev=a",
        "-spice port=5900,addr=127.0.0.1,disable-ticketing=on",
        "-spice unix,addr=/srv/spice.sock",
    ],
)
def test_a_screen_elsewhere_stays_where_it_is(argument: str) -> None:
    assert args(made(argument)) == argument


@pytest.mark.parametrize("ending", ["fd", "qcow2", "raw"])
def test_variables_of_firmware_get_a_lasting_place_whatever_their_format(ending: str) -> None:
    found = made(f"-blockdev driver=file,filename={OWN}/lib/qemu/nvram/x_VARS.{ending},node-name=v")
    path = f"/var/lib/libvirt/qemu/nvram/old_VARS.{ending}"
    assert args(found) == f"-blockdev driver=file,filename={path},node-name=v"
    assert path in notes(found, Kind.CHANGED)["os nvram"]


@pytest.mark.parametrize(
    ("given", "kept", "told"),
    [
        ("vhost-vsock-pci,id=v,guest-cid=0,bus=pci.0", "vhost-vsock-pci,id=v,guest-cid=3,bus=pci.0", True),
        ('\'{"driver":"vhost-vsock-pci","guest-cid":0}\'', '{"driver":"vhost-vsock-pci","guest-cid":3}', True),
        ("vhost-vsock-pci,id=v,guest-cid=7", "vhost-vsock-pci,id=v,guest-cid=7", False),
    ],
)
def test_a_vsock_whose_number_libvirt_chose_at_each_start_has_one(given: str, kept: str, told: bool) -> None:
    found = made(f"-device {given}")
    assert args(found) == f"-device {kept}"
    assert bool(notes(found, Kind.CHANGED)) is told
