# SPDX-License-Identifier: Apache-2.0
"""State tables and the one setter: every state has its row, illegal moves raise, the listener hears each change in order."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from enum import Enum
from typing import Any

import pytest

from vmloop.common.states import (
    AGENT_MOVES,
    MONITOR_MOVES,
    VM_MOVES,
    AgentState,
    IllegalMove,
    MonitorState,
    StateHolder,
    VmState,
)

TABLES: list[tuple[type[Enum], Mapping[Any, frozenset[Any]]]] = [
    (VmState, VM_MOVES),
    (MonitorState, MONITOR_MOVES),
    (AgentState, AGENT_MOVES),
]
every_table = pytest.mark.parametrize(("states", "moves"), TABLES, ids=[states.__name__ for states, _ in TABLES])

V = VmState


class Heard(list[tuple[VmState, VmState, str]]):
    """A listener that keeps what it was told."""

    def __call__(self, old: VmState, new: VmState, reason: str) -> None:
        self.append((old, new, reason))


def holder(initial: VmState, heard: Heard | None = None) -> StateHolder[VmState]:
    return StateHolder("vm web1", initial, VM_MOVES, heard if heard is not None else Heard(), "first")


# -- the tables -----------------------------------------------------------------------------------------------------------


@every_table
def test_every_state_has_a_row(states: type[Enum], moves: Mapping[Any, frozenset[Any]]) -> None:
    assert set(moves) == set(states)
    assert set().union(*moves.values()) <= set(states)


@every_table
def test_no_state_moves_to_itself_and_none_is_a_dead_end(
    states: type[Enum], moves: Mapping[Any, frozenset[Any]]
) -> None:
    for state in states:
        assert state not in moves[state]
        assert moves[state]


@every_table
def test_every_state_can_be_reached_from_every_other(states: type[Enum], moves: Mapping[Any, frozenset[Any]]) -> None:
    for start in states:
        reached, todo = {start}, [start]
        while todo:
            for following in moves[todo.pop()] - reached:
                reached.add(following)
                todo.append(following)
        assert reached == set(states)


def test_the_spellings_are_those_of_the_design() -> None:
    assert {state.value for state in VmState} == {
        "running",
        "paused",
        "shutdown",
        "shutoff",
        "crashed",
        "pmsuspended",
        "starting",
        "unknown",
    }
    assert {state.value for state in MonitorState} == {"connecting", "ready", "busy", "frozen", "lost"}
    assert {state.value for state in AgentState} == {"absent", "waiting", "syncing", "ready", "unresponsive"}


def test_only_a_new_start_leaves_shutoff() -> None:
    assert VM_MOVES[V.SHUTOFF] == {V.STARTING}


def test_only_a_vm_that_is_off_or_was_let_go_can_start() -> None:
    assert {state for state in V if V.STARTING in VM_MOVES[state]} == {V.SHUTOFF, V.UNKNOWN}


def test_unknown_may_turn_out_to_be_anything() -> None:
    assert VM_MOVES[V.UNKNOWN] == set(V) - {V.UNKNOWN}


def test_a_lost_monitor_is_never_ready_without_connecting_again() -> None:
    assert MONITOR_MOVES[MonitorState.LOST] == {MonitorState.CONNECTING}


def test_an_agent_is_never_ready_without_a_sync() -> None:
    assert [state for state in AgentState if AgentState.READY in AGENT_MOVES[state]] == [AgentState.SYNCING]


# -- the setter -----------------------------------------------------------------------------------------------------------


def test_every_pair_is_moved_or_refused_as_the_table_says() -> None:
    for old in V:
        for new in V:
            heard = Heard()
            subject = holder(old, heard)
            if new is old:
                assert subject.can(new)
                assert subject.move(new, "again") is False
                assert (subject.state, subject.reason, heard) == (old, "first", [])
            elif new in VM_MOVES[old]:
                assert subject.can(new)
                assert subject.move(new, "why") is True
                assert (subject.state, subject.reason, heard) == (new, "why", [(old, new, "why")])
            else:
                assert not subject.can(new)
                with pytest.raises(IllegalMove, match=rf"vm web1: {old.value} → {new.value} \(why\)"):
                    subject.move(new, "why")
                assert (subject.state, subject.reason, heard) == (old, "first", [])


def test_the_listener_hears_the_sequence() -> None:
    heard = Heard()
    subject = holder(V.STARTING, heard)
    for state, reason in [(V.PAUSED, "launched"), (V.RUNNING, "cont"), (V.RUNNING, "cont"), (V.SHUTOFF, "kill")]:
        subject.move(state, reason)
    with pytest.raises(IllegalMove):
        subject.move(V.RUNNING, "late event")
    subject.move(V.STARTING, "start")
    assert heard == [
        (V.STARTING, V.PAUSED, "launched"),
        (V.PAUSED, V.RUNNING, "cont"),
        (V.RUNNING, V.SHUTOFF, "kill"),
        (V.SHUTOFF, V.STARTING, "start"),
    ]


def test_the_listener_sees_the_new_state_in_place() -> None:
    seen: list[VmState] = []
    subject: StateHolder[VmState] = StateHolder(
        "vm", V.STARTING, VM_MOVES, lambda _old, _new, _reason: seen.append(subject.state)
    )
    subject.move(V.RUNNING, "cont")
    assert seen == [V.RUNNING]


def test_a_change_is_logged_with_both_states_and_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        holder(V.RUNNING).move(V.PAUSED, "stop")
    assert caplog.messages == ["vm web1: running → paused (stop)"]
