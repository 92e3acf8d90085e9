# SPDX-License-Identifier: Apache-2.0
"""Events on which a shipped handler acts, and may be in the middle of it when its worker dies: run/vms/NAME/pending.json.

Such an event is written down before it is handled and struck out after; what a worker finds here from the one before it is handled again.
The handlers of these events can be repeated: a guest that was reset already is reset once more before it goes on. Used by handling.py.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

import msgspec

from ...common.durable import write_whole
from ..events import Event

log = logging.getLogger(__name__)

FILE_NAME: Final = "pending.json"
EVENTS: Final = frozenset({"GUEST_PANICKED", "SHUTDOWN", "WATCHDOG"})

MAX_FILE_BYTES: Final = 1 << 20
MAX_PENDING: Final = 16  # a guest that panics more often at once has nothing to lose


class Pending:
    """The events of one run that are not handled to their end yet."""

    def __init__(self, directory: Path, epoch: int) -> None:
        """Read what a worker before this one has left; a file that is torn, foreign or of an earlier run is nothing."""
        self._path = directory / FILE_NAME
        self._events = [event for event in _read(self._path) if event.epoch == epoch and event.event in EVENTS]

    @property
    def events(self) -> list[Event]:
        """Oldest first."""
        return list(self._events)

    def add(self, event: Event) -> None:
        """It will be handled."""
        if event.event in EVENTS and len(self._events) < MAX_PENDING:
            self._events.append(event)
            self._save()

    def done(self, event: Event) -> None:
        """It was, or it cannot be."""
        if event in self._events:
            self._events.remove(event)
            self._save()

    def _save(self) -> None:
        try:
            if self._events:
                write_whole(self._path, msgspec.json.encode(self._events))
            else:
                self._path.unlink(missing_ok=True)
        except OSError as error:  # a full disk: handled all the same, only not again
            log.error("%s cannot be written: %s", self._path, error)


def _read(path: Path) -> list[Event]:
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(MAX_FILE_BYTES), type=list[Event])
    except FileNotFoundError:
        return []
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        log.error("%s cannot be read (%s): what it held is not handled again", path, error)
        return []
