# SPDX-License-Identifier: Apache-2.0
"""A spawner whose news are noted, and a zygote that says what the test wants. Used by the tests of spawner and handover."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any, Final

from vmloop import __version__
from vmloop.broker.fd_store import FdStore
from vmloop.broker.spawner import Spawner
from vmloop.common.names import VmName
from vmloop.common.process import ProcessGone, identify
from vmloop.common.settings import Settings
from vmloop.common.systemd import Notifier
from vmloop.common.zygote_wire import Hello, receive_packet, send_packet

from .zygote_process import SECONDS, Root, children, readable

WEB1: Final = VmName("web1")
WEB2: Final = VmName("web2")


class Notes:
    """What a spawner has told, and the spawner; ends all that was made."""

    def __init__(self, root: Root, version: str = __version__, environ: dict[str, str] | None = None) -> None:
        self.root = root
        self.told: list[tuple[Any, ...]] = []
        self.before = children()
        self.spawner = Spawner(
            root.paths,
            Settings(),
            on_forked=lambda name, pid: self.told.append(("forked", name, pid)),
            on_not_forked=lambda name, error: self.told.append(("not forked", name, error)),
            on_exit=lambda name, pid: self.told.append(("exit", name, pid)),
            on_new_zygote=lambda: self.told.append(("new zygote",)),
            on_renewed=lambda error: self.told.append(("renewed", error)),
            store=FdStore(Notifier(environ or {}), time.monotonic),
            version=version,
            clock=lambda: time.monotonic() + self.ahead,
        )
        self.ahead = 0.0

    def tick(self, ahead: float) -> None:
        """Let time pass, and tell the spawner."""
        self.ahead += ahead
        due = self.spawner.next_due()
        assert due is not None
        self.spawner.on_tick(time.monotonic() + self.ahead)

    def turn_until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert readable(self.spawner.fileno(), deadline - time.monotonic()), f"nothing more happens: {self.told}"
            self.spawner.turn()

    def next(self, count: int = 1) -> list[tuple[Any, ...]]:
        """What is told next."""
        self.turn_until(lambda: len(self.told) >= count)
        told, self.told = self.told, []
        return told

    def fork(self, name: VmName = WEB1) -> int:
        """A worker's pid."""
        self.spawner.fork(name)
        [(what, of, pid)] = self.next()
        assert (what, of) == ("forked", name)
        return int(pid)

    def zygotes(self) -> list[int]:
        """The zygotes that were started here and live; workers are their children."""
        return sorted(pid for pid in children() - self.before if lives(pid))

    def kill_zygote(self) -> None:
        [pid] = self.zygotes()
        pidfd = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        assert readable(pidfd)
        os.close(pidfd)


def lives(pid: int) -> bool:
    try:
        identify(pid)
    except ProcessGone:
        return False
    return True


class FakeZygote:
    """A listening socket in the zygote's place, that says what the test wants."""

    def __init__(self, root: Root) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(os.fspath(root.paths.zygote_socket))
        self.listener.listen()

    def accept(self) -> socket.socket:
        connection, _ = self.listener.accept()
        connection.settimeout(SECONDS)
        return connection


def greet(notes: Notes, zygote: socket.socket) -> None:
    """Answer a broker's greeting as a zygote of this version does."""
    assert receive_packet(zygote)[0] == Hello(__version__)
    send_packet(zygote, Hello(__version__, os.getpid(), 1))
    assert readable(notes.spawner.fileno())
    notes.spawner.turn()
