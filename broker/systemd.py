# SPDX-License-Identifier: Apache-2.0
"""The service manager: telling it how the broker is (sd_notify(3)), and its store of fds (FDSTORE=1, sd_listen_fds(3)).

Does nothing where there is none. Used by __main__.py; the store by fd_store.py.
"""

from __future__ import annotations

import contextlib
import os
import socket
from array import array
from collections.abc import MutableMapping
from typing import Final

# sd_listen_fds(3): the first fd that a service manager passes.
LISTEN_FDS_START: Final = 3


class Notifier:
    """Speaks to the socket that NOTIFY_SOCKET names. Never waits."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Takes NOTIFY_SOCKET out of `environ`: it is for the broker, and not for what it starts."""
        address = environ.pop("NOTIFY_SOCKET", "")
        # A leading @ stands for the abstract namespace.
        self._address = "\0" + address[1:] if address.startswith("@") else address

    @property
    def there(self) -> bool:
        """Whether there is a service manager."""
        return bool(self._address)

    def ready(self, status: str) -> None:
        self._send(f"READY=1\nSTATUS={status}")

    def stopping(self, status: str) -> None:
        self._send(f"STOPPING=1\nSTATUS={status}")

    def store(self, name: str, fd: int) -> None:
        """Have a duplicate of an fd kept. FDPOLL=0: a connection whose peer has gone is kept too, for what it was still to be read.

        Raises OSError; BlockingIOError when the manager does not keep up.
        """
        self.send(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", fd)

    def unstore(self, name: str) -> None:
        """Have all fds of a name closed. Raises as `store`."""
        self.send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def send(self, message: str, fd: int | None = None) -> None:
        """One message, and an fd beside it. Raises OSError; BlockingIOError when the manager does not keep up."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))] if fd is not None else []
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.setblocking(False)
            notify.sendmsg([message.encode()], rights, 0, self._address)

    def _send(self, message: str) -> None:
        if self._address:
            with contextlib.suppress(OSError):  # a manager that does not read must not stop the broker
                self.send(message)


def take_passed_fds(environ: MutableMapping[str, str], pid: int) -> list[tuple[str, int]]:
    """The fds that a service manager has passed to this process, with their names, close-on-exec from now on.

    The variables are taken out of `environ`, so that no child believes them meant for it. What makes no sense is nothing passed.
    """
    meant_for, count, names = (environ.pop(key, "") for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if meant_for != str(pid) or not count.isascii() or not count.isdigit():
        return []
    named = names.split(":") if names else []
    passed = []
    for place in range(int(count)):
        fd = LISTEN_FDS_START + place
        try:
            os.set_inheritable(fd, False)
        except OSError:  # fewer are there than were announced
            break
        passed.append((named[place] if place < len(named) else "", fd))
    return passed
