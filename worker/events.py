# SPDX-License-Identifier: Apache-2.0
"""The VM's stream of events: numbers them, writes them into the journal, then publishes them. Called by vm.py, the session and handlers.

    {vm, epoch, seq, time, event, data, origin}      time: microseconds since 1970; origin: qmp, agent or vmloop

All events of one monitor line are one batch, and so is each event of vmloop's own that belongs to no line:

    1  journal     one write; its mark says up to which byte of the unread chunk the monitor is dealt with
    2  effects     what the events say of the VM, on the status page: its state
    3  PROGRESS    number and bytes on the status page, one 64-bit store: the line is settled
    4  afterwards  commands that the line has answered are struck out of the ledger
    5  told        published, and given to listeners; TOLD on the page after each

A worker that takes over after a death between 1 and 3 finds in the journal's newest batch what the page lacks (`unsettled`); the ledger has
been prepared before 1 so that 3 decides about it; and what was not told yet is told. A death before 1 leaves no trace, and the line is read
again. So no event is lost or doubled, and no number is given twice.

A disk that takes nothing costs the journal, not the VM: such events are published with `journalled: false`, kept in memory, and written
when the disk takes them again.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final, Literal, NamedTuple

import msgspec

from ..common.cursor import Cursor
from ..common.errors import BadRequest
from ..common.names import VmName, vm_service
from ..common.pack import pack, unpack
from ..common.page import DONE_BITS, Page, Word
from ..common.wire import Kind, Message, encode
from .journal.record import Record
from .journal.store import EventStore

log = logging.getLogger(__name__)

Origin = Literal["qmp", "agent", "vmloop"]

# QEMU's own are far below; a message of the wire must hold one, and a segment of the journal several. Of a larger one the size is told.
MAX_EVENT_BYTES: Final = 256 * 1024

PAGE_EVENTS: Final = 256  # read from the journal at once
PAGE_BYTES: Final = 1024 * 1024

_DONE_MASK: Final = (1 << DONE_BITS) - 1
_IN_LINE: Final = 1 << 30  # of a record's mark; the lower 24 bits are the bytes that are dealt with


class Event(msgspec.Struct, frozen=True):
    """One event of a VM's stream; `data` is what QEMU said, as it said it."""

    vm: VmName
    epoch: int
    seq: int
    time: int
    event: str
    data: dict[str, Any]
    origin: Origin

    @property
    def cursor(self) -> Cursor:
        """Just after this event."""
        return Cursor(self.epoch, self.seq)

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


class EventPage(NamedTuple):
    """Some events of the journal, their bytes, and where to go on if there are more."""

    events: list[Event]
    size: int
    last: Cursor
    more: bool


class LineChange:
    """What a line changes on the status page, beside its events; each is called once, in this order."""

    def prepare(self, progress: int) -> None:
        """Before anything is settled. `progress`: what PROGRESS will be then; it tells a successor on which side of it this worker died."""

    def effect(self) -> None:
        """The events are in the journal: put on the page what they say. A successor may have to do the same again."""

    def afterwards(self) -> None:
        """The line is settled."""


class Effect(LineChange):
    """What an event says, put on the page."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def effect(self) -> None:
        self._act()


class Afterwards(LineChange):
    """Something to do once the line at hand is settled."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def afterwards(self) -> None:
        self._act()


