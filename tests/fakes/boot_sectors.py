# SPDX-License-Identifier: Apache-2.0
"""Whole guests of a few bytes, each of which does one thing to its machine, as images that the firmware boots from.

Used by the tests of the shipped handlers on real QEMU. The devices that are needed stand beside each.

    args = boots(tmp_path, PANIC, *PANIC_ARGS)
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

SECTOR: Final = 512
DISK_BYTES: Final = 1 << 20

# fa        cli
# ba 04 06  mov dx, 0x604      PM1a_CNT of a q35
# b8 00 20  mov ax, 0x2000     SLP_EN, type 0: soft off
# ef        out dx, ax
# f4        hlt
SWITCH_OFF: Final = bytes.fromhex("fa ba0406 b80020 ef f4")

# fa        cli
# ba 05 05  mov dx, 0x505      pvpanic
# b0 01     mov al, 1          the guest has panicked
# ee        out dx, al
# f4        hlt
PANIC: Final = bytes.fromhex("fa ba0505 b001 ee f4")
PANIC_ARGS: Final = ("-device", "pvpanic")

# As PANIC, but al = 2: the crash kernel is loaded
CRASHLOAD: Final = bytes.fromhex("fa ba0505 b002 ee f4")

# fa        cli
# ba 43 04  mov dx, 0x443      the ib700's timer
# b0 0f     mov al, 15         (15 - al) * 2 seconds: now
# ee        out dx, al
# eb fe     jmp $
HANG: Final = bytes.fromhex("fa ba4304 b00f ee ebfe")
HANG_ARGS: Final = ("-device", "ib700")

# eb fe     jmp $
SPIN: Final = bytes.fromhex("ebfe")


def boots(directory: Path, sector: bytes, *more: str) -> list[str]:
    """QEMU arguments for a machine that boots a sector, which is written to a disk in the directory."""
    disk = directory / "boot.img"
    disk.write_bytes((sector.ljust(SECTOR - 2, b"\0") + b"\x55\xaa").ljust(DISK_BYTES, b"\0"))
    return [*more, "-drive", f"file={disk},format=raw,if=ide"]
