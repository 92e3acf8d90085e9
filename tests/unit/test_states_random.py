# SPDX-License-Identifier: Apache-2.0
"""Any order of moves on any of the tables: a holder moves by its table and tells it once, or refuses and stays as it was."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.broker.roster import WORKER_MOVES, VmEntry, WorkerState
from vmloop.common.names import VmName
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
from vmloop.worker.transitions import of_end, of_event, of_status

Moves = Mapping[Any, frozenset[Any]]

TABLES: dict[type[Enum], Moves] = {
    VmState: VM_MOVES,
    MonitorState: MONITOR_MOVES,
    AgentState: AGENT_MOVES,
    WorkerState: WORKER_MOVES,
}
BEGINNINGS: list[Enum] = [VmState.STARTING, MonitorState.CONNECTING, AgentState.ABSENT, WorkerState.ABSENT]
every_table = pytest.mark.parametrize("beginning", BEGINNINGS, ids=[type(state).__name__ for state in BEGINNINGS])


@every_table
@given(st.data())
def test_any_order_of_moves_goes_by_the_table_and_is_told_once(beginning: Enum, data: st.DataObject) -> None:
    moves = TABLES[type(beginning)]
    told: list[tuple[Enum, Enum, str]] = []
    holder: StateHolder[Any] = StateHolder("it", beginning, moves, lambda *change: told.append(change), "at first")
    expected, state, reason = [], beginning, "at first"
    for number, wanted in enumerate(data.draw(st.lists(st.sampled_from(list(moves)), max_size=30))):
        allowed = wanted is state or wanted in moves[state]
        assert holder.can(wanted) is allowed
        if not allowed:
            with pytest.raises(IllegalMove):
                holder.move(wanted, str(number))
        else:
            assert holder.move(wanted, str(number)) is (wanted is not state)
            if wanted is not state:
                expected.append((state, wanted, str(number)))
                state, reason = wanted, str(number)
        assert (holder.state, holder.reason) == (state, reason)
    assert told == expected


@every_table
def test_every_state_comes_up_from_the_beginning_and_leads_back_to_where_all_begins(beginning: Enum) -> None:
    moves = TABLES[type(beginning)]
    assert _reached_from(beginning, moves) == set(moves)
    for state in moves:
        assert beginning in _reached_from(state, moves), f"{state} never comes to {beginning} again"


def _reached_from(start: Enum, moves: Moves) -> set[Enum]:
    reached, todo = {start}, [start]
    while todo:
        fresh = moves[todo.pop()] - reached
        reached |= fresh
        todo += fresh
    return reached


def test_a_vm_that_starts_may_become_anything() -> None:
    assert VM_MOVES[VmState.STARTING] == set(VmState) - {VmState.STARTING}


def test_any_connection_may_be_lost_and_any_agent_may_go() -> None:
    assert all(MonitorState.LOST in MONITOR_MOVES[state] for state in MonitorState if state is not MonitorState.LOST)
    assert all(AgentState.ABSENT in AGENT_MOVES[state] for state in AgentState if state is not AgentState.ABSENT)


def test_a_worker_that_has_gone_in_order_is_not_counted_as_lost() -> None:
    assert WorkerState.LOST not in WORKER_MOVES[WorkerState.LEAVING]
    assert WorkerState.LOST not in WORKER_MOVES[WorkerState.ABSENT]
    assert VmEntry(VmName("web1"), {}).worker.state is WorkerState.ABSENT


NAMES = [
    "STOP",
    "RESUME",
    "SHUTDOWN",
    "GUEST_PANICKED",
    "SUSPEND",
    "SUSPEND_DISK",
    "WAKEUP",
    "WATCHDOG",
    "BLOCK_IO_ERROR",
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
event_data = st.dictionaries(
    st.sampled_from(["action", "reason", "guest"]) | st.text(max_size=4),
    st.sampled_from(["pause", "stop", "none"]) | json_values,
    max_size=3,
)
happenings: st.SearchStrategy[tuple[str, str, dict[str, Any]]] = st.one_of(
    st.tuples(st.just("event"), st.sampled_from(NAMES) | st.text(max_size=8), event_data),
    st.tuples(st.just("status"), st.just(""), st.fixed_dictionaries({"status": json_values, "running": json_values})),
    st.tuples(st.just("end"), st.just(""), st.just({})),
    st.tuples(st.just("start"), st.just(""), st.just({})),
    st.tuples(st.just("unreachable"), st.just(""), st.just({})),
)


@given(st.lists(happenings, max_size=25), st.sampled_from(["", "user"]))
def test_whatever_happens_to_a_vm_in_whatever_order_no_move_is_illegal(
    happened: list[tuple[str, str, dict[str, Any]]], intent: str
) -> None:
    """As worker/vm.py does it: events move as they say; a query's answer counts unless the run is over; an end ends."""
    holder: StateHolder[VmState] = StateHolder("vm", VmState.STARTING, VM_MOVES, lambda *_: None)
    for what, name, data in happened:
        if what == "event":
            move = of_event(holder.state, name, data, intent)
            assert move is None or (holder.can(move.state) and move.reason)
        elif what == "status":
            move = of_status(data) if holder.state is not VmState.SHUTOFF else None
        elif what == "end":
            move = of_end(killed=False, started=True, shutdown_seen=holder.state is VmState.SHUTDOWN)
        elif what == "start":
            if holder.can(VmState.STARTING):
                holder.move(VmState.STARTING, "started")
            continue
        else:
            if holder.can(VmState.UNKNOWN):
                holder.move(VmState.UNKNOWN, "not reached")
            continue
        if move is not None:
            was = holder.state
            holder.move(move.state, move.reason)
            assert was is not VmState.SHUTOFF or holder.state is VmState.SHUTOFF, "a late event began a new run"
