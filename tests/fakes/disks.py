# SPDX-License-Identifier: Apache-2.0
"""Disks that refuse, without a mock: a limit on the size of files, and small or read-only file systems. For the tests of the journal."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes: a write across it is short, the next one fails with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def small_disk(at: Path, size: int) -> Iterator[None]:
    """A tmpfs of so many bytes on a directory; skips the test where none can be mounted, but not where CI promises that it can."""
    at.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "none", os.fspath(at)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        if os.environ.get("CI") == "true":
            pytest.fail(f"no tmpfs can be mounted, and CI must be able to: {done.stderr}")
        pytest.skip(f"no tmpfs can be mounted: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", os.fspath(at)], timeout=30, check=True)


def make_read_only(at: Path, read_only: bool = True) -> None:
    """Remount a `small_disk`; no file on it may be open for writing."""
    option = "ro" if read_only else "rw"
    subprocess.run(["mount", "-o", f"remount,{option}", os.fspath(at)], timeout=30, check=True)
