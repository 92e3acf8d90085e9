# SPDX-License-Identifier: Apache-2.0
"""A QMP session that is killed and taken over on the same connection: every command gets its one answer, and none is sent twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmloop.common.page import Page, Word
from vmloop.common.states import MonitorState
from vmloop.worker.qmp.ledger import Owed
from vmloop.worker.qmp.session import IN_BAND_WINDOW

from ..fakes.qmp_peer import QmpPeer, Request
from ..fakes.session_bench import FAR, Life, SessionBench

BIG = "x" * 2_000_000  # more than the socket takes at once


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[SessionBench]:
    with SessionBench(tmp_path) as bench:
        yield bench


def sent_and_killed(bench: SessionBench, *names: str, **options: Any) -> list[Request]:
    """A worker sends commands, numbered from 1, and is killed; what the peer has read of them."""
    requests: list[Request] = []

    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer, "oob")
        for number, name in enumerate(names, 1):
            life.submit(name, request=number, **options)
        requests.extend(await peer.requests(len(names)))

    bench.run(live, killed=True)
    return requests


def test_replies_that_come_after_the_death_go_to_whoever_asked(bench: SessionBench) -> None:
    stop, cont = sent_and_killed(bench, "stop", "cont", key=b"once")
    assert [(owed.request, owed.key) for owed in bench.owed()] == [(1, b"once"), (2, b"once")]

    async def live(life: Life, peer: QmpPeer) -> None:
        outcomes = life.take_over()
        assert life.vm.states == [MonitorState.READY]
        assert life.session.in_flight == 2
        peer.answer(stop, {"stopped": True})
        peer.refuse(cont, "cannot")
        await life.told(*outcomes.values())
        assert outcomes[1].value == {"stopped": True}
        assert outcomes[2].code == "qmp-error"
        assert peer.waiting() == b""  # nothing is sent again

    bench.run(live)
    assert bench.owed() == []


def test_replies_and_events_that_wait_in_the_socket_are_found(bench: SessionBench) -> None:
    (stop,) = sent_and_killed(bench, "stop")
    bench.peer.event("STOP")
    bench.peer.answer(stop)
    bench.peer.say(b'{"event": "RES')

    async def live(life: Life, peer: QmpPeer) -> None:
        outcomes = life.take_over()
        await life.told(outcomes[1])
        peer.say(b'UME"}\n')
        await life.until(lambda: len(life.vm.events) == 2)
        assert [name for name, *_ in life.vm.events] == ["STOP", "RESUME"]
        assert outcomes[1].error is None

    bench.run(live)


def test_a_command_that_nobody_waits_for_any_more_is_answered_in_silence(bench: SessionBench) -> None:
    """vmloop's own, such as the question whether QEMU lives: its answer is not late, it is of no interest."""
    requests: list[Request] = []

    async def first(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer, "oob")
        life.submit("query-yank", oob=True, request=0, deadline=life.loop.time() + 0.01)
        requests.append(await peer.request())

    async def second(life: Life, peer: QmpPeer) -> None:
        assert life.take_over() == {}
        peer.answer(requests[0])
        peer.event("STOP")
        await life.until(lambda: len(life.vm.events) == 1)
        assert life.vm.late == []
        assert life.session.garbled == 0

    bench.run(first, killed=True)
    bench.run(second)
    assert bench.owed() == []


def test_the_callers_deadline_holds_across_workers(bench: SessionBench) -> None:
    requests: list[Request] = []

    async def first(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        life.submit("stop", request=5, deadline=life.loop.time() + 0.05)
        requests.append(await peer.request())

    async def second(life: Life, peer: QmpPeer) -> None:
        outcomes = life.take_over(oob=False)
        await life.told(outcomes[5])
        assert outcomes[5].code == "deadline"
        peer.answer(requests[0])
        await life.until(lambda: len(life.vm.late) == 1)
        assert life.vm.late[0][1] == 5

    bench.run(first, killed=True)
    bench.run(second)


def test_what_the_predecessor_has_on_the_wire_counts_for_the_window(bench: SessionBench) -> None:
    requests = sent_and_killed(bench, *["stop"] * IN_BAND_WINDOW)

    async def live(life: Life, peer: QmpPeer) -> None:
        life.take_over()
        outcome = life.submit("cont", request=50)
        assert peer.waiting() == b""
        peer.answer(requests[0])
        cont = await peer.request()
        assert cont["execute"] == "cont"
        assert cont["id"] not in [request["id"] for request in requests]
        peer.answer(cont)
        await life.told(outcome)

    bench.run(live)


def test_an_end_of_the_connection_tells_those_who_asked_the_predecessor(bench: SessionBench) -> None:
    sent_and_killed(bench, "stop", "query-block")
    bench.peer.hang_up()

    async def live(life: Life, peer: QmpPeer) -> None:
        owed: list[Owed] = []
        outcomes = life.take_over()
        owed.extend(bench.owed())
        await life.told(*outcomes.values())
        assert [entry.request for entry in owed] == [1, 2]
        assert {outcome.code for outcome in outcomes.values()} == {"outcome-unknown"}
        assert len(life.vm.ends) == 1

    bench.run(live)


def test_a_row_of_workers_answers_each_command_once(bench: SessionBench) -> None:
    requests = sent_and_killed(bench, "a", "b", "c", "d")
    answered: list[int] = []

    for number, request in enumerate(requests, 1):

        async def live(life: Life, peer: QmpPeer, request: Request = request, number: int = number) -> None:
            outcomes = life.take_over()
            assert sorted(outcomes) == list(range(number, 5))
            peer.answer(request, number)
            await life.told(outcomes[number])
            answered.append(outcomes[number].value)

        bench.run(live, killed=True)
    assert answered == [1, 2, 3, 4]
    assert bench.owed() == []


# -- killed inside a send -------------------------------------------------------------------------------------------------


def cut_inside_a_send(bench: SessionBench) -> None:
    """A worker is killed with a command half written, behind one that was sent whole."""

    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer, "oob")
        life.submit("whole", request=1)
        life.submit("cut", {"big": BIG}, request=2)
        life.submit("never sent", request=3)

    bench.run(live, killed=True)
    assert [owed.request for owed in bench.owed()] == [1, 2]


