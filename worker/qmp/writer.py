# SPDX-License-Identifier: Apache-2.0
"""Commands onto the socket, one at a time, with file descriptors beside them if they have any. Used by session.py.

The page says which command is being written: a worker killed just then leaves QEMU's parser inside an object, and its successor ends
that before it sends anything of its own.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterable

from ...common.page import Page, Word

log = logging.getLogger(__name__)


class CommandWriter:
    """The sending half of one connection. Never blocks: what the socket does not take waits, and `on_room` is called when it is gone."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, connection: socket.socket, page: Page, on_room: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._socket = connection
        self._words = page.words
        self._on_room = on_room
        self._rest = b""
        self._fds: tuple[int, ...] = ()
        self._qmp_id = 0

    @property
    def full(self) -> bool:
        """A command is half written; nothing else may be sent before its rest."""
        return bool(self._rest)

    @property
    def cut_command(self) -> int:
        """The id of the command inside which the worker before this one died, or 0. To be asked before the first `write`."""
        qmp_id: int = self._words[Word.SENDING]
        return qmp_id

    def begin(self) -> None:
        """For a fresh connection: nothing is half written."""
        self._words[Word.SENDING] = 0

    def announce(self, qmp_id: int) -> None:
        """A command is about to be entered as sent: until it is, a successor takes it for cut, and asks QEMU."""
        self._words[Word.SENDING] = qmp_id

    def write(self, text: bytes, qmp_id: int, fds: tuple[int, ...] = ()) -> None:
        """Send a command. `fds` go with its first byte and are closed here. The caller has seen that the writer is not `full`."""
        self._rest = text
        self._qmp_id = qmp_id
        self._fds = fds
        self._flush()

    def close(self) -> None:
        self._loop.remove_writer(self._socket)
        close_all(self._fds)
        self._fds = ()
        self._rest = b""

    def _flush(self) -> None:
        self._words[Word.SENDING] = self._qmp_id
        try:
            if self._fds:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self._fds))]
                sent = self._socket.sendmsg([self._rest], rights)
                close_all(self._fds)
                self._fds = ()
            else:
                sent = self._socket.send(self._rest)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            log.info("the monitor takes no more commands: %s", error)  # its end is read in order, by the reader
            self.close()
            return
        if sent < len(self._rest):
            self._rest = self._rest[sent:]
            self._loop.add_writer(self._socket, self._writable)
        else:
            self._rest = b""
            self._words[Word.SENDING] = 0

    def _writable(self) -> None:
        self._loop.remove_writer(self._socket)
        self._flush()
        if not self._rest:
            self._on_room()


def close_all(fds: Iterable[int]) -> None:
    """Close fds that were to be passed on."""
    for fd in fds:
        os.close(fd)


def end_connection(connection: socket.socket) -> None:
    """Close it for good. The zygote holds a duplicate: without the shutdown QEMU would go on serving a client that is not there."""
    with contextlib.suppress(OSError):  # the peer was quicker
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
