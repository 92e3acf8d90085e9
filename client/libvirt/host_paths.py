# SPDX-License-Identifier: Apache-2.0
"""Files that QEMU's arguments name: absolute, and there? Pure but for the question, which is passed in. Used by importing.py."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any, Final

from .argv import Option, properties_of
from .notes import Note, warning

# (option, key): the file must be there. An empty key: the whole value is the path.
_FILES: Final = {
    "-kernel": ("",),
    "-initrd": ("",),
    "-dtb": ("",),
    "-bios": ("",),
    "-blockdev": ("filename",),
    "-drive": ("file",),
    "-fsdev": ("path",),
    "-object": ("mem-path", "filename", "dir", "evdev"),
    "-device": ("romfile", "evdev", "hostdevice", "sysfsdev"),
}
_LOCAL_DRIVERS: Final = ("file", "host_device", "host_cdrom", "")  # of -blockdev whose `filename` is a file here
_PROTOCOL: Final = re.compile(r"[A-Za-z0-9+.-]+:")  # of -drive file=nbd://…, which names no file
_MADE_BY_QEMU: Final = ("path", "logfile")  # of -chardev: only the directory must be there
_OPENED: Final = ("serial", "parallel", "pipe", "tty", "parport")  # backends of -chardev whose `path` must be there
_SHARED_MEMORY: Final = "/dev/shm/"  # QEMU makes the file that it shares with others


def path_notes(binary: str, options: list[Option], exists: Callable[[str], bool]) -> list[Note]:
    """A warning for each path that is relative or not there."""
    notes = [*_look("qemu.binary", binary, exists)]
    for option in options:
        for path in _files(option):
            notes += _look(option.name, path, exists)
        if option.name == "-chardev":
            for path in _opened(option):
                notes += _look("-chardev", path, lambda path: exists(path) or exists(f"{path}.in"))
            for path in _made(option):
                notes += _look("the directory of -chardev", os.path.dirname(path), exists)
    return notes


def _look(what: str, path: str, exists: Callable[[str], bool]) -> Iterator[Note]:
    if not path.startswith("/"):
        yield warning(
            f"{what} {path[:200]}", "is no absolute path: QEMU looks from the VM's own directory (state/vms/NAME)"
        )
    elif not exists(path):
        yield warning(f"{what} {path[:200]}", "is not there, or may not be seen from here")


def _files(option: Option) -> Iterator[str]:
    keys = _FILES.get(option.name, ())
    if keys == ("",):
        yield option.value or ""
    elif keys:
        values = properties_of(option).values
        yield from (
            path
            for path in _found(values, keys)
            if path not in ("", ".") and not path.startswith(_SHARED_MEMORY) and not _PROTOCOL.match(path)
        )


def _opened(option: Option) -> Iterator[str]:
    """A device, a pipe (or two, .in and .out), the socket of another program: without it QEMU does not start."""
    properties = properties_of(option)
    backend, path = properties.text("backend"), properties.text("path")
    listens = properties.values.get("server", "off") in ("on", "yes", None)
    if path and (backend in _OPENED or (backend == "socket" and not listens and "reconnect" not in properties.values)):
        yield path


def _found(values: dict[str, Any], keys: tuple[str, ...]) -> Iterator[str]:
    """Also in drivers inside drivers, as -blockdev nests them."""
    pending = [values]
    while pending:
        each = pending.pop()
        pending += [value for value in each.values() if isinstance(value, dict)]
        if each.get("type") == "unix" and isinstance(each.get("path"), str):
            yield each["path"]  # the socket of a server of disks
        if each.get("driver", "") in _LOCAL_DRIVERS or "filename" not in each:
            yield from (each[key] for key in keys if isinstance(each.get(key), str))


def _made(option: Option) -> Iterator[str]:
    values = properties_of(option).values
    opened = set(_opened(option))
    for key in _MADE_BY_QEMU:
        path = values.get(key)
        if isinstance(path, str) and "/" in path and path not in opened:  # without one it is in the VM's own directory
            yield path