def test_a_half_sent_command_is_ended_before_anything_else_is_sent(bench: SessionBench) -> None:
    cut_inside_a_send(bench)

    async def live(life: Life, peer: QmpPeer) -> None:
        outcomes = life.take_over()
        whole = await peer.request()
        peer.answer(whole)
        half, _, after = (await peer.line()).partition(b"\xff")
        assert half.startswith(b'{"execute":"cut"')
        assert after.startswith(b'{"execute":"query-name"')
        assert len(half) < len(BIG)
        await life.told(outcomes[1])
        assert outcomes[2].told == 0  # whether it was carried out only QEMU's order of answers tells
        # QEMU's parser complains of the half, without an id, and goes on to what is behind it.
        peer.say({"error": {"class": "GenericError", "desc": "JSON parse error"}})
        peer.say(b'{"return": {}, "id": %d}\n' % int(after.rpartition(b'"id":')[2].rstrip(b"}")))
        await life.told(outcomes[2])
        assert outcomes[2].code == "worker-lost"
        assert "not carried out" in str(outcomes[2].error)
        assert life.session.in_flight == 0
        following = life.submit("cont")
        peer.answer(await peer.request())
        await life.told(following)

    bench.run(live)
    assert bench.owed() == []


def test_a_command_that_was_whole_after_all_gets_its_own_answer(bench: SessionBench) -> None:
    (stop,) = sent_and_killed(bench, "stop")
    with Page(bench.paths.page, writable=True) as page:
        page.words[Word.SENDING] = stop["id"]  # killed between the send and the note that it is done

    async def live(life: Life, peer: QmpPeer) -> None:
        outcomes = life.take_over()
        (mark, _, after) = (await peer.line()).partition(b"{")
        assert mark == b"\xff"
        assert after.startswith(b'"execute":"query-name"')
        peer.answer(stop, {"carried": "out"})
        await life.told(outcomes[1])
        assert outcomes[1].value == {"carried": "out"}
        peer.say(b'{"return": {}, "id": %d}\n' % int(after.rpartition(b'"id":')[2].rstrip(b"}")))
        await life.until(lambda: life.session.in_flight == 0)
        assert outcomes[1].told == 1

    bench.run(live)


def test_a_death_with_nothing_half_sent_needs_no_repair(bench: SessionBench) -> None:
    sent_and_killed(bench, "stop")

    async def live(life: Life, peer: QmpPeer) -> None:
        life.take_over()
        assert peer.waiting() == b""

    bench.run(live)


def test_the_cut_command_is_the_one_that_was_being_written_and_not_the_one_with_the_highest_id(
    bench: SessionBench,
) -> None:
    """An in-band command that waited in line has a lower id than an out-of-band one that overtook it."""
    requests: list[Request] = []

    async def first(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer, "oob")
        for number in range(1, IN_BAND_WINDOW + 1):
            life.submit("query-name", request=number)
        life.submit("cut", {"big": BIG}, request=20, deadline=life.loop.time() + FAR)
        life.submit("query-yank", request=30, oob=True)
        requests.extend(await peer.requests(IN_BAND_WINDOW + 1))
        for request in requests[:IN_BAND_WINDOW]:
            peer.answer(request)
        await life.until(lambda: bool(life.page.words[Word.SENDING]))
        assert [owed.request for owed in bench.owed()][:2] == [20, 30]

    async def second(life: Life, peer: QmpPeer) -> None:
        outcomes = life.take_over()
        half, _, after = (await peer.line()).partition(b"\xff")
        assert half.startswith(b'{"execute":"cut"')
        peer.say(b'{"return": {}, "id": %d}\n' % int(after.rpartition(b'"id":')[2].rstrip(b"}")))
        await life.told(outcomes[20])
        assert outcomes[20].code == "worker-lost"
        assert outcomes[30].told == 0
        peer.answer(requests[-1])
        await life.told(outcomes[30])
        assert outcomes[30].error is None

    bench.run(first, killed=True)
    bench.run(second)


def test_a_command_that_was_entered_and_never_sent_is_not_waited_for(bench: SessionBench) -> None:
    """Killed between the ledger and the first byte: QEMU tells by what it answers behind it."""

    async def die(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer, "oob")
        life.session._writer.write = lambda *_: None  # type: ignore[method-assign]
        life.submit("stop", request=1)

    bench.run(die, killed=True)
    assert [owed.request for owed in bench.owed()] == [1]

    async def live(life: Life, peer: QmpPeer) -> None:
        outcomes = life.take_over()
        mark, _, behind = (await peer.line()).partition(b"{")
        assert mark == b"\xff"
        peer.answer(json.loads(b"{" + behind), {})
        await life.told(outcomes[1])
        assert outcomes[1].code == "worker-lost"

    bench.run(live)
    assert bench.owed() == []


def test_who_was_told_that_the_answer_will_come_late_is_told_of_it_under_the_next_worker_too(
    bench: SessionBench,
) -> None:
    (stop,) = sent_and_killed(bench, "stop", deadline=0.01)

    async def live(life: Life, peer: QmpPeer) -> None:
        life.take_over(answer=lambda owed: None)
        peer.answer(stop, {})
        await life.until(lambda: life.vm.late != [])
        assert [request for _, request, _ in life.vm.late] == [1]

    bench.run(live)
