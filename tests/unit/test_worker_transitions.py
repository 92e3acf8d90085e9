# SPDX-License-Identifier: Apache-2.0
"""What events, query-status and the end of the process make of a VM's state: the table, and that no move of it is illegal."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.common.states import VM_MOVES, VmState
from vmloop.worker.transitions import Move, of_end, of_event, of_status

R, P, S, C, M = VmState.RUNNING, VmState.PAUSED, VmState.SHUTDOWN, VmState.CRASHED, VmState.PMSUSPENDED

EVENTS = [
    "STOP",
    "RESUME",
    "SHUTDOWN",
    "GUEST_PANICKED",
    "SUSPEND",
    "SUSPEND_DISK",
    "WAKEUP",
    "WATCHDOG",
    "BLOCK_IO_ERROR",
    "RESET",
    "POWERDOWN",
]

# qapi/run-state.json, RunState, of QEMU 7.2 and later; preconfig left it in 5.x.
RUN_STATES = {
    "debug": P,
    "inmigrate": P,
    "internal-error": P,
    "io-error": P,
    "paused": P,
    "postmigrate": P,
    "prelaunch": P,
    "preconfig": P,
    "finish-migrate": P,
    "restore-vm": P,
    "running": R,
    "save-vm": P,
    "shutdown": S,
    "suspended": M,
    "watchdog": P,
    "guest-panicked": C,
    "colo": P,
}


@pytest.mark.parametrize(
    ("state", "event", "data", "move"),
    [
        (R, "STOP", {}, Move(P, "unknown")),
        (VmState.STARTING, "STOP", {}, Move(P, "unknown")),
        (VmState.UNKNOWN, "STOP", {}, Move(P, "unknown")),
        (P, "STOP", {}, None),
        (S, "STOP", {}, None),  # QEMU sends STOP after SHUTDOWN with -no-shutdown
        (C, "STOP", {}, None),  # and after GUEST_PANICKED
        (M, "STOP", {}, None),
        (P, "RESUME", {}, Move(R, "unpaused")),
        (S, "RESUME", {}, Move(R, "unpaused")),
        (R, "RESUME", {}, None),
        (R, "SHUTDOWN", {"guest": True}, Move(S, "unknown")),
        (P, "SHUTDOWN", {"guest": False}, Move(S, "unknown")),
        (S, "SHUTDOWN", {}, None),
        (R, "GUEST_PANICKED", {"action": "pause"}, Move(C, "panicked")),
        (C, "GUEST_PANICKED", {}, None),
        (R, "SUSPEND", {}, Move(M, "unknown")),
        (R, "SUSPEND_DISK", {}, Move(M, "unknown")),
        (P, "SUSPEND", {}, None),
        (M, "WAKEUP", {}, Move(R, "wakeup")),
        (P, "WAKEUP", {}, None),
        (R, "WATCHDOG", {"action": "pause"}, Move(P, "watchdog")),
        (R, "WATCHDOG", {"action": "none"}, None),
        (P, "WATCHDOG", {"action": "pause"}, None),
        (R, "BLOCK_IO_ERROR", {"action": "stop"}, Move(P, "ioerror")),
        (R, "BLOCK_IO_ERROR", {"action": "report"}, None),
        (R, "RESET", {"guest": True}, None),
        (R, "stop", {}, None),
        (R, "", {}, None),
    ],
)
def test_an_event_means(state: VmState, event: str, data: dict[str, Any], move: Move | None) -> None:
    assert of_event(state, event, data, "") == move


@pytest.mark.parametrize(
    ("state", "event", "to"), [(R, "STOP", P), (P, "RESUME", R), (VmState.STARTING, "RESUME", R), (R, "SHUTDOWN", S)]
)
def test_who_asked_for_it_gives_the_reason(state: VmState, event: str, to: VmState) -> None:
    assert of_event(state, event, {}, "user") == Move(to, "user")


@pytest.mark.parametrize("event", EVENTS)
def test_a_late_event_does_not_bring_a_vm_back_that_is_shut_off(event: str) -> None:
    for action in ("pause", "stop"):
        assert of_event(VmState.SHUTOFF, event, {"action": action}, "user") is None


@given(
    st.sampled_from(list(VmState)),
    st.sampled_from(EVENTS) | st.text(max_size=10),
    st.dictionaries(st.sampled_from(["action", "guest", "reason"]), st.sampled_from(["pause", "stop", 1, None])),
    st.sampled_from(["", "user"]),
)
def test_no_event_calls_for_an_illegal_move(state: VmState, event: str, data: dict[str, Any], intent: str) -> None:
    move = of_event(state, event, data, intent)
    assert move is None or (move.state in VM_MOVES[state] and move.reason)


@pytest.mark.parametrize(("status", "state"), RUN_STATES.items())
def test_each_run_state_of_qemu_stands_for_a_state(status: str, state: VmState) -> None:
    running = status == "running"
    assert of_status({"status": status, "running": running, "singlestep": False}).state is state


@pytest.mark.parametrize(("running", "state"), [(True, R), (False, P), (None, P), ("yes", P), (1, P)])
def test_a_run_state_of_a_later_qemu_goes_by_its_running_flag(running: object, state: VmState) -> None:
    assert of_status({"status": "brand-new", "running": running}) == Move(state, "unknown")


@given(st.recursive(st.none() | st.booleans() | st.text() | st.integers(), st.lists))
def test_any_reply_to_query_status_stands_for_something(reply: object) -> None:
    for value in (reply, {"status": reply}, {"running": reply}):
        move = of_status(value)
        assert move.state in VM_MOVES[VmState.STARTING]


@pytest.mark.parametrize(
    ("killed", "started", "shutdown_seen", "reason"),
    [
        (True, True, True, "destroyed"),
        (True, True, False, "destroyed"),
        (True, False, False, "destroyed"),
        (False, False, False, "failed"),
        (False, False, True, "failed"),
        (False, True, True, "shutdown"),
        (False, True, False, "crashed"),
    ],
)
def test_a_process_that_is_gone_is_shut_off_for_a_reason(
    killed: bool, started: bool, shutdown_seen: bool, reason: str
) -> None:
    assert of_end(killed=killed, started=started, shutdown_seen=shutdown_seen) == Move(VmState.SHUTOFF, reason)
