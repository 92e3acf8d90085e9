# SPDX-License-Identifier: Apache-2.0
"""The end of a run, race by race, on a real Vm; tests/system/test_teardown.py has those that need whole processes.

libvirt's list of what its event threads must guard against (its own guards in brackets), and where each stands here:

| race in libvirt | here |
|---|---|
| quit asked before the loop runs: the join hangs (start handshake) | system: `…told_to_leave_before_it_has_begun…` |
| last ref of a GSource dropped off-thread (idle source) | cannot exist: one thread; sources are fds in that thread's selector |
| idle source outlives its context | cannot exist: what is queued on a loop that was closed never runs |
| join while the VM's lock is held: deadlock with a callback | no locks; system: `…ends_while_a_handler_runs…` |
| callback fires after close | `test_nothing_is_taken_from_the_monitor_after_the_end` |
| order of the monitor's lock and the VM's | cannot exist: no locks |
| pending-message pointer stale after the lock was dropped | `test_whoever_is_told_of_an_answer_may_end_the_run` |
| end-of-file callback spins while its handler waits for a job | `test_an_end_of_file_wakes_the_loop_once` |
| end-of-file during a wanted kill: wrong "crashed" | `test_a_kill_is_no_crash_whatever_is_seen_first` |
| final events lost at stop | `test_what_qemu_said_last_is_told_before_its_end` |
| stale end-of-file of an old run ends a VM restarted meanwhile | a worker has one run; system: `…started_again_in_the_same_instant…` |
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from vmloop.common.errors import MonitorLost, NotRunning, OutcomeUnknown, VmloopError
from vmloop.common.page import Word
from vmloop.common.states import MonitorState, VmState
from vmloop.worker.run_page import Fact
from vmloop.worker.runfile import Run, RunFile, read_run

from ..fakes.vm_bench import VmBench, run

END = ["MONITOR_STATE lost", "VM_STATE shutoff"]


def outcome(told: list[VmloopError | None]) -> Any:
    return lambda value, error: told.append(error)


def submit(bench: VmBench, name: str, told: list[VmloopError | None], *, reading: bool = False) -> None:
    session = bench.vm.require_session()
    session.submit(name, None, done=outcome(told), deadline=bench.loop.time() + 60, reading=reading)


# -- the order --------------------------------------------------------------------------------------------------------------


def test_the_end_comes_in_its_order(tmp_path: Path) -> None:
    """Monitor read to its end, agent, monitor, state, files: QEMU is gone while its monitor's other end is still held by somebody."""

    async def live(bench: VmBench) -> None:
        await bench.up()
        bench.vm.agent.state.move(type(bench.vm.agent.state.state).WAITING, "a port")
        del bench.told[:]
        bench.paths.monitor_socket.touch()
        seen: list[tuple[str, bool, bool]] = []

        def look(event: Any) -> None:
            ended = read_run(bench.paths.run_file)
            assert ended is not None
            seen.append((event.event, ended.ended is not None, bench.paths.monitor_socket.exists()))

        bench.vm.events.listen(look)
        bench.peer.event("DEVICE_DELETED", path="/x")
        bench.end_process()
        await bench.gone()
        assert bench.names() == ["DEVICE_DELETED", "AGENT_STATE absent", *END]
        assert [event.seq for event in bench.told] == list(range(bench.told[0].seq, bench.told[0].seq + 4))
        assert seen[-1] == ("VM_STATE", False, True)  # told first; the rest follows
        after = read_run(bench.paths.run_file)
        assert after is not None
        assert after.ended is not None
        assert not bench.paths.monitor_socket.exists()
        assert bench.vm.process is None
        assert bench.vm.session is None

    run(tmp_path, live)


def test_what_qemu_said_last_is_told_before_its_end(tmp_path: Path) -> None:
    async def live(bench: VmBench) -> None:
        await bench.up()
        del bench.told[:]
        for number in range(100):
            bench.peer.event("X_LAST", number=number)
        bench.peer.event("SHUTDOWN", guest=True)
        bench.end_process()
        bench.peer.hang_up()
        bench.vm.finish("")  # the process's end is seen before anything of the monitor's
        assert [event.data["number"] for event in bench.told if event.event == "X_LAST"] == list(range(100))
        assert bench.names()[100:] == ["SHUTDOWN", "VM_STATE shutdown", *END]
        assert bench.told[-1].data["reason"] == "shutdown"

    run(tmp_path, live)


