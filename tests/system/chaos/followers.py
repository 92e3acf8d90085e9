# SPDX-License-Identifier: Apache-2.0
"""Readers of event streams. All must end with the same stream of each VM, whatever their habits and whenever they came.

    everything     the blocking library, all VMs in one stream, from before the first VM is there
    aio            the asyncio library, a stream for each VM from 0.0
    slow           blocking, takes its time over each event      each VM has one of these three
    late           blocking, comes when half the time is over
    renewed        blocking, closes its stream now and then and opens a new one at its cursor

A stream that ends with an error is opened again at its cursor, as a program would; one that always does is given up, and that is a finding.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from vmloop.client import aio, connect
from vmloop.client.session import Host
from vmloop.client.stream import Event, numbered
from vmloop.common.errors import VmloopError

from .commands import CONNECT, Stage
from .recording import Reading, Told
from .streams import canonical

Cursor = tuple[int, int]

TURN: Final = 0.3  # seconds of one wait for an event, after which a reader looks whether it has all
SLOWNESS: Final = 0.05  # seconds over each event
RENEW_AFTER: Final = 25  # events
MAX_ERRORS: Final = 30  # streams opened again by one reader
TIMEOUT: Final = 10.0  # seconds of one request of a reader
ENDING: Final = 35.0  # seconds after its time is over: a page is asked for three times at most

HABITS: Final = ("slow", "late", "renewed")


class Followers:
    """All readers of a run, in threads."""

    def __init__(self, stage: Stage, late_after: float) -> None:
        self._stage = stage
        self._late_at = time.monotonic() + late_after
        self._targets: dict[str, Cursor] = {}
        self._until = float("inf")
        self._finishing = threading.Event()
        self._threads: list[threading.Thread] = []
        self.readings: list[Reading] = []
        self.reopened = 0

    def start_everything(self) -> None:
        """Before the first VM is there."""
        self._spawn("everything", self._everything)

    def start(self) -> None:
        """When the VMs are known."""
        self._spawn("aio", self._aio)
        for place, actor in enumerate(self._stage.actors):
            habit = HABITS[place % len(HABITS)]
            self._spawn(f"{habit} of {actor.name}", partial(self._one, habit, actor.name))

    def finish(self, targets: dict[str, Cursor], seconds: float) -> list[Reading]:
        """Wait until every reader has come to the end of each stream, for so long at most; what they got."""
        self._until = time.monotonic() + seconds
        self._targets = targets
        self._finishing.set()
        for thread in self._threads:
            thread.join(max(0.0, self._until + ENDING - time.monotonic()))
            if thread.is_alive():
                self._stage.broken.append(f"reader {thread.name} does not end: what it waits for is past its deadline")
        return self.readings

    def _spawn(self, name: str, act: Callable[[], None]) -> None:
        def run() -> None:
            try:
                act()
            except Exception as error:  # noqa: BLE001 - a reader that ends before its time is a finding, told with the others
                self._stage.broken.append(f"reader {name} ended: {error!r}")

        thread = threading.Thread(target=run, name=name, daemon=True)  # as in commands.py
        thread.start()
        self._threads.append(thread)

    def _over(self, vm: str, at: Cursor) -> bool:
        return self._finishing.is_set() and (at >= self._targets.get(vm, (0, 0)) or time.monotonic() > self._until)

    # -- the readers --------------------------------------------------------------------------------------------------------

    def _everything(self) -> None:
        got: dict[str, list[Told]] = defaultdict(list)
        at: dict[str, Cursor] = defaultdict(lambda: (0, 0))
        with connect(root=self._stage.root, wait=CONNECT, timeout=TIMEOUT) as host, host.events() as events:
            while not all(self._over(actor.name, at[actor.name]) for actor in self._stage.actors):
                event = events.get(TURN)
                if event is not None and numbered(event):
                    got[event.vm].append(told(event))
                    at[event.vm] = event.epoch, event.seq
        self.readings += [Reading("everything", actor.name, (0, 0), got[actor.name]) for actor in self._stage.actors]

    def _one(self, habit: str, name: str) -> None:
        if habit == "late":
            self._finishing.wait(max(0.0, self._late_at - time.monotonic()))
        got: list[Told] = []
        errors = 0
        error = ""
        with connect(root=self._stage.root, wait=CONNECT, timeout=TIMEOUT) as host:
            while not self._over(name, _end(got)):
                try:
                    self._read(host, habit, name, got)
                except VmloopError as caught:
                    errors += 1
                    self.reopened += 1
                    if errors > MAX_ERRORS:
                        error = f"{caught.code}: {caught}"
                        break
                    self._stage.stop.wait(TURN)
        self.readings.append(Reading(habit, name, (0, 0), got, error))

    def _read(self, host: Host, habit: str, name: str, got: list[Told]) -> None:
        epoch, seq = _end(got)
        limit = len(got) + RENEW_AFTER if habit == "renewed" else None
        with host.events(name, since=f"{epoch}.{seq}") as events:
            while not self._over(name, _end(got)) and (limit is None or len(got) < limit):
                event = events.get(TURN)
                if event is not None and numbered(event):
                    got.append(told(event))
                if habit == "slow" and not self._finishing.is_set():
                    self._stage.stop.wait(SLOWNESS)

    def _aio(self) -> None:
        asyncio.run(self._aio_all())

    async def _aio_all(self) -> None:
        async with aio.connect(root=self._stage.root, wait=CONNECT, timeout=TIMEOUT) as host:
            await asyncio.gather(*(self._aio_one(host, actor.name) for actor in self._stage.actors))

    async def _aio_one(self, host: aio.Host, name: str) -> None:
        got: list[Told] = []
        errors = 0
        error = ""
        while not self._over(name, _end(got)):
            epoch, seq = _end(got)
            try:
                async with host.events(name, since=f"{epoch}.{seq}") as events:
                    while not self._over(name, _end(got)):
                        event = await events.get(TURN)
                        if event is not None and numbered(event):
                            got.append(told(event))
            except VmloopError as caught:
                errors += 1
                self.reopened += 1
                if errors > MAX_ERRORS:
                    error = f"{caught.code}: {caught}"
                    break
                await asyncio.sleep(TURN)
        self.readings.append(Reading("aio", name, (0, 0), got, error))


def look(host: Host, reader: str, name: str) -> Reading:
    """All that is kept of a VM's stream now, from 0.0."""
    got: list[Told] = []
    now: Cursor = (0, 0)
    try:
        newest = host.vm(name).cursor()
        now = (newest.epoch, newest.seq)
        with host.events(name, since="0.0", follow=False) as events:
            got.extend(told(event) for event in events if numbered(event))
    except VmloopError as error:
        return Reading(reader, name, (0, 0), got, f"{error.code}: {error}", now)
    return Reading(reader, name, (0, 0), got, until=now)


def told(event: Event) -> Told:
    """What is written down of an event."""
    data: Any = event.data
    return Told(event.epoch, event.seq, event.event, event.time, canonical(data), event.origin)


def _end(got: list[Told]) -> Cursor:
    return got[-1].cursor if got else (0, 0)
