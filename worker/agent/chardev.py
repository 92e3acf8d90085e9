# SPDX-License-Identifier: Apache-2.0
"""Whether the guest has its agent's port open, ports that open and close all the time, connecting. Used by agent.py."""

from __future__ import annotations

import os
import re
import socket
from collections import deque
from typing import Any, Final

from ...common.definition import AGENT_ID

FLAP_OPENINGS: Final = 5  # so many openings
FLAP_SECONDS: Final = 10.0  # within so many seconds: the port is left alone
FLAP_HOLD: Final = 10.0  # for so many seconds

# QEMU 7.2: disconnected:unix:/path,server=on    older: disconnected:unix:/path,server
_FILENAME: Final = re.compile(r"(?:^|:)unix:(?P<path>.+?)(?:,server(?:=on)?)?$")


def is_port_open(chardevs: Any, socket_path: str) -> bool:
    """Whether the guest has the port behind this socket open, by a reply to query-chardev.

    A socket that is none of this QEMU's chardevs belongs to a qemu-ga that listens for itself: open.
    """
    entries = [entry for entry in chardevs if isinstance(entry, dict)] if isinstance(chardevs, list) else []
    for entry in entries:
        if _path_of(entry.get("filename")) == os.path.normpath(socket_path):
            return entry.get("frontend-open") is True
    # The filename of a chardev whose fd was passed may tell nothing; its label is vmloop's own.
    return all(entry.get("frontend-open") is True for entry in entries if entry.get("label") == AGENT_ID)


def _path_of(filename: Any) -> str:
    found = _FILENAME.search(filename) if isinstance(filename, str) else None
    return os.path.normpath(found["path"]) if found else ""


class Openings:
    """Tells a port that opens and closes all the time. No clock inside."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=FLAP_OPENINGS)

    def opened(self, now: float) -> None:
        """The port was opened, and a connection is made for it."""
        self._times.append(now)

    def flapping(self, now: float) -> bool:
        """Whether it was opened so often that the next opening should wait `FLAP_HOLD` seconds."""
        return len(self._times) == FLAP_OPENINGS and now - self._times[0] < FLAP_SECONDS


def connect(path: str) -> socket.socket:
    """A connection that is there at once or not at all: unix sockets either have room for it or refuse."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection
