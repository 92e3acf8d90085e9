# SPDX-License-Identifier: Apache-2.0
"""The verdict of the chaos test on answers: each has a cause, and agrees with what its VM did."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ..fakes.chaos_recording import (
    VM,
    both_die,
    changed,
    command,
    fault,
    good,
    good_events,
    kill_command,
    kill_qemu,
    read,
    rules,
    set_command,
)
from ..system.chaos.answers import WENT_AWAY
from ..system.chaos.excuses import BROKER_BACK
from ..system.chaos.recording import Claim, Injected, Life, Recording, Told
from ..system.chaos.verdict import judge


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
        (
            (),
            {
                "outcome": "agent-absent",
                "op": "agent x-mark",
                "began": 189.0,
                "ended": 190.5,
                "text": "VM own-000 has no port for a guest agent; set agent.enabled and start it again",
            },
            "nonsense answer",
        ),
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


@pytest.mark.parametrize(("mark", "wrong"), [("m1", set()), ("m9", {"no definite outcome"})])
def test_what_excused_an_answer_excuses_it_when_it_is_given_again(mark: str, wrong: set[str]) -> None:
    recording = changed(lambda recording: set_command(recording, (), outcome="outcome-unknown", ended=115.0))
    fault(recording, 111.0, "kill", "worker", VM)
    fault(recording, 114.0, "kill", "zygote")
    recording.zygotes = [Life("", 5, 0, 100.5, 114.1), Life("", 6, 0, 114.6)]
    recording.commands.append(command(outcome="outcome-unknown", mark=mark, began=150.0, ended=150.1))
    assert rules(recording) == wrong


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
    recording.commands[0] = command(outcome="outcome-unknown", keyed=True, text=f"{WENT_AWAY}: …")
    assert judge(recording) == []  # its time was over while the next broker was not there yet
    recording.faults[-1] = msgspec.structs.replace(recording.faults[-1], at=110.9 - BROKER_BACK - 1.0)
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


def test_a_qemu_that_was_killed_once_does_not_make_its_successors_look_frozen() -> None:
    recording = changed(lambda recording: set_command(recording, (), outcome="monitor-frozen"))
    fault(recording, 105.0, "kill", "qemu", VM)
    assert rules(recording) == {"said frozen, was not"}


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
    assert rules(recording) == {"error without a cause"}
    recording.commands[-1] = msgspec.structs.replace(already, began=150.0, ended=150.1)  # it runs
    assert judge(recording) == []


@pytest.mark.parametrize("other", ["result", "outcome-unknown", "launch-failed"])
def test_who_has_started_a_vm_is_not_told_that_it_ran_already(other: str) -> None:
    already = command(op="start", mark="", outcome="already-running", began=99.0, ended=102.0)  # it is born at 101
    recording = changed(lambda recording: recording.commands.append(already))
    assert rules(recording) == {"said not done, done"}
    recording.commands.append(msgspec.structs.replace(already, client="power1", began=100.0))
    assert rules(recording) == {"said not done, done"}  # one of the two
    recording.commands[-1] = msgspec.structs.replace(recording.commands[-1], outcome=other)
    fault(recording, 100.5, "kill", "zygote")
    fault(recording, 100.5, "kill", "worker", VM)
    recording.zygotes = [Life("", 5, 0, 98.0, 100.6), Life("", 6, 0, 101.0)]
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
