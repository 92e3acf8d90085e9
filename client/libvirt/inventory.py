# SPDX-License-Identifier: Apache-2.0
"""What a domain's XML says and QEMU's arguments do not: what libvirt did itself, on the host or through the monitor. Used by importing.py.

Every element at the top and every device is either in a table here, with what becomes of it, or listed as unknown: nothing is dropped in
silence. Values of the XML that may be secret (passwords) are never repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final
from xml.etree.ElementTree import Element

from .domain_xml import QEMU_NAMESPACE, children, size_in_bytes
from .notes import Note, changed, left_out, warning

_CGROUP: Final = "libvirt put this into a cgroup; give the units of vmloop a slice, or set it by systemd-run"
_LOCKED: Final = (
    "the limit of locked memory, which libvirt raised, is yours to raise now (LimitMEMLOCK= of vmloop's service)"
)
_VFIO: Final = "libvirt gave the device to vfio-pci: that is yours now, and "
_UNKNOWN: Final = "vmloop does not know this element; look whether the arguments say the same"
_TO_COMMENT: Final = "a definition has no place for it; the file may hold a comment"

# Elements at the top: None if the arguments, or a key of the definition, say all of it; else why it is left out.
_TOP: Final[dict[str, str | None]] = {
    "name": None,
    "uuid": None,
    "genid": None,
    "memory": None,
    "maxMemory": None,
    "currentMemory": None,
    "memoryBacking": None,
    "numatune": None,
    "vcpu": None,
    "vcpus": None,
    "iothreads": None,
    "iothreadids": None,
    "defaultiothread": None,
    "os": None,
    "features": None,
    "cpu": None,
    "clock": None,
    "on_poweroff": None,
    "on_reboot": None,
    "on_crash": None,
    "pm": None,
    "sysinfo": None,
    "devices": None,
    "launchSecurity": None,
    "keywrap": None,
    f"{QEMU_NAMESPACE}commandline": None,
    f"{QEMU_NAMESPACE}override": None,
    f"{QEMU_NAMESPACE}capabilities": "it tells libvirt what to believe of QEMU, and has had its effect on the arguments",
    f"{QEMU_NAMESPACE}deprecation": "what libvirt does about deprecated features; QEMU's own option is -compat",
    "title": _TO_COMMENT,
    "description": _TO_COMMENT,
    "metadata": "data of the tools that made the domain",
    "memtune": _CGROUP,
    "blkiotune": _CGROUP,
    "cputune": "CPU shares, quotas and pinning were a cgroup's and taskset's; use the service's slice, or taskset on the threads "
    "that query-cpus-fast names",
    "resource": _CGROUP,
    "perf": "libvirt counted these events of the host's CPUs; perf(1) does that for a pid",
    "seclabel": "vmloop sets no labels of SELinux, AppArmor or file owners: QEMU runs as the user of the broker, with its label",
    "on_lockfailure": "vmloop has no lock manager",
    "bootloader": "of Xen",
    "bootloader_args": "of Xen",
    "idmap": "of containers",
}

# Devices: None if the arguments hold them.
_DEVICES: Final[dict[str, str | None]] = dict.fromkeys(
    (
        *(
            "emulator",
            "disk",
            "controller",
            "filesystem",
            "interface",
            "input",
            "hub",
            "redirdev",
            "redirfilter",
            "serial",
        ),
        *(
            "parallel",
            "console",
            "channel",
            "sound",
            "audio",
            "graphics",
            "video",
            "hostdev",
            "memballoon",
            "rng",
            "memory",
        ),
        *("panic", "shmem", "tpm", "watchdog", "smartcard", "nvram", "vsock", "iommu", "crypto", "pstore"),
    )
) | {"lease": "vmloop has no lock manager"}


def notes_of_domain(root: Element) -> list[Note]:
    """All that the arguments cannot say, but for the network cards (interfaces.py) and what preparation.py takes out."""
    found = [*_top(root), *_memory(root), *_processors(root), *_environment(root)]
    for device in root.findall("devices/*"):
        reason = _DEVICES.get(device.tag, _UNKNOWN)
        if reason is not None:
            found.append(left_out(device.tag[:64], reason))
    for check in (_disks, _graphics, _balloon, _host_devices, _channels):
        found += check(root)
    return found


def _top(root: Element) -> Iterator[Note]:
    for element in root:
        reason = _TOP.get(element.tag, _UNKNOWN)
        if reason is not None:
            yield left_out(element.tag.replace(QEMU_NAMESPACE, "qemu:")[:120], reason)


def _memory(root: Element) -> Iterator[Note]:
    now, most = root.find("currentMemory"), root.find("memory")
    if now is not None and most is not None and (_bytes(now) is None or _bytes(now) != _bytes(most)):
        yield left_out(
            "currentMemory",
            "libvirt's balloon took the rest after the start; the guest begins with all of it: vmloop qmp NAME balloon value=BYTES",
        )
    if root.find("numatune") is not None:
        yield left_out(
            "numatune", "the nodes are in the arguments where QEMU can bind memory; the cgroup's cpuset is not kept"
        )
    if root.find("memoryBacking/hugepages") is not None:
        yield warning(
            "memoryBacking hugepages", "libvirt made a directory of its own there; QEMU must be able to write to it"
        )
    if root.find("memoryBacking/locked") is not None:
        yield warning("memoryBacking locked", f"QEMU locks all of its memory: {_LOCKED}")


def _bytes(element: Element) -> int | None:
    return size_in_bytes(element.text or "", element.get("unit", "KiB"))


def _processors(root: Element) -> Iterator[Note]:
    cpu = root.find("cpu")
    if cpu is not None and cpu.get("mode") == "host-model":
        yield changed(
            "cpu host-model",
            "the model is the one of this host as it is now: libvirt looked anew at each start. Import on the host that will run it",
        )
    vcpu = root.find("vcpu")
    if vcpu is not None and vcpu.get("cpuset"):
        yield left_out("vcpu cpuset", "pinning was a cgroup's: set AllowedCPUs of the service's slice")
    if any(each is not None and each.get("placement") == "auto" for each in (vcpu, root.find("numatune/memory"))):
        yield left_out(
            "placement auto", "libvirt asked numad where to run it: choose CPUs and nodes for the service's slice"
        )
    if any(each.get("hotpluggable") == "yes" and each.get("enabled") == "yes" for each in root.findall("vcpus/vcpu")):
        yield left_out(
            "vcpus", "those that can be unplugged were added by libvirt after the start: vmloop qmp NAME device_add"
        )


def _environment(root: Element) -> Iterator[Note]:
    for _, variable in children(root, f"{QEMU_NAMESPACE}commandline/{QEMU_NAMESPACE}env"):
        yield left_out(
            f"qemu:env {variable.get('name', '')[:64]}",
            "QEMU gets the environment of vmloop's service: set it there if QEMU needs it",
        )


def _disks(root: Element) -> Iterator[Note]:
    for number, disk in children(root, "devices/disk"):
        target = disk.find("target")
        name = f"disk {target.get('dev') if target is not None else number}"
        if disk.find("iotune") is not None:
            yield left_out(
                f"{name} iotune",
                "libvirt set it after each start: vmloop qmp NAME block_set_io_throttle id=… with the qdev of query-block",
            )
        if disk.get("type") == "nvme":
            yield warning(f"{name} nvme", _VFIO + _LOCKED)
        if disk.find("transient") is not None:
            yield warning(
                f"{name} transient",
                "libvirt wrote to an overlay that it threw away: now the image itself is written to",
            )
        if any(source.get("startupPolicy") for source in disk.findall("source")):
            yield left_out(
                f"{name} startupPolicy", "a missing file was left out by libvirt; QEMU will not start without it"
            )
        if any(found.tag in ("auth", "encryption") for found in disk.iter()):
            yield warning(f"{name} secrets", "libvirt kept them; see the secret objects that were left out")
        managed = disk.find("source/reservations")
        if managed is not None and managed.get("managed") == "yes":
            yield warning(
                f"{name} reservations", "libvirt started qemu-pr-helper for it: start one and name its socket"
            )
        if disk.find("mirror") is not None:
            yield left_out(f"{name} mirror", "the copy under way; begin it anew with vmloop qmp NAME blockdev-mirror")


def _graphics(root: Element) -> Iterator[Note]:
    for number, graphics in children(root, "devices/graphics"):
        name = f"graphics {number} ({graphics.get('type', '')[:16]})"
        if graphics.get("passwd"):
            yield left_out(
                f"{name} passwd",
                "libvirt set it after each start; until you do nobody gets in: "
                f"vmloop qmp NAME set_password protocol={'spice' if graphics.get('type') == 'spice' else 'vnc'} password=…",
            )
        if graphics.get("autoport") == "yes" or graphics.get("port") == "-1":
            yield changed(
                f"{name} autoport",
                "libvirt chose a free port at each start; the argument names one: change it for a second VM",
            )
        if graphics.get("type") == "sdl":
            yield warning(name, "QEMU opens a window: vmloop's service needs DISPLAY and XAUTHORITY in its environment")
        if any(listen.get("type") == "network" for listen in graphics.findall("listen")):
            yield changed(
                f"{name} listen",
                "the address of libvirt's network at that time; look whether the argument names the right one",
            )


def _balloon(root: Element) -> Iterator[Note]:
    if root.find("devices/memballoon/stats") is not None:
        yield left_out(
            "memballoon stats",
            "libvirt set the period after the start: vmloop qmp NAME qom-set "
            "path=/machine/peripheral/balloon0 property=guest-stats-polling-interval value=SECONDS",
        )


_HOST_DEVICES: Final = {
    "pci": _VFIO + _LOCKED,
    "mdev": f"the mediated device must be there before the start (mdevctl), QEMU's user may open /dev/vfio; {_LOCKED}",
    "usb": "QEMU's user must be allowed to open the device in /dev/bus/usb",
    "scsi": "QEMU's user must be allowed to open /dev/sgN, whose number changes from boot to boot",
}


def _host_devices(root: Element) -> Iterator[Note]:
    for number, device in children(root, "devices/hostdev"):
        advice = _HOST_DEVICES.get(device.get("type", ""))
        if advice is not None:
            yield warning(f"hostdev {number}", advice)
        if device.get("type") == "usb" and device.find("source/address") is not None:
            yield warning(
                f"hostdev {number} address", "its number on the bus is another each time that it is plugged in"
            )


def _channels(root: Element) -> Iterator[Note]:
    for kind in ("serial", "parallel", "console", "channel"):
        for number, port in children(root, f"devices/{kind}"):
            target = port.find("target")
            if kind == "console" and target is not None and target.get("type") == "serial":
                continue  # another name for the first serial port
            if port.get("type") == "stdio":
                yield warning(
                    f"{kind} {number} stdio",
                    "QEMU runs without a terminal: the guest's words go into qemu.log, and nothing can be typed",
                )
            if port.get("type") == "pty":
                yield changed(
                    f"{kind} {number}",
                    "virsh console is not there: vmloop qmp NAME query-chardev names its terminal, for screen or socat",
                )
