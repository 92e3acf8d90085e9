# SPDX-License-Identifier: Apache-2.0
"""Rules about event streams: every reader of a VM gets the same one, gap-free and in order, and it is what the VM says it emitted. Pure.

All that any reader got of a VM, put together, is its stream; each reader is held against it, and it against the VM's own account.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Final

from .excuses import Excuses
from .recording import Account, Emission, Life, Reading, Recording, Told
from .violation import Violation

LOST: Final = "EVENTS_LOST"
TRUNCATED: Final = "JOURNAL_TRUNCATED"
# Written down, and not in the kernel's hands yet when the VM was killed: one that it is at, a few if its monitor's socket was full.
UNSENT: Final = 3
# The last event before a gap and the first after it are told; what lies between is told by clocks of two processes of one machine.
CLOCKS: Final = 0.01  # seconds
STARTED: Final = "WORKER_STARTED"  # the first event of every epoch
SHOWN: Final = 3  # of the missing events, by name; of the rest only the number

Cursor = tuple[int, int]


def wrong_streams(recording: Recording, excuses: Excuses) -> Iterator[Violation]:
    for vm in recording.vms:
        readings = [reading for reading in recording.readings if reading.vm == vm]
        stream, conflicts = stream_of(readings)
        yield from (Violation("numbered twice", vm, text) for text in conflicts)
        yield from _holes(vm, [*stream.values()])
        for reading in readings:
            yield from _wrong_reading(reading, stream)
        yield from _wrong_lost(vm, stream, excuses)
        lives = [life for life in recording.lives if life.vm == vm]
        yield from _wrong_epochs(vm, [*stream.values()], lives)
        accounts = [account for account in recording.accounts if account.vm == vm]
        yield from _Comparison(vm, [*stream.values()], accounts, lives, excuses).violations()


def stream_of(readings: list[Reading]) -> tuple[dict[Cursor, Told], list[str]]:
    """All events that any reader got, by cursor and in its order; and what two readers were told differently."""
    found: dict[Cursor, tuple[str, Told]] = {}
    conflicts = []
    for reading in readings:
        for told in reading.events:
            if is_marker(told):
                continue
            reader, before = found.setdefault(told.cursor, (reading.reader, told))
            if before != told:
                conflicts.append(
                    f"{_at(told.cursor)} is {before.event} {before.data:.60} at {before.time} to {reader}, "
                    f"{told.event} {told.data:.60} at {told.time} to {reading.reader}"
                )
    return {cursor: told for cursor, (_, told) in sorted(found.items())}, conflicts


def is_marker(told: Told) -> bool:
    """EVENTS_LOST that a client made up for a hole in what it got, not one of the VM's own events."""
    return told.event == LOST and '"after"' in told.data and '"last"' in told.data


def _holes(vm: str, stream: list[Told]) -> Iterator[Violation]:
    """In what all readers together got."""
    truncated = any(told.event == TRUNCATED for told in stream)
    if stream and stream[0].cursor != (1, 1) and not truncated:
        yield Violation("hole in the stream", vm, f"nobody got anything before {_at(stream[0].cursor)}")
    for before, after in pairwise(stream):
        if not _follows(before.cursor, after.cursor):
            yield Violation(
                "hole in the stream", vm, f"nobody got what is between {_at(before.cursor)} and {_at(after.cursor)}"
            )


def _follows(before: Cursor, after: Cursor) -> bool:
    return after == (before[0], before[1] + 1) or (after[0] > before[0] and after[1] == 1)


def _wrong_reading(reading: Reading, stream: dict[Cursor, Told]) -> Iterator[Violation]:
    """A reader got all of the stream from where it began, once and in order."""
    vm, who = reading.vm, reading.reader
    if reading.error:
        yield Violation("reader failed", vm, f"{who}: {reading.error}")
    markers = [told for told in reading.events if is_marker(told)]
    if markers:
        yield Violation(
            "told of a gap", vm, f"{who} was told {len(markers)} times that events are lost: {markers[0].data}"
        )
    got = [told.cursor for told in reading.events if not is_marker(told)]
    for before, after in pairwise(got):
        if after <= before:
            rule = "told twice" if after == before or after in got[: got.index(before)] else "out of order"
            yield Violation(rule, vm, f"{who}: {_at(after)} after {_at(before)}")
    start = reading.since if reading.since is not None else (got[0][0], got[0][1] - 1) if got else None
    if start is None:
        return
    has = set(got)
    until = reading.until
    missing = [
        cursor for cursor in stream if cursor > start and cursor not in has and (until is None or cursor <= until)
    ]
    if missing:
        last = "to its end" if got and missing[0] > got[-1] else "in the middle"
        yield Violation(
            "reader misses events",
            vm,
            f"{who}, from {_at(start)}: {len(missing)} of {len(stream)}, the first {_at(missing[0])}, {last}",
        )


def _wrong_lost(vm: str, stream: dict[Cursor, Told], excuses: Excuses) -> Iterator[Violation]:
    """EVENTS_LOST of the VM's own only shortly after its worker and the zygote have died together."""
    for told in stream.values():
        if told.event == LOST and not excuses.may_be_lost_at(vm, excuses.on_our_clock(told.time)):
            yield Violation(
                "events lost", vm, f"{_at(told.cursor)} {told.data}, but somebody held the connection all the time"
            )


