# SPDX-License-Identifier: Apache-2.0
"""Writing a state file so that a crash leaves the old or the new one, never half of either. Used by workers for vm.toml and run.json."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: temporary file, fsync, rename, fsync of the directory. Each file has one writer at a time.

    Raises OSError, which always names a file; then the old one is untouched, unless only the last step failed.
    """
    try:
        _write_whole(path, content)
    except OSError as error:
        if error.filename is None:  # of write and fsync: the kernel does not know how the file is called
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


def _write_whole(path: Path, content: bytes) -> None:
    # One name, so that a writer that is killed leaves one file at most: the next one writes over it.
    temporary = path.with_name(f".{path.name}.new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            os.unlink(temporary)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames and removals in a directory last."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def set_aside(path: Path) -> Path:
    """Move a file that cannot be read out of the way, next to its place; its new path, to be named in an error."""
    aside = path.with_name(f"{path.name}.damaged-{os.stat(path).st_mtime_ns}")
    os.rename(path, aside)
    return aside
