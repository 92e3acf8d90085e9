# SPDX-License-Identifier: Apache-2.0
"""From a domain to a definition, on libvirt's recorded answers: what is taken over, what is changed, and that the rest is listed."""

from __future__ import annotations

import re

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmloop.client.libvirt.argv import Properties, properties_of
from vmloop.client.libvirt.document import document
from vmloop.client.libvirt.importing import Imported, import_domain
from vmloop.client.libvirt.notes import Kind, Note
from vmloop.client.libvirt.virsh import Translated
from vmloop.common.definition import HandlersSection, definition_from_toml
from vmloop.common.errors import ConfigError

from ..fakes.recorded_libvirt import OWN_DIRECTORY, RECORDED, answer, domain, imported

EVERY = (*RECORDED, "old")
HERE = ("/bin/qemu", "/there", "/there/pipe.in")
THERE = ("/usr/bin/qemu-system-x86_64", "/srv/sample/desk.qcow2", "/srv/sample")


def values(found: Imported, option: str, **wanted: str) -> list[Properties]:
    """The properties of options of a name, by some of their values."""
    properties = [properties_of(each) for each in found.options if each.name == option]
    return [each for each in properties if all(each.text(key) == value for key, value in wanted.items())]


def told(found: Imported, kind: Kind) -> str:
    return "\n".join(f"{note.what}: {note.why}" for note in found.notes if note.kind is kind)


@pytest.mark.parametrize("name", EVERY)
def test_nothing_of_libvirts_own_is_left_in_the_arguments(name: str) -> None:
    text = " ".join(imported(name).definition.qemu.args)
    for word in (
        OWN_DIRECTORY,
        "charmonitor",
        "masterKey0",
        "vmloop-net",
        "/var/lib/libvirt/qemu/domain",
        "/run/libvirt",
    ):
        assert word not in text
    options = {option.name for option in imported(name).options}
    assert options.isdisjoint({"-S", "-no-shutdown", "-msg", "-pidfile", "-daemonize", "-add-fd", "-incoming", "-mon"})


@pytest.mark.parametrize("name", EVERY)
def test_the_file_reads_back_as_the_definition_and_holds_every_note(name: str) -> None:
    found = imported(name)
    text = document(found, f"{name}.xml")
    assert definition_from_toml(text, "here") == found.definition
    assert all(f"{note.what}: {note.why}" in text.decode() for note in found.notes)


@given(st.lists(st.text(max_size=20), max_size=3), st.text(max_size=20))
@example(["\x7f", "a'b\"c", '{"a":"\\\\"}', "\n"], "\x7f\r\n\x00")
def test_any_text_in_arguments_and_notes_makes_a_file_that_reads_back(arguments: list[str], text: str) -> None:
    clean = [word.encode("utf-8", "ignore").decode().replace("\0", "") for word in arguments]
    found = imported("old")
    options = [msgspec.structs.replace(found.options[0], name="-name", value=word) for word in clean]
    args = [word for option in options for word in option.words()]
    definition = msgspec.structs.replace(
        found.definition, qemu=msgspec.structs.replace(found.definition.qemu, args=args)
    )
    made = Imported(definition, options, [Note(Kind.LEFT_OUT, text, text)])
    assert definition_from_toml(document(made, text), "here") == definition


def test_machine_name_and_quoting_are_kept_as_they_are() -> None:
    found = imported("desk", there=THERE)
    args = found.definition.qemu.args
    assert args[args.index("-machine") + 1].startswith("pc-q35-7.2,")
    assert args[args.index("-append") + 1] == '-v console=ttyS0 "it\'s"'
    assert args[args.index("-name") + 1] == "guest=desk,debug-threads=on"
    assert values(found, "-blockdev", filename="/srv/sample/a,b c.iso")
    assert "-no-reboot" in args  # on_reboot destroy


def test_the_agents_channel_becomes_the_agents_section_and_others_stay() -> None:
    found = imported("desk")
    assert found.definition.agent.enabled
    assert not values(found, "-device", name="org.qemu.guest_agent.0")
    (other,) = values(found, "-device", name="org.other.0")
    (socket,) = values(found, "-chardev", id=other.text("chardev"))
    assert socket.text("path") == "org.other.0"  # in the VM's own directory
    assert not imported("cards").definition.agent.enabled


def test_what_the_host_or_the_monitor_did_is_listed() -> None:
    out = told(imported("desk"), Kind.LEFT_OUT)
    for what in (
        "title",
        "metadata",
        "currentMemory",
        "cputune",
        "vcpu cpuset",
        "seclabel",
        "disk vda iotune",
        "disk sda startupPolicy",
    ):
        assert re.search(rf"^{what}: .", out, re.MULTILINE), what
    for what in (
        "qemu:env TOKEN",
        "memballoon stats",
        "graphics 1 .vnc. passwd",
        "-qmp stdio",
        "-S",
        "-mon of libvirt",
    ):
        assert re.search(rf"^{what}: .", out, re.MULTILINE), what
    out = told(imported("firmware"), Kind.LEFT_OUT)
    for what in ("memtune", "numatune", "on_lockfailure", "lease", "filesystem shared", "tpm tpm-crb"):
        assert re.search(rf"^{what}: .", out, re.MULTILINE), what


