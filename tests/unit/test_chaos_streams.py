# SPDX-License-Identifier: Apache-2.0
"""The verdict of the chaos test on streams of events: whole, in order, and what the VM emitted."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from ..fakes.chaos_recording import (
    LOST,
    STARTED,
    VM,
    both_die,
    changed,
    command,
    emission,
    fault,
    good,
    good_events,
    kill_command,
    kill_qemu,
    read,
    rules,
    state,
    told,
)
from ..system.chaos.recording import Account, Emission, Injected, Life, Reading, Recording, Told
from ..system.chaos.streams import canonical
from ..system.chaos.verdict import judge


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
    assert rules(recording) == {"events lost", "emitted, never told"}
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


def test_an_emission_from_before_the_deaths_is_missed_however_long_qemu_had_said_nothing() -> None:
    recording = lossy()
    started, first, _, *rest = recording.readings[0].events
    read(recording, started, first, gap(101.0, 110.9), *rest)
    assert judge(recording) == []
    recording.accounts[0].emissions[1] = at(105.0)
    assert rules(recording) == {"emitted, never told"}


@pytest.mark.parametrize(("missing", "fine"), [(110.8, True), (105.0, False), (140.0, False)])
def test_of_a_process_that_ended_before_anybody_was_connected_again_only_what_came_in_between_is_lost(
    missing: float, fine: bool
) -> None:
    recording = lossy()
    read(recording, STARTED, told(2), LOST, told(4), state(5, "shutoff"))
    recording.accounts[0].emissions[1:] = [emission(told(4)), at(missing), at(missing), at(missing), at(missing)]
    assert rules(recording) == (set() if fine else {"emitted, never told"})


def test_of_a_process_that_ended_after_somebody_was_connected_again_nothing_is_lost() -> None:
    recording = lossy()
    recording.accounts[0].emissions[1:] = [at(110.8), emission(told(4)), at(113.0)]
    assert rules(recording) == {"emitted, never told"}
    recording.accounts[0].emissions.pop()
    assert judge(recording) == []


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
