# SPDX-License-Identifier: Apache-2.0
"""What the status page says while foreign code runs, so that whoever looks at a blocked or dead worker knows the culprit.

    handler mail.on_error on BLOCK_IO_ERROR 17      an operator's `async def` holds the loop
    shipped crash.dump on GUEST_PANICKED 4          one of vmloop's own does
    thread mail.on_error on BLOCK_IO_ERROR 17       a plain `def` runs beside the loop: one that holds the interpreter holds the loop, too
    hook 50-mail on STOP 9                          an executable is being started
    loading handlers/mail.py                        a file is being run
    loop                                            nothing of these

Written by registry, calls, thread and hooks; read by quarantine (in the next worker) and by whoever shows `blocked`.
"""

from __future__ import annotations

import contextlib
import re
import time
import zlib
from collections.abc import Iterator
from typing import Final, Protocol

import msgspec

from ..events import Event

AT_REST: Final = "loop"

# A step that took so long may be what a turn of the loop was held up in; the loop asks when that turn is over.
LONG_STEP: Final = 0.05

# The page keeps 63 bytes: enough for the longest word, this much of a name, and in most cases event and number.
_NAME_BYTES: Final = 40

# The event's name is QEMU's, and may be anything.
_TASK = re.compile(r"(handler|shipped|thread|hook) ([!-~]+)(?: on (.*?)(?: ([0-9]{1,20}))?)?", re.DOTALL)
_UNPRINTABLE = re.compile(r"[^!-~]")
_LOADING: Final = "loading handlers/"


class TaskPage(Protocol):
    """The part of the status page (common/page.py) that is written here."""

    held_up_in: str

    def doing(self, task: str) -> None: ...


class Culprit(msgspec.Struct, frozen=True):
    """What a page's task names."""

    kind: str  # handler, shipped, thread, hook, or loading
    label: str  # see `label`
    event: str = ""  # may be cut
    seq: int = 0  # 0 if it did not fit


class TaskNames:
    """The writer of the page's task, on the loop's thread alone. One per worker."""

    def __init__(self, page: TaskPage) -> None:
        self._page = page
        self._resting = AT_REST
        self._task = AT_REST
        self._entered = 0.0

    def enter(self, task: str) -> None:
        """The loop goes into this; `leave` when it comes out."""
        self._task = task
        self._entered = time.monotonic()
        self._page.doing(task)

    def leave(self) -> None:
        if time.monotonic() - self._entered >= LONG_STEP:
            self._page.held_up_in = self._task
        self._page.doing(self._resting)

    def rest_in(self, task: str = AT_REST) -> None:
        """What the page says from now on whenever the loop is in nothing that names itself: what the handler thread does."""
        self._resting = task
        self._page.doing(task)

    @contextlib.contextmanager
    def during(self, task: str) -> Iterator[None]:
        self.enter(task)
        try:
            yield
        finally:
            self.leave()


def label(name: str) -> str:
    """A handler's or file's name as it fits on the page: a long one is cut, with a checksum that keeps it apart from others."""
    plain = _UNPRINTABLE.sub("?", name)
    if plain == name and len(plain) <= _NAME_BYTES:
        return plain
    return f"{plain[: _NAME_BYTES - 9]}~{zlib.crc32(name.encode('utf-8', 'replace')):08x}"


def call_task(kind: str, name: str, event: Event) -> str:
    """The task of a call; `kind` is one of handler, shipped, thread, hook."""
    return f"{kind} {label(name)} on {event.event} {event.seq}"


def loading_task(file_name: str) -> str:
    """The task of running a file of handlers."""
    return _LOADING + label(file_name)


def parse_task(task: str) -> Culprit | None:
    """Whom a task names; None if nobody."""
    if task.startswith(_LOADING) and len(task) > len(_LOADING):
        return Culprit("loading", task[len(_LOADING) :])
    match = _TASK.fullmatch(task)
    if match is None:
        return None
    return Culprit(match[1], match[2], match[3] or "", int(match[4] or 0))
