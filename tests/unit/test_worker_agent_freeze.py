# SPDX-License-Identifier: Apache-2.0
"""worker/agent/freeze.py and the verb: a frozen file system is thawed when its limit passes, its caller goes, or nobody knows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vmloop.common.page import Word, float_to_word
from vmloop.worker.verbs.agent import AgentArguments
from vmloop.worker.verbs.agent import hold as hold_frozen
from vmloop.worker.verbs.request import Request

from ..fakes.agent_peer import PORT, Bench, honest, on_bench, reply
from ..fakes.agent_peer import Request as AgentRequest


class FrozenGuest:
    """A guest that knows whether it is frozen; `mute` commands are carried out and not answered."""

    def __init__(self, bench: Bench, mute: frozenset[str] = frozenset()) -> None:
        self.frozen = False
        self.mute = mute
        bench.peer.answer = self

    def __call__(self, request: AgentRequest) -> bytes | None:
        name = request["execute"]
        value: Any = {}
        if name == "guest-fsfreeze-freeze":
            self.frozen, value = True, 2
        elif name == "guest-fsfreeze-thaw":
            self.frozen, value = False, 2
        elif name == "guest-fsfreeze-status":
            value = "frozen" if self.frozen else "thawed"
        else:
            return honest(request)
        return None if name in self.mute else reply(request, **{"return": value})


def test_a_freeze_is_thawed_at_its_limit(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        guest = FrozenGuest(bench)
        await bench.ready()
        outcome = bench.submit("guest-fsfreeze-freeze")
        assert (await outcome.code(), outcome.value) == ("", 2)
        assert bench.seen("AGENT_FROZEN") == [{"count": 2, "until": 0.1}]
        assert bench.page.words[Word.FROZEN_UNTIL] != 0
        await bench.until(lambda: bench.seen("AGENT_THAWED") == [{"why": "limit"}])
        assert not guest.frozen
        assert bench.page.words[Word.FROZEN_UNTIL] == 0

    on_bench(tmp_path, work, freeze_limit=0.1)


def test_a_thaw_by_hand_ends_the_guard(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        FrozenGuest(bench)
        await bench.ready()
        await bench.submit("guest-fsfreeze-freeze").code()
        await bench.submit("guest-fsfreeze-thaw").code()
        assert bench.seen("AGENT_THAWED") == [{"why": "asked"}]
        assert bench.page.words[Word.FROZEN_UNTIL] == 0

    on_bench(tmp_path, work)


def test_a_freeze_that_is_not_answered_counts_as_frozen(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        guest = FrozenGuest(bench, frozenset({"guest-fsfreeze-freeze"}))
        await bench.ready()
        assert await bench.submit("guest-fsfreeze-freeze", 0.1).code() == "deadline"
        await bench.until(lambda: bench.seen("AGENT_THAWED") == [{"why": "unanswered"}])
        assert not guest.frozen
        assert bench.peer.names() == ["guest-fsfreeze-freeze", "guest-fsfreeze-status", "guest-fsfreeze-thaw"]

    on_bench(tmp_path, work)


def test_the_next_worker_goes_on_with_the_guard(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        guest = FrozenGuest(bench)
        guest.frozen = True
        bench.page.words[Word.FROZEN_UNTIL] = float_to_word(bench.loop.time() + 0.1)
        bench.agent.begin(str(bench.path), bench.section, PORT, taken_over=True)
        await bench.ready()
        await bench.until(lambda: not guest.frozen)
        await bench.until(lambda: bench.seen("AGENT_THAWED") == [{"why": "limit"}])

    on_bench(tmp_path, work)


def test_a_worker_that_leaves_hands_the_guard_on(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        FrozenGuest(bench)
        await bench.ready()
        await bench.submit("guest-fsfreeze-freeze").code()
        bench.agent.close("the worker ends", over=False)
        bench.agent.guard.thaw("caller gone")  # too late for this worker
        assert 0 < bench.agent.guard.until <= bench.loop.time()
        assert bench.seen("AGENT_THAWED") == []
        bench.agent.begin(str(bench.path), bench.section, PORT, taken_over=True)
        await bench.ready()
        await bench.until(lambda: bench.seen("AGENT_THAWED") == [{"why": "limit"}])

    on_bench(tmp_path, work)


def test_a_thaw_is_tried_until_it_succeeds(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        guest = FrozenGuest(bench)
        await bench.ready()
        await bench.submit("guest-fsfreeze-freeze").code()
        bench.port(False)
        await asyncio.sleep(0.2)
        bench.port(True)
        await bench.until(lambda: not guest.frozen)

    on_bench(tmp_path, work, freeze_limit=0.1)


def test_a_refused_freeze_and_a_reset_leave_nothing_frozen(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        await bench.ready()
        bench.peer.answer = lambda r: reply(r, error={"class": "GenericError", "desc": "no"})
        assert await bench.submit("guest-fsfreeze-freeze").code() == "agent-error"
        assert bench.page.words[Word.FROZEN_UNTIL] == 0
        FrozenGuest(bench)
        await bench.submit("guest-fsfreeze-freeze").code()
        bench.agent.on_qmp_event("RESET", {})
        assert bench.page.words[Word.FROZEN_UNTIL] == 0

    on_bench(tmp_path, work)


def hold(bench: Bench, parts: list[Any], seconds: float) -> tuple[Any, Request, list[Callable[[], None]]]:
    """An app and a request for the verb, and what to call when the client goes away."""
    cancels: list[Callable[[], None]] = []

    def on_cancel(_: int, callback: Callable[[], None]) -> Callable[[], None]:
        cancels.append(callback)
        return cancels.clear

    requests = SimpleNamespace(on_cancel=on_cancel, begun=lambda _: None)
    app = SimpleNamespace(
        loop=bench.loop, name="vm1", vm=SimpleNamespace(agent=bench.agent, require_run=lambda: None), requests=requests
    )
    now = bench.loop.time()
    return app, Request(9, "agent", now + seconds, now, False, b"", parts.append), cancels


def test_a_held_freeze_ends_when_its_client_goes_away(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        guest = FrozenGuest(bench)
        await bench.ready()
        parts: list[Any] = []
        app, request, cancels = hold(bench, parts, 30.0)
        task = asyncio.create_task(hold_frozen(app, request, AgentArguments("guest-fsfreeze-freeze", hold=True)))
        await bench.until(lambda: parts == [{"return": 2}])
        await bench.until(lambda: guest.frozen)
        cancels[0]()
        assert await task == {"thawed": "caller gone"}
        assert not guest.frozen
        assert cancels == []

    on_bench(tmp_path, work)


def test_a_held_freeze_ends_before_its_requests_deadline_and_gives_signs_of_life(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        guest = FrozenGuest(bench)
        await bench.ready()
        parts: list[Any] = []
        app, request, _ = hold(bench, parts, 1.6)
        assert await hold_frozen(app, request, AgentArguments("guest-fsfreeze-freeze", hold=True)) == {
            "thawed": "deadline"
        }
        assert not guest.frozen
        assert parts[0] == {"return": 2}
        assert 0 < parts[1]["left"] < 1

    on_bench(tmp_path, work)


def test_a_freeze_may_have_a_limit_of_its_own(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        FrozenGuest(bench)
        await bench.ready()
        app, request, _ = hold(bench, [], 5.0)
        arguments = AgentArguments("guest-fsfreeze-freeze", hold=True, limit=0.1)
        assert await hold_frozen(app, request, arguments) == {"thawed": "limit"}

    on_bench(tmp_path, work)
