# SPDX-License-Identifier: Apache-2.0
"""worker/agent/: a worker that is killed at any step leaves every answer of the guest agent to the next one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from vmloop.common.errors import VmloopError

from ..fakes.killed_agent import Bench

MIB = 1 << 20
# Padding of an answer: one that a look at the idle wire takes in whole, one that is several of those, and one longer than a chunk.
SIZES = (0, 20_000, 70_000)


def steps_of(work: Callable[[Bench], None], **options: Any) -> int:
    """How many steps a worker makes that is not killed."""
    with Bench(**options) as bench:
        work(bench)
        assert bench.deaths == 0
        return bench.worker.steps.made


def true_answers(bench: Bench, *requests: int) -> None:
    """Everybody was told the truth, and nothing was carried out twice."""
    for request in requests:
        for told in bench.told[request]:
            if isinstance(told, VmloopError):
                assert (told.code, "not carried out" in str(told)) == ("worker-lost", True), told
                assert request not in bench.guest.carried_out
            else:
                assert told["n"] == request
                assert len(told["padding"]) == bench.guest.size
    assert len(bench.guest.carried_out) == len(set(bench.guest.carried_out))
    assert bench.ends == []


def unkept(bench: Bench) -> bool:
    """Whether the start of an answer has been read that no successor would find."""
    return not bench.worker.standing.ledger.synced


def two_commands(bench: Bench, size: int = 0) -> None:
    """`size`: bytes of padding in each answer."""
    bench.guest.size = size
    bench.ask(1)
    bench.ask(2)


@pytest.mark.parametrize("ids", [True, False], ids=["ids", "no ids"])
@pytest.mark.parametrize("answers", ["before", "after", "between"])
@pytest.mark.parametrize("size", SIZES)
def test_whenever_a_worker_is_killed_every_answer_is_given_and_true(size: int, answers: str, ids: bool) -> None:
    work = partial(two_commands, size=size)
    for kill in range(steps_of(work, ids=ids) + 1):
        with Bench([kill], ids=ids) as bench:
            bench.guest.size = size

            def while_dead(bench: Bench = bench) -> None:
                bench.guest.silent = False
                while answers != "before" and bench.guest.act():
                    pass

            bench.while_dead = while_dead
            bench.guest.silent = answers == "after" and kill > 0
            if bench.guest.silent:  # it answers only once the worker is dead
                bench.submit(1)
                while bench.guest.act() or bench.worker.loop.turn():
                    pass
                bench.worker.steps.allowed = 0
                bench.succeed()
                bench.run(lambda: 1 in bench.told)
                bench.ask(2)
            else:
                work(bench)
            true_answers(bench, 1, 2)


@pytest.mark.parametrize("ids", [True, False], ids=["ids", "no ids"])
def test_a_row_of_killed_workers_loses_nothing_either(ids: bool) -> None:
    steps = steps_of(two_commands, ids=ids)
    for kills in itertools.product(range(steps + 1), range(0, steps + 12, 2)):
        with Bench(list(kills), ids=ids) as bench:
            two_commands(bench)
            true_answers(bench, 1, 2)


def in_line(bench: Bench, size: int = 0) -> None:
    """Three commands, the second and third of which wait for the one before; whoever dies has them asked for again."""
    bench.guest.size = size
    for request in (1, 2, 3):
        bench.submit(request)
    for request in (1, 2, 3):
        if request not in bench.told and request not in bench.inherited and bench.deaths:
            bench.submit(request)
        bench.run(lambda: request in bench.told or (bench.deaths > 0 and request not in bench.inherited))  # noqa: B023
        if request not in bench.told:
            bench.ask(request)


@pytest.mark.parametrize("ids", [True, False], ids=["ids", "no ids"])
@pytest.mark.parametrize("size", SIZES)
def test_no_answer_is_taken_for_that_of_the_command_behind_it(size: int, ids: bool) -> None:
    work = partial(in_line, size=size)
    for kill in range(steps_of(work, ids=ids) + 1):
        with Bench([kill], ids=ids) as bench:
            work(bench)
            for request, told in bench.told.items():
                assert [answer["n"] for answer in told if not isinstance(answer, VmloopError)] in (
                    [request] * len(told),
                    [],
                )


@pytest.mark.parametrize("ids", [True, False], ids=["ids", "no ids"])
@pytest.mark.parametrize("at_once", [1, 40])
def test_a_command_that_was_cut_is_either_answered_or_not_carried_out(at_once: int, ids: bool) -> None:
    def cut(bench: Bench) -> None:
        bench.send_at_once = at_once
        bench.submit(1)
        bench.run(lambda: 1 in bench.told or bench.deaths > 0)

    outcomes = set()
    for kill in range(0, steps_of(cut, ids=ids), 1 if at_once > 1 else 7):
        with Bench([kill], ids=ids) as bench:
            bench.send_at_once = at_once
            bench.ask(1)
            bench.send_at_once = MIB
            bench.ask(2)
            true_answers(bench, 1, 2)
            outcomes.add(isinstance(bench.told[1][0], VmloopError))
    assert outcomes == {True, False}  # it was seen to go both ways


def test_a_reply_of_5_mib_goes_on_in_the_next_worker() -> None:
    def long(bench: Bench) -> None:
        bench.guest.size = 5 * MIB
        bench.ask(1)

    steps = steps_of(long)
    for kill in range(9, steps, max(1, steps // 40)):
        with Bench([kill, kill // 3]) as bench:
            long(bench)
            true_answers(bench, 1)


def test_a_flood_around_the_answer_does_not_hide_it() -> None:
    noise = b'{"return": 5, "id": 12345}\n' * 3000 + b"x" * 70_000 + b"\n"

    def flooded(bench: Bench) -> None:
        bench.guest.before = noise
        bench.ask(1)

    steps = steps_of(flooded)
    for kill in range(steps):
        with Bench([kill]) as bench:
            flooded(bench)
            true_answers(bench, 1)


def test_a_death_between_two_commands_needs_no_sync() -> None:
    with Bench() as bench:
        bench.ask(1)
        bench.succeed()
        assert bench.worker.standing.conversation.synced
        assert not bench.worker.standing.conversation.owed
        bench.ask(2)
        assert [state.value for state in bench.worker.states] == ["ready"]
        true_answers(bench, 1, 2)


def test_a_late_reply_is_recognised_by_the_next_worker() -> None:
    with Bench() as bench:
        bench.guest.silent = True
        bench.submit(1, seconds=1.0)
        bench.run(lambda: 1 in bench.told)
        assert bench.told[1][0].code == "deadline"
        bench.succeed()
        assert bench.inherited == []
        bench.guest.silent = False
        bench.ask(2)
        assert [(number, reply["return"]["n"]) for number, reply in bench.late] == [(1, 1)]
        assert bench.told[2][0]["n"] == 2


def test_the_callers_deadline_holds_in_the_next_worker() -> None:
    with Bench() as bench:
        bench.guest.silent = True
        bench.submit(1, seconds=3.0)
        bench.run(lambda: bench.guest.carried_out == [1])
        bench.succeed()
        assert bench.inherited == [1]
        began = bench.now
        bench.run(lambda: 1 in bench.told)
        assert bench.told[1][0].code == "deadline"
        assert bench.now - began <= 3.1


def test_a_carry_that_cannot_be_written_costs_the_answer_only_if_the_worker_dies_then() -> None:
    for dies in (False, True):
        with Bench() as bench:
            bench.guest.size = MIB
            for index in (0, 1):
                bench.paths.agent_carry(index).mkdir()
            bench.submit(1)
            bench.run(partial(unkept, bench))
            for index in (0, 1):
                bench.paths.agent_carry(index).rmdir()
            if dies:
                bench.succeed()
            bench.run(partial(bench.told.__contains__, 1))
            assert [getattr(told, "code", "") for told in bench.told[1]] == ["outcome-unknown" if dies else ""]
            bench.ask(2)
            assert bench.told[2][0]["n"] == 2


def test_with_a_full_disk_the_next_worker_knows_at_once_that_the_answer_is_lost() -> None:
    def long(bench: Bench) -> None:
        bench.guest.size = 200_000
        for index in (0, 1):
            bench.paths.agent_carry(index).mkdir()
        bench.ask(1)

    for kill in range(steps_of(long)):
        with Bench([kill]) as bench:
            began = bench.now
            long(bench)
            codes = {getattr(told, "code", "") for told in bench.told[1]}
            assert codes <= {"", "outcome-unknown", "worker-lost"}
            assert bench.now == began  # nobody waited for what cannot come


def test_a_damaged_carry_is_no_answer() -> None:
    with Bench() as bench:
        bench.guest.size = MIB
        bench.submit(1)
        carries = [bench.paths.agent_carry(index) for index in (0, 1)]
        bench.run(lambda: any(carry.exists() and carry.stat().st_size > 100_000 for carry in carries))
        for carry in carries:
            if carry.exists():
                carry.write_bytes(b"{}\n")
        bench.succeed()
        bench.run(lambda: 1 in bench.told)
        assert bench.told[1][0].code == "outcome-unknown"


def test_an_answer_that_is_in_the_socket_is_given_before_the_end_is_told() -> None:
    with Bench() as bench:
        bench.guest.silent = True
        bench.submit(1)
        bench.run(lambda: bench.guest.carried_out == [1])
        bench.guest.silent = False
        while bench.guest.act():
            pass
        assert bench.told == {}
        bench.worker.session.close("the guest closed its agent's port")
        assert bench.told[1] == [{"n": 1, "padding": ""}]


def test_an_answer_from_before_the_other_end_closed_is_found_by_the_next_worker() -> None:
    with Bench() as bench:
        bench.guest.silent = True
        bench.submit(1)
        bench.submit(2)
        bench.run(lambda: bench.guest.carried_out == [1])
        bench.guest.silent = False
        while bench.guest.act():
            pass
        bench.peer.close()
        bench.succeed()
        assert bench.told[1] == [{"n": 1, "padding": ""}]
        while not bench.ends:
            assert bench.worker.loop.turn()
