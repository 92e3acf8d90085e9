# SPDX-License-Identifier: Apache-2.0
"""What a document's truth hangs on: the binary's file, its modules, vmloop, and the host. Used by cache.py and asking.py.

A document is as good as new while the same facts are found again. Looking costs a few system calls.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

import msgspec

from ... import __version__

_MICROCODE: Final = Path("/sys/devices/system/cpu/cpu0/microcode/version")
_CPUINFO: Final = Path("/proc/cpuinfo")
_KVM: Final = Path("/dev/kvm")
# Whether guests may use KVM themselves; each module has its own name for it.
_NESTED: Final = tuple(
    Path(f"/sys/module/{module}/parameters/nested") for module in ("kvm_intel", "kvm_amd", "kvm_hv", "kvm")
)
_MAX_FACT: Final = 4096  # bytes of a file in /sys or /proc that are read


class Stamp(msgspec.Struct, frozen=True):
    """The facts. Two that are equal are of a binary that answers the same."""

    path: str  # canonical
    device: int
    inode: int
    size: int
    mtime: int  # nanoseconds, as all times here
    ctime: int
    modules: dict[str, int]  # directory → its mtime; those that are there
    vmloop: str
    kvm: bool  # /dev/kvm can be opened
    kernel: str
    microcode: str
    nested: dict[str, str]


def stamp_of(path: str) -> Stamp:
    """The facts as they are now. Raises OSError if the binary cannot be looked at."""
    found = os.stat(path)
    kernel = os.uname()
    return Stamp(
        path=path,
        device=found.st_dev,
        inode=found.st_ino,
        size=found.st_size,
        mtime=found.st_mtime_ns,
        ctime=found.st_ctime_ns,
        modules=_modules(path),
        vmloop=__version__,
        kvm=_kvm_usable(),
        kernel=f"{kernel.release} {kernel.version} {kernel.machine}",
        microcode=_microcode(),
        nested={os.fspath(file): value for file in _NESTED if (value := _fact(file))},
    )


def _modules(path: str) -> dict[str, int]:
    """Where a QEMU installed under a prefix looks for its modules (configure --libdir and what distributions make of it)."""
    prefix = Path(path).parent.parent
    multiarch = getattr(sys.implementation, "_multiarch", "")
    places = [prefix / library / "qemu" for library in ("lib", "lib64", *([f"lib/{multiarch}"] if multiarch else []))]
    found = {}
    for place in places:
        try:
            found[os.fspath(place)] = place.stat().st_mtime_ns
        except OSError:
            continue  # it is not there, as most are not
    return found


def _kvm_usable() -> bool:
    try:
        os.close(os.open(_KVM, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _microcode() -> str:
    version = _fact(_MICROCODE)
    if version:
        return version
    lines = _fact(_CPUINFO).splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("microcode")), "")


def _fact(path: Path) -> str:
    """The beginning of a small file of the kernel's; "" where there is none."""
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FACT).decode("ascii", "replace").strip()
    except OSError:
        return ""
