# SPDX-License-Identifier: Apache-2.0
"""The plan of the chaos test: repeatable, within its time, and with every kind of fault in it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ..system.chaos.plan import (
    ALL_WORKERS,
    BROKER,
    KILL,
    LONGEST_ABSENCE,
    LONGEST_PAUSE,
    LONGEST_STOP,
    QEMU,
    SHORTEST_STOP,
    STOP,
    WORKER,
    ZYGOTE,
    plan,
)
from ..system.chaos.storm import strikes_of
from ..system.chaos.test_chaos import SCENARIO

SEEDS = st.integers(0, 1 << 32)


@given(SEEDS)
def test_the_same_seed_gives_the_same_plan_and_another_seed_another_one(seed: int) -> None:
    assert plan(seed, 60.0, 30, 20) == plan(seed, 60.0, 30, 20)
    assert plan(seed, 60.0, 30, 20) != plan(seed + 1, 60.0, 30, 20)


@given(SEEDS)
def test_a_longer_run_begins_like_a_shorter_one(seed: int) -> None:
    short = plan(seed, 20.0, 30, 20)
    assert plan(seed, 60.0, 30, 20)[: len(short)] == short


@given(SEEDS, st.integers(1, 40), st.data())
def test_every_fault_is_within_the_time_and_meets_somebody_who_is_there(
    seed: int, vms: int, data: st.DataObject
) -> None:
    launched = data.draw(st.integers(1, vms))
    before = 0.0
    for strike in plan(seed, 60.0, vms, launched):
        assert before < strike.at <= 60.0
        assert strike.at - before <= LONGEST_PAUSE + 0.001
        before = strike.at
        for blow in strike.blows:
            assert 0 <= blow.vm < vms
            if blow.what == STOP:
                assert SHORTEST_STOP <= blow.seconds <= LONGEST_STOP
            else:
                assert blow.seconds <= LONGEST_ABSENCE
                assert blow.whom != QEMU or blow.vm < launched
        assert strike.describe()


def test_a_long_plan_strikes_everybody_alone_and_together() -> None:
    strikes = plan(1, 600.0, 30, 20)
    kinds = {tuple((blow.what, blow.whom) for blow in strike.blows) for strike in strikes}
    assert kinds == {
        *(((what, whom),) for what in (KILL, STOP) for whom in (BROKER, ZYGOTE, WORKER, QEMU)),
        ((KILL, WORKER), (KILL, WORKER)),
        ((KILL, BROKER), (KILL, WORKER)),
        ((KILL, WORKER), (KILL, QEMU)),
        ((KILL, ZYGOTE), (KILL, WORKER)),
        ((KILL, BROKER), (KILL, ZYGOTE), (KILL, ALL_WORKERS)),
    }


def test_the_short_run_kills_the_zygote_alone_and_with_a_worker_and_a_worker_with_the_broker() -> None:
    kinds = {tuple((blow.what, blow.whom) for blow in strike.blows) for strike in strikes_of(SCENARIO)}
    assert kinds >= {
        ((KILL, ZYGOTE),),
        ((KILL, ZYGOTE), (KILL, WORKER)),
        ((KILL, BROKER), (KILL, WORKER)),
        ((KILL, BROKER), (KILL, ZYGOTE), (KILL, ALL_WORKERS)),
        ((KILL, WORKER),),
        ((KILL, QEMU),),
    }


def test_a_worker_dies_together_with_its_own_qemu_and_two_workers_are_of_two_vms() -> None:
    for strike in plan(2, 600.0, 30, 20):
        whom = [blow.whom for blow in strike.blows]
        places = [blow.vm for blow in strike.blows if blow.whom in (WORKER, QEMU)]
        if whom == [WORKER, WORKER]:
            assert len(set(places)) == 2
        elif whom == [WORKER, QEMU]:
            assert len(set(places)) == 1
