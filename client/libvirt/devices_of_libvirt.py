# SPDX-License-Identifier: Apache-2.0
"""What in QEMU's arguments belongs to libvirt: its monitor, its secrets, its directories, its fds. Pure; used by takeover.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from .argv import Option, Properties, properties_of

GUEST_AGENT: Final = "org.qemu.guest_agent.0"

# libvirt's own directories, of the system's daemon and of users': what it puts there is gone with the run. Variables of firmware, saved
# states, dumps and logs are files to keep.
_DIRECTORIES: Final = re.compile(
    r"(?:/var)?/run/(?:user/[0-9]+/)?libvirt/"
    r"|(?:/var/lib|/.*/\.config|/.*/\.cache)/libvirt/(?:qemu/(?!nvram/|save/|dump/|snapshot/)|swtpm/)"
)
# A directory for one domain's memory in a hugetlbfs, wherever that is mounted; older versions had one for all.
_HUGEPAGES: Final = re.compile(r"(/.+?)/libvirt/qemu(?:/-?[0-9]+-[^/]+)?/?")
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


def is_memory_directory(path: str, theirs: Callable[[str], bool]) -> bool:
    """Whether libvirt made it for guest memory."""
    return theirs(path) or _HUGEPAGES.fullmatch(path) is not None


def memory_directory(path: str, theirs: Callable[[str], bool]) -> str:
    """Where guest memory goes that was in such a directory: the hugetlbfs around it, or the VM's own directory (`.`)."""
    found = _HUGEPAGES.fullmatch(path)
    return found[1] if found is not None and not theirs(path) else "."
