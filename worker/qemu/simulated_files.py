# SPDX-License-Identifier: Apache-2.0
"""The files of a simulated guest, in memory: what guest-file-* opens, reads and writes, by the rules of qemu-ga and of C's streams.

Made by simulated_guest; its programs (simulated_programs) read the same files. Files survive a reset of the machine, handles do not.
There are a few directories and no way to make more.
"""

from __future__ import annotations

import errno
import os
import posixpath
import re
from typing import Final, NamedTuple

MAX_BYTES: Final = 64 << 20  # of all files together, holes included
MAX_FILES: Final = 1024
MAX_HANDLES: Final = 1024  # what a process may have open by default
FIRST_HANDLE: Final = 1000  # as qemu-ga counts

_DIRECTORIES: Final = frozenset({"/", "/bin", "/etc", "/home", "/root", "/tmp", "/usr", "/usr/bin", "/var", "/var/tmp"})
_MODE: Final = re.compile(r"[rwa](b?\+?|\+b)")


class ReadBytes(NamedTuple):
    """What a read gave, and whether it came to the end."""

    data: bytes
    eof: bool


class _Handle:
    __slots__ = ("appends", "content", "position", "readable", "writable")

    def __init__(self, content: bytearray, mode: str) -> None:
        self.content = content
        self.position = 0
        self.readable = "r" in mode or "+" in mode
        self.writable = "r" not in mode or "+" in mode
        self.appends = "a" in mode


def is_mode(mode: str) -> bool:
    """Whether qemu-ga knows a mode."""
    return _MODE.fullmatch(mode) is not None


class Files:
    """Paths with contents, and handles on them. Every method raises `OSError` with the errno that Linux has for it, but for unknown
    handles, which are a `KeyError`."""

    def __init__(self) -> None:
        self._contents: dict[str, bytearray] = {}
        self._handles: dict[int, _Handle] = {}
        self._next_handle = FIRST_HANDLE

    # -- by path --

    def exists(self, path: str) -> bool:
        """Whether there is a file or a directory; nothing has the empty path."""
        return bool(path) and (_absolute(path) in self._contents or _absolute(path) in _DIRECTORIES)

    def content(self, path: str) -> bytes:
        """A whole file."""
        return bytes(self._find(_absolute(path)))

    def _find(self, path: str) -> bytearray:
        content = self._contents.get(path)
        if content is None:
            raise _error(errno.EISDIR if path in _DIRECTORIES else errno.ENOENT)
        return content

    # -- by handle --

    def open(self, path: str, mode: str) -> int:
        """A new handle; the mode is one that `is_mode` knows."""
        if len(self._handles) >= MAX_HANDLES:
            raise _error(errno.EMFILE)
        if not path:
            raise _error(errno.ENOENT)
        absolute = _absolute(path)
        if mode[0] == "r" or absolute in self._contents or absolute in _DIRECTORIES:
            content = self._find(absolute)
        else:
            content = self._create(absolute)
        if mode[0] == "w":
            content.clear()
        number = self._next_handle
        self._next_handle += 1
        self._handles[number] = _Handle(content, mode)
        return number

    def _create(self, path: str) -> bytearray:
        parent = posixpath.dirname(path)
        if parent not in _DIRECTORIES:
            raise _error(errno.ENOTDIR if parent in self._contents else errno.ENOENT)
        if len(self._contents) >= MAX_FILES:
            raise _error(errno.ENOSPC)
        return self._contents.setdefault(path, bytearray())

    def read(self, number: int, count: int) -> ReadBytes:
        """Up to `count` bytes from the handle's position."""
        handle = self._handles[number]
        if not handle.readable:
            raise _error(errno.EBADF)
        data = bytes(handle.content[handle.position : handle.position + count])
        handle.position += len(data)
        return ReadBytes(data, len(data) < count)

    def write(self, number: int, data: bytes) -> None:
        """Write at the handle's position; a handle that appends does so at the end."""
        handle = self._handles[number]
        if not handle.writable:
            raise _error(errno.EBADF)
        if not data:
            return
        content = handle.content
        if handle.appends:
            handle.position = len(content)
        grows = max(0, handle.position + len(data) - len(content))
        if self.size() + grows > MAX_BYTES:
            raise _error(errno.ENOSPC)
        content.extend(bytes(max(0, handle.position - len(content))))
        content[handle.position : handle.position + len(data)] = data
        handle.position += len(data)

    def seek(self, number: int, offset: int, whence: int) -> int:
        """Move the handle's position; returns the new one."""
        handle = self._handles[number]
        start = {os.SEEK_SET: 0, os.SEEK_CUR: handle.position, os.SEEK_END: len(handle.content)}[whence]
        if not 0 <= start + offset < 2**63:
            raise _error(errno.EINVAL)
        handle.position = start + offset
        return handle.position

    def has(self, number: int) -> bool:
        """Whether there is such a handle."""
        return number in self._handles

    def close(self, number: int) -> None:
        """Give a handle back."""
        del self._handles[number]

    def close_all(self) -> None:
        """Forget every handle; numbers are not used again."""
        self._handles.clear()

    def size(self) -> int:
        """Bytes in all files."""
        return sum(map(len, self._contents.values()))


def _absolute(path: str) -> str:
    return posixpath.normpath(posixpath.join("/", path)).replace("//", "/")


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
