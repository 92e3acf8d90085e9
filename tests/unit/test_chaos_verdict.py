# SPDX-License-Identifier: Apache-2.0
"""The verdict of the chaos test: a run in which all went well has nothing wrong with it; what is claimed, left over, and counted."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ..fakes.chaos_recording import (
    VM,
    changed,
    fault,
    good,
    good_events,
    kill_command,
    read,
    rules,
)
from ..system.chaos.recording import THE_END, Claim, Injected, Life
from ..system.chaos.report import figures, lines
from ..system.chaos.truth import left_files
from ..system.chaos.verdict import judge


def test_a_run_in_which_all_went_well_has_nothing_wrong_with_it() -> None:
    assert judge(good()) == []


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


@pytest.mark.parametrize(("before", "wrong"), [("shutoff", False), ("starting", True), ("running", True)])
def test_a_run_that_is_known_to_have_begun_is_not_over_while_its_process_lives(before: str, wrong: bool) -> None:
    """A run's number may be told a moment before its state; after its state has been told there is no such excuse."""
    recording = good()
    [life] = [life for life in recording.lives if life.vm == VM]
    recording.claims[:] = [
        Claim(VM, before, 1, life.born + 0.1, life.born + 0.2),
        Claim(VM, "shutoff", 1, life.born + 0.3, life.born + 0.4),
    ]
    assert rules(recording) == ({"said gone, lives"} if wrong else set())


@pytest.mark.parametrize(("seen", "wrong"), [(189.0, False), (189.8, True)])
def test_an_end_counts_from_when_the_process_was_last_seen_alive(seen: float, wrong: bool) -> None:
    """The kernel is looked at every few hundredths of a second, and `list` may be quicker."""
    recording = good()
    [life] = [life for life in recording.lives if life.vm == VM]
    recording.lives[recording.lives.index(life)] = msgspec.structs.replace(life, seen=seen)
    recording.claims.append(Claim(VM, "shutoff", 1, 189.5, 189.6))
    assert rules(recording) == ({"said gone, lives"} if wrong else set())


@pytest.mark.parametrize(
    ("at", "what", "vm", "until", "asked"),
    [
        (120.0, "kill", VM, None, True),
        (120.0, "stop", VM, 122.0, True),  # and then a kill came, which it did not take up
        (120.0, "kill", "own-001", None, False),
        (185.0, "kill", VM, None, False),  # after it
    ],
)
def test_a_worker_that_was_lost_without_a_fault_is_found(
    at: float, what: str, vm: str, until: float | None, asked: bool
) -> None:
    recording = good()
    recording.faults[0] = Injected(at, what, "worker", vm, until)
    assert rules(recording) == (set() if asked else {"died unasked"})


def test_a_fault_explains_the_loss_of_one_worker_and_not_of_its_successor() -> None:
    recording = good()
    started, first, lost, second, off = good_events()
    again = msgspec.structs.replace(started, seq=4, time=181_000_000)
    once_more = msgspec.structs.replace(lost, seq=5, time=185_000_000)
    events = [
        started,
        first,
        lost,
        again,
        once_more,
        *(msgspec.structs.replace(told, seq=told.seq + 2) for told in (second, off)),
    ]
    read(recording, *events)
    assert rules(recording) == {"died unasked"}
    fault(recording, 184.0, "kill", "worker", VM)
    assert judge(recording) == []


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


def test_a_run_in_which_nobody_read_the_marks_of_a_real_qemu_that_lived_to_the_end_proves_nothing() -> None:
    recording = changed(kill_command)
    recording.commands[-1] = msgspec.structs.replace(recording.commands[-1], client=THE_END)
    recording.accounts[0] = msgspec.structs.replace(recording.accounts[0], whole=False)
    assert judge(recording) == []
    recording.accounts[0] = msgspec.structs.replace(recording.accounts[0], asked=False)
    assert rules(recording) == {"worthless"}
    recording.commands.pop()  # it had ended before
    assert judge(recording) == []


@pytest.mark.parametrize(
    ("born", "killed", "alone"),
    [(148.0, 147.5, True), (148.0, 149.5, True), (148.0, 140.0, False), (120.0, 149.5, False)],
)
def test_a_new_zygote_may_end_with_the_broker_that_made_it_and_an_old_one_may_not(
    born: float, killed: float, alone: bool
) -> None:
    recording = good()
    recording.zygotes = [Life("", 5, 0, born, 150.0), Life("", 6, 0, 150.5)]
    fault(recording, killed, "kill", "broker", "")
    assert ("died unasked" in rules(recording)) is not alone
