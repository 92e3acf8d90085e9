# SPDX-License-Identifier: Apache-2.0
"""The order of events: what to hand out, what to fetch, what is lost. No sockets: subscription.py (blocking) and aio_events.py wait.

PUB is a doorbell that may drop; the journal, which the VM's worker reads, is the truth. So a stream
  1. subscribes,
  2. asks the broker how far each VM is (its position), or takes the caller's cursor,
  3. fetches what lies between through the op `events`, a page at a time,
  4. follows PUB: an event at or before the position is a repetition and dropped, the next one is handed out, a jump is fetched first,
  5. asks the broker now and then how far each VM is, in case the last message before a silence was the one that PUB dropped.
What the journal does not have any more becomes one event EVENTS_LOST that says the span. A journal that cannot be asked now loses nothing:
the stream asks again, and where it gives up for now it raises, and goes on at the same place when it is asked for the next event.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec

from ..common.cursor import Cursor, parse_cursor
from ..common.errors import BadRequest, NoSuchVm, NotRunning, VmloopError
from ..common.names import VmName, host_topic, vm_name, vm_service, vm_topic
from ..common.pack import unpack
from . import requests
from .results import VmStats, VmSummary

log = logging.getLogger(__name__)

EVENTS_LOST: Final = "EVENTS_LOST"

# Events per request to a worker: bounds memory here and the time a lane is held.
PAGE: Final = 500
# What `recent` begins with: so many events of each VM.
RECENT: Final = 1000
# Brokers and workers that go away are back within seconds; each attempt waits for them until the connection's timeout.
FETCH_ATTEMPTS: Final = 3
FETCH_AGAIN: Final = 0.05  # seconds before the second attempt; doubles
# Messages taken from the socket at once.
BATCH: Final = 100
# Seconds between questions how far the VMs are: soon after subscribing, because PUB knows a subscriber only a moment later.
FIRST_CHECK: Final = 0.1
MAX_CHECK: Final = 5.0


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One event, its fields in the order of the wire. `time` is in microseconds since 1970; `vm` is empty for an event of the host."""

    vm: str = ""
    epoch: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] = 0
    seq: Annotated[int, msgspec.Meta(ge=0)] = 0
    time: int = 0
    event: str
    data: Any = None
    origin: str = ""
    journalled: bool = True  # False: not on the disk when it was published, which is full or broken

    @property
    def cursor(self) -> Cursor:
        """Just after this event."""
        return Cursor(self.epoch, self.seq)


class Fetch(msgspec.Struct, frozen=True):
    """What a stream wants its shell to ask the worker for."""

    vm: VmName
    since: Cursor
    last: int | None = None

    def request(self) -> requests.Request[Any]:
        return requests.events(vm_service(self.vm), str(self.since), PAGE, self.last)


class Page(msgspec.Struct, frozen=True):
    """What a worker gave: its events, and whether there are more after them."""

    parts: list[Any]
    more: bool


def page_of(parts: list[Any], value: Any) -> Page:
    """The page that came in these parts. `value`: the reply behind them; a worker that does not say so has more if the page is full."""
    more = value.get("more") if isinstance(value, dict) else None
    return Page(parts, more if isinstance(more, bool) else len(parts) >= PAGE)


def transient(error: BaseException) -> bool:
    """Whether the journal may answer later: it could not be asked, or its worker had to be made."""
    return not isinstance(error, (NoSuchVm, NotRunning, BadRequest)) and isinstance(error, VmloopError)


def event_from(value: object) -> Event | None:
    """The event in an unpacked body; None, with a log line, if it is none."""
    try:
        event = msgspec.convert(value, Event)
        if event.vm:
            vm_name(event.vm)
    except (msgspec.ValidationError, RecursionError, BadRequest) as error:
        log.warning("dropped what is no event: %s", error)
        return None
    return event


def numbered(event: Event) -> bool:
    """Whether it has a place in a VM's stream; the broker's own have none."""
    return bool(event.vm) and event.seq > 0


def lost(vm: str, after: Cursor, last: Cursor) -> Event:
    """The event that stands for those after a cursor up to `last`, which nobody has any more."""
    data: dict[str, Any] = {"after": str(after), "last": str(last)}
    if after.epoch == last.epoch:
        data["count"] = last.seq - after.seq
    now = time.time_ns() // 1000
    return Event(vm=vm, epoch=last.epoch, seq=last.seq, time=now, event=EVENTS_LOST, data=data, origin="vmloop")


