# SPDX-License-Identifier: Apache-2.0
"""What a worker finds of the one before it: how far it came, what it was doing, how it ended. Read by entry.py, told by app.py."""

from __future__ import annotations

import signal
from typing import Any

import msgspec

from .handlers.naming import AT_REST


class Predecessor(msgspec.Struct, frozen=True):
    """The worker that had this VM before; `incarnation` 0 if there was none."""

    incarnation: int
    in_order: bool  # it said goodbye
    task: str  # what it said it was doing, "" for nothing in particular
    stack: str  # where it was when it was held up, or crashed
    exit: int | None  # its exit code, negative for a signal; None if nobody knows

    @property
    def died(self) -> bool:
        """Whether there was one that did not leave by itself."""
        return self.incarnation > 0 and not self.in_order

    @property
    def how(self) -> str:
        """How it ended, in words."""
        if self.exit is None:
            return "it ended, nobody knows how"
        if self.exit >= 0:
            return f"it ended with exit code {self.exit}"
        try:
            return f"it was killed by {signal.Signals(-self.exit).name}"
        except ValueError:
            return f"it was killed by signal {-self.exit}"

    def to_event(self) -> dict[str, Any]:
        """The data of WORKER_LOST."""
        data: dict[str, Any] = {"incarnation": self.incarnation, "how": self.how}
        if self.task and self.task != AT_REST:
            data["task"] = self.task
        if self.stack:
            data["stack"] = self.stack
        return data
