# SPDX-License-Identifier: Apache-2.0
"""Verbs that speak to the monitor as it is, and to the stream of events: qmp hmp events. Arguments and results: docs/operations.md."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec

from ...common.cursor import Cursor, parse_cursor
from ...common.errors import VmloopError
from ..qmp.commands import Done
from .request import Request

if TYPE_CHECKING:
    from ..app import App


class QmpArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    command: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    arguments: dict[str, Any] | None = None
    oob: bool = False
    wait_frozen: bool = False


class HmpArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    line: Annotated[str, msgspec.Meta(max_length=65536)]


# One answer of `events`: parts that wait for a client sit in the broker, and there in memory.
MAX_PARTS: Final = 1000
MAX_PARTS_BYTES: Final = 4 * 1024 * 1024
CHUNK: Final = 100  # events read from the journal at once; the loop has its turn in between
CHUNK_BYTES: Final = 256 * 1024


class EventsArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    since: str | None = None
    names: list[str] | None = None
    limit: Annotated[int, msgspec.Meta(ge=1)] | None = None
    last: Annotated[int, msgspec.Meta(ge=1, le=MAX_PARTS)] | None = None


def qmp(app: App, request: Request, arguments: QmpArguments, done: Done) -> None:
    """One QMP command, QEMU's `return` as the result. The shortest path: no task, no future."""
    try:
        session = app.vm.require_session()
    except VmloopError as error:
        done(None, error)
        return
    session.submit(
        arguments.command,
        arguments.arguments,
        done=done,
        deadline=request.deadline,
        reading=request.reading or arguments.command.startswith("query-"),
        request=request.number,
        oob=arguments.oob,
        key=request.key,
        wait_frozen=arguments.wait_frozen,
    )


def hmp(app: App, request: Request, arguments: HmpArguments, done: Done) -> None:
    """One line for the human monitor, what it prints as the result."""
    passed = QmpArguments("human-monitor-command", {"command-line": arguments.line})
    qmp(app, request, passed, done)


async def events(app: App, request: Request, arguments: EventsArguments) -> dict[str, Any]:
    """The events after a cursor, one part each, as many as one answer holds; `reached` is where to go on if there are more."""
    reached = parse_cursor(arguments.since) if arguments.since is not None else Cursor(0, 0)
    if arguments.last is not None:
        reached = max(reached, await _before_last(app, arguments.last))
    limit = min(arguments.limit or MAX_PARTS, MAX_PARTS)
    count = size = 0
    more = True
    while more and count < limit and size < MAX_PARTS_BYTES:
        page = app.vm.events.read(reached, min(CHUNK, limit - count), CHUNK_BYTES)
        for event in page.events:
            if arguments.names is None or event.event in arguments.names:
                request.partial(event.to_wire())
                count += 1
        reached, more, size = page.last, page.more, size + page.size
        await asyncio.sleep(0)
    return {"count": count, "cursor": str(app.vm.events.cursor), "reached": str(reached), "more": more}


async def _before_last(app: App, count: int) -> Cursor:
    """Just before the newest `count` events of the newest run; where that has fewer, before all of the run before it too."""
    epoch, seq = app.vm.events.cursor
    if seq >= count or epoch <= 1:
        return Cursor(epoch, max(0, seq - count))
    places: deque[Cursor] = deque([Cursor(epoch - 1, 0)], maxlen=count + 1)
    more = True
    while more:
        page = app.vm.events.read(places[-1], CHUNK, CHUNK_BYTES)
        places.extend(event.cursor for event in page.events)
        more = page.more
        await asyncio.sleep(0)
    return places[0]
