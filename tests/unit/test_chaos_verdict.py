# SPDX-License-Identifier: Apache-2.0
"""The verdict of the chaos test: a run in which all went well has nothing wrong with it, and one recording for each rule that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ..system.chaos.recording import (
    Account,
    Claim,
    Command,
    Emission,
    Injected,
    Life,
    Reading,
    Recording,
    Told,
)
from ..system.chaos.report import figures, lines
from ..system.chaos.streams import canonical
from ..system.chaos.truth import left_files
from ..system.chaos.verdict import judge

VM = "own-000"


def told(seq: int, event: str = "X", origin: str = "qmp", epoch: int = 1, data: str = "{}") -> Told:
    return Told(epoch, seq, event, 1000 * epoch + seq, data, origin)


def emission(event: Told) -> Emission:
    return Emission(event.event, event.time, event.data)


def command(**changes: Any) -> Command:
    return msgspec.structs.replace(
        Command("blocking0", VM, "qmp x-simulate", 110.0, 111.0, "result", mark="m1", keyed=True), **changes
    )


STARTED = told(1, "WORKER_STARTED", "vmloop")
LOST = told(3, "WORKER_LOST", "vmloop")


def state(seq: int, new: str, epoch: int = 1) -> Told:
    return told(seq, "VM_STATE", "vmloop", epoch, f'{{"new":"{new}"}}')


def good() -> Recording:
    """One VM, one process, one fault that hurts nothing, two events of its own and three of vmloop's, one command, two readers."""
    events = [STARTED, told(2), LOST, told(4), state(5, "shutoff")]
    return Recording(
        seed=1,
        vms=[VM],
        began=100.0,
        ended=200.0,
        faults=[Injected(120.0, "kill", "worker", VM)],
        commands=[command(), command(op="qmp query-status", began=130.0, ended=130.5, mark="", reading=True)],
        readings=[Reading("aio", VM, (0, 0), [*events]), Reading("slow", VM, (0, 0), [*events])],
        accounts=[Account(VM, 7, [emission(events[1]), emission(events[3])], ["m1"])],
        lives=[Life(VM, 7, 1, 101.0, 190.0)],
        claims=[Claim(VM, "running", 1, 150.0, 150.1)],
        zygotes=[Life("", 5, 0, 100.5)],
    )


def good_events() -> list[Told]:
    return good().readings[0].events


def rules(recording: Recording) -> set[str]:
    return {violation.rule for violation in judge(recording)}


def changed(change: Callable[[Recording], None]) -> Recording:
    recording = good()
    change(recording)
    return recording


def set_command(recording: Recording, marks: tuple[str, ...] = ("m1",), **changes: Any) -> None:
    recording.commands[0] = command(**changes)
    recording.accounts[0].marks[:] = marks


def fault(recording: Recording, at: float, what: str, whom: str, vm: str = "", until: float | None = None) -> None:
    recording.faults.append(Injected(at, what, whom, vm, until))


def both_die(recording: Recording, at: float = 110.5) -> None:
    fault(recording, at, "kill", "zygote")
    fault(recording, at, "kill", "worker", VM)
    recording.zygotes[:] = [Life("", 5, 0, 100.5, at + 0.01), Life("", 6, 0, at + 0.5)]


def read(recording: Recording, *events: Told, reader: int | None = None) -> None:
    """What one reader, or each of them, got."""
    for place in (0, 1) if reader is None else (reader,):
        recording.readings[place] = msgspec.structs.replace(recording.readings[place], events=[*events])


def test_a_run_in_which_all_went_well_has_nothing_wrong_with_it() -> None:
    assert judge(good()) == []


# -- answers --


