# SPDX-License-Identifier: Apache-2.0
"""The VM's stream of events: numbers them, keeps the recent ones, hands them to the link. Called by vm.py, the session and handlers.

    {vm, epoch, seq, time, event, data, origin}      time: microseconds since 1970; origin: qmp, agent or vmloop

The number of the newest event lives on the status page, together with how far the monitor's unread bytes are dealt with: one 64-bit
store moves both. So a worker that takes over continues the numbers, and a monitor line that its predecessor had not finished is dealt
with again under the same numbers, which subscribers know as a repetition. (The journal will be written here, before publishing.)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final, Literal

import msgspec

from ..common.cursor import Cursor
from ..common.names import VmName, vm_service
from ..common.pack import pack
from ..common.page import Page, Word
from ..common.wire import Kind, Message, encode

Origin = Literal["qmp", "agent", "vmloop"]

# QEMU's own are far below; a message of the wire must hold one, and a worker's memory the recent ones. Of a larger one the size is told.
MAX_EVENT_BYTES: Final = 256 * 1024

# All that are kept in memory, as packed; unpacked they may take many times as much.
MAX_RECENT_BYTES: Final = 4 * 1024 * 1024

_DONE_BITS: Final = 24
_DONE_MASK: Final = (1 << _DONE_BITS) - 1
_SEQ_MASK: Final = (1 << (64 - _DONE_BITS)) - 1


class Event(msgspec.Struct, frozen=True):
    """One event of a VM's stream; `data` is what QEMU said, as it said it."""

    vm: VmName
    epoch: int
    seq: int
    time: int
    event: str
    data: dict[str, Any]
    origin: Origin

    def to_wire(self) -> dict[str, Any]:
        return {
            "vm": self.vm,
            "epoch": self.epoch,
            "seq": self.seq,
            "time": self.time,
            "event": self.event,
            "data": self.data,
            "origin": self.origin,
        }


class EventLog:
    """Numbers, keeps and publishes the events of one VM. One per worker."""

    def __init__(self, name: VmName, page: Page, publish: Callable[[bytes], None], keep: int) -> None:
        """`publish` takes a whole native frame and must neither block nor raise."""
        self._name = name
        self._service = vm_service(name)
        self._words = page.words
        self._publish = publish
        self._recent: deque[tuple[Event, int]] = deque()  # with the size of each
        self._recent_limit = keep
        self._recent_bytes = 0
        self._listeners: list[Callable[[Event], None]] = []
        self._seq = self._words[Word.PROGRESS] >> _DONE_BITS & _SEQ_MASK
        self._in_line = False

    @property
    def cursor(self) -> Cursor:
        """The newest event."""
        return Cursor(self._words[Word.EPOCH], self._seq)

    def begin_epoch(self, epoch: int) -> None:
        """Start a new run: the numbers begin again at 1."""
        self._words[Word.EPOCH] = epoch
        self._seq = 0
        self._words[Word.PROGRESS] = 0

    def emit(self, event: str, data: dict[str, Any], origin: Origin = "vmloop", at: int | None = None) -> Event:
        """Give an event its number and send it out. `at`: microseconds since 1970, now if None."""
        self._seq += 1
        made = Event(
            vm=self._name,
            epoch=self._words[Word.EPOCH],
            seq=self._seq,
            time=time.time_ns() // 1000 if at is None else at,
            event=event,
            data=data,
            origin=origin,
        )
        body = pack(made.to_wire())
        if len(body) > MAX_EVENT_BYTES:
            made = msgspec.structs.replace(made, data={"too_large": len(body)})
            body = pack(made.to_wire())
        self._keep(made, len(body))
        self._publish(
            encode(
                Message(
                    kind=Kind.EVENT,
                    service=self._service,
                    op=event if len(event) < 64 else event.encode()[:255].decode("utf-8", "ignore"),
                    body=body,
                    epoch=made.epoch,
                    seq=made.seq,
                )
            )
        )
        if not self._in_line:
            self._words[Word.PROGRESS] = self._seq << _DONE_BITS | self._words[Word.PROGRESS] & _DONE_MASK
        for listener in tuple(self._listeners):
            listener(made)
        return made

    def listen(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Call `listener` with every event from now on; returns the function that ends it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def since(self, cursor: Cursor) -> Iterable[Event]:
        """What is still kept of the events after a cursor, oldest first."""
        return [event for event, _ in self._recent if (event.epoch, event.seq) > cursor]

    def _keep(self, event: Event, size: int) -> None:
        self._recent.append((event, size))
        self._recent_bytes += size
        while len(self._recent) > self._recent_limit or self._recent_bytes > MAX_RECENT_BYTES:
            _, forgotten = self._recent.popleft()
            self._recent_bytes -= forgotten

    # -- kept in step with the reading of the monitor (worker/qmp/framing.py) --------------------------------------------

    @property
    def done(self) -> int:
        """Bytes at the start of the monitor's unread data whose events already have numbers."""
        done: int = self._words[Word.PROGRESS] & _DONE_MASK
        return done

    def begin_line(self) -> None:
        """From here to `end_line` events belong to one monitor line."""
        self._in_line = True

    def end_line(self, done: int) -> None:
        """The line is dealt with: its events and its bytes become settled in one store."""
        self._in_line = False
        self._words[Word.PROGRESS] = self._seq << _DONE_BITS | done
