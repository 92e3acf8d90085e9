# SPDX-License-Identifier: Apache-2.0
"""The test guest, ready to boot: `guest_image`, `guest_args`, `guest_disk`. For tests/system, tests/bench and deploy.

The image is packed once (0.2 s) and kept in .cache/guest under a key of all that goes into it; a change of any of it makes another one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from . import build

CACHE: Final = build.HERE.parents[1] / ".cache" / "guest"

# Each word saves time, or makes what is tested happen at once: no calibration of clocks that TCG has no drift in, no self-tests; a panic
# resets at once (and says so through pvpanic first); S3 is what guest-suspend-ram means.
COMMAND_LINE: Final = (
    "quiet panic=-1 nokaslr mitigations=off tsc=reliable no_timer_check lpj=4000000 "
    "rcupdate.rcu_expedited=1 cryptomgr.notests mem_sleep_default=deep"
)


class GuestImage(NamedTuple):
    """What QEMU boots."""

    kernel: Path
    initrd: Path


def guest_image() -> GuestImage:
    """The image, packed now if it is not there yet. Raises `MissingPart` with the name of the package that is not installed."""
    kernel = build.kernel()
    initrd = CACHE / f"{_key(kernel)}.cpio"
    if not initrd.exists():
        _make(kernel, initrd)
    return GuestImage(kernel, initrd)


def require_guest() -> GuestImage:
    """The image; skips the test on a machine that lacks a part of it, or fails it where CI promises that all are there."""
    try:
        return guest_image()
    except build.MissingPart as missing:
        if os.environ.get("CI") == "true":
            pytest.fail(str(missing))
        pytest.skip(str(missing))


def guest_args(
    image: GuestImage, *, disk: Path | None = None, memory: int = 256, console: Path | None = None, shell: bool = False
) -> list[str]:
    """QEMU's arguments for the guest, without monitor and agent port.

    disk: a raw image with ext4 (`guest_disk`), mounted on /data. memory: MiB, at least 160. console: a file for what the guest prints.
    shell: it prints to a serial port that the caller adds, and runs a shell there.
    """
    words = f"console=ttyS0 {COMMAND_LINE}" if console or shell else COMMAND_LINE
    words += " vmloop.shell" if shell else ""
    args = ["-machine", "q35,accel=tcg", "-cpu", "max", "-m", str(memory), "-nodefaults", "-display", "none"]
    args += ["-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", words, "-device", "pvpanic-pci"]
    if disk is not None:
        args += ["-drive", f"if=none,id=disk,format=raw,file={disk}", "-device", "virtio-blk-pci,drive=disk,id=disk0"]
    if console is not None:
        args += ["-serial", f"file:{console}"]
    return args


def guest_disk(path: Path, mebibytes: int = 8) -> Path:
    """Make a small raw image with an ext4 file system. Raises `MissingPart` without e2fsprogs."""
    program = build.find_program("mkfs.ext4", "e2fsprogs")
    with path.open("wb") as file:
        file.truncate(mebibytes << 20)
    subprocess.run([program, "-q", "-F", path], check=True)
    return path


def _key(kernel: Path) -> str:
    """Our own files by content, the machine's by path, size and time: a package that is upgraded changes these."""
    digest = hashlib.sha256()
    for path in (Path(build.__file__), *(build.HERE / name for name in build.SCRIPTS)):
        digest.update(path.read_bytes())
    for path in (kernel, *build.parts(kernel).values()):
        found = path.stat()
        digest.update(f"{path} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _make(kernel: Path, initrd: Path) -> None:
    """Whoever comes at the same time packs one too, and the last rename wins: they are the same."""
    CACHE.mkdir(parents=True, exist_ok=True)
    old = [path for path in CACHE.glob("*.cpio") if path != initrd]
    descriptor, name = tempfile.mkstemp(dir=CACHE, prefix="new-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            build.pack(kernel, file)
        os.rename(name, initrd)
    except BaseException:
        os.unlink(name)
        raise
    for path in old:
        with contextlib.suppress(FileNotFoundError):  # the other one removed it
            path.unlink()