@pytest.mark.parametrize(
    ("marks", "changes", "rule"),
    [
        ((), {}, "said done, not done"),
        (("m1", "m1"), {}, "done twice"),
        (("m1",), {"outcome": "not-running", "began": 189.0, "ended": 190.5}, "said not done, done"),
        (("m1", "m1"), {"outcome": "not-running", "began": 189.0, "ended": 190.5}, "done twice"),
        ((), {"outcome": "worker-lost"}, "error without a cause"),
        ((), {"outcome": "busy"}, "error without a cause"),
        ((), {"outcome": "agent-error", "op": "agent x-mark"}, "nonsense answer"),
        ((), {"outcome": "outcome-unknown"}, "no definite outcome"),
        (("m1",), {"outcome": "deadline"}, "no definite outcome"),
        ((), {"outcome": "no-answer", "keyed": False}, "no definite outcome"),
        ((), {"outcome": "internal"}, "nonsense answer"),
        ((), {"outcome": "no-such-vm"}, "nonsense answer"),
        ((), {"outcome": "qmp-error", "text": "Expecting capabilities negotiation"}, "nonsense answer"),
        (
            (),
            {"outcome": "qmp-error", "op": "pause", "text": "stop: Expecting capabilities negotiation"},
            "nonsense answer",
        ),
        ((), {"outcome": "no-broker"}, "said no broker, there is one"),
        ((), {"outcome": "monitor-frozen"}, "said frozen, was not"),
        ((), {"outcome": "not-running"}, "said gone, lives"),
        (("m1",), {"answers": 2}, "answered twice"),
        (("m1",), {"op": "kill"}, "said done, not done"),
        (("m1",), {"op": "start"}, "said done, not done"),
    ],
)
def test_an_answer_that_is_not_true_is_found(marks: tuple[str, ...], changes: dict[str, Any], rule: str) -> None:
    assert rules(changed(lambda recording: set_command(recording, marks, **changes))) == {rule}


def test_a_command_sent_again_with_its_key_may_leave_one_mark_only() -> None:
    recording = good()
    recording.commands.append(command(client="blocking1", began=112.0, ended=113.0))
    assert judge(recording) == []
    recording.accounts[0].marks.append("m1")
    assert rules(recording) == {"done twice"}


@pytest.mark.parametrize("outcome", ["outcome-unknown", "deadline"])
def test_nobody_need_know_of_a_command_whose_qemu_ended_under_it(outcome: str) -> None:
    ended = changed(lambda recording: set_command(recording, (), outcome=outcome, began=189.0, ended=191.0))
    assert judge(ended) == []


def test_a_command_whose_qemu_stood_still_under_it_may_be_late_and_what_became_of_it_is_known_in_the_end() -> None:
    stopped = changed(lambda recording: set_command(recording, (), outcome="deadline"))
    fault(stopped, 110.5, "stop", "qemu", VM, 112.0)
    assert judge(stopped) == []
    stopped.commands[0] = command(outcome="outcome-unknown")
    assert rules(stopped) == {"no definite outcome"}
    stopped.commands[0] = command(outcome="deadline")
    stopped.faults[-1] = Injected(105.0, "stop", "qemu", VM, 107.0)  # long before
    assert rules(stopped) == {"no definite outcome"}


def test_an_unknown_outcome_is_excused_by_zygote_and_worker_together_and_by_neither_alone() -> None:
    recording = changed(lambda recording: set_command(recording, (), outcome="outcome-unknown"))
    both_die(recording)
    assert judge(recording) == []
    *_, zygote, worker = recording.faults
    recording.faults = [zygote, Injected(130.0, "kill", "worker", VM)]  # long after
    assert rules(recording) == {"no definite outcome"}
    recording.faults = [worker]
    recording.zygotes = [Life("", 5, 0, 100.5)]
    assert rules(recording) == {"no definite outcome"}


def test_a_zygote_that_dies_before_a_dead_worker_has_a_successor_takes_the_connection_with_it() -> None:
    recording = changed(lambda recording: set_command(recording, (), outcome="outcome-unknown", ended=115.0))
    recording.epoch = -100.0  # an event's time of 11.4 s is 111.4 s on the test's clock
    fault(recording, 111.0, "kill", "worker", VM)
    fault(recording, 114.0, "kill", "zygote")
    recording.zygotes = [Life("", 5, 0, 100.5, 114.1), Life("", 6, 0, 114.6)]
    assert judge(recording) == []
    started = Told(1, 6, "WORKER_STARTED", 11_400_000, "{}", "vmloop")
    read(recording, *good_events(), started)
    assert rules(recording) == {"no definite outcome"}


def test_nobody_answers_while_a_killed_broker_is_not_back() -> None:
    recording = changed(lambda recording: set_command(recording, (), outcome="no-broker"))
    fault(recording, 110.5, "kill", "broker")
    assert judge(recording) == []


def test_a_lost_broker_excuses_the_one_without_a_key_only() -> None:
    recording = changed(lambda recording: set_command(recording, outcome="outcome-unknown", keyed=False))
    fault(recording, 110.5, "kill", "broker")
    assert judge(recording) == []
    recording.commands[0] = command(outcome="outcome-unknown", keyed=True)
    assert rules(recording) == {"no definite outcome"}


def test_a_reading_command_is_never_of_unknown_outcome_for_want_of_a_worker() -> None:
    recording = changed(lambda recording: set_command(recording, (), outcome="outcome-unknown", reading=True, mark=""))
    both_die(recording)
    assert rules(recording) == {"no definite outcome"}


def test_an_agent_need_not_answer_while_its_guest_is_paused() -> None:
    recording = changed(
        lambda recording: set_command(recording, (), op="agent guest-ping", outcome="deadline", mark="")
    )
    assert rules(recording) == {"no definite outcome"}
    recording.claims.append(Claim(VM, "paused", 1, 110.4, 110.5))
    assert judge(recording) == []


@pytest.mark.parametrize("op", ["pause", "resume", "stop", "kill", "start"])
def test_an_operation_of_several_steps_is_not_left_open_by_a_worker_that_dies_under_it(op: str) -> None:
    recording = changed(lambda recording: set_command(recording, op=op, outcome="outcome-unknown", mark=""))
    fault(recording, 110.5, "kill", "worker", VM)
    assert rules(recording) == {"no definite outcome"}


@pytest.mark.parametrize(
    ("changes", "excuse"),
    [
        ({"outcome": "worker-lost"}, ("kill", "worker", None)),
        ({"outcome": "monitor-lost"}, ("stop", "qemu", 112.0)),
        ({"outcome": "monitor-frozen"}, ("stop", "qemu", 112.0)),
        ({"outcome": "agent-absent", "op": "agent guest-ping"}, ("kill", "worker", None)),
        ({"outcome": "agent-unresponsive", "op": "agent guest-ping"}, ("stop", "qemu", 112.0)),
        ({"outcome": "launch-failed", "op": "start"}, ("kill", "worker", None)),
    ],
)
def test_an_error_needs_a_fault_that_brought_it_about(
    changes: dict[str, Any], excuse: tuple[str, str, float | None]
) -> None:
    recording = changed(lambda recording: set_command(recording, (), mark="", **changes))
    found = {"said frozen, was not"} if changes["outcome"] == "monitor-frozen" else {"error without a cause"}
    assert rules(recording) == found
    what, whom, until = excuse
    fault(recording, 110.5, what, whom, VM, until)
    assert judge(recording) == []
    recording.faults[-1] = Injected(160.0, what, whom, VM, until and until + 50.0)  # long after
    assert rules(recording) == found
    recording.faults[-1] = Injected(110.5, what, whom, "own-001", until)  # another's
    assert rules(recording) == found


@pytest.mark.parametrize("outcome", ["agent-absent", "agent-unresponsive", "launch-failed"])
def test_an_error_of_the_agents_or_of_a_launch_is_no_answer_to_a_mark(outcome: str) -> None:
    recording = changed(lambda recording: set_command(recording, (), outcome=outcome))
    fault(recording, 110.5, "kill", "worker", VM)
    assert rules(recording) == {"error without a cause"}


def test_a_monitor_is_lost_for_as_long_as_worker_and_zygote_may_need_and_not_longer() -> None:
    recording = changed(lambda recording: set_command(recording, (), outcome="monitor-lost"))
    both_die(recording, 109.0)
    recording.commands[0] = command(outcome="monitor-lost", began=112.0, ended=113.0)
    assert judge(recording) == []
    recording.commands[0] = command(outcome="monitor-lost", began=140.0, ended=141.0)
    assert rules(recording) == {"error without a cause"}


