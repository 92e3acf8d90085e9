# SPDX-License-Identifier: Apache-2.0
"""The verdict of the chaos test: a run in which all went well has nothing wrong with it, and one recording for each rule that breaks it."""

from __future__ import annotations

from collections.abc import Callable
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


def good() -> Recording:
    """One VM, one process, one fault that hurts nothing, three events, one command, two readers."""
    events = [told(1), told(2, "WORKER_LOST", "vmloop"), told(3)]
    return Recording(
        seed=1,
        vms=[VM],
        began=100.0,
        ended=200.0,
        faults=[Injected(120.0, "kill", "worker", VM)],
        commands=[command(), command(op="qmp query-status", began=130.0, ended=130.5, mark="", reading=True)],
        readings=[Reading("aio", VM, (0, 0), [*events]), Reading("slow", VM, (0, 0), [*events])],
        accounts=[Account(VM, 7, [emission(events[0]), emission(events[2])], ["m1"])],
        lives=[Life(VM, 7, 1, 101.0, 190.0)],
        claims=[Claim(VM, "running", 1, 150.0, 150.1)],
        zygotes=[Life("", 5, 0, 100.5)],
    )


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
        (("m1",), {"outcome": "worker-lost"}, "said not done, done"),
        (("m1",), {"outcome": "busy"}, "said not done, done"),
        (("m1", "m1"), {"outcome": "worker-lost"}, "done twice"),
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
def test_nobody_need_know_of_a_command_whose_qemu_ended_or_stood_still_under_it(outcome: str) -> None:
    ended = changed(lambda recording: set_command(recording, (), outcome=outcome, began=189.0, ended=191.0))
    assert judge(ended) == []
    stopped = changed(lambda recording: set_command(recording, (), outcome=outcome))
    fault(stopped, 110.5, "stop", "qemu", VM, 112.0)
    assert judge(stopped) == []
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
    started = Told(1, 4, "WORKER_STARTED", 11_400_000, "{}", "vmloop")
    read(recording, *recording.readings[0].events, started)
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


def test_an_operation_of_several_steps_may_be_left_open_by_a_worker_that_dies_under_it() -> None:
    recording = changed(lambda recording: set_command(recording, op="pause", outcome="outcome-unknown", mark=""))
    assert rules(recording) == {"no definite outcome"}
    fault(recording, 110.5, "kill", "worker", VM)
    assert judge(recording) == []


def test_marks_of_a_real_vm_count_for_its_newest_process_only() -> None:
    recording = changed(lambda recording: set_command(recording, ()))
    recording.accounts[0] = msgspec.structs.replace(recording.accounts[0], whole=False)
    assert judge(recording) == []  # the process has ended, and its objects with it
    again = command(outcome="qmp-error", text="object-add: attempt to add duplicate property 'm1' to object")
    recording.commands.append(again)  # whatever has ended since: it was carried out before
    assert rules(recording) == {"done twice"}
    recording.commands.remove(again)
    recording.lives = [Life(VM, 7, 1, 101.0)]
    assert rules(recording) == {"said done, not done"}


# -- streams --


def test_what_no_reader_got_is_a_hole() -> None:
    recording = good()
    read(recording, told(1), told(3))
    assert rules(recording) == {"hole in the stream"}
    read(recording, told(2, "WORKER_LOST", "vmloop"), told(3))
    assert rules(recording) == {"hole in the stream", "emitted, never told"}


def test_a_truncated_journal_may_begin_late() -> None:
    recording = good()
    read(recording, told(2, "JOURNAL_TRUNCATED", "vmloop"), told(3))
    recording.accounts[0].emissions[:] = [emission(told(3))]
    assert judge(recording) == []


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_reader_that_misses_an_event_is_found(missing: int) -> None:
    recording = good()
    events = [*recording.readings[0].events]
    del events[missing]
    read(recording, *events, reader=1)
    assert rules(recording) == {"reader misses events"}


def test_a_reader_that_got_nothing_at_all_misses_everything() -> None:
    recording = good()
    read(recording, reader=1)
    assert rules(recording) == {"reader misses events"}


def test_a_reader_of_the_newest_alone_misses_nothing_before() -> None:
    recording = good()
    recording.readings.append(Reading("late", VM, None, [told(3)]))
    assert judge(recording) == []


