# SPDX-License-Identifier: Apache-2.0
"""Clients that send commands all the time, and write down how each ended: blocking ones in threads, an asyncio one with several tasks.

Each mutating command carries a mark of its own; some are sent twice on purpose, with the same key. power.py changes what VMs do, raw.py
uses no library.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from vmloop.client import aio, connect, requests
from vmloop.client.requests import Request
from vmloop.common.errors import VmloopError

from .cast import LAUNCHED, REAL, Actor
from .recording import RESULT, Command

TIMEOUT: Final = 8.0  # seconds; four times as long as any one fault lasts
CONNECT: Final = 10.0
PACE: Final = 0.05  # seconds between two commands of one client
TASKS: Final = 4  # of the asyncio client

_MARK: Final = 0.55  # the share of mutating commands
_REPEAT: Final = 0.15  # of these, the share that is sent again with its key
_AGENT: Final = 0.2  # of those for a VM with an agent, the share for it


class Stage(msgspec.Struct):
    """What all clients share."""

    root: Path
    actors: list[Actor]
    seed: int
    stop: threading.Event
    commands: list[Command]
    broken: list[str]


class Ask(msgspec.Struct, frozen=True):
    """One command to be sent."""

    vm: str
    request: Request[Any]
    mark: str = ""
    again: bool = False  # send it a second time after its answer


def asks(stage: Stage, client: str) -> Any:
    """The endless commands of one client: the same for the same seed."""
    chance = random.Random(f"{client} {stage.seed}")
    for number in itertools.count():
        actor = chance.choice(stage.actors)
        service = f"vm/{actor.name}"
        for_agent = actor.kind == LAUNCHED and chance.random() < _AGENT
        if chance.random() < _MARK:
            mark = f"m-{client}-{number}"
            op, arguments = ("agent", agent_marking(mark)) if for_agent else ("qmp", marking(actor, mark))
            request = Request(service, op, arguments, requests.plain, TIMEOUT, key=mark.encode())
            yield Ask(actor.name, request, mark, chance.random() < _REPEAT)
        elif for_agent:
            yield Ask(actor.name, requests.agent(service, "guest-ping", None, TIMEOUT))
        else:
            yield Ask(actor.name, requests.qmp(service, "query-status", None, False, False, TIMEOUT, None))


def marking(actor: Actor, mark: str) -> dict[str, Any]:
    """The arguments of a `qmp` that leaves a mark: of a real QEMU an object of that name, of which there can be only one."""
    if actor.kind == REAL:
        return {"command": "object-add", "arguments": {"qom-type": "secret", "id": mark, "data": "x"}}
    return {"command": "x-simulate", "arguments": {"mark": mark}}


def agent_marking(mark: str) -> dict[str, Any]:
    """The arguments of an `agent` that leaves a mark in the guest."""
    return {"command": "x-mark", "arguments": {"mark": mark}}


def in_thread(stage: Stage, name: str, act: Callable[[Stage, str], None]) -> threading.Thread:
    """A started thread; what it raises is written down as broken."""

    def run() -> None:
        try:
            act(stage, name)
        except Exception as error:  # noqa: BLE001 - a client that ends before its time is a finding, told with the others
            stage.broken.append(f"client {name} ended: {error!r}")

    thread = threading.Thread(target=run, name=name, daemon=True)  # one that hangs is told, and must not keep the test
    thread.start()
    return thread


def blocking(stage: Stage, client: str) -> None:
    """A program with the blocking library."""
    with connect(root=stage.root, wait=CONNECT) as host:
        for ask in asks(stage, client):
            for _ in range(1 + ask.again):
                began = time.monotonic()
                error: VmloopError | None = None
                try:
                    host.answer(ask.request)
                except VmloopError as caught:
                    error = caught
                stage.commands.append(ended(client, ask, began, error))
            if stage.stop.wait(PACE):
                return


def asynchronous(stage: Stage, client: str) -> None:
    """A program with the asyncio library: several commands under way at once, over one connection."""
    asyncio.run(_asynchronous(stage, client))


async def _asynchronous(stage: Stage, client: str) -> None:
    async with aio.connect(root=stage.root, wait=CONNECT) as host:
        await asyncio.gather(*(_task(stage, host, f"{client}{number}") for number in range(TASKS)))


async def _task(stage: Stage, host: aio.Host, client: str) -> None:
    for ask in asks(stage, client):
        for _ in range(1 + ask.again):
            began = time.monotonic()
            error: VmloopError | None = None
            try:
                await host.answer(ask.request)
            except VmloopError as caught:
                error = caught
            stage.commands.append(ended(client, ask, began, error))
        if stage.stop.is_set():
            return
        await asyncio.sleep(PACE)


def ended(client: str, ask: Ask, began: float, error: VmloopError | None) -> Command:
    """What is written down of a command that has ended now."""
    request = ask.request
    return Command(
        client=client,
        vm=ask.vm,
        op=f"{request.op} {(request.arguments or {}).get('command', '')}".strip(),
        began=began,
        ended=time.monotonic(),
        outcome=RESULT if error is None else error.code,
        text="" if error is None else str(error),
        mark=ask.mark,
        keyed=request.key != b"" and not request.reading,
        reading=request.reading,
        sent=None if error is None else error.fields.get("sent"),
    )