def test_a_launch_that_lost_its_qemu_has_failed() -> None:
    failed = command(op="start", mark="", outcome="launch-failed", began=189.0, ended=191.0)
    recording = changed(lambda recording: recording.commands.append(failed))
    assert judge(recording) == []


def test_an_agent_of_a_guest_that_has_just_been_launched_may_be_absent() -> None:
    early = command(op="agent guest-ping", mark="", outcome="agent-absent", began=101.5, ended=101.6)
    assert judge(changed(lambda recording: recording.commands.append(early))) == []


def test_a_dying_worker_cuts_one_command_on_each_wire_and_no_more() -> None:
    recording = changed(lambda recording: set_command(recording, (), outcome="worker-lost"))
    fault(recording, 110.5, "kill", "worker", VM)
    again = command(outcome="worker-lost", began=111.0, ended=111.1)  # with the same key
    recording.commands.append(again)
    recording.commands.append(command(op="agent x-mark", mark="m2", outcome="worker-lost"))
    assert judge(recording) == []
    recording.commands.append(command(mark="m3", outcome="worker-lost"))
    assert rules(recording) == {"lost more than was cut"}


@pytest.mark.parametrize(("outcome", "rule"), [("busy", "error without a cause"), ("denied", "nonsense answer")])
def test_nobody_is_too_busy_and_nothing_is_denied_whatever_died(outcome: str, rule: str) -> None:
    recording = changed(lambda recording: set_command(recording, (), outcome=outcome))
    both_die(recording)
    fault(recording, 110.5, "kill", "broker")
    assert rules(recording) == {rule}
    recording.commands[0] = command(outcome="busy", text="the broker is going down; ask again when it is back")
    assert judge(recording) == []


def test_a_vm_runs_already_only_if_somebody_has_started_it() -> None:
    already = command(op="start", mark="", outcome="already-running", began=195.0, ended=195.1)
    recording = changed(lambda recording: recording.commands.append(already))
    assert rules(recording) == {"said not done, done"}
    recording.commands[-1] = msgspec.structs.replace(already, began=150.0, ended=150.1)  # it runs
    assert judge(recording) == []
    recording.commands[-1] = already
    recording.commands.append(command(op="start", mark="", outcome="launch-failed", began=194.9, ended=195.2))
    fault(recording, 195.1, "kill", "worker", VM)
    assert judge(recording) == []


@pytest.mark.parametrize("op", ["stop", "kill"])
def test_who_has_ended_a_vm_is_not_told_that_it_did_not_run(op: str) -> None:
    ending = command(op=op, mark="", outcome="not-running", began=189.0, ended=192.0)
    recording = changed(lambda recording: recording.commands.append(ending))
    assert rules(recording) == {"said not done, done"}
    kill_qemu(recording)  # a fault did it
    assert judge(recording) == []
    recording = changed(lambda recording: recording.commands.append(ending))
    kill_command(recording)  # another client did it
    assert judge(recording) == []
    recording.commands[2:] = [msgspec.structs.replace(ending, began=190.2)]  # it was over before
    assert judge(recording) == []


def test_a_silent_agent_may_have_been_given_the_mark_if_it_says_so() -> None:
    recording = changed(
        lambda recording: set_command(recording, op="agent x-mark", outcome="agent-unresponsive", sent=True)
    )
    fault(recording, 110.5, "stop", "qemu", VM, 112.0)
    assert judge(recording) == []
    recording.accounts[0].marks.append("m1")
    assert rules(recording) == {"done twice"}
    recording.accounts[0].marks[:] = ["m1"]
    recording.commands[0] = msgspec.structs.replace(recording.commands[0], sent=False)
    assert rules(recording) == {"said not done, done"}


def real(recording: Recording, *, asked: bool) -> None:
    """As storm.py has it of a real QEMU: a witness of part of its life, which asked for the marks before the VM was killed."""
    recording.accounts[0] = msgspec.structs.replace(recording.accounts[0], whole=False, asked=asked)


def test_marks_of_a_real_vm_count_if_its_newest_process_was_asked_for_them() -> None:
    recording = changed(lambda recording: set_command(recording, ()))
    real(recording, asked=False)
    assert judge(recording) == []  # the process has ended, and its objects with it
    again = command(outcome="qmp-error", text="object-add: attempt to add duplicate property 'm1' to object")
    recording.commands.append(again)  # whatever has ended since: it was carried out before
    assert rules(recording) == {"done twice"}
    recording.commands.remove(again)
    real(recording, asked=True)
    assert rules(recording) == {"said done, not done"}
    recording.commands[0] = command(outcome="worker-lost")
    recording.accounts[0].marks.append("m1")
    fault(recording, 110.5, "kill", "worker", VM)
    assert rules(recording) == {"said not done, done"}


def test_marks_that_a_real_vm_was_given_in_an_earlier_life_are_not_counted() -> None:
    recording = changed(lambda recording: set_command(recording, ()))
    real(recording, asked=True)
    recording.lives.insert(0, Life(VM, 6, 0, 100.5, 110.9))
    recording.lives[1] = Life(VM, 7, 1, 110.95, 190.0)
    assert judge(recording) == []


# -- streams --


def test_what_no_reader_got_is_a_hole() -> None:
    started, first, lost, second, off = good_events()
    recording = good()
    read(recording, started, first, second, off)
    assert rules(recording) == {"hole in the stream"}
    read(recording, first, lost, second, off)
    assert rules(recording) == {"hole in the stream"}
    read(recording, started, lost, second, off)
    assert rules(recording) == {"hole in the stream", "emitted, never told"}


def test_a_truncated_journal_may_begin_late() -> None:
    recording = good()
    read(recording, told(3, "JOURNAL_TRUNCATED", "vmloop"), told(4), state(5, "shutoff"))
    recording.accounts[0].emissions[:] = [emission(told(4))]
    assert judge(recording) == []


@pytest.mark.parametrize("missing", range(5))
def test_a_reader_that_misses_an_event_is_found(missing: int) -> None:
    recording = good()
    events = good_events()
    del events[missing]
    read(recording, *events, reader=1)
    assert rules(recording) == {"reader misses events"}


def test_a_reader_that_got_nothing_at_all_misses_everything() -> None:
    recording = good()
    read(recording, reader=1)
    assert rules(recording) == {"reader misses events"}


def test_a_reader_of_the_newest_alone_misses_nothing_before() -> None:
    recording = good()
    recording.readings.append(Reading("late", VM, None, good_events()[3:]))
    assert judge(recording) == []


def test_a_reader_that_looked_while_its_vm_ran_misses_what_was_there_then_and_not_what_came_later() -> None:
    recording = good()
    recording.readings.append(Reading("look", VM, (0, 0), [STARTED], until=(1, 1)))
    assert judge(recording) == []
    recording.readings.append(Reading("look", VM, (0, 0), [STARTED], until=(1, 2)))
    assert rules(recording) == {"reader misses events"}


def test_an_event_that_is_told_twice_or_out_of_order_is_found() -> None:
    recording = good()
    started, first, lost, second, off = good_events()
    read(recording, started, first, lost, lost, second, off, reader=0)
    assert rules(recording) == {"told twice"}
    read(recording, started, first, second, lost, off, reader=0)
    assert rules(recording) == {"out of order"}


def test_one_number_for_two_events_is_found() -> None:
    recording = good()
    started, first, _, *rest = good_events()
    read(recording, started, first, told(3, "WORKER_STARTED", "vmloop"), *rest, reader=1)
    assert rules(recording) == {"numbered twice"}


def test_a_client_that_speaks_of_a_gap_is_found() -> None:
    recording = good()
    started, first, _, *rest = good_events()
    gap = told(3, "EVENTS_LOST", "vmloop", data='{"after":"1.2","count":1,"last":"1.3"}')
    read(recording, started, first, gap, *rest, reader=1)
    assert rules(recording) == {"told of a gap", "reader misses events"}


def test_a_reader_that_gave_up_is_found() -> None:
    recording = good()
    recording.readings[1] = msgspec.structs.replace(recording.readings[1], error="internal: x")
    assert rules(recording) == {"reader failed"}


def test_an_event_that_was_never_emitted_is_found() -> None:
    recording = good()
    read(recording, *good_events(), told(6, "Y"))
    assert rules(recording) == {"never emitted"}


def test_an_emission_that_is_told_under_two_numbers_is_found() -> None:
    recording = good()
    again = msgspec.structs.replace(told(4), seq=6)
    read(recording, *good_events(), again)
    assert rules(recording) == {"emitted once, told twice"}


def test_events_in_another_order_than_they_were_emitted_in_are_found() -> None:
    recording = good()
    recording.accounts[0].emissions.reverse()
    assert rules(recording) >= {"out of order"}


def test_an_emission_that_was_never_told_is_found() -> None:
    recording = good()
    recording.accounts[0].emissions.insert(1, Emission("X", 1003, "{}"))
    assert rules(recording) == {"emitted, never told"}


def kill_qemu(recording: Recording) -> None:
    fault(recording, 189.9, "kill", "qemu", VM)


def kill_command(recording: Recording) -> None:
    recording.commands.append(command(op="kill", mark="", began=189.5, ended=190.2))


def forced_stop(recording: Recording) -> None:
    recording.commands.append(command(op="stop", mark="", began=186.0, ended=190.2))


def failed_start(recording: Recording) -> None:
    kill_qemu(recording)
    recording.commands.append(command(op="start", mark="", began=189.0, ended=190.2, outcome="launch-failed"))


@pytest.mark.parametrize("hit", [kill_qemu, kill_command, forced_stop, failed_start])
def test_the_last_few_emissions_of_a_process_that_was_killed_may_be_lost_and_no_more(
    hit: Callable[[Recording], None],
) -> None:
    recording = changed(hit)
    recording.accounts[0].emissions.append(Emission("X", 2000, "{}"))
    assert judge(recording) == []
    recording.accounts[0].emissions.extend(Emission("X", 3000 + number, "{}") for number in range(10))
    assert rules(recording) == {"emitted, never told"}
    recording = good()
    recording.accounts[0].emissions.append(Emission("X", 2000, "{}"))
    recording.lives = [Life(VM, 7, 1, 101.0)]  # it lives
    assert rules(recording) == {"emitted, never told"}


@pytest.mark.parametrize("ended", ["by itself", "stopped in order", "killed another"])
def test_the_last_emission_of_a_process_that_ended_in_order_is_told(ended: str) -> None:
    recording = good()
    if ended == "stopped in order":
        recording.commands.append(command(op="stop", mark="", began=189.0, ended=190.2))
    elif ended == "killed another":
        recording.faults.append(Injected(150.0, "kill", "qemu", VM))
        recording.commands.append(command(op="kill", mark="", began=150.0, ended=150.2, outcome="worker-lost"))
        recording.faults.append(Injected(150.1, "kill", "worker", VM))
    recording.accounts[0].emissions.append(Emission("SHUTDOWN", 2000, "{}"))
    assert rules(recording) == {"emitted, never told"}


def gap(since: float, until: float, seq: int = 3, at: float = 111.0) -> Told:
    """EVENTS_LOST of the VM's own, told at a moment of the test's clock; so are its bounds."""
    data = canonical({"since": since - EPOCH, "until": until - EPOCH, "reason": "no connection", "changed": {}})
    return Told(1, seq, "EVENTS_LOST", round((at - EPOCH) * 1e6), data, "vmloop")


EPOCH = (
    100.0  # of the test's clock: when the clock of the events began, so that those of told() are at 100.001 s and later
)


def lossy(lost_at: float = 111.0) -> Recording:
    """Worker and zygote died together at 110.5; what was emitted at 110.8 is missing, and EVENTS_LOST stands there."""
    recording = good()
    recording.epoch = -EPOCH
    recording.accounts[0].emissions.insert(1, at(110.8))
    read(recording, STARTED, told(2), gap(110.4, 110.9, at=lost_at), told(4), state(5, "shutoff"))
    both_die(recording)
    return recording


def at(seconds: float, event: str = "X") -> Emission:
    return Emission(event, round((seconds - EPOCH) * 1e6), "{}")


