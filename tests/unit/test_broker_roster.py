# SPDX-License-Identifier: Apache-2.0
"""What the broker knows of each VM: found by name, service and identity alike, and a worker's moves are those of its table."""

from __future__ import annotations

import itertools

import pytest

from vmloop.broker.roster import WORKER_MOVES, Roster, VmEntry, WorkerState
from vmloop.common.names import VmName
from vmloop.common.states import IllegalMove

WEB1 = VmName("web1")
WEB2 = VmName("web2")


def test_a_vm_is_found_by_its_name_and_its_service() -> None:
    roster = Roster()
    entry = roster.add(WEB1)
    assert roster.get(WEB1) is roster.by_service[b"vm/web1"] is entry
    assert roster.get(WEB2) is None
    assert len(roster) == 1


def test_adding_again_gives_the_same_entry_with_what_is_known_of_it() -> None:
    roster = Roster()
    entry = roster.add(WEB1, {"state": "running"})
    assert roster.add(WEB1, {"state": "crashed"}) is entry
    assert entry.state == "running"


def test_vms_come_in_the_order_of_their_names() -> None:
    roster = Roster()
    for name in ("b", "a", "C", "10", "9"):
        roster.add(VmName(name))
    assert [entry.name for entry in roster] == ["10", "9", "C", "a", "b"]


def test_vms_may_be_removed_while_going_through_them() -> None:
    roster = Roster()
    for name in ("a", "b", "c"):
        roster.add(VmName(name))
    for entry in roster:
        roster.remove(entry)
    assert (len(roster), roster.by_service, roster.by_identity) == (0, {}, {})


def test_a_vm_speaks_under_its_newest_identity_alone() -> None:
    roster = Roster()
    entry = roster.add(WEB1)
    roster.present(entry, b"one")
    roster.present(entry, b"two")
    entry.worker_pid = 5
    assert roster.by_identity == {b"two": entry}
    roster.absent(entry)
    assert roster.by_identity == {}
    roster.absent(entry)
    assert entry.summary(0.0, 0.0)["worker_pid"] is None


def test_two_vms_without_a_worker_do_not_get_in_each_others_way() -> None:
    roster = Roster()
    one, two = roster.add(WEB1), roster.add(WEB2)
    roster.present(one, b"one")
    roster.absent(two)
    roster.remove(two)
    assert roster.by_identity == {b"one": one}


def test_a_removed_vm_leaves_nothing() -> None:
    roster = Roster()
    entry = roster.add(WEB1)
    roster.present(entry, b"one")
    roster.remove(entry)
    assert (len(roster), roster.by_service, roster.by_identity) == (0, {}, {})


@pytest.mark.parametrize(("old", "new"), list(itertools.permutations(WorkerState, 2)))
def test_a_workers_moves_are_those_of_the_table(old: WorkerState, new: WorkerState) -> None:
    ways = {
        WorkerState.ABSENT: [],
        WorkerState.STARTING: [WorkerState.STARTING],
        WorkerState.READY: [WorkerState.READY],
        WorkerState.LEAVING: [WorkerState.READY, WorkerState.LEAVING],
        WorkerState.LOST: [WorkerState.READY, WorkerState.LOST],
    }
    worker = VmEntry(WEB1, {}).worker
    for step in ways[old]:
        worker.move(step, "on the way")
    if new in WORKER_MOVES[old]:
        worker.move(new, "allowed")
        assert worker.state is new
    else:
        with pytest.raises(IllegalMove):
            worker.move(new, "not allowed")
        assert worker.state is old


@pytest.mark.parametrize(
    ("status", "known"),
    [
        ({}, False),
        ({"defined": True}, True),
        ({"run": True}, True),
        ({"defined": False, "run": False}, False),
        ({"defined": True, "run": True, "forget": True}, False),
    ],
)
def test_a_vm_is_known_while_there_is_something_behind_its_name(status: dict[str, object], known: bool) -> None:
    assert VmEntry(WEB1, status).known is known


def test_a_status_replaces_all_that_was_known_before() -> None:
    entry = VmEntry(WEB1, {"defined": True, "state": "running", "alive": True, "pid": 7})
    entry.take_status({"state": "shutoff", "started": 1.0})
    assert (entry.state, entry.alive, entry.known) == ("shutoff", False, True)
    assert entry.summary(0.0, 0.0)["pid"] is None
    entry.take_status({"state": "shutoff", "started": None})
    assert not entry.known


def test_a_vm_of_which_nothing_was_said_is_unknown_and_not_shutoff() -> None:
    entry = VmEntry(WEB1, {})
    summary = entry.summary(10.0, 0.0)
    assert (summary["state"], summary["reason"], summary["age"]) == ("unknown", "unknown", None)
    assert not entry.alive


def test_figures_are_rounded_to_milliseconds() -> None:
    entry = VmEntry(WEB1, {})
    entry.heard = 1.0
    summary = entry.summary(1.23456, 0.98765)
    assert (summary["age"], summary["blocked"]) == (0.235, 0.988)
