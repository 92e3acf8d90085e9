# SPDX-License-Identifier: Apache-2.0
"""A blocking client for monitors and agents on a raw socket, so that what is tested is the other end and nothing of vmloop's.

Used by tests/contract and tests/unit/test_simulated.py. Every wait has a deadline; one that passes is an `AssertionError` with what came.
"""

from __future__ import annotations

import array
import json
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final

DEADLINE: Final = 10.0  # seconds; far above what an answer takes, also on a busy machine
QUIET: Final = 0.3  # seconds in which nothing may come where a test says that nothing comes

LOOK_AGAIN: Final = 0.01  # seconds between two looks

NEGOTIATION: Final = b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}\n'


class RawClient:
    """One connection."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(DEADLINE)
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise
        self._received = b""
        self._ended = False

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave."""
        self.socket.close()

    # -- sending --

    def send(self, data: bytes | dict[str, Any]) -> None:
        """Send bytes as they are, or an object as a line."""
        self.socket.sendall(data if isinstance(data, bytes) else json.dumps(data).encode() + b"\n")

    def send_with_fds(self, data: dict[str, Any], fds: list[int]) -> None:
        """Send an object with file descriptors."""
        self.socket.sendmsg(
            [json.dumps(data).encode() + b"\n"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        )

    # -- receiving --

    def line(self, end: bytes = b"\n") -> bytes:
        """The next line, with its end."""
        deadline = time.monotonic() + DEADLINE
        while end not in self._received:
            assert self._receive(deadline), f"no more lines; last came {self._received!r}"
        line, _, self._received = self._received.partition(end)
        return line + end

    def message(self) -> Any:
        """The next line, decoded."""
        return json.loads(self.line())

    def messages(self, count: int) -> list[Any]:
        """The next lines, decoded."""
        return [self.message() for _ in range(count)]

    def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        deadline = time.monotonic() + DEADLINE
        while self._receive(deadline):
            pass
        rest, self._received = self._received, b""
        return rest

    def rest_messages(self) -> list[Any]:
        """Everything up to the end of the connection, decoded line by line."""
        return [json.loads(line) for line in self.rest().splitlines()]

    def quiet(self, seconds: float = QUIET) -> bool:
        """True if nothing at all comes for a while."""
        if self._received:
            return False
        return not select.select([self.socket], [], [], seconds)[0]

    def _receive(self, deadline: float) -> bool:
        """Add what there is, or wait for it; False at the end of the connection."""
        if self._ended:
            return False
        left = deadline - time.monotonic()
        ready, _, _ = select.select([self.socket], [], [], max(0.0, left))
        assert ready, f"nothing came after {self._received!r}"
        try:
            data = self.socket.recv(1 << 20)
        except ConnectionResetError:  # the other end had unread input when it closed
            data = b""
        self._ended = not data
        self._received += data
        return bool(data)

    # -- conversations --

    def ask(self, command: str, **arguments: Any) -> Any:
        """Send a command and return the answer to it whole; events on the way are an error."""
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        self.send(request)
        return self.message()

    def reply(self, wanted_id: Any) -> tuple[Any, list[Any]]:
        """The reply with an id, and the messages that came before it."""
        before: list[Any] = []
        while True:
            message = self.message()
            if message.get("id") == wanted_id:
                return message, before
            before.append(message)

    def event(self, name: str) -> Any:
        """The next event of a name; others and replies on the way are skipped."""
        while True:
            message = self.message()
            if message.get("event") == name:
                return message


def negotiated(path: Path) -> RawClient:
    """A client of a monitor, greeted, with out-of-band enabled."""
    client = RawClient(path)
    greeting = client.message()
    assert "QMP" in greeting, greeting
    client.send(NEGOTIATION)
    assert client.message() == {"return": {}}
    return client


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that cannot be waited for otherwise than by looking."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        select.select([], [], [], LOOK_AGAIN)


def refusal(desc: str, kind: str = "GenericError") -> dict[str, Any]:
    """An error reply without an id."""
    return {"error": {"class": kind, "desc": desc}}