def test_a_reader_that_looked_while_its_vm_ran_misses_what_was_there_then_and_not_what_came_later() -> None:
    recording = good()
    recording.readings.append(Reading("look", VM, (0, 0), [told(1)], until=(1, 1)))
    assert judge(recording) == []
    recording.readings.append(Reading("look", VM, (0, 0), [told(1)], until=(1, 2)))
    assert rules(recording) == {"reader misses events"}


def test_an_event_that_is_told_twice_or_out_of_order_is_found() -> None:
    recording = good()
    first, second, third = recording.readings[0].events
    read(recording, first, second, second, third, reader=0)
    assert rules(recording) == {"told twice"}
    read(recording, first, third, second, reader=0)
    assert rules(recording) == {"out of order"}


def test_one_number_for_two_events_is_found() -> None:
    recording = good()
    first, _, third = recording.readings[0].events
    read(recording, first, told(2, "WORKER_STARTED", "vmloop"), third, reader=1)
    assert rules(recording) == {"numbered twice"}


def test_a_client_that_speaks_of_a_gap_is_found() -> None:
    recording = good()
    first, _, third = recording.readings[0].events
    gap = told(2, "EVENTS_LOST", "vmloop", data='{"after":"1.1","count":1,"last":"1.2"}')
    read(recording, first, gap, third, reader=1)
    assert rules(recording) == {"told of a gap", "reader misses events"}


def test_a_reader_that_gave_up_is_found() -> None:
    recording = good()
    recording.readings[1] = msgspec.structs.replace(recording.readings[1], error="internal: x")
    assert rules(recording) == {"reader failed"}


def test_an_event_that_was_never_emitted_is_found() -> None:
    recording = good()
    read(recording, *recording.readings[0].events, told(4, "Y"))
    assert rules(recording) == {"never emitted"}


def test_an_emission_that_is_told_under_two_numbers_is_found() -> None:
    recording = good()
    again = msgspec.structs.replace(told(3), seq=4)
    read(recording, *recording.readings[0].events, again)
    assert rules(recording) == {"emitted once, told twice"}


def test_events_in_another_order_than_they_were_emitted_in_are_found() -> None:
    recording = good()
    recording.accounts[0].emissions.reverse()
    assert rules(recording) >= {"out of order"}


def test_an_emission_that_was_never_told_is_found() -> None:
    recording = good()
    recording.accounts[0].emissions.insert(1, Emission("X", 1002, "{}"))
    assert rules(recording) == {"emitted, never told"}


def test_the_last_few_emissions_of_a_process_that_ended_may_be_lost_and_no_more() -> None:
    recording = good()
    recording.accounts[0].emissions.append(Emission("X", 2000, "{}"))
    assert judge(recording) == []
    recording.accounts[0].emissions.extend(Emission("X", 3000 + number, "{}") for number in range(10))
    assert rules(recording) == {"emitted, never told"}
    recording = good()
    recording.accounts[0].emissions.append(Emission("X", 2000, "{}"))
    recording.lives = [Life(VM, 7, 1, 101.0)]  # it lives
    assert rules(recording) == {"emitted, never told"}


def test_events_may_be_lost_where_zygote_and_worker_died_together_if_it_is_said_there() -> None:
    recording = good()
    gap = told(3, "EVENTS_LOST", "vmloop")
    read(recording, told(1), told(2, "WORKER_LOST", "vmloop"), gap, told(4))
    recording.accounts[0].emissions[:] = [emission(told(1)), Emission("X", 1003, "{}"), emission(told(4))]
    assert rules(recording) == {"events lost", "emitted, never told"}
    both_die(recording)
    assert judge(recording) == []
    read(recording, told(1), told(2, "WORKER_LOST", "vmloop"), told(3, "OTHER", "vmloop"), told(4))
    assert rules(recording) == {"emitted, never told"}


def test_a_witness_answers_only_for_the_span_that_it_saw() -> None:
    recording = good()
    recording.accounts[0] = Account(VM, 7, [emission(told(3))], ["m1"], whole=False)
    assert judge(recording) == []
    recording.accounts[0].emissions.append(Emission("X", 5000, "{}"))
    read(recording, *recording.readings[0].events, told(4, "Y"))
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


def test_a_process_that_ends_unasked_and_whatever_is_left_over_are_found() -> None:
    recording = good()
    recording.zygotes = [Life("", 5, 0, 100.5, 150.0)]
    recording.leftovers = ["run/vms/own-000/monitor.sock"]
    recording.broken = ["the broker ended by itself"]
    assert rules(recording) == {"died unasked", "left over", "broken"}


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
        "events": 3,
        "events_read": 6,
        "readers": 2,
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
