# SPDX-License-Identifier: Apache-2.0
"""What a simulated VM says that it did: a file that a test compares with what reached it through vmloop. Made by simulated.

    {"pid", "started", "vm", "at"}       a run begins: its process (`started` as in common/process.py), CLOCK_MONOTONIC in seconds
    {"event", "time", "data"}            an event, before its bytes go to the monitor's client; time in microseconds, as the event says it
    {"command"}                          a command that is no query was carried out
    {"mark"}                             `x-simulate`, or `x-mark` of the guest's agent, left the mark that it was given

One JSON line each, in the order of what happened, with one write(2) and no buffer: what a client has read stands in the file, whatever
kills the process. Without a file nothing is written.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import msgspec

from ...common.process import identify


class Emitted:
    """The file of one VM, or none. Close it with the VM."""

    def __init__(self, path: Path | None = None, vm: str = "") -> None:
        """Appends to the file and begins a run in it. Raises OSError."""
        self._fd: int | None = None
        if path is None:
            return
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        me = identify(os.getpid())
        self._line({"pid": me.pid, "started": me.started, "vm": vm, "at": time.monotonic()})

    def event(self, event: dict[str, Any]) -> None:
        """An event is about to be handed to the monitor's client. `event`: as it is sent."""
        when = event["timestamp"]["seconds"] * 1_000_000 + event["timestamp"]["microseconds"]
        self._line({"event": event["event"], "time": when, "data": event.get("data")})

    def command(self, name: str) -> None:
        """A command was carried out and is about to be answered; one that only looks is not written down."""
        if not name.startswith("query-") and name != "qmp_capabilities":
            self._line({"command": name})

    def mark(self, mark: str) -> None:
        """A command with a mark is being carried out."""
        self._line({"mark": mark})

    def close(self) -> None:
        """The VM is gone."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _line(self, content: dict[str, Any]) -> None:
        if self._fd is not None:
            os.write(self._fd, msgspec.json.encode(content) + b"\n")
