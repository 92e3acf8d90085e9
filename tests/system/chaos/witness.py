# SPDX-License-Identifier: Apache-2.0
"""What a real QEMU says, heard over a second monitor of the test's own: the same account that a simulated VM writes down by itself.

It is heard from when the witness is connected, a moment after the launch, until the process ends; so an account of a real VM is not whole.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from typing import Any, Final

import msgspec

from .cast import Actor
from .recording import Account, Emission
from .streams import canonical

RETRY: Final = 0.05  # seconds between attempts to connect: the socket is there when QEMU is
TURN: Final = 0.2  # seconds of one wait for QEMU's words, after which the witness looks whether it shall end
ANSWER_SECONDS: Final = 10.0
CHUNK: Final = 65536


class Witness:
    """A thread for one real VM."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor
        self._stop = threading.Event()
        self.accounts: list[Account] = []
        self._thread = threading.Thread(target=self._run, name=f"witness of {actor.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def give_up(self) -> None:
        """End soon; nobody waits for it."""
        self._stop.set()

    def stop(self) -> list[Account]:
        """Call it while the VM still runs: at the end its marks are asked for."""
        self._stop.set()
        self._thread.join()
        return self.accounts

    def _run(self) -> None:
        while not self._stop.is_set():
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(TURN)
                try:
                    connection.connect(str(self._actor.account))
                except OSError:
                    self._stop.wait(RETRY)  # the VM does not run, or does not listen yet
                    continue
                self._listen(connection)

    def _listen(self, connection: socket.socket) -> None:
        peer = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        account = Account(self._actor.name, peer[0], [], [], whole=False, asked=False)
        asked = False
        for message in self._messages(connection):
            if "QMP" in message:
                connection.sendall(b'{"execute": "qmp_capabilities"}\n')
                self.accounts.append(account)
            elif message.get("event"):
                stamp = message["timestamp"]
                when = stamp["seconds"] * 1_000_000 + stamp["microseconds"]
                account.emissions.append(Emission(message["event"], when, canonical(message.get("data"))))
            elif asked and isinstance(message.get("return"), list):
                account.marks.extend(entry["name"] for entry in message["return"])
                self.accounts[-1] = msgspec.structs.replace(account, asked=True)
                return
            if self._stop.is_set() and not asked:
                asked = True
                connection.settimeout(ANSWER_SECONDS)
                connection.sendall(b'{"execute": "qom-list", "arguments": {"path": "/objects"}}\n')

    def _messages(self, connection: socket.socket) -> Any:
        """Each message; an empty one after each wait in vain while the witness shall go on. Ends with the connection."""
        buffer = b""
        while True:
            try:
                data = connection.recv(CHUNK)
            except TimeoutError:
                if self._stop.is_set() and connection.gettimeout() == ANSWER_SECONDS:
                    return
                yield {}
                continue
            except OSError:
                return
            if not data:
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                with contextlib.suppress(json.JSONDecodeError):  # cut by the end of the process
                    yield json.loads(line)
