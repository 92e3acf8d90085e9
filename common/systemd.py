# SPDX-License-Identifier: Apache-2.0
"""Telling a service manager how its service is (sd_notify(3)), and having fds stored by it (FDSTORE=1). Does nothing where there is none.

Used by the broker (its fds: broker/fd_store.py) and by `vmloop run`.
"""

from __future__ import annotations

import contextlib
import socket
from array import array
from collections.abc import MutableMapping


class Notifier:
    """Speaks to the socket that NOTIFY_SOCKET names. Never waits."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Takes NOTIFY_SOCKET out of `environ`: it is for this process, and not for what it starts."""
        address = environ.pop("NOTIFY_SOCKET", "")
        # A leading @ stands for the abstract namespace.
        self._address = "\0" + address[1:] if address.startswith("@") else address

    @property
    def there(self) -> bool:
        """Whether there is a service manager."""
        return bool(self._address)

    def ready(self, status: str) -> None:
        self._send(f"READY=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        self._send(f"STATUS={status}")

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
            with contextlib.suppress(OSError):  # a manager that does not read must not stop the service
                self.send(message)
