# SPDX-License-Identifier: Apache-2.0
"""What a worker's death or a lost monitor could leave untold, on a real Vm: each gap is marked, at its place, and each end is told."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from vmloop.common.settings import WorkerSettings
from vmloop.common.states import VmState
from vmloop.worker.qemu.process import QemuProcess
from vmloop.worker.qmp.ledger import Ledger, Owed
from vmloop.worker.runfile import over
from vmloop.worker.vm import Vm

from ..fakes.vm_bench import NAME, VmBench, run


def next_vm(bench: VmBench) -> Vm:
    """The VM as the next worker finds it."""
    return Vm(
        bench.loop, NAME, bench.paths, WorkerSettings(), bench.page, bench.vm.events, bench.vm.keeper, lambda: None
    )


def test_a_run_that_ends_while_its_monitor_is_sought_has_the_gap_in_its_stream(tmp_path: Path) -> None:
    async def live(bench: VmBench) -> None:
        await bench.up()
        before = time.time()
        bench.peer.hang_up()
        await bench.until(lambda: bench.vm.session is None)
        bench.vm.reconnection.begin()
        bench.end_process()
        await bench.gone()
        assert bench.names()[-2:] == ["EVENTS_LOST", "VM_STATE shutoff"]
        lost = bench.told[-2].data
        assert before <= lost["since"] <= lost["until"] <= time.time()
        assert bench.told[-1].data["reason"] == "crashed"  # its exit status says it

    run(tmp_path, live)


def test_an_end_that_nobody_heard_is_no_crash(tmp_path: Path) -> None:
    async def live(bench: VmBench) -> None:
        await bench.up()
        bench.peer.event("X_LAST")
        await bench.until(lambda: bench.names()[-1] == "X_LAST")
        bench.vm.reconnection.unwatched()
        held = bench.vm.process
        assert held is not None
        bench.vm.process = QemuProcess(held.identity)  # a child of nobody's: its exit status is not known
        bench.loop.remove_reader(held.fileno())
        held.close()
        bench.vm.finish("it ended while no worker watched")
        lost, end = bench.told[-3].data, bench.told[-1].data
        assert (bench.told[-3].event, end["reason"]) == ("EVENTS_LOST", "unknown")
        assert lost["since"] == next(event.time for event in bench.told if event.event == "X_LAST") / 1e6

    run(tmp_path, live)


def test_what_is_held_back_when_the_run_ends_is_told_behind_the_mark(tmp_path: Path) -> None:
    async def live(bench: VmBench) -> None:
        await bench.up()
        bench.vm.reconnection.unwatched()
        bench.vm.reconnection._held = []  # a connection is being brought up
        bench.peer.event("SHUTDOWN", guest=True)
        bench.end_process()
        await bench.gone()
        names = bench.names()
        assert names[names.index("EVENTS_LOST") :][:3] == ["EVENTS_LOST", "SHUTDOWN", "VM_STATE shutdown"]
        assert bench.told[-1].data["reason"] == "shutdown"

    run(tmp_path, live)


def test_a_second_loss_before_the_mark_does_not_shorten_the_gap(tmp_path: Path) -> None:
    async def live(bench: VmBench) -> None:
        await bench.up()
        bench.vm.reconnection.lost()
        first = bench.vm.reconnection._lost_at
        bench.vm.reconnection.unwatched()
        bench.vm.reconnection.lost()
        assert bench.vm.reconnection._lost_at == first

    run(tmp_path, live)


def test_an_answer_that_was_settled_before_the_death_is_not_owed_any_more(tmp_path: Path) -> None:
    """The mark is compared with PROGRESS, which the successor's own events move."""

    async def live(bench: VmBench) -> None:
        await bench.up()
        ledger = Ledger(bench.page)
        ledger.enter(Owed(99, 7, False, False, 1e9, b""))
        change = ledger.answered_by_line(99)
        change.afterwards = lambda: None  # type: ignore[method-assign] # killed before the ledger is struck
        bench.vm.events.begin_line()
        bench.vm.events.with_line(change)
        bench.vm.events.end_line(30)
        ledger.release()
        next_vm(bench)
        bench.vm.events.emit("WORKER_LOST", {})
        ledger = Ledger(bench.page)
        assert list(ledger) == []
        ledger.release()

    run(tmp_path, live)


def test_a_detached_vm_whose_worker_died_before_it_told_is_told_by_the_next(tmp_path: Path) -> None:
    async def live(bench: VmBench) -> None:
        await bench.up()
        assert bench.vm.run is not None
        bench.vm.save(over(bench.vm.run, "unknown", "detached", bench.vm.events.cursor))
        vm = next_vm(bench)
        assert vm.state.state is VmState.UNKNOWN
        del bench.told[:]
        vm.tell_end_of_run()
        assert bench.names() == ["VM_STATE unknown"]
        assert bench.told[0].data == {"old": "running", "new": "unknown", "reason": "detached"}
        next_vm(bench).tell_end_of_run()  # once
        assert bench.names() == ["VM_STATE unknown"]

    run(tmp_path, live)


def test_a_run_whose_page_was_lost_keeps_the_epoch_that_it_began_with(tmp_path: Path) -> None:
    async def live(bench: VmBench) -> None:
        await bench.up()
        assert bench.vm.run is not None
        first = bench.vm.run.epoch
        bench.vm._begin_lost_page(bench.vm.run)
        assert (bench.vm.run.epoch, bench.vm.run.first_epoch) == (first + 1, first)
        again = msgspec.json.decode(bench.paths.run_file.read_bytes())
        assert (again["epoch"], again["began"]) == (first + 1, first)

    run(tmp_path, live)


def test_a_connection_that_is_lost_is_not_kept_any_more(tmp_path: Path) -> None:
    async def live(bench: VmBench) -> None:
        await bench.up()
        assert "monitor" in bench.vm.keeper._kept
        bench.peer.hang_up()
        await bench.until(lambda: bench.vm.session is None)
        assert "monitor" not in bench.vm.keeper._kept

    run(tmp_path, live)