def test_secrets_of_the_domain_are_never_told() -> None:
    text = document(imported("desk"), "desk.xml").decode()
    assert "geheim" not in text
    assert "hush" not in text
    assert "Zm9v" not in document(imported("old"), "old").decode()


def test_handlers_follow_what_the_domain_says() -> None:
    assert imported("desk").definition.handlers == HandlersSection(on_crash="dump", on_watchdog="dump")
    assert imported("cards").definition.handlers == HandlersSection(on_crash="restart", on_poweroff="restart")
    assert imported("firmware").definition.handlers == HandlersSection(on_crash="destroy")


def test_a_reboot_that_ends_the_guest_gives_way_to_a_restart() -> None:
    xml = domain("cards").replace(b"<on_crash>", b"<on_reboot>destroy</on_reboot><on_crash>")
    found = import_domain(xml, "x", lambda _: answer("cards"))
    assert "-no-reboot" not in found.definition.qemu.args
    assert "on_reboot destroy" in told(found, Kind.LEFT_OUT)


def test_a_clock_that_the_guest_may_set_does_not_begin_at_the_time_of_the_import() -> None:
    assert properties_of(next(o for o in imported("firmware").options if o.name == "-rtc")).values == {"base": "utc"}


@pytest.mark.parametrize(
    ("number", "driver", "backend"),
    [
        (0, "virtio-net-pci", "user,id=hostnet0"),
        (1, "e1000", None),
        (2, "virtio-net-pci", "bridge,id=hostnet2,br=br0"),
        (3, "rtl8139", None),
        (4, "virtio-net-pci", "vhost-user,id=hostnet4,chardev=charnet4"),
        (5, "virtio-net-pci-non-transitional", "socket,id=hostnet5,mcast=230.0.0.1:5558"),
        (6, "virtio-net-pci", "tap,id=hostnet6,ifname=tap7,script=no,downscript=no"),
    ],
)
def test_a_network_card_is_what_it_was_on_what_can_be_had(number: int, driver: str, backend: str | None) -> None:
    found = imported("cards")
    (card,) = values(found, "-device", id=f"net{number}")
    assert card.text("driver") == driver
    assert card.values.get("netdev") == (f"hostnet{number}" if backend else None)
    netdevs = [
        option.value
        for option in found.options
        if option.name == "-netdev" and f"id=hostnet{number}" in str(option.value)
    ]
    assert netdevs == ([backend] if backend else [])


def test_a_network_card_keeps_its_slot_its_address_and_its_place_in_the_boot_order() -> None:
    (first,) = values(imported("cards"), "-device", id="net0")
    assert (first.text("bus"), first.text("addr"), first.text("mac")) == ("pci.0", "0xb", "52:54:00:aa:bb:01")
    assert first.values["bootindex"] == 2
    slots = [each.values["addr"] for each in values(imported("cards"), "-device", bus="pci.0")]
    assert len(slots) == len(set(slots))


def test_a_network_without_a_stand_in_leaves_the_cable_out_and_says_what_to_do() -> None:
    out = told(imported("cards"), Kind.LEFT_OUT)
    assert "interface 2 (network) isolated: " in out
    assert "netdev=hostnet1" in out
    assert "interface 2 (network) filterref: " in out
    assert "interface 8 (hostdev): " in out


def test_the_sandbox_lets_qemu_start_the_bridge_helper_and_else_stays_shut() -> None:
    def sandbox(name: str) -> str:
        return next(str(option.value) for option in imported(name).options if option.name == "-sandbox")

    assert sandbox("cards") == "on,obsolete=deny,resourcecontrol=deny"
    assert "spawn=deny" in sandbox("desk")


def test_what_an_older_libvirt_passed_as_fds_or_kept_in_its_directories_is_gone_with_what_hangs_on_it() -> None:
    found = imported("old")
    assert not values(found, "-netdev")
    assert "netdev" not in values(found, "-device", id="net0")[0].values
    assert not values(found, "-tpmdev")
    assert not values(found, "-device", id="tpm0")
    assert values(found, "-chardev", id="charserial0")[0].values == {"backend": "pty", "id": "charserial0"}
    assert values(found, "-object", id="ram-node0")[0].text("mem-path") == "/dev/hugepages"
    assert "id=libvirt-1-storage-auth-secret0,file=FILE" in told(found, Kind.LEFT_OUT)
    assert "-nographic" not in found.definition.qemu.args


