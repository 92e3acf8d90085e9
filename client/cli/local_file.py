# SPDX-License-Identifier: Apache-2.0
"""The host's side of `vmloop cp`: a file that is read, and one that appears whole or not at all. Used by cp.py."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from ...common.errors import BadRequest

STREAM: Final = "-"  # standard input or output


@contextlib.contextmanager
def reading(path: str) -> Iterator[tuple[BinaryIO, int | None]]:
    """The file and its size (None: not known), or standard input. `BadRequest` if it cannot be read."""
    if path == STREAM:
        yield sys.stdin.buffer, None
        return
    try:
        with Path(path).open("rb") as file:
            status = os.fstat(file.fileno())
            yield file, status.st_size if stat.S_ISREG(status.st_mode) else None
    except OSError as error:
        raise BadRequest(f"cannot read {path}: {error.strerror}") from error


@contextlib.contextmanager
def appearing(path: str) -> Iterator[BinaryIO]:
    """What is written becomes the file at `path` if the `with` ends well; else what was there stays.

    What is no regular file, a device or a pipe or standard output, is written to at once. `BadRequest` if that cannot be.
    """
    if path == STREAM:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    target = Path(os.path.realpath(path))  # a link stays one
    try:
        if target.exists() and not target.is_file():
            with target.open("wb") as file:
                yield file
        else:
            with _replacing(target) as file:
                yield file
    except OSError as error:
        raise BadRequest(f"cannot write {path}: {error.strerror}") from error


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    """A temporary file beside the target that takes its place at the end."""
    fd, name = tempfile.mkstemp(prefix=".vmloop-", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, _mode_for(target))
            yield file
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink()
        raise


def _mode_for(target: Path) -> int:
    """The mode of the file that is replaced, or that which a new one has."""
    try:
        return stat.S_IMODE(target.stat().st_mode) & 0o777
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask
