# SPDX-License-Identifier: Apache-2.0
"""What in QEMU's arguments belongs to libvirt: its monitor, its secrets, its directories, its fds. Pure; used by takeover.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from .argv import Option, Properties, properties_of

GUEST_AGENT: Final = "org.qemu.guest_agent.0"

# libvirt's own directories, of the system's and of users' daemons. Variables of firmware (nvram) and images are files to keep.
_DIRECTORIES: Final = re.compile(
    r"(?:/var)?/run/libvirt/|/var/lib/libvirt/(?:qemu/(?!nvram/|save/|dump/)|swtpm/)|/.*/libvirt/(?:qemu/(?!nvram/)|common/|virtqemud)"
)
_HUGEPAGES: Final = re.compile(r"(/.+?)/libvirt/qemu/.+")
_FD_KEYS: Final = ("fd", "fds", "vhostfd", "vhostfds", "vhost-fd", "sock-fd")
_OPENED_BY_LIBVIRT: Final = "/dev/fdset/"


def in_libvirts_place(own_directory: str) -> Callable[[str], bool]:
    """Whether a path lies in a directory of libvirt's; `own_directory` is the one that it was given for this import, or empty."""

    def check(path: str) -> bool:
        mine = bool(own_directory) and (path == own_directory or path.startswith(own_directory + "/"))
        return mine or _DIRECTORIES.match(path) is not None

    return check


def is_agent_port(option: Option, properties: Properties) -> bool:
    return option.name == "-device" and properties.text("name") == GUEST_AGENT and bool(properties.text("chardev"))


def is_master_key(option: Option, properties: Properties, theirs: Callable[[str], bool]) -> bool:
    return option.name == "-object" and properties.text("qom-type") == "secret" and theirs(properties.text("file"))


def secret_id(option: Option, properties: Properties) -> str:
    """The id of a secret that only libvirt's master key opens; else empty."""
    sealed = option.name == "-object" and properties.text("qom-type") == "secret" and properties.text("keyid")
    return properties.text("id") if sealed else ""


def monitor_ids(options: list[Option], theirs: Callable[[str], bool]) -> frozenset[str]:
    """Ids of the character devices of libvirt's own monitor: as it has always called it, or in its directory."""
    behind_monitors = {properties_of(each).text("chardev") for each in options if each.name == "-mon"}
    ids = set()
    for option in options:
        if option.name == "-chardev":
            properties = properties_of(option)
            name = properties.text("id")
            if name in behind_monitors and (name == "charmonitor" or theirs(properties.text("path"))):
                ids.add(name)
    return frozenset(ids)


def without_fds(properties: Properties) -> tuple[Properties, list[str]]:
    """The properties without those that name a file descriptor of libvirt's, and their keys."""
    gone = [key for key in properties.values if key in _FD_KEYS]
    gone += [
        key
        for key, value in properties.values.items()
        if isinstance(value, str) and value.startswith(_OPENED_BY_LIBVIRT)
    ]
    if "logfile" in gone:
        gone.append("logappend")
    return (properties.without(*gone) if gone else properties), gone


def memory_directory(path: str, own_directory: str) -> str:
    """Where guest memory goes that was in a directory of libvirt's: the hugetlbfs around it, or the VM's own directory (`.`)."""
    found = _HUGEPAGES.fullmatch(path)
    if found is None or found[1].startswith("/var/lib") or (own_directory and path.startswith(own_directory)):
        return "."
    return found[1]