# -- end-of-file and end of the process -------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["end-of-file", "process", "both"])
@pytest.mark.parametrize("reading", [True, False])
def test_commands_that_wait_at_the_end_are_answered_once(tmp_path: Path, first: str, reading: bool) -> None:
    async def live(bench: VmBench) -> None:
        await bench.up()
        told: list[VmloopError | None] = []
        submit(bench, "query-block", told, reading=reading)
        await bench.peer.request()
        if first != "process":
            bench.peer.hang_up()
        if first == "end-of-file":
            await bench.until(lambda: bench.vm.session is None)
            assert bench.vm.state.state is VmState.RUNNING  # the end of a connection alone says nothing
        bench.end_process()
        await bench.gone()
        (error,) = told
        assert isinstance(error, MonitorLost if reading else OutcomeUnknown)
        assert bench.names()[-2:] == END

    run(tmp_path, live)


def test_the_end_of_the_process_while_its_monitor_is_negotiated_is_a_failed_start(tmp_path: Path) -> None:
    async def live(bench: VmBench) -> None:
        bench.begin()
        coming = bench.loop.create_task(bench.bring_up())
        bench.peer.greet()
        await bench.peer.request()  # qmp_capabilities, which nobody answers
        bench.end_process()
        await bench.gone()
        with pytest.raises(VmloopError):
            await coming
        assert bench.names()[-2:] == END
        assert bench.told[-1].data["reason"] == "failed"

    run(tmp_path, live)


def test_an_end_of_file_wakes_the_loop_once(tmp_path: Path) -> None:
    """The process lives on for a while: nothing is left registered that would be ready for ever."""

    async def live(bench: VmBench) -> None:
        await bench.up()
        fd = bench.vm.require_session().fileno()
        bench.peer.hang_up()
        await bench.until(lambda: bench.vm.session is None)
        with pytest.raises(KeyError):
            bench.loop._selector.get_key(fd)  # type: ignore[attr-defined]  # nothing public tells
        assert bench.vm.monitor.state is MonitorState.LOST

    run(tmp_path, live)


def test_a_kill_is_no_crash_whatever_is_seen_first(tmp_path: Path) -> None:
    for number, first in enumerate(("end-of-file", "process")):

        async def live(bench: VmBench, first: str = first) -> None:
            await bench.up()
            bench.vm.kill()
            if first == "end-of-file":
                bench.peer.hang_up()
                await bench.until(lambda: bench.vm.session is None)
            await bench.gone()
            assert bench.told[-1].data["reason"] == "destroyed"

        directory = tmp_path / str(number)
        directory.mkdir()
        run(directory, live)


# -- twice, late, and from inside -------------------------------------------------------------------------------------------


def test_the_end_is_told_once_however_often_it_is_seen(tmp_path: Path) -> None:
    async def live(bench: VmBench) -> None:
        await bench.up()
        bench.vm.kill()
        bench.vm.kill()
        await bench.gone()
        bench.vm.finish("again")
        bench.vm.finish("and again")
        await asyncio.sleep(0)
        assert bench.names().count("VM_STATE shutoff") == 1
        with pytest.raises(NotRunning):
            bench.vm.kill()

    run(tmp_path, live)


def test_nothing_is_taken_from_the_monitor_after_the_end(tmp_path: Path) -> None:
    async def live(bench: VmBench) -> None:
        await bench.up()
        bench.end_process()
        await bench.gone()
        newest, numbered = bench.names(), bench.page.words[Word.PROGRESS]
        with pytest.raises(BrokenPipeError):  # late words have nowhere to go any more
            bench.peer.event("RESUME")
        await asyncio.sleep(0)
        assert bench.names() == newest
        assert bench.page.words[Word.PROGRESS] == numbered
        assert bench.vm.state.state is VmState.SHUTOFF

    run(tmp_path, live)


def test_a_late_event_of_the_old_run_does_not_touch_the_new_one(tmp_path: Path) -> None:
    """The last run's end is known, its connection's lines are still to be dealt with: they move no state."""

    async def first(bench: VmBench) -> None:
        await bench.up()
        bench.end_process()
        await bench.gone()
        bench.vm.on_event("RESUME", {}, 0)  # as if a line had been on its way
        assert bench.vm.state.state is VmState.SHUTOFF

    async def second(bench: VmBench) -> None:
        await bench.up()
        assert bench.vm.run is not None
        assert bench.vm.run.epoch == 2
        assert {event.epoch for event in bench.told} == {2}
        assert bench.told[0].seq == 1

    run(tmp_path, first)
    run(tmp_path, second)