def _wrong_epochs(vm: str, stream: list[Told], lives: list[Life]) -> Iterator[Violation]:
    """Each run begins with its worker's word, and each that is over says once that it is, as its last state."""
    epochs: dict[int, list[Told]] = {}
    for told in stream:
        epochs.setdefault(told.epoch, []).append(told)
    gone = {life.epoch for life in lives if life.gone is not None and life.epoch}
    newest = max(epochs, default=0)
    for epoch in sorted(gone - epochs.keys()):
        yield Violation("end never told", vm, f"nobody got any event of epoch {epoch}, whose process is gone")
    for epoch, events in epochs.items():
        if events[0].seq == 1 and events[0].event != STARTED:
            yield Violation("begins with something else", vm, f"{_at(events[0].cursor)} is {events[0].event}")
        if epoch not in gone and epoch == newest:
            continue  # it lives, as far as is known
        states = [json.loads(told.data).get("new") for told in events if told.event == "VM_STATE"]
        if states.count("shutoff") != 1 or states[-1] != "shutoff":
            yield Violation("end never told", vm, f"epoch {epoch} is over, and its last states are {states[-SHOWN:]}")


class _Comparison:
    """The QMP events of one VM's stream, against what the VM emitted, in that order."""

    def __init__(
        self, vm: str, stream: list[Told], accounts: list[Account], lives: list[Life], excuses: Excuses
    ) -> None:
        self._vm = vm
        self._stream = stream
        self._accounts = accounts
        self._excuses = excuses
        gone = [life for life in lives if life.gone is not None]
        self._gone = {life.pid for life in gone}
        self._killed = {life.pid for life in gone if excuses.was_killed(life)}
        self._gaps = [
            gap for told in stream if told.event == LOST and (gap := self._gap(told)) is not None
        ]  # in which emissions may be missing, for an EVENTS_LOST says so

    def violations(self) -> Iterator[Violation]:
        vm = self._vm
        emitted = [
            (number, emission) for number, account in enumerate(self._accounts) for emission in account.emissions
        ]
        places = {emission: place for place, (_, emission) in enumerate(emitted)}
        met, matched = -1, set[int]()
        for told in self._stream:
            if told.origin != "qmp":
                continue
            place = places.get(Emission(told.event, told.time, told.data))
            if place is None:
                if not _unwitnessed(told, self._accounts):
                    yield Violation(
                        "never emitted", vm, f"{_at(told.cursor)} {told.event} {told.data:.80} at {told.time}"
                    )
                continue
            if place in matched:
                yield Violation("emitted once, told twice", vm, f"{_at(told.cursor)} {told.event} {told.data:.80}")
            elif place < met:
                yield Violation(
                    "out of order", vm, f"{_at(told.cursor)} {told.event} was emitted before what comes before it"
                )
            if place > met:
                yield from self._skipped(emitted[met + 1 : place])
                met = place
            matched.add(place)
        yield from self._skipped(emitted[met + 1 :])

    def _skipped(self, skipped: list[tuple[int, Emission]]) -> Iterator[Violation]:
        """Emissions that are not in the stream. What a QEMU still had in its hands when it was killed is nobody's fault."""
        wrong: list[Emission] = []
        for number in sorted({number for number, _ in skipped}):
            account = self._accounts[number]
            of_run = [emission for other, emission in skipped if other == number]
            at_its_end = of_run[-1] == account.emissions[-1] and account.pid in self._gone
            missing = [emission for emission in of_run if not self._excused(emission, at_its_end=at_its_end)]
            if not (at_its_end and account.pid in self._killed and len(missing) <= UNSENT):
                wrong += missing
        if wrong:
            first = ", ".join(f"{one.event} {one.data:.60} at {one.time}" for one in wrong[:SHOWN])
            yield Violation("emitted, never told", self._vm, f"{len(wrong)} events: {first}")

    def _excused(self, emission: Emission, *, at_its_end: bool) -> bool:
        """Nobody held the connection when it was emitted, and an EVENTS_LOST says so, or QEMU ended before anybody was connected again.

        `since` of an EVENTS_LOST is when QEMU last said something, which may be long before the deaths: that alone excuses nothing.
        """
        at = self._excuses.on_our_clock(emission.time)
        marked = any(since - CLOCKS <= at <= until + CLOCKS for since, until in self._gaps)
        return any(
            marked or (at_its_end and not any(start <= until < at - CLOCKS for _, until in self._gaps))
            for start, end in self._excuses.losses(self._vm)
            if start <= at <= end
        )

    def _gap(self, told: Told) -> tuple[float, float] | None:
        """The span that an EVENTS_LOST speaks of; None of one that says nothing of the kind."""
        data = json.loads(told.data)
        since, until = data.get("since"), data.get("until")
        if not isinstance(since, int | float) or not isinstance(until, int | float):
            return None
        return self._excuses.on_our_clock(since * 1e6), self._excuses.on_our_clock(until * 1e6)


def _unwitnessed(told: Told, accounts: list[Account]) -> bool:
    """Outside the span that the witness of a real QEMU has seen of each run."""
    if all(account.whole for account in accounts):
        return False
    return not any(
        account.emissions and account.emissions[0].time <= told.time <= account.emissions[-1].time
        for account in accounts
    )


def _at(cursor: Cursor) -> str:
    return f"{cursor[0]}.{cursor[1]}"


def canonical(data: object) -> str:
    """An event's data in the one form in which it is compared; nothing and an empty map are the same, as on vmloop's wire."""
    return json.dumps(data or {}, sort_keys=True, separators=(",", ":"), default=repr)
