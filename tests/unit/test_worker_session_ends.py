# SPDX-License-Identifier: Apache-2.0
"""How the commands of a QMP session end: by a deadline, with a frozen QEMU, with the connection; and what becomes of their descriptors."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from vmloop.common.settings import WorkerSettings
from vmloop.common.states import MonitorState
from vmloop.worker.qmp.commands import MAX_COMMAND_BYTES
from vmloop.worker.qmp.session import IN_BAND_WINDOW

from ..fakes.qmp_peer import QmpPeer
from ..fakes.session_bench import Life, SessionBench

IMPATIENT = msgspec.structs.replace(WorkerSettings(), probe_after=0.05, frozen_after=0.05)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[SessionBench]:
    with SessionBench(tmp_path) as bench:
        yield bench


# -- deadlines ------------------------------------------------------------------------------------------------------------


def test_a_deadline_ends_the_wait_of_a_sent_command_and_its_late_reply_is_told_to_the_vm(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        outcome = life.submit("stop", deadline=life.loop.time(), request=9)
        request = await peer.request()
        await life.told(outcome)
        assert outcome.code == "deadline"
        assert "COMMAND_LATE" in str(outcome.error)
        assert (life.session.in_flight, life.vm.late) == (1, [])
        peer.answer(request, {"done": True})
        await life.until(lambda: len(life.vm.late) == 1)
        assert life.vm.late == [("stop", 9, {"return": {"done": True}, "id": request["id"]})]
        assert (life.session.in_flight, outcome.told) == (0, 1)

    bench.run(live)
    assert bench.owed() == []


def test_a_command_whose_deadline_passes_in_line_is_never_sent(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        sent = [life.submit("stop") for _ in range(IN_BAND_WINDOW)]
        doomed = life.submit("doomed", deadline=life.loop.time())
        after = life.submit("after")
        await life.told(doomed)
        assert doomed.code == "deadline"
        assert "not sent" in str(doomed.error)
        requests = await peer.requests(IN_BAND_WINDOW)
        for request in requests:
            peer.answer(request)
        last = await peer.request()
        assert last["execute"] == "after"
        peer.answer(last)
        await life.told(*sent, after)
        assert life.session.queued == 0

    bench.run(live)


def test_deadlines_end_each_wait_for_itself(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        now = life.loop.time()
        later, soon = life.submit("later", deadline=now + 0.2), life.submit("soon", deadline=now + 0.05)
        await life.told(soon)
        assert later.told == 0
        await life.told(later)
        assert (soon.code, later.code) == ("deadline", "deadline")
        assert life.loop.time() >= now + 0.2

    bench.run(live)


def test_who_is_told_of_a_deadline_may_close_the_session(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        failures: list[object] = []
        life.loop.set_exception_handler(lambda _, context: failures.append(context))
        await life.negotiate(peer)
        now = life.loop.time()
        life.session.submit("a", None, done=lambda *_: life.session.close("enough"), deadline=now, reading=True)
        other = life.submit("b", deadline=now)
        await life.told(other)
        assert failures == []

    bench.run(live)


# -- descriptors ----------------------------------------------------------------------------------------------------------


def a_pipe() -> tuple[int, int]:
    return os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)


def is_open(fd: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{fd}")


def test_descriptors_go_with_their_command_and_are_closed_here(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        reading, writing = a_pipe()
        life.submit("getfd", {"fdname": "x"}, fds=(writing,))
        assert not is_open(writing)
        assert (await peer.request())["execute"] == "getfd"
        os.write(peer.fds[0], b"through")
        assert os.read(reading, 10) == b"through"
        os.close(reading)

    bench.run(live)


def test_descriptors_of_a_command_that_is_not_sent_are_closed(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        pipes = [a_pipe() for _ in range(5)]
        refused = life.submit("getfd", {"x": object()}, fds=pipes[0])
        too_large = life.submit("getfd", {"x": "x" * MAX_COMMAND_BYTES}, fds=pipes[1])
        for _ in range(IN_BAND_WINDOW):
            life.submit("stop")
        doomed = life.submit("getfd", deadline=life.loop.time(), fds=pipes[2])
        await life.told(doomed)
        waiting = life.submit("getfd", fds=pipes[3])
        assert [is_open(fd) for fd in pipes[3]] == [True, True]
        life.session.close("over")
        closed = life.submit("getfd", fds=pipes[4])
        codes = [outcome.code for outcome in (refused, too_large, doomed, waiting, closed)]
        assert codes == ["bad-request", "too-large", "deadline", "not-running", "monitor-lost"]
        assert not any(is_open(fd) for pair in pipes for fd in pair)
        assert peer.fds == []

    bench.run(live)


# -- busy and frozen ------------------------------------------------------------------------------------------------------


def test_a_frozen_monitor_refuses_new_commands_at_once_unless_asked_to_wait(tmp_path: Path) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer, "oob")
        first = life.submit("stop")
        stop, question = await peer.requests(2)
        assert question["exec-oob"] == "query-yank"
        await life.until(lambda: life.vm.states[-1] is MonitorState.FROZEN)
        assert life.submit("cont").code == "monitor-frozen"
        patient = life.submit("cont", wait_frozen=True)
        cont = await peer.request()
        assert first.told == patient.told == 0
        for request in (question, stop, cont):
            peer.answer(request)
        await life.told(first, patient)
        assert life.vm.states[-1] is MonitorState.READY
        assert life.submit("cont").told == 0

    with SessionBench(tmp_path, IMPATIENT) as impatient:
        impatient.run(live)


def test_a_busy_monitor_takes_new_commands(tmp_path: Path) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer, "oob")
        life.submit("migrate")
        await peer.request()
        peer.answer(await peer.request())
        await life.until(lambda: life.vm.states[-1] is MonitorState.BUSY)
        assert life.submit("query-migrate").told == 0

    with SessionBench(tmp_path, IMPATIENT) as impatient:
        impatient.run(live)


def test_questions_that_are_never_answered_do_not_fill_the_ledger(tmp_path: Path) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer, "oob")
        for _ in range(4):
            outcome = life.submit("stop", wait_frozen=True)
            stop = await peer.request()
            question = await peer.request()
            assert question["exec-oob"] == "query-yank"
            peer.answer(stop)
            await life.told(outcome)
        assert len(impatient.owed()) == 1

    with SessionBench(tmp_path, IMPATIENT) as impatient:
        impatient.run(live)


# -- the end --------------------------------------------------------------------------------------------------------------


def test_a_close_tells_everybody_what_is_known_of_their_command(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        looking = life.submit("query-status", reading=True)
        changing = life.submit("stop", reading=False)
        late = life.submit("cont", deadline=life.loop.time())
        await life.told(late)
        for _ in range(IN_BAND_WINDOW - 3):
            life.submit("stop")
        never_sent = life.submit("stop")
        life.session.close("the VM was let go")
        life.session.close("again")
        assert (looking.code, changing.code, never_sent.code) == ("monitor-lost", "outcome-unknown", "not-running")
        assert late.told == 1
        for outcome in (looking, changing, never_sent):
            assert "the VM was let go" in str(outcome.error)
        assert life.submit("stop").code == "monitor-lost"
        assert life.vm.ends == []  # who closes knows

    bench.run(live)
    assert bench.owed() == []


def test_a_connection_that_ends_tells_everybody_and_the_vm_after_its_last_line(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        answered, lost = life.submit("quit"), life.submit("stop")
        request = await peer.request()
        peer.answer(request)
        peer.event("SHUTDOWN", guest=False)
        peer.hang_up()
        await life.until(lambda: len(life.vm.ends) == 1)
        assert (answered.told, answered.error) == (1, None)
        assert lost.code == "outcome-unknown"
        assert [name for name, *_ in life.vm.events] == ["SHUTDOWN"]

    bench.run(live)


def test_drain_reads_all_that_a_dead_qemu_has_left(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        lines = [b'{"event": "E%d", "data": {"pad": "%s"}}\n' % (number, b"x" * 40) for number in range(2000)]
        peer.say(b"".join(lines))  # more than one turn takes
        peer.hang_up()
        life.session.drain()
        assert [name for name, *_ in life.vm.events] == [f"E{number}" for number in range(2000)]
        assert len(life.vm.ends) == 1

    bench.run(live)


def test_drain_ends_even_where_somebody_still_holds_the_other_end(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        peer.event("SHUTDOWN")
        life.session.drain()
        assert [name for name, *_ in life.vm.events] == ["SHUTDOWN"]
        assert len(life.vm.ends) == 1

    bench.run(live)


def test_a_line_over_the_limit_ends_the_session(tmp_path: Path) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        outcome = life.submit("query-block", reading=True)
        peer.say(b"x" * 150_000)
        await life.told(outcome)
        assert outcome.code == "monitor-lost"
        assert "100000 bytes" in life.vm.ends[0]

    with SessionBench(tmp_path, max_line=100_000) as bench:
        bench.run(live)


def test_a_carry_file_that_cannot_be_written_ends_the_session_with_the_reason(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        for index in (0, 1):
            bench.paths.carry(index).mkdir()
        peer.say(b'{"event": "STOP"}\n{"event": "RES')
        await life.until(lambda: len(life.vm.ends) == 1)
        assert "carry" in life.vm.ends[0]
        assert [name for name, *_ in life.vm.events] == ["STOP"]

    bench.run(live)


def test_who_is_told_of_a_reply_may_close_the_session(bench: SessionBench) -> None:
    async def live(life: Life, peer: QmpPeer) -> None:
        await life.negotiate(peer)
        failures: list[object] = []
        life.loop.set_exception_handler(lambda _, context: failures.append(context))
        now = life.loop.time()
        life.session.submit("a", None, done=lambda *_: life.session.close("enough"), deadline=now + 5, reading=True)
        other = life.submit("b")
        request = await peer.request()
        peer.answer(request)
        await life.told(other)
        assert other.code == "outcome-unknown"
        await asyncio.sleep(0)
        assert failures == []

    bench.run(live)
