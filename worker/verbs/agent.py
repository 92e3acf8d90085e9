# SPDX-License-Identifier: Apache-2.0
"""The verb that speaks to the guest agent: agent. Arguments and results: docs/operations.md.

With `hold`, guest-fsfreeze-freeze keeps its request open for as long as the guest is frozen, so that a client that goes away thaws it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec

from ...common.errors import BadRequest, DeadlineExceeded, OutcomeUnknown
from ..agent.freeze import FREEZES
from ..qmp.commands import Done, awaited
from .request import Request

if TYPE_CHECKING:
    from ..answers import Begun
    from ..app import App

SIGN_OF_LIFE: Final = 1.0  # seconds between the partial answers of a freeze that is held
THAW_MARGIN: Final = (
    2.0  # seconds before the request's deadline at which a freeze that is held ends; at most a fifth of the time left
)

# Safe to repeat. guest-exec-status is not: it tells the end of a process once.
_READING: Final = frozenset(
    {
        "guest-ping",
        "guest-info",
        "guest-fsfreeze-status",
        "guest-network-get-interfaces",
        "guest-ssh-get-authorized-keys",
    }
)


class AgentArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    command: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    arguments: dict[str, Any] | None = None
    hold: bool = False
    limit: Annotated[float, msgspec.Meta(gt=0, le=3600)] | None = None


def agent(app: App, request: Request, arguments: AgentArguments, done: Done) -> None:
    """One command for the guest agent, its `return` as the result. Answered on the loop, so that the page keeps it until it is."""
    try:
        _check(arguments)
    except BadRequest as error:
        done(None, error)
    else:
        _submit(app, request, arguments, done)


async def hold(app: App, request: Request, arguments: AgentArguments) -> dict[str, Any]:
    """A freeze for as long as whoever asked stays: `{thawed: why}` once the guest is thawed."""
    _check(arguments)
    if request.begun is None:
        app.requests.begun(request)
    guard = app.vm.agent.guard
    thawed: asyncio.Future[str] = app.loop.create_future()
    gone = asyncio.Event()

    def on_thawed(why: str) -> None:
        if not thawed.done():
            thawed.set_result(why)

    def on_gone() -> None:  # before the freeze is answered there is nothing to thaw yet
        gone.set()
        if frozen:
            guard.thaw("caller gone")

    frozen = False
    ends = [guard.on_thawed(on_thawed), app.requests.on_cancel(request.number, on_gone)]
    try:
        count = await _freeze(app, request, arguments) if request.begun is None else _frozen_before(app, request.begun)
        if count == 0:
            return {"thawed": "there was nothing to freeze"}
        frozen = True
        request.partial({"return": count})
        if gone.is_set():
            guard.thaw("caller gone")
        return {"thawed": await _until_thawed(app, request, thawed)}
    finally:
        for end in ends:
            end()
        if frozen and not thawed.done():  # the request ends before its freeze
            guard.thaw("request over")


def holds(arguments: Any) -> bool:
    """Whether a request is a freeze that lasts as long as whoever asked for it stays."""
    return isinstance(arguments, AgentArguments) and arguments.hold


def only_looks(command: str) -> bool:
    """Whether a command of the agent's is safe to repeat."""
    return command in _READING or command.startswith("guest-get-")


def _frozen_before(app: App, begun: Begun) -> int | None:
    """How many file systems an earlier worker had frozen for this request, which is held on. Raises `OutcomeUnknown`."""
    guard = app.vm.agent.guard
    found: int | None = 0
    for event in app.vm.events.since(begun.cursor):
        if event.event == "AGENT_FROZEN":
            found = event.data.get("count")
        elif event.event == "AGENT_THAWED":
            found = 0
    if found == 0 or not guard.until:
        guard.thaw("worker lost")
        text = f"VM {app.name}: its worker was lost while it froze the guest's file systems; they are thawed if they were frozen"
        raise OutcomeUnknown(text)
    return found


def _check(arguments: AgentArguments) -> None:
    if arguments.command not in FREEZES and (arguments.hold or arguments.limit is not None):
        raise BadRequest(f"agent: hold and limit are for guest-fsfreeze-freeze, not for {arguments.command}")


def _submit(app: App, request: Request, arguments: AgentArguments, done: Done) -> None:
    app.vm.require_run()
    name = arguments.command
    app.vm.agent.submit(
        name,
        arguments.arguments,
        done=done,
        deadline=request.deadline,
        request=request.number,
        reading=request.reading or only_looks(name),
        freeze_limit=arguments.limit,
        key=request.key,
        held=arguments.hold,
    )


async def _freeze(app: App, request: Request, arguments: AgentArguments) -> Any:
    answered, done = awaited(app.loop)
    _submit(app, request, arguments, done)
    return await answered


async def _until_thawed(app: App, request: Request, thawed: asyncio.Future[str]) -> str:
    guard = app.vm.agent.guard
    left = request.deadline - app.loop.time()
    end = request.deadline - min(THAW_MARGIN, left / 5)
    while (now := app.loop.time()) < request.deadline:
        if now >= end:
            guard.thaw("deadline")
        next_look = min(now + SIGN_OF_LIFE, end if now < end else request.deadline)
        await asyncio.wait({thawed}, timeout=next_look - now)
        if thawed.done():
            return thawed.result()
        request.partial({"left": max(0.0, min(guard.until or end, end) - app.loop.time())})
    text = f"VM {app.name}: its file systems are not thawed yet; vmloop goes on trying (event AGENT_THAWED tells)"
    raise DeadlineExceeded(text)