def test_a_path_that_is_not_there_is_warned_of_and_one_that_is_is_not() -> None:
    warnings = told(imported("desk", there=THERE), Kind.WARNING)
    assert "-kernel /srv/sample/vmlinuz: " in warnings
    assert "-blockdev /srv/sample/a,b c.iso: " in warnings
    assert "desk.qcow2" not in warnings
    assert "qemu.binary" not in warnings
    assert "qemu.binary /usr/bin/qemu-system-x86_64" in told(imported("desk"), Kind.WARNING)


@pytest.mark.parametrize(
    ("option", "warned"),
    [
        ("-drive file=nbd://host/disk,if=none", ""),
        ("-drive file=rbd:pool/image,if=none", ""),
        ("-drive file=disk.img,if=none", "-drive disk.img: is no absolute path"),
        ("-kernel vmlinuz", "-kernel vmlinuz: is no absolute path"),
        (
            '-blockdev \'{"driver":"qcow2","file":{"driver":"file","filename":"/no/disk"}}\'',
            "-blockdev /no/disk: is not there",
        ),
        ('-blockdev \'{"driver":"gluster","filename":"vol/disk"}\'', ""),
        (
            '-blockdev \'{"driver":"nbd","server":{"type":"unix","path":"/no/nbd.sock"}}\'',
            "-blockdev /no/nbd.sock: is not there",
        ),
        ('-blockdev \'{"driver":"nbd","server":{"type":"unix","path":"/there"}}\'', ""),
        ('-blockdev \'{"driver":"nbd","server":{"type":"inet","host":"a","port":"1"}}\'', ""),
        ("-blockdev driver=host_device,filename=/dev/nosuch", "-blockdev /dev/nosuch: is not there"),
        ("-chardev file,id=a,path=/no/log", "the directory of -chardev /no: is not there"),
        ("-chardev file,id=a,path=log", ""),
        ("-chardev serial,id=a,path=/dev/ttyS9", "-chardev /dev/ttyS9: is not there"),
        ("-chardev pipe,id=a,path=/no/pipe", "-chardev /no/pipe: is not there"),
        ("-chardev pipe,id=a,path=/there/pipe", ""),
        ("-chardev socket,id=a,path=/no/sock", "-chardev /no/sock: is not there"),
        ("-chardev socket,id=a,path=/there/sock,server=on", ""),
        ("-chardev socket,id=a,path=/there/sock,reconnect=1", ""),
        ("-object input-linux,id=a,evdev=/dev/input/no", "-object /dev/input/no: is not there"),
        ("-object memory-backend-file,id=a,mem-path=/dev/shm/made", ""),
        ("-device usb-host,hostdevice=/dev/bus/usb/001/009", "-device /dev/bus/usb/001/009: is not there"),
    ],
)
def test_files_are_looked_for_wherever_an_argument_names_one(option: str, warned: str) -> None:
    line = Translated(f"/bin/qemu {option}", "")
    found = import_domain(
        b"<domain type='kvm'><name>a</name></domain>", "x", lambda _: line, exists=lambda p: p in HERE
    )
    assert told(found, Kind.WARNING).startswith(warned)
    assert bool(told(found, Kind.WARNING)) is bool(warned)


def test_files_in_directories_of_libvirts_that_are_the_guests_own_are_named_elsewhere() -> None:
    found = imported("firmware")
    assert values(found, "-blockdev", filename="/var/lib/libvirt/qemu/nvram/firmware_VARS.fd")
    assert values(found, "-object", id="pc.ram")[0].text("mem-path") == "."
    assert "vhostfd" not in values(found, "-device", id="vsock0")[0].values


def test_hooks_of_the_host_are_listed_where_there_are_any() -> None:
    assert "hooks: " in told(imported("desk", there=("/etc/libvirt/hooks/qemu",)), Kind.LEFT_OUT)
    assert "hooks: " not in told(imported("desk"), Kind.LEFT_OUT)


def test_another_name_goes_to_libvirt_and_into_the_definition() -> None:
    given: list[bytes] = []

    def translate(xml: bytes) -> Translated:
        given.append(xml)
        return answer("desk")

    found = import_domain(domain("desk"), "desk.xml", translate, name="web2", autostart=True)
    assert (found.definition.name, found.definition.autostart) == ("web2", True)
    assert b"<name>web2</name>" in given[0]


def test_a_name_that_vmloop_cannot_have_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="--name"):
        import_domain(b"<domain type='kvm'><name>a b</name></domain>", "x", lambda _: answer("desk"))


def test_arguments_that_clash_with_vmloops_own_are_refused() -> None:
    line = Translated("/usr/bin/qemu -chardev null,id=vmloop-monitor", "")
    with pytest.raises(ConfigError, match="vmloop's own"):
        import_domain(b"<domain type='kvm'><name>a</name></domain>", "x", lambda _: line)