class Stream:
    """The order of events of some VMs, of all if `names` is empty.

    The shell asks `step()`: an Event to hand out, a Fetch to answer by `fetched` or `fetch_failed`, or None: nothing to do, listen to PUB.
    """

    def __init__(self, names: tuple[VmName, ...]) -> None:
        self._names = frozenset(names)
        self._position: dict[str, Cursor] = {}
        self._ready: deque[Event] = deque()  # to hand out
        self._inbox: deque[Event] = deque()  # from PUB, in its order; at most one batch
        self._replays: dict[VmName, int | None] = {}  # VMs whose kept events come first, and how many at most
        self._targets: dict[str, Cursor] = {}  # how far the broker said that VMs are
        self._older: set[str] = set()  # VMs of which the broker's last answer knew an earlier run only
        self._fetching: VmName | None = None
        self._waiting: Event | None = None  # the event of the inbox for whose sake something is fetched
        self.check_wanted = False  # ask the broker at once: something does not fit

    # -- told by the shell -----------------------------------------------------------------------------------------------

    def begin(self, positions: Mapping[str, Cursor]) -> None:
        """Events up to these are not wanted. A VM that is not there has had none."""
        self._position.update(positions)

    def replay(self, name: VmName, since: Cursor, last: int | None = None) -> None:
        """Fetch what is kept of a VM's events after a cursor, the `last` ones at most, before anything else."""
        self._position[name] = since
        self._replays[name] = last

    def arrived(self, body: bytes) -> None:
        """A message from PUB."""
        try:
            event = event_from(unpack(body))
        except BadRequest as error:
            log.warning("dropped a malformed event: %s", error)
            return
        if event is not None and (not self._names or event.vm in self._names):
            self._inbox.append(event)

    def known(self, cursors: Mapping[str, Cursor]) -> None:
        """How far the broker says that the VMs are."""
        self._targets.update((vm, cursor) for vm, cursor in cursors.items() if not self._names or vm in self._names)

    def fetched(self, page: Page) -> None:
        """A page of what was fetched."""
        vm = self._fetching
        if vm is None:
            return
        before = self._position.get(vm)
        for part in page.parts:
            event = event_from(part)
            if event is not None and event.vm == vm:
                self._accept(event)
        if vm in self._replays:
            self._replays[vm] = None
        if not page.more or self._position.get(vm) == before:
            self._end_fetch(vm)

    def fetch_failed(self, error: VmloopError) -> bool:
        """The journal could not be read. True if that must be told to whoever asked for the next event: it is tried again then."""
        vm, self._fetching = self._fetching, None
        log.log(logging.DEBUG if self.replaying else logging.WARNING, "no events of %s could be fetched: %s", vm, error)
        if vm is None:
            return False
        if not transient(error):
            self._end_fetch(vm)
            return False
        wanted = vm in self._replays or self._waiting is not None
        self._waiting = None
        if not wanted:
            self._targets.pop(vm, None)  # a look after a silence is repeated by the next one
        return wanted

    def refuses(self, fetch: Fetch, error: VmloopError) -> bool:
        """Whether a failed fetch ends the stream: the caller asked for the past of a VM that has none."""
        return self.replaying and fetch.vm in self._names and isinstance(error, (NoSuchVm, BadRequest))

    @property
    def replaying(self) -> bool:
        """Whether what is fetched now, or next, is what the caller asked to begin with."""
        return bool(self._replays)

    # -- what is next ----------------------------------------------------------------------------------------------------

    def step(self) -> Event | Fetch | None:
        while not self._ready:
            if self._fetching is None and not self._choose_fetch():
                return None
            if self._fetching is not None and not self._ready:
                vm = self._fetching
                return Fetch(vm, self._position.get(vm, Cursor(0, 0)), self._replays.get(vm))
        return self._ready.popleft()

    def _choose_fetch(self) -> bool:
        """Move on: begin a fetch or take from the inbox. False if there is nothing to do."""
        if self._replays:
            self._fetching = next(iter(self._replays))
        elif self._inbox:
            event = self._inbox[0]
            if numbered(event) and event is not self._waiting and self._gap_before(event):
                self._waiting = event
                self._fetching = vm_name(event.vm)
            else:
                self._inbox.popleft()
                self._waiting = None
                self._accept(event)
        elif self._targets:
            vm, target = next(iter(self._targets.items()))
            if self._behind(vm, target):
                self._fetching = vm_name(vm)
            else:
                del self._targets[vm]
        else:
            return False
        return True

    def _end_fetch(self, vm: VmName) -> None:
        self._fetching = None
        self._replays.pop(vm, None)
        target = self._targets.pop(vm, None)
        if target is None or self._waiting is not None:
            return
        position = self._position.get(vm)
        if position is not None and position < target:
            self._ready.append(lost(vm, position, target))
            self._position[vm] = target

    # -- the order -------------------------------------------------------------------------------------------------------

    def _gap_before(self, event: Event) -> bool:
        """Whether something may lie between the position and this event. At the beginning of a new run: the end of the last one."""
        position = self._position.setdefault(event.vm, Cursor(event.epoch, 0))
        if event.epoch == position.epoch:
            return event.seq > position.seq + 1
        if event.epoch < position.epoch:
            self.check_wanted = True  # very late, or of a VM whose runs are numbered anew
        return event.epoch > position.epoch

    def _behind(self, vm: str, target: Cursor) -> bool:
        position = self._position.get(vm)
        if position is None:
            position = self._position[vm] = Cursor(target.epoch, 0)
        if target.epoch >= position.epoch:
            self._older.discard(vm)
        elif vm in self._older:  # the numbers of its runs were lost with its host's state, and begin anew
            self._older.discard(vm)
            position = self._position[vm] = Cursor(target.epoch, 0)
        else:  # the answer may be older than the events
            self._older.add(vm)
        return target > position

    def _accept(self, event: Event) -> None:
        """Hand out an event in its place: not twice, and with what is missing before it marked."""
        if not numbered(event):
            self._ready.append(event)
            return
        position = self._position.get(event.vm, Cursor(event.epoch, 0))
        if event.cursor <= position:
            return
        in_run = position if position.epoch == event.epoch else Cursor(event.epoch, 0)
        # From the start of all time there is no knowing what was: not before the first event that is still kept.
        if event.seq > in_run.seq + 1 and position != Cursor(0, 0):
            self._ready.append(lost(event.vm, position, Cursor(event.epoch, event.seq - 1)))
        self._position[event.vm] = event.cursor
        self._ready.append(event)


