# SPDX-License-Identifier: Apache-2.0
"""Packs the test guest's initramfs from what Debian's packages installed here; called by image.py.

The archive is written directly in the kernel's own format (newc), uncompressed: the guest unpacks it under TCG, where inflating costs more
than reading. Neither root nor a directory to stage it in is needed.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import BinaryIO, Final

HERE: Final = Path(__file__).parent
MODULES: Final = Path("/lib/modules")
PROGRAM_PATH: Final = (
    f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # a user's PATH often lacks where qemu-ga and modprobe are
)

# ext4 is built into the cloud kernel. evdev and button: the power button; pvpanic-pci: GUEST_PANICKED.
WANTED_MODULES: Final = ("virtio_pci", "virtio_console", "virtio_blk", "evdev", "button", "pvpanic-pci")

# Our own files: where they go in the guest.
SCRIPTS: Final = {"init": "init", "shutdown": "sbin/shutdown", "trouble": "bin/trouble"}

DIRECTORIES: Final = ("bin", "sbin", "data", "dev", "lib", "lib/modules", "proc", "run", "sys", "tmp", "etc")


class MissingPart(Exception):
    """A Debian package that the guest is made from is not installed; the message names it."""


class Archive:
    """A newc cpio archive that is being written: each entry a header of 110 ASCII bytes, name and content padded to 4 bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._written: set[str] = set()

    def directory(self, name: str) -> None:
        """An empty directory."""
        self._entry(name, stat.S_IFDIR | 0o755, b"")

    def link(self, name: str, target: str) -> None:
        """A symbolic link."""
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def file(self, name: str, content: bytes) -> None:
        """An executable file; the directories above it are made as needed."""
        for parent in reversed(Path(name).parents[:-1]):
            self.directory(str(parent))
        self._entry(name, stat.S_IFREG | 0o755, content)

    def end(self) -> None:
        """The entry that ends every archive."""
        self._entry("TRAILER!!!", 0, b"")

    def _entry(self, name: str, mode: int, content: bytes) -> None:
        if name in self._written:
            return
        self._written.add(name)
        encoded = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, four device numbers, length of the name, no checksum
        fields = (len(self._written), mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._file.write(_padded(header + encoded) + _padded(content))


def kernel() -> Path:
    """The newest cloud kernel whose modules are here too. Raises `MissingPart`."""
    found = [path for path in Path("/boot").glob("vmlinuz-*-cloud-amd64") if (MODULES / _version(path)).is_dir()]
    if not found:
        raise MissingPart("no kernel for the test guest: install linux-image-cloud-amd64")
    newest = max(found, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])
    if not os.access(newest, os.R_OK):
        raise MissingPart(f"{newest} cannot be read by this user")
    return newest


def parts(kernel_path: Path) -> dict[str, Path]:
    """Every file of the machine's that is packed, by its name in the guest. Raises `MissingPart`."""
    agent, busybox = find_program("qemu-ga", "qemu-guest-agent"), find_program("busybox", "busybox-static")
    found = {"bin/busybox": busybox, "sbin/qemu-ga": agent}
    found |= {str(library).lstrip("/"): library for library in _libraries(agent)}
    found |= {f"lib/modules/{module.name}": module for module in _modules(_version(kernel_path))}
    return found


def pack(kernel_path: Path, file: BinaryIO) -> None:
    """Write the initramfs. Raises `MissingPart`."""
    archive = Archive(file)
    for name in DIRECTORIES:
        archive.directory(name)
    for name, path in parts(kernel_path).items():
        archive.file(name, path.read_bytes())
    archive.file(
        "lib/modules/order", "".join(f"{module.name}\n" for module in _modules(_version(kernel_path))).encode()
    )
    for name, place in SCRIPTS.items():
        archive.file(place, (HERE / name).read_bytes())
    archive.file("etc/os-release", b'ID=vmloop-test-guest\nNAME="vmloop test guest"\n')
    for applet in subprocess.check_output([find_program("busybox", "busybox-static"), "--list"], text=True).split():
        archive.link(f"bin/{applet}", "busybox")
    archive.end()


def find_program(name: str, package: str) -> Path:
    """A program's path. Raises `MissingPart` with the name of its package."""
    found = shutil.which(name, path=PROGRAM_PATH)
    if found is None:
        raise MissingPart(f"no {name} for the test guest: install {package}")
    return Path(found)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _version(kernel_path: Path) -> str:
    return kernel_path.name.removeprefix("vmlinuz-")


def _libraries(program: Path) -> list[Path]:
    """Shared libraries and the loader, at the paths where the loader looks for them."""
    listed = subprocess.check_output(["ldd", program], text=True)
    return [Path(path) for path in re.findall(r"(?:=> |^\s+)(/\S+) \(", listed, re.MULTILINE)]


def _modules(version: str) -> list[Path]:
    """The wanted modules and what they depend on, in an order in which they can be inserted."""
    modprobe = find_program("modprobe", "kmod")
    order: dict[Path, None] = {}
    for name in WANTED_MODULES:
        shown = subprocess.run([modprobe, "-S", version, "-D", name], capture_output=True, text=True, check=False)
        if shown.returncode:
            raise MissingPart(f"kernel {version} has no module {name} for the test guest: {shown.stderr.strip()}")
        order |= dict.fromkeys(
            Path(line.split()[1]) for line in shown.stdout.splitlines() if line.startswith("insmod ")
        )
    return list(order)