class EventLog:
    """Numbers, keeps and publishes the events of one VM. One per worker."""

    def __init__(self, name: VmName, page: Page, publish: Callable[[bytes], None], store: EventStore) -> None:
        """`publish` takes a whole native frame and must neither block nor raise."""
        self._name = name
        self._service = vm_service(name)
        self._words = page.words
        self._publish = publish
        self._store = store
        self._listeners: list[Callable[[Event], None]] = []
        self._in_line = False
        self._batch: list[tuple[Event, bytes]] = []
        self._line: list[LineChange] = []
        self._untold: deque[tuple[Event, bytes]] = deque()
        self._telling = False
        self.on_trouble: Callable[[str], None] = lambda _: (
            None
        )  # the journal's problem is another one; "" when it is over
        self._trouble = store.problem
        self.unsettled: list[Event] = []  # in the journal, and their effects perhaps not on the page
        self._finish_epoch()
        self._catch_up()
        self._seq = self._settled
        self.unheard = Cursor(self._words[Word.EPOCH], self._words[Word.TOLD])  # handlers have had what came before

    @property
    def cursor(self) -> Cursor:
        """The newest event that is settled: its number is never given again. Before the first run on this page: of the journal."""
        return Cursor(self._words[Word.EPOCH], self._settled) if self._words[Word.EPOCH] else self._store.last

    @property
    def newest_epoch(self) -> int:
        """The newest run that the page or the journal knows of."""
        return max(int(self._words[Word.EPOCH]), self._store.last.epoch)

    @property
    def first(self) -> Cursor:
        """The oldest event that is kept; `Cursor(0, 0)` if there is none."""
        return self._store.first

    @property
    def trouble(self) -> str:
        """Why events are not written to the disk; "" if they are."""
        return self._trouble

    @property
    def _settled(self) -> int:
        settled: int = self._words[Word.PROGRESS] >> DONE_BITS
        return settled

    # -- start ------------------------------------------------------------------------------------------------------------

    def begin_epoch(self, epoch: int) -> None:
        """Start a new run: the numbers begin again at 1."""
        self._words[Word.NEXT_EPOCH] = epoch  # from here on a successor finishes it
        self._finish_epoch()
        self._seq = 0
        self.unheard = Cursor(epoch, 0)

    def _finish_epoch(self) -> None:
        if self._words[Word.NEXT_EPOCH]:
            self._words[Word.PROGRESS] = 0
            self._words[Word.TOLD] = 0
            self._words[Word.EPOCH] = self._words[Word.NEXT_EPOCH]
            self._words[Word.NEXT_EPOCH] = 0

    def _catch_up(self) -> None:
        """After a death between the journal and the page: what the newest batch says, the page gets."""
        last = self._store.last_on_disk
        if last.epoch != self._words[Word.EPOCH] or last.seq <= self._settled:
            return
        self.unsettled = list(self.since(self.cursor))
        done = self._store.last_mark & _DONE_MASK if self._store.last_mark & _IN_LINE else self.done
        self._words[Word.PROGRESS] = last.seq << DONE_BITS | done

    def tell_of_predecessor(self) -> None:
        """Publish what an earlier worker wrote down and did not tell, and say what it could not write down."""
        epoch, told = self._words[Word.EPOCH], self._words[Word.TOLD]
        if told < self._settled:
            for event in self.since(Cursor(epoch, told)):
                self._untold.append((event, pack(event.to_wire())))
            self._tell()
        last = self._store.last
        if self._settled and last < self.cursor:
            first = Cursor(epoch, last.seq + 1 if last.epoch == epoch else 1)
            self._tell_lost(first, self.cursor, "they were not written down before their worker ended")
        if self._store.repaired:
            log.warning("VM %s: journal: %s", self._name, self._store.repaired)

    # -- run --------------------------------------------------------------------------------------------------------------

    def emit(self, event: str, data: dict[str, Any], origin: Origin = "vmloop", at: int | None = None) -> Event:
        """Give an event its number and send it out: at once, or with its line. `at`: microseconds since 1970, now if None."""
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
        self._batch.append((made, body))
        if not self._in_line:
            self._commit(self._words[Word.PROGRESS] & _DONE_MASK, 0)
        return made

    def listen(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Call `listener` with every event from now on; returns the function that ends it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def since(self, cursor: Cursor) -> Iterator[Event]:
        """What is kept of the events after a cursor, oldest first."""
        more = True
        while more:
            page = self.read(cursor, PAGE_EVENTS, PAGE_BYTES)
            yield from page.events
            cursor, more = page.last, page.more

    def read(self, cursor: Cursor, count: int, size: int) -> EventPage:
        """The events after a cursor, oldest first, at most so many and about so many bytes."""
        page = self._store.read(cursor, count, size)
        events = [event for body in page.bodies if (event := _event_from(body)) is not None]
        return EventPage(events, sum(map(len, page.bodies)), page.last, page.more)

    def retry(self) -> None:
        """Try again to write down what the disk has not taken."""
        self._store.retry()
        self._look_at_store()

    def sync(self) -> None:
        """A run is over: its events outlast a crash of the host too."""
        self._store.sync()

    def filenos(self) -> list[int]:
        return self._store.filenos()

    def close(self) -> None:
        """Write what can be written, and let go of the files."""
        self._store.retry()
        self._store.close()

    # -- kept in step with the reading of the monitor (worker/qmp/framing.py) --------------------------------------------

    @property
    def done(self) -> int:
        """Bytes at the start of the monitor's unread data that are dealt with."""
        done: int = self._words[Word.PROGRESS] & _DONE_MASK
        return done

    def begin_line(self) -> None:
        """From here to `end_line` events belong to one monitor line."""
        self._in_line = True

    def with_line(self, change: LineChange) -> None:
        """Have a change of the page made in step with the line at hand; at once outside of a line."""
        if self._in_line:
            self._line.append(change)
        else:
            change.effect()
            change.afterwards()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Events and changes within the block are settled together: with the line at hand if there is one."""
        if self._in_line:
            yield
            return
        self._in_line = True
        try:
            yield
        finally:
            self._in_line = False
            self._commit(self.done, 0)

    def end_line(self, done: int) -> None:
        """The line is dealt with: its events, its bytes and what it changed on the page become settled."""
        self._in_line = False
        if self._batch or self._line:
            self._commit(done, _IN_LINE | done)
        else:
            self._words[Word.PROGRESS] = self._seq << DONE_BITS | done

    def _commit(self, done: int, mark: int) -> None:
        batch, self._batch = self._batch, []
        changes, self._line = self._line, []
        progress = self._seq << DONE_BITS | done
        for change in changes:
            change.prepare(progress)
        written = True
        if batch:
            written = self._store.append([Record(made.epoch, made.seq, mark, body) for made, body in batch])
        for change in changes:
            change.effect()
        self._words[Word.PROGRESS] = progress
        for change in changes:
            change.afterwards()
        if not batch:
            return
        if written:
            self._untold.extend(batch)
        else:
            self._untold.extend((made, pack({**made.to_wire(), "journalled": False})) for made, _ in batch)
        self._tell()
        self._look_at_store()

    def _tell(self) -> None:
        """Publish, and call the listeners. What they emit is told after what is being told."""
        if self._telling:
            return
        self._telling = True
        try:
            while self._untold:
                made, body = self._untold.popleft()
                name = made.event
                op = name if len(name) < 64 else name.encode()[:255].decode("utf-8", "ignore")
                kind = Kind.EVENT
                frame = Message(kind=kind, service=self._service, op=op, body=body, epoch=made.epoch, seq=made.seq)
                self._publish(encode(frame))
                for listener in tuple(self._listeners):
                    listener(made)
                self._words[Word.TOLD] = made.seq
        finally:
            self._telling = False

    def _look_at_store(self) -> None:
        """Tell what the journal has dropped, and whether it can be written."""
        store = self._store
        if store.problem != self._trouble:
            self._trouble = store.problem
            if self._trouble:
                log.error("VM %s: events are not written down: %s", self._name, self._trouble)
            else:
                log.info("VM %s: events are written down again", self._name)
            self.on_trouble(self._trouble)
        if (span := store.truncated()) is not None:
            self._tell_lost(*span, "the journal is full: its oldest part was dropped")
        # Only when the disk is back: told of in memory, a loss would push out the next event, and that again.
        if not self._trouble and (span := store.lost()) is not None:
            self._tell_lost(*span, "the disk took nothing for a while, and they were too many to keep in memory")

    def _tell_lost(self, first: Cursor, last: Cursor, reason: str) -> None:
        self.emit("JOURNAL_TRUNCATED", {"first": str(first), "last": str(last), "reason": reason})


def _event_from(body: bytes) -> Event | None:
    """The event in a record; None, with a log line, for one that an older or damaged journal has."""
    try:
        return msgspec.convert(unpack(body), Event)
    except (msgspec.ValidationError, BadRequest) as error:
        log.warning("a record of the journal is no event: %s", error)
        return None
