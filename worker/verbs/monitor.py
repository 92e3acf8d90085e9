# SPDX-License-Identifier: Apache-2.0
"""Verbs that speak to the monitor as it is, and to the stream of events: qmp hmp events. Arguments and results: docs/operations.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

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


class EventsArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    since: str | None = None
    names: list[str] | None = None
    limit: Annotated[int, msgspec.Meta(ge=1)] | None = None


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
    """The recent events after a cursor, one part each."""
    since = parse_cursor(arguments.since) if arguments.since is not None else Cursor(0, 0)
    count = 0
    for event in app.vm.events.since(since):
        if arguments.names is not None and event.event not in arguments.names:
            continue
        if count == arguments.limit:
            break
        request.partial(event.to_wire())
        count += 1
    return {"count": count, "cursor": str(app.vm.events.cursor)}
