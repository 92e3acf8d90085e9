# SPDX-License-Identifier: Apache-2.0
"""The test guest under a plain QEMU, with raw connections to its monitor and its agent, and nothing of vmloop's in between.

Used by tests/system/test_guest_alone.py. (`tests/guest` makes the guest; vmloop's own tests put its arguments into a definition.)
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from ..guest.image import guest_args, guest_disk, require_guest
from .raw_qmp import RawClient, negotiated, until

BOOT_SECONDS: Final = 40.0  # two to three on an idle machine
PORT: Final = "agent-port"


class RealGuest:
    """One QEMU with the guest and an ext4 disk on /data; `boot` waits for the agent's port."""

    def __init__(self, *extra: str, disk: bool = True) -> None:
        self._image = require_guest()
        self._extra, self._disk = extra, disk
        self.directory = Path(tempfile.mkdtemp(prefix="vml-guest-"))  # a unix socket's path has 107 bytes
        self.console = self.directory / "console.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._clients: list[RawClient] = []
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> RealGuest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._clients:
            client.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.directory)

    def boot(self) -> None:
        """Start QEMU and wait until the agent has opened its port."""
        disk = guest_disk(self.directory / "disk.img") if self._disk else None
        monitor, agent = self.directory / "qmp", self.directory / "agent"
        self.process = subprocess.Popen(
            [
                "qemu-system-x86_64",
                *guest_args(self._image, disk=disk, console=self.console),
                *("-qmp", f"unix:{monitor},server=on,wait=off"),
                *("-chardev", f"socket,id=agent,path={agent},server=on,wait=off"),
                *("-device", "virtio-serial,id=agent-bus"),
                *("-device", f"virtserialport,bus=agent-bus.0,chardev=agent,name=org.qemu.guest_agent.0,id={PORT}"),
                *self._extra,
            ]
        )
        until(agent.exists)
        self.monitor = negotiated(monitor)
        self._clients.append(self.monitor)
        self.monitor.socket.setblocking(True)
        self.port(is_open=True, seconds=BOOT_SECONDS)
        self.connect()

    def connect(self) -> None:
        """A new connection to the agent, in place of the one there is."""
        if len(self._clients) > 1:
            self._clients.pop().close()
        self.agent = RawClient(self.directory / "agent")
        self._clients.append(self.agent)

    # -- the monitor --

    def qmp(self, command: str, **arguments: Any) -> Any:
        """The answer of the monitor; events on the way are kept."""
        request = {
            "execute": command,
            "arguments": {name.replace("_", "-"): value for name, value in arguments.items()},
        }
        self.monitor.send(request | {"id": command})
        answer, before = self.monitor.reply(command)
        self.events += before
        return answer["return"]

    def event(self, *names: str, seconds: float = 10.0) -> dict[str, Any]:
        """The next event of one of these names; others on the way are kept in `events`."""
        deadline = time.monotonic() + seconds
        while True:
            if self.monitor.quiet(max(0.0, deadline - time.monotonic())):
                raise AssertionError(f"no {names} within {seconds} s; came: {self.names()}\n{self.told()}")
            message: dict[str, Any] = self.monitor.message()
            self.events.append(message)
            if message["event"] in names:
                return message

    def port(self, *, is_open: bool, seconds: float = 10.0) -> None:
        """Wait for the event that says so."""
        deadline = time.monotonic() + seconds
        while self.event("VSERPORT_CHANGE", seconds=max(0.0, deadline - time.monotonic()))["data"] != {
            "open": is_open,
            "id": PORT,
        }:
            pass

    def names(self) -> list[str]:
        """The names of all events so far."""
        return [event["event"] for event in self.events]

    def told(self) -> str:
        """What the guest printed."""
        return self.console.read_text(errors="replace")

    # -- the agent --

    def synchronise(self, number: int) -> list[Any]:
        """Send a delimited sync; what came before its answer, decoded."""
        self.agent.send(b'\xff{"execute": "guest-sync-delimited", "arguments": {"id": %d}}\n' % number)
        before = self.agent.line(end=b"\xff")[:-1]
        assert self.agent.message() == {"return": number}
        return [json.loads(line) for line in before.splitlines()]

    def ask(self, command: str, **arguments: Any) -> Any:
        """The agent's answer, which must be a success."""
        answer = self.agent.ask(command, **arguments)
        assert "return" in answer, answer
        return answer["return"]

    def run(self, path: str, *argv: str) -> tuple[int, str]:
        """Exit code and standard output of a program in the guest."""
        pid = self.ask("guest-exec", path=path, arg=list(argv), capture_output=True)["pid"]
        status: dict[str, Any] = {}

        def ended() -> bool:
            status.update(self.ask("guest-exec-status", pid=pid))
            return bool(status["exited"])

        until(ended)
        return status["exitcode"], base64.b64decode(status.get("out-data", "")).decode()

    def trouble(self, *words: str) -> None:
        """Set off something in the guest (tests/guest/trouble), and do not wait for it."""
        self.ask("guest-exec", path="/bin/trouble", arg=list(words))