def test_whoever_is_told_of_an_answer_may_end_the_run(tmp_path: Path) -> None:
    """In the middle of reading: what comes behind in the same chunk belongs to nobody, and nothing is told twice."""

    async def live(bench: VmBench) -> None:
        await bench.up()
        told: list[VmloopError | None] = []

        def end(value: Any, error: VmloopError | None) -> None:
            told.append(error)
            bench.end_process()
            bench.vm.finish("")

        session = bench.vm.require_session()
        session.submit("query-name", None, done=end, deadline=bench.loop.time() + 60, reading=True)
        submit(bench, "stop", told)
        one, two = await bench.peer.requests(2)
        bench.peer.say({"return": {}, "id": one["id"]}, {"return": {}, "id": two["id"]})
        await bench.gone()
        assert len(told) == 2
        assert told[0] is None
        assert bench.names()[-2:] == END

    run(tmp_path, live)


def test_a_run_whose_end_cannot_be_written_down_ends_all_the_same_and_the_next_worker_knows(tmp_path: Path) -> None:
    hindrance = tmp_path / "state" / ".run.json.new"

    async def first(bench: VmBench) -> None:
        await bench.up()
        hindrance.mkdir()  # where the new file would be made
        bench.end_process()
        await bench.gone()
        assert bench.names()[-2:] == END
        old = read_run(bench.paths.run_file)
        assert old is not None
        assert old.ended is None

    async def second(bench: VmBench) -> None:
        assert not bench.vm.alive
        assert (bench.vm.state.state, bench.vm.state.reason) == (VmState.SHUTOFF, "crashed")
        assert bench.vm.facts["run_file"].startswith(str(bench.paths.run_file))
        hindrance.rmdir()
        await bench.until(lambda: "run_file" not in bench.vm.facts)
        ended = read_run(bench.paths.run_file)
        assert ended is not None
        assert ended.ended is not None
        assert ended.ended.reason == "crashed"
        assert bench.told == []  # it was told by the first

    run(tmp_path, first)
    run(tmp_path, second)


def test_a_vm_that_cannot_be_noted_as_let_go_is_held_as_before(tmp_path: Path) -> None:
    hindrance = tmp_path / "state" / ".run.json.new"

    async def live(bench: VmBench) -> None:
        await bench.up()
        hindrance.mkdir()
        with pytest.raises(OSError, match="Is a directory"):
            bench.vm.detach()
        assert bench.vm.alive
        assert bench.vm.process is not None
        assert bench.vm.state.state is VmState.RUNNING
        hindrance.rmdir()
        bench.vm.detach()
        assert bench.vm.gone.is_set()
        assert not bench.vm.noted.has(Fact.KILLED)
        assert bench.child is not None
        assert Path(f"/proc/{bench.child.pid}/stat").exists()

    run(tmp_path, live)


def test_files_that_cannot_be_removed_do_not_keep_a_run_from_its_end(tmp_path: Path) -> None:
    async def live(bench: VmBench) -> None:
        await bench.up()
        bench.paths.monitor_socket.mkdir()
        bench.end_process()
        await bench.gone()
        assert bench.names()[-2:] == END

    run(tmp_path, live)


class WatchedFile(RunFile):
    """A run.json that notes what its run's directory holds when the end is written down."""

    def __init__(self, bench: VmBench) -> None:
        super().__init__(bench.loop, bench.paths.run_file, lambda trouble: None)
        self._run_directory = bench.paths.run
        self.left: list[set[str]] = []

    def write(self, run: Run) -> None:
        if run.ended is not None:
            self.left.append(set(os.listdir(self._run_directory)))
        super().write(run)


def test_a_run_is_cleared_away_before_its_end_is_written_down(tmp_path: Path) -> None:
    """A worker that is killed in between leaves what the next one still does: a run that is noted as over nobody looks after."""

    async def live(bench: VmBench) -> None:
        await bench.up()
        bench.vm.file = file = WatchedFile(bench)
        for name in ("monitor.sock", "carry.0"):
            (bench.paths.run / name).touch()
        bench.end_process()
        await bench.gone()
        assert file.left != []
        assert not any(left & {"monitor.sock", "carry.0"} for left in file.left)

    run(tmp_path, live)