def positions_of(entries: list[VmSummary] | list[VmStats]) -> dict[str, Cursor]:
    """How far the VMs in an answer of the broker are. An entry whose name is none is passed over, with a log line."""
    found: dict[str, Cursor] = {}
    for entry in entries:
        try:
            found[vm_name(entry.name)] = Cursor(entry.epoch, entry.seq)
        except BadRequest as error:
            log.warning("passed over an entry of the broker's: %s", error)
    return found


def checked_interest(names: tuple[str, ...], since: Cursor | str | None) -> tuple[tuple[VmName, ...], Cursor | None]:
    """The arguments of `events`, checked: a cursor belongs to one VM."""
    checked = tuple(vm_name(name) for name in names)
    if since is not None and len(checked) != 1:
        raise BadRequest("since is a cursor of one VM: name that VM")
    return checked, parse_cursor(since) if isinstance(since, str) else since


def topics_of(names: tuple[VmName, ...]) -> list[bytes]:
    """What to subscribe to."""
    return [vm_topic(name) for name in names] if names else [b"vm/", host_topic()]


def attended(entries: list[VmSummary] | list[VmStats]) -> set[str]:
    """The VMs that have a worker: for the recent events of all VMs none is made."""
    return {entry.name for entry in entries if isinstance(entry, VmSummary) and entry.worker != "absent"}


def begin(
    stream: Stream,
    names: tuple[VmName, ...],
    since: Cursor | None,
    recent: bool,
    known: dict[str, Cursor],
    live: set[str],
) -> None:
    """Set a new stream to where its caller wants it to begin. `known`: how far the VMs are now; `live`: those that have a worker."""
    stream.begin({name: cursor for name, cursor in known.items() if not names or name in names})
    if since is not None:
        stream.replay(names[0], since)
    elif recent:
        for name in names or [vm_name(name) for name in known if name in live]:
            stream.replay(name, Cursor(0, 0), RECENT)