def test_events_may_be_lost_where_zygote_and_worker_died_together_if_it_is_said_there() -> None:
    assert judge(lossy()) == []
    recording = lossy()
    recording.faults = good().faults
    recording.zygotes = good().zygotes
    assert rules(recording) == {"events lost"}
    recording = lossy()
    read(recording, STARTED, told(2), told(3, "OTHER", "vmloop"), told(4), state(5, "shutoff"))
    assert rules(recording) == {"emitted, never told"}


@pytest.mark.parametrize(
    ("told_at", "fine"), [(105.0, False), (111.0, True), (120.0, True), (130.0, False), (180.0, False)]
)
def test_events_lost_is_excused_only_for_a_while_after_the_deaths(told_at: float, fine: bool) -> None:
    assert rules(lossy(told_at)) == (set() if fine else {"events lost"})


@pytest.mark.parametrize("missing", [105.0, 110.3, 111.5, 180.0])
def test_an_emission_before_or_after_the_span_that_is_said_to_be_lost_is_missed(missing: float) -> None:
    recording = lossy()
    recording.accounts[0].emissions[1] = at(missing)
    assert rules(recording) == {"emitted, never told"}


@pytest.mark.parametrize(("missing", "fine"), [(110.8, True), (105.0, False), (140.0, False)])
def test_of_a_process_that_ended_before_anybody_was_connected_again_only_what_came_in_between_is_lost(
    missing: float, fine: bool
) -> None:
    recording = lossy()
    read(recording, STARTED, told(2), LOST, told(4), state(5, "shutoff"))
    recording.accounts[0].emissions[1:] = [emission(told(4)), at(missing), at(missing), at(missing), at(missing)]
    assert rules(recording) == (set() if fine else {"emitted, never told"})


def test_a_worker_that_stood_still_when_it_was_killed_had_read_nothing_since() -> None:
    recording = lossy()
    read(recording, STARTED, told(2), LOST, told(4), state(5, "shutoff"))
    recording.accounts[0].emissions[1:] = [emission(told(4)), at(109.0)]
    assert rules(recording) == {"emitted, never told"}
    fault(recording, 108.9, "stop", "worker", VM, 110.6)
    assert judge(recording) == []


def test_an_epoch_that_begins_with_anything_but_its_workers_word_is_found() -> None:
    recording = good()
    read(recording, told(1, "OTHER", "vmloop"), *good_events()[1:])
    assert rules(recording) == {"begins with something else"}


@pytest.mark.parametrize(
    "states",
    [(), ("running",), ("shutoff", "running"), ("shutoff", "shutoff")],
)
def test_a_run_that_is_over_says_so_once_and_last(states: tuple[str, ...]) -> None:
    recording = good()
    read(recording, *good_events()[:4], *(state(5 + place, new) for place, new in enumerate(states)))
    assert rules(recording) == {"end never told"}
    recording.lives = [Life(VM, 7, 1, 101.0)]  # it lives
    assert judge(recording) == []


def test_a_run_is_over_when_the_next_one_has_begun_and_one_that_nobody_heard_of_has_no_end() -> None:
    recording = good()
    recording.lives[:] = [Life(VM, 7, 0, 101.0, 150.0), Life(VM, 8, 2, 151.0)]
    read(recording, *good_events()[:4], told(1, "WORKER_STARTED", "vmloop", epoch=2))
    assert rules(recording) == {"end never told"}
    recording = good()
    recording.lives.append(Life(VM, 8, 2, 191.0, 195.0))
    assert rules(recording) == {"end never told"}


def test_a_witness_answers_only_for_the_span_that_it_saw() -> None:
    recording = good()
    recording.accounts[0] = Account(VM, 7, [emission(told(4))], ["m1"], whole=False)
    assert judge(recording) == []
    recording.accounts[0].emissions.append(Emission("X", 5000, "{}"))
    kill_qemu(recording)
    read(recording, *good_events(), told(6, "Y"))
    assert rules(recording) == {"never emitted"}


# -- claims, and the rest --


