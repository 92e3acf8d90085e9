# SPDX-License-Identifier: Apache-2.0
"""A service manager for one service, as far as sd_notify(3) and sd_listen_fds(3) go: it starts the service, and stores fds for it.

As systemd does: only the service's main process is heard; a descriptor of the same open file is stored once; with FDNAME= it has that name,
else "stored"; FDSTOREREMOVE=1 removes all of a name; above FileDescriptorStoreMax nothing more is stored; at the next start the fds are
passed from 3 on. It keeps FDPOLL=0 fds whatever happens to them; others it would watch, and refuses here.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Final

SECONDS: Final = 15.0
# Moves the fds that it was given to 3 and on, says so in the environment, and becomes the service.
_LAUNCHER: Final = """
import fcntl, os, sys
names, fds, argv = sys.argv[1], [int(fd) for fd in sys.argv[2].split(",") if fd], sys.argv[3:]
high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 200) for fd in fds]
for place, fd in enumerate(high):
    os.dup2(fd, 3 + place, inheritable=True)
if fds:
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=names)
os.execv(argv[0], argv)
"""


class ServiceManager:
    """Reads in a thread of its own. `said`: what the main process says beside the store; `refused`: what was not heeded, and why."""

    def __init__(self, directory: Path, store_max: int = 64, *, deaf: bool = False) -> None:
        """`deaf`: it reads nothing until `listen`."""
        self.path = directory / "notify"
        self.said: list[str] = []
        self.refused: list[str] = []
        self.main: subprocess.Popen[bytes] | None = None
        self._store: list[tuple[str, int]] = []
        self._max = store_max
        self._changed = threading.Condition()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(os.fspath(self.path))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._stop_read, self._stop_write = os.pipe()
        self._thread = threading.Thread(target=self._read, daemon=True)
        if not deaf:
            self.listen()

    def listen(self) -> None:
        self._thread.start()

    @property
    def names(self) -> list[str]:
        """Of what is stored."""
        with self._changed:
            return sorted(name for name, _ in self._store)

    def wait_for(self, names: list[str]) -> bool:
        """Whether exactly this is stored, soon."""
        with self._changed:
            return self._changed.wait_for(lambda: sorted(name for name, _ in self._store) == sorted(names), SECONDS)

    def add(self, name: str, fd: int) -> None:
        """Store an fd as if the service had asked for it."""
        with self._changed:
            self._store.append((name, os.dup(fd)))

    def start(self, argv: list[str], log: int) -> subprocess.Popen[bytes]:
        """Start the service with all that is stored for it."""
        with self._changed:
            fds = [fd for _, fd in self._store]
            names = ":".join(name for name, _ in self._store)
            self.main = subprocess.Popen(
                [sys.executable, "-c", _LAUNCHER, names, ",".join(map(str, fds)), *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=fds,
                process_group=0,
                env={**os.environ, "NOTIFY_SOCKET": os.fspath(self.path)},
            )
        return self.main

    def close(self) -> None:
        os.write(self._stop_write, b"x")
        if self._thread.is_alive():
            self._thread.join(SECONDS)
        for _, fd in self._store:
            os.close(fd)
        self._socket.close()
        os.close(self._stop_read)
        os.close(self._stop_write)
        self.path.unlink()

    def _read(self) -> None:
        while True:
            ready, _, _ = select.select([self._socket.fileno(), self._stop_read], [], [])
            if self._stop_read in ready:
                return
            data, ancillary, _, _ = self._socket.recvmsg(4096, 4096)
            fds: list[int] = []
            sender = 0
            for level, kind, body in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds += struct.unpack(f"{len(body) // 4}i", body)
                elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                    sender = struct.unpack("3i", body)[0]
            with self._changed:
                self._hear(data.decode(), fds, sender)
                self._changed.notify_all()

    def _hear(self, text: str, fds: list[int], sender: int) -> None:
        fields = dict(line.split("=", 1) for line in text.splitlines())
        name = fields.get("FDNAME", "stored")
        if self.main is None or sender != self.main.pid:
            self._refuse(f"process {sender} is not the main process: {text!r}", fds)
        elif fields.get("FDSTOREREMOVE") == "1":
            for _, fd in [kept for kept in self._store if kept[0] == name]:
                os.close(fd)
            self._store = [kept for kept in self._store if kept[0] != name]
        elif fields.get("FDSTORE") == "1":
            self._keep(fields, name, fds)
        else:
            self.said.append(text)

    def _keep(self, fields: dict[str, str], name: str, fds: list[int]) -> None:
        if not fds or fields.get("FDPOLL") != "0" or len(name) > 255 or ":" in name:
            self._refuse(f"{fields} with {len(fds)} fds", fds)
            return
        for fd in fds:
            if any(os.path.sameopenfile(fd, kept) for _, kept in self._store):
                os.close(fd)
            elif len(self._store) >= self._max:
                self._refuse(f"{name}: the store is full", [fd])
            else:
                self._store.append((name, fd))

    def _refuse(self, why: str, fds: list[int]) -> None:
        self.refused.append(why)
        for fd in fds:
            os.close(fd)
