# SPDX-License-Identifier: Apache-2.0
"""worker/agent/agent.py: a new worker goes on with port, connection, freezes and ends that an earlier one began."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from vmloop.common.states import AgentState
from vmloop.worker.agent.ledger import AgentLedger, Part

from ..fakes.agent_peer import PORT, Bench, Outcome, Request, honest, on_bench, reply, sync_only


async def open_ports(label: bool) -> Any:  # what query-chardev says
    return [{"label": "vmloop-agent", "filename": "x", "frontend-open": label}]


def owed_parts(bench: Bench) -> list[Part]:
    return [owed.part for owed in AgentLedger(bench.page)]


async def in_flight(bench: Bench, command: str, **options: Any) -> Request:
    """A command that the peer has, and does not answer; the request that it got."""
    bench.peer.answer = sync_only
    await bench.ready()
    bench.submit(command, **options)
    await bench.until(lambda: bench.peer.names()[-1:] == [command])
    return bench.peer.requests[-1]


def test_the_agent_is_ready_again_once_its_port_is_known_to_be_open_and_without_a_sync(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        await bench.ready()
        asked = len(bench.peer.requests)
        bench.succeed()
        assert bench.agent.state.state is AgentState.SYNCING
        bench.agent.look(lambda: open_ports(True))
        await bench.until(lambda: bench.agent.state.state is AgentState.READY)
        assert len(bench.peer.requests) == asked
        assert bench.peer.connections == 1
        assert await bench.submit("guest-ping").code() == ""

    on_bench(tmp_path, work)


def test_a_port_that_was_closed_meanwhile_is_not_ready(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        await bench.ready()
        bench.succeed()
        bench.agent.look(lambda: open_ports(False))
        await bench.until(lambda: bench.agent.state.state is AgentState.WAITING)
        assert bench.keeper.kept == {}
        assert await bench.submit("guest-ping").code() == "agent-absent"
        await bench.ready()
        assert bench.peer.connections == 2

    on_bench(tmp_path, work)


@pytest.mark.parametrize("answered", [True, False])
def test_when_the_port_closes_the_answer_in_the_socket_is_told_before_the_end(tmp_path: Path, answered: bool) -> None:
    async def work(bench: Bench) -> None:
        request = await in_flight(bench, "guest-set-time")
        bench.succeed()
        outcome = bench.inherited[7]
        if answered:
            bench.peer.say(reply(request, **{"return": 5}))
        bench.port(False)
        assert (await outcome.code(), outcome.value) == (("", 5) if answered else ("outcome-unknown", None))
        assert bench.states()[-1] == "waiting"
        assert owed_parts(bench) == []

    on_bench(tmp_path, work, timeout=5.0)


@pytest.mark.parametrize("reading", [True, False])
def test_without_the_connection_a_mutating_command_ends_and_a_reading_one_is_nobodys(
    tmp_path: Path, reading: bool
) -> None:
    async def work(bench: Bench) -> None:
        await in_flight(bench, "guest-x", reading=reading)
        bench.succeed(kept=False)
        assert [await outcome.code() for outcome in bench.inherited.values()] == (
            [] if reading else ["outcome-unknown"]
        )
        assert bench.agent.state.state is AgentState.WAITING
        bench.peer.answer = honest
        await bench.ready()
        assert await bench.submit("guest-ping").code() == ""

    on_bench(tmp_path, work, timeout=5.0)


def test_a_connection_of_which_the_page_knows_nothing_is_ended(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        await bench.ready()
        AgentLedger(bench.page).ended()
        bench.succeed()
        assert bench.agent.fileno() == -1
        await bench.ready()
        assert bench.peer.connections == 2

    on_bench(tmp_path, work)


def test_an_end_for_good_is_one_for_the_duplicate_that_is_kept_too(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        await bench.ready()
        duplicate = bench.keeper.kept["agent"].dup()
        try:
            duplicate.setblocking(False)
            bench.port(False)
            assert bench.keeper.kept == {}
            assert duplicate.recv(1) == b""  # a chardev of QEMU's would not take another client otherwise
        finally:
            duplicate.close()

    on_bench(tmp_path, work)


def test_who_waits_in_line_of_a_leaving_worker_is_the_next_ones_and_its_own_commands_are_told(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        await in_flight(bench, "guest-x")
        waiting = bench.submit("guest-y")
        own = Outcome()
        bench.agent.submit("guest-z", None, done=own, deadline=bench.loop.time() + 10.0)
        bench.succeed()
        assert await own.code() == "worker-lost"
        assert not waiting.told.is_set()
        assert list(bench.inherited) == [7]

    on_bench(tmp_path, work, timeout=5.0)


def test_a_freeze_that_is_answered_in_the_next_worker_is_known_and_thawed_at_its_limit(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        request = await in_flight(bench, "guest-fsfreeze-freeze")
        bench.succeed()
        bench.peer.answer = honest
        bench.peer.say(reply(request, **{"return": 3}))
        outcome = bench.inherited[7]
        assert (await outcome.code(), outcome.value) == ("", 3)
        assert bench.seen("AGENT_FROZEN") == [{"count": 3, "until": 0.3}]
        await bench.until(lambda: bench.seen("AGENT_THAWED") == [{"why": "limit"}])
        assert bench.peer.names()[-1] == "guest-fsfreeze-thaw"

    on_bench(tmp_path, work, freeze_limit=0.3)


def test_a_freeze_that_somebody_held_is_thawed_as_soon_as_it_is_answered(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.peer.answer = sync_only
        await bench.ready()
        deadline = bench.loop.time() + 10.0
        bench.agent.submit("guest-fsfreeze-freeze", None, done=lambda *_: None, deadline=deadline, request=7, held=True)
        await bench.until(lambda: bench.peer.names() == ["guest-fsfreeze-freeze"])
        request = bench.peer.requests[-1]
        bench.succeed()
        assert bench.inherited == {}
        bench.peer.answer = honest
        bench.peer.say(reply(request, **{"return": 3}))
        await bench.until(lambda: len(bench.seen("AGENT_THAWED")) == 1, 5.0)

    on_bench(tmp_path, work)


@pytest.mark.parametrize(("mode", "event"), [("reboot", "RESET"), ("powerdown", "SHUTDOWN")])
@pytest.mark.parametrize("given_up", [False, True])
def test_a_command_that_ends_the_guest_waits_for_qemus_event_in_the_next_worker(
    tmp_path: Path, mode: str, event: str, given_up: bool
) -> None:
    async def work(bench: Bench) -> None:
        await in_flight(bench, "guest-shutdown", mode=mode)
        if given_up:
            await bench.until(lambda: Part.ENDING in owed_parts(bench))
        bench.succeed()
        outcome = bench.inherited[7]
        bench.agent.on_qmp_event("SUSPEND", {})
        await asyncio.sleep(0)
        assert not outcome.told.is_set()
        bench.agent.on_qmp_event(event, {})
        assert (await outcome.code(), outcome.value) == ("", {})
        await bench.until(lambda: Part.CURRENT not in owed_parts(bench))
        bench.succeed()
        assert bench.inherited == {}

    on_bench(tmp_path, work, timeout=0.2 if given_up else 2.0)


def test_an_event_of_its_own_port_still_counts_after_a_takeover(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        await bench.ready()
        bench.succeed()
        bench.agent.on_qmp_event("VSERPORT_CHANGE", {"id": PORT, "open": True})  # closed in between, and open again
        await bench.until(lambda: bench.peer.requests[-1]["execute"] == "guest-sync-delimited")
        await bench.until(lambda: bench.agent.state.state is AgentState.READY)

    on_bench(tmp_path, work)