@pytest.mark.parametrize(
    ("claim", "wrong"),
    [
        (Claim(VM, "shutoff", 1, 150.0, 150.1), "said gone, lives"),
        (Claim(VM, "shutoff", 0, 150.0, 150.1), "said gone, lives"),  # of the run before, and long ago
        (Claim(VM, "shutoff", 0, 101.5, 101.6), None),  # the process is new
        (Claim(VM, "shutoff", 1, 189.9, 190.1), None),  # it ended meanwhile
        (Claim(VM, "unknown", 1, 150.0, 150.1), None),
        (Claim(VM, "running", 1, 194.0, 194.1), None),  # not long
        (Claim(VM, "running", 1, 196.0, 196.1), "said alive, gone"),
        (Claim(VM, "paused", 1, 196.0, 196.1), "said alive, gone"),
        (Claim(VM, "shutoff", 1, 196.0, 196.1), None),
    ],
)
def test_a_claim_of_list_is_held_against_the_kernel(claim: Claim, wrong: str | None) -> None:
    recording = good()
    recording.claims.append(claim)
    assert rules(recording) == ({wrong} if wrong else set())


@pytest.mark.parametrize("state", ["unknown", "starting"])
def test_a_vm_that_lives_and_that_no_fault_touches_is_not_in_doubt_for_long(state: str) -> None:
    recording = good()
    recording.claims += [Claim(VM, state, 1, 150.0 + second, 150.1 + second) for second in range(19)]
    assert judge(recording) == []
    recording.claims += [Claim(VM, state, 1, 169.0 + second, 169.1 + second) for second in range(15)]
    assert [violation.rule for violation in judge(recording)] == ["long in doubt"]
    for excused in (
        lambda recording: fault(recording, 160.0, "stop", "worker", VM, 166.0),
        lambda recording: recording.lives.__setitem__(0, Life(VM, 7, 1, 101.0, 165.0)),
        lambda recording: recording.claims.append(Claim(VM, "running", 1, 168.0, 168.1)),
    ):
        again = msgspec.structs.replace(
            recording, faults=[*recording.faults], lives=[*recording.lives], claims=[*recording.claims]
        )
        excused(again)
        again.claims.sort(key=lambda claim: claim.asked)
        assert judge(again) == []


def test_a_process_that_ends_unasked_and_whatever_is_left_over_are_found() -> None:
    recording = good()
    recording.zygotes = [Life("", 5, 0, 100.5, 150.0)]
    recording.leftovers = ["run/vms/own-000/monitor.sock"]
    recording.broken = ["the broker ended by itself"]
    assert rules(recording) == {"died unasked", "left over", "broken"}


@pytest.mark.parametrize(
    "name",
    ["agent.sock", "carry.0", "agent-carry.1", ".answers.new", ".run.json.77.new", "zygote.new", "page.damaged-1"],
)
def test_a_file_that_nobody_needs_any_more_is_left_over(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run" / VM
    run.mkdir(parents=True)
    (run / "page").touch()
    assert left_files(tmp_path, [run]) == []
    (run / name).touch()
    assert left_files(tmp_path, [run]) == [f"run/{VM}/{name}"]


@pytest.mark.parametrize("part", ["faults", "commands", "readings", "claims", "lives", "accounts"])
def test_a_run_in_which_nothing_happened_proves_nothing(part: str) -> None:
    recording = good()
    setattr(recording, part, [])
    assert "worthless" in rules(recording)


def test_the_figures_count_what_was_recorded() -> None:
    recording = good()
    assert figures(recording, judge(recording)) | {"longest_command": ""} == {
        "seed": 1,
        "seconds": 100.0,
        "vms": 1,
        "faults": {"kill worker": 1},
        "faults_missed": 0,
        "commands": {"result": 2},
        "marks": 1,
        "events": 5,
        "events_read": 10,
        "readers": 2,
        "streams_reopened": 0,
        "marks_asked_of_real": 0,
        "emitted": 2,
        "gaps_told": 0,
        "events_lost_allowed": 0,
        "lost": 0,
        "doubled": 0,
        "processes": 1,
        "claims": 1,
        "longest_without_answer": 1.0,
        "longest_command": "",
        "violations": {},
    }
    recording.accounts[0].marks.append("m1")
    assert any("done twice: own-000" in line for line in lines(recording, judge(recording)))
