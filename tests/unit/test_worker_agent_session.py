# SPDX-License-Identifier: Apache-2.0
"""worker/agent/: the channel to a guest agent, against a peer that keeps to the protocol, or does not."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from ..fakes.agent_peer import Bench, Request, honest, on_bench, reply, sync_only


def test_ready_means_that_a_sync_was_answered(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        assert await bench.submit("guest-ping").code() == "agent-absent"
        bench.begin()
        outcome = bench.submit("guest-ping")
        assert await outcome.code() == "agent-absent"
        assert "not opened" in str(outcome.error)
        await bench.ready()
        assert bench.states() == ["waiting", "syncing", "ready"]
        ping = bench.submit("guest-ping")
        assert (await ping.code(), ping.value) == ("", {})
        assert bench.peer.names() == ["guest-ping"]

    on_bench(tmp_path, work)


def test_without_a_port_the_error_says_how_to_get_one(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.agent.begin(None, bench.section, None)
        outcome = bench.submit("guest-ping")
        assert await outcome.code() == "agent-absent"
        assert "agent.enabled" in str(outcome.error)

    on_bench(tmp_path, work)


def test_a_timeout_is_unresponsive_and_a_late_reply_becomes_an_event(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        kept: list[Request] = []

        def answer(request: Request) -> bytes | None:
            if request["execute"] == "guest-get-time":
                kept.append(request)
                return None
            if kept and request["execute"] == "guest-sync-delimited":
                kept.append(request)
                return None
            return honest(request)

        bench.peer.answer = answer
        await bench.ready()
        assert await bench.submit("guest-get-time").code() == "agent-unresponsive"
        assert bench.states()[-1] == "unresponsive"
        await bench.until(lambda: len(kept) == 2)
        bench.peer.say(reply(kept[0], **{"return": 5}) + (honest(kept[1]) or b""))
        await bench.until(lambda: bench.states()[-1] == "ready")
        assert bench.seen("COMMAND_LATE") == [{"id": 7, "command": "guest-get-time", "agent": True, "return": 5}]
        bench.peer.answer = honest
        assert await bench.submit("guest-ping").code() == ""

    on_bench(tmp_path, work)


def test_the_callers_own_deadline_leaves_the_channel_free(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.peer.answer = sync_only
        await bench.ready()
        assert await bench.submit("guest-ping", 0.05).code() == "deadline"
        bench.peer.answer = honest
        assert await bench.submit("guest-ping").code() == ""
        assert "unresponsive" not in bench.states()

    on_bench(tmp_path, work, timeout=2.0)


def test_the_queue_is_bounded_and_closing_tells_everybody(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.peer.answer = sync_only
        await bench.ready()
        outcomes = [bench.submit("guest-set-time") for _ in range(1025)]
        assert await outcomes[-1].code() == "busy"
        bench.port(False)
        assert await outcomes[0].code() == "outcome-unknown"
        assert {await outcome.code() for outcome in outcomes[1:-1]} == {"agent-absent"}
        assert bench.states()[-1] == "waiting"

    on_bench(tmp_path, work, timeout=5.0)


def test_a_reading_command_is_absent_when_the_port_closes(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.peer.answer = sync_only
        await bench.ready()
        outcome = bench.submit("guest-get-time", reading=True)
        bench.port(False)
        assert await outcome.code() == "agent-absent"

    on_bench(tmp_path, work, timeout=5.0)


@pytest.mark.parametrize(
    ("label", "desc", "kind"),
    [
        ("CommandNotFound", "The command x has not been found", "unknown"),
        ("CommandNotFound", "Command guest-ping has been disabled", "disabled"),
        ("CommandDisabled", "no", "disabled"),
        ("GenericError", "no", "refused"),
    ],
)
def test_refusals_are_told_apart(tmp_path: Path, label: str, desc: str, kind: str) -> None:
    async def work(bench: Bench) -> None:
        await bench.ready()
        bench.peer.answer = lambda request: reply(request, error={"class": label, "desc": desc})
        outcome = bench.submit("guest-x")
        assert await outcome.code() == "agent-error"
        assert outcome.error is not None
        assert outcome.error.fields == {"class": label, "desc": desc, "kind": kind}

    on_bench(tmp_path, work)


LIES = {
    "not json": b"nonsense that is no JSON\n",
    "0xff in the middle": b'{"return": "a\xff{"return": 5}\n',
    "unknown id": b'{"return": 5, "id": 12345}\n',
    "id of another kind": b'{"return": 5, "id": {"a": [1]}}\n',
    "nested": b'{"return": ' + b"[" * 10_000 + b"]" * 10_000 + b"}\n",
    "not an object": b"[1, 2, 3, 4, 5, 6, 7]\n",
    "both": b'{"return": 5, "error": {}}\n',
    "long": b"x" * (3 << 20) + b"\n",
    "zero bytes": b"\0" * 100 + b"\n",
    "huge id": b'{"return": 5, "id": ' + b"9" * 5000 + b"}\n",
    "an event": b'{"event": "SHUTDOWN"}\n',
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_lie_between_two_commands_changes_nothing(tmp_path: Path, lie: bytes) -> None:
    async def work(bench: Bench) -> None:
        await bench.ready()
        await bench.peer.say_all(lie)
        assert await bench.submit("guest-ping").code() == ""
        assert bench.states() == ["waiting", "syncing", "ready"]

    on_bench(tmp_path, work, timeout=5.0)


def test_a_deeply_nested_answer_is_an_error_of_that_command(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        await bench.ready()
        deep = b"[" * 900 + b"]" * 900
        bench.peer.answer = lambda r: b'{"return": %s, "id": %d}\n' % (deep * 1, r["id"])
        assert await bench.submit("guest-info").code() in ("", "agent-error")
        bench.peer.answer = honest
        assert await bench.submit("guest-ping").code() == ""

    on_bench(tmp_path, work)


def test_an_answer_over_the_limit_is_too_large_and_the_channel_goes_on(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        await bench.ready()
        bench.peer.answer = sync_only
        outcome = bench.submit("guest-file-read")
        await bench.until(lambda: bench.peer.names() == ["guest-file-read"])
        request = bench.peer.requests[-1]
        await bench.peer.say_all(json.dumps({"return": "x" * (20 << 20), "id": request["id"]}).encode() + b"\n")
        assert await outcome.code() == "too-large"
        bench.peer.answer = honest
        assert await bench.submit("guest-ping").code() == ""

    on_bench(tmp_path, work, timeout=5.0)


def test_half_a_line_and_silence_ends_in_a_sync_that_clears_it(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        await bench.ready()
        bench.peer.answer = lambda r: b'{"return": {"half' if r["execute"] == "guest-info" else honest(r)
        assert await bench.submit("guest-info").code() == "agent-unresponsive"
        assert await bench.submit("guest-ping").code() == ""

    on_bench(tmp_path, work)


def test_an_agent_without_ids_is_understood(tmp_path: Path) -> None:
    def old(request: Request) -> bytes | None:
        if request["execute"] == "guest-sync-delimited":
            return b'\xff{"return": %d}\n' % request["arguments"]["id"]
        return b'{"return": {"old": 1}}\n'

    async def work(bench: Bench) -> None:
        bench.peer.answer = old
        await bench.ready()
        outcome = bench.submit("guest-info")
        assert (await outcome.code(), outcome.value) == ("", {"old": 1})

    on_bench(tmp_path, work)


def test_an_agent_that_never_answers_is_reconnected_ever_less_often(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.peer.answer = lambda _: None
        bench.begin()
        bench.port(True)
        outcome = bench.submit("guest-ping")
        assert await outcome.code() == "agent-unresponsive"  # the connection is made in the next turn
        await bench.until(lambda: bench.states()[-1] == "unresponsive")
        assert await bench.submit("guest-ping").code() == "agent-unresponsive"
        bench.peer.answer = honest
        await bench.until(lambda: bench.states()[-1] == "ready")

    on_bench(tmp_path, work, timeout=0.05)


def test_who_comes_while_a_sync_is_out_is_given_one_of_its_own(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.peer.answer = lambda _: None
        bench.begin()
        bench.port(True)
        await bench.until(lambda: len(bench.peer.requests) == 1)
        bench.peer.answer = honest
        assert await bench.submit("guest-ping").code() == ""

    on_bench(tmp_path, work)


def test_a_closed_socket_is_opened_again(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        await bench.ready()
        bench.peer.hang_up()
        await bench.until(lambda: bench.peer.connections == 2 and bench.states()[-1] == "ready")

    on_bench(tmp_path, work)


def test_a_port_without_a_socket_behind_it_is_told_as_such(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.path.unlink()
        bench.begin()
        bench.port(True)
        await asyncio.sleep(0.05)
        outcome = bench.submit("guest-ping")
        assert await outcome.code() == "agent-unresponsive"
        assert "No such file" in str(outcome.error)

    on_bench(tmp_path, work)


def test_a_flapping_port_is_left_alone(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.begin()
        began = time.process_time()
        for _ in range(200):
            bench.port(True)
            await asyncio.sleep(0.0005)
            bench.port(False)
            await asyncio.sleep(0.0005)
        assert len(bench.events) < 30
        assert "flapping" in bench.agent.state.reason
        assert time.process_time() - began < 1.0
        assert await bench.submit("guest-ping").code() == "agent-absent"

    on_bench(tmp_path, work)


def test_a_flood_is_not_read(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        await bench.ready()
        noise = b'{"return": 0}\n' * 2000
        said = 0
        until = bench.loop.time() + 1.5
        while bench.loop.time() < until:
            said += bench.peer.say(noise)
            await asyncio.sleep(0.002)
        assert said < 3_000_000  # what the allowance and the socket's buffer take: 20 MB/s would go through otherwise

    on_bench(tmp_path, work)


@pytest.mark.parametrize(
    ("command", "mode", "event"),
    [
        ("guest-shutdown", "powerdown", "SHUTDOWN"),
        ("guest-shutdown", "reboot", "RESET"),
        ("guest-suspend-ram", None, "SUSPEND"),
        ("guest-suspend-disk", None, "SUSPEND_DISK"),
    ],
)
def test_a_command_that_ends_the_guest_completes_on_the_event(
    tmp_path: Path, command: str, mode: str | None, event: str
) -> None:
    async def work(bench: Bench) -> None:
        bench.peer.answer = sync_only
        await bench.ready()
        arguments: dict[str, Any] = {"mode": mode} if mode else {}
        outcome = bench.submit(command, **arguments)
        await bench.until(lambda: bench.peer.names() == [command])
        bench.port(False)
        await asyncio.sleep(0.3)
        assert not outcome.told.is_set()
        bench.agent.on_qmp_event(event, {})
        assert (await outcome.code(), outcome.value) == ("", {})
        assert "unresponsive" not in bench.states()

    on_bench(tmp_path, work)


def test_an_event_before_the_command_was_sent_is_not_its_doing(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.peer.answer = sync_only
        await bench.ready()
        bench.submit("guest-ping", 0.2)
        outcome = bench.submit("guest-shutdown", 0.1)
        bench.agent.on_qmp_event("SHUTDOWN", {})
        assert await outcome.code() == "deadline"

    on_bench(tmp_path, work, timeout=5.0)


def test_a_refused_shutdown_is_the_agents_error(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        await bench.ready()
        bench.peer.answer = lambda r: reply(r, error={"class": "GenericError", "desc": "mode is invalid"})
        assert await bench.submit("guest-shutdown", mode="x").code() == "agent-error"

    on_bench(tmp_path, work)


def test_query_chardev_tells_whether_the_port_is_open(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        asked = 0

        async def query() -> Any:
            nonlocal asked
            asked += 1
            await asyncio.sleep(0.02)
            return [{"label": "x", "filename": f"disconnected:unix:{bench.path},server=on", "frontend-open": True}]

        bench.agent.begin(str(bench.path), bench.section, None)
        for _ in range(50):
            bench.agent.look(query)
            bench.agent.on_qmp_event("VSERPORT_CHANGE", {"id": "port0", "open": True})
            await asyncio.sleep(0)
        await bench.until(lambda: bench.states()[-1] == "ready")
        assert asked <= 2

    on_bench(tmp_path, work)
