# SPDX-License-Identifier: Apache-2.0
"""A worker that can be killed before any of its steps, as far as the reading of its monitor goes.

A step is what others can see: a figure stored on the page, an operation on the socket, the opening of a carry file, a published event. A
kill is an exception that nothing in the code under test catches; what is left behind is the page, the carry files and the connection.
Used by tests/unit/test_worker_framing.py.
"""

from __future__ import annotations

import os
import select
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, cast

from vmloop.common.cursor import Cursor
from vmloop.common.names import VmName
from vmloop.common.pack import unpack_map
from vmloop.common.page import Page, Word
from vmloop.common.paths import VmPaths
from vmloop.common.wire import decode
from vmloop.worker.events import EventLog
from vmloop.worker.journal.record import Record, encode_batch
from vmloop.worker.journal.store import EventStore
from vmloop.worker.qmp.framing import LineReader

NAME: Final = VmName("web1")
EPOCH: Final = 3
MAX_LINE: Final = 64 << 20

Published = tuple[int, str, dict[str, Any]]  # seq, event, data


class Killed(BaseException):
    """The worker is dead."""


class Steps:
    """Counts a worker's steps and kills it before the one after `allowed`; None: never."""

    def __init__(self, allowed: int | None = None) -> None:
        self.allowed = allowed
        self.made = 0

    def step(self) -> None:
        if self.allowed is not None and self.made >= self.allowed:
            raise Killed
        self.made += 1


class _Words:
    def __init__(self, words: memoryview, steps: Steps) -> None:
        self._words = words
        self._steps = steps

    def __getitem__(self, index: int) -> int:
        return self._words[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._steps.step()
        self._words[index] = value


class _Page:
    def __init__(self, page: Page, steps: Steps) -> None:
        self.words = _Words(page.words, steps)


class _Paths:
    def __init__(self, paths: VmPaths, steps: Steps) -> None:
        self._paths = paths
        self._steps = steps

    def carry(self, index: int) -> Path:
        self._steps.step()
        return self._paths.carry(index)


class _Socket:
    def __init__(self, connection: socket.socket, steps: Steps) -> None:
        self._connection = connection
        self._steps = steps

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._connection, name)

        def call(*arguments: Any) -> Any:
            self._steps.step()
            return operation(*arguments)

        return call


class _Store(EventStore):
    """A kill inside a write leaves a part of it."""

    def __init__(self, directory: Path, steps: Steps) -> None:
        super().__init__(directory)
        self._steps = steps

    def append(self, batch: Sequence[Record]) -> bool:
        self._steps.step()
        try:
            self._steps.step()
        except Killed:
            self._tear(batch)
            raise
        return super().append(batch)

    def _tear(self, batch: Sequence[Record]) -> None:
        newest = max(self._directory.glob("*.journal"), default=None)
        if newest is not None:
            with newest.open("ab") as file:
                file.write(encode_batch(batch)[:-1])


class Worker:
    """One incarnation: its own mapping of the page, its own fd of the connection."""

    def __init__(self, bench: Bench, steps: Steps) -> None:
        self.steps = steps
        self.page = Page(bench.paths.page, writable=True)
        self.connection = bench.connection.dup()
        page = cast("Page", _Page(self.page, steps))

        def publish(frame: bytes) -> None:
            steps.step()
            bench.publish(frame)

        self.store = _Store(bench.paths.journal, steps)
        self.events = EventLog(NAME, page, publish, self.store)
        self.reader = LineReader(
            cast("socket.socket", _Socket(self.connection, steps)),
            page,
            cast("VmPaths", _Paths(bench.paths, steps)),
            self.events,
            bench.max_line,
        )
        self._on_line = bench.on_line

    def read(self) -> bool:
        """One turn."""
        return self.reader.read(lambda line: self._on_line(self, line))

    def close(self) -> None:
        self.store.close()
        self.page.close()
        self.connection.close()


class Bench:
    """One connection and the workers that read it, one after the other.

    `kills`: how many steps each worker may make; who comes after the last of them lives on.
    """

    def __init__(
        self,
        on_line: Callable[[Worker, bytes], None],
        kills: list[int] | None = None,
        max_line: int = MAX_LINE,
        own_event: str = "",
    ) -> None:
        """`own_event`: what each worker that takes over says before it reads."""
        self.own_event = own_event
        self.on_line = on_line
        self.max_line = max_line
        self.published: list[Published] = []
        self._kills = list(kills or ())
        self._directory = tempfile.TemporaryDirectory(prefix="vmloop-killed-")
        root = Path(self._directory.name)
        self.paths = VmPaths(root, root)
        self.peer, self.connection = socket.socketpair()
        self.peer.setblocking(False)
        self.connection.setblocking(False)
        with Page(self.paths.page, writable=True) as page:
            page.words[Word.EPOCH] = EPOCH
        # The connection is given to the zygote only after negotiation: nobody takes over before `begin` is through.
        self.worker = Worker(self, Steps())
        self.worker.reader.begin()
        self._allow_steps()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.worker.close()
        self.peer.close()
        self.connection.close()
        self._directory.cleanup()

    def publish(self, frame: bytes) -> None:
        message = decode(frame)
        body = unpack_map(message.body)
        assert (message.epoch, message.seq) == (body["epoch"], body["seq"])
        assert message.epoch == EPOCH
        self.published.append((message.seq, message.op, body["data"]))

    def send(self, data: bytes) -> None:
        """Write all of it; where the socket is full, it is read meanwhile."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self.peer.send(rest) :]
            except BlockingIOError:
                self.read()

    def read(self) -> bool:
        """One turn of whoever lives, after as many deaths as there are to die in it."""
        while True:
            try:
                return self.worker.read()
            except Killed:
                self._succeed()

    def read_all(self) -> bool:
        """Read until nothing is left; False at the end of the stream."""
        while select.select([self.connection], [], [], 0)[0]:  # not by a peek: that would move the offset
            if not self.read():
                return False
        return True

    def left_over(self) -> tuple[int, int, int]:
        """What is pending, what counts as dealt with of the unread bytes, and the newest settled number."""
        words = self.worker.page.words
        return words[Word.PENDING], words[Word.PROGRESS] & 0xFFFFFF, words[Word.PROGRESS] >> 24

    def journal(self) -> list[Published]:
        """What a reader of the journal finds."""
        return [(event.seq, event.event, event.data) for event in self.worker.events.since(Cursor(0, 0))]

    def carry_files(self) -> list[str]:
        return sorted(name for name in os.listdir(self._directory.name) if name.startswith("carry"))

    def _succeed(self) -> None:
        while True:
            self.worker.close()
            self.worker = Worker(self, Steps())
            self._allow_steps()
            try:
                self.worker.events.tell_of_predecessor()
                if self.own_event:
                    self.worker.events.emit(self.own_event, {})
                self.worker.reader.take_over()
            except Killed:
                continue
            return

    def _allow_steps(self) -> None:
        self.worker.steps.made = 0
        self.worker.steps.allowed = self._kills.pop(0) if self._kills else None
