# SPDX-License-Identifier: Apache-2.0
"""Operations that end when something has happened: wait, answered when the VM is there, and shutdown, when all is done."""

from __future__ import annotations

from typing import Any

import pytest

from vmloop.broker.actions import EndZygote, Fork, ToWorker
from vmloop.broker.ending import SHUTDOWN_SECONDS
from vmloop.common.settings import BrokerSettings
from vmloop.common.states import VmState
from vmloop.common.wire import Kind, decode

from ..fakes.broker_desk import Desk, Worker

# -- wait -------------------------------------------------------------------------------------------------------------------


def wait(desk: Desk, state: str, seconds: float = 10.0, id: int = 7) -> None:  # noqa: A002 — as the wire calls it
    desk.ask("wait", "vm/web1", {"for": state}, seconds=seconds, id=id)


def test_waiting_for_the_state_that_is_ends_at_once() -> None:
    desk = Desk()
    desk.worker("web1", epoch=4)
    wait(desk, "running")
    assert desk.answer().value == {"state": "running", "reason": "resumed", "epoch": 4}
    assert len(desk.core.inflight) == 0


def test_waiting_ends_when_the_vm_is_in_that_state_and_not_before() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    wait(desk, "shutoff", id=1)
    wait(desk, "paused", id=2)
    desk.status(worker, state="shutdown", reason="guest")
    assert desk.core.actions == []
    desk.status(worker, state="paused", reason="asked", epoch=1, seq=8)
    assert [(answer.message.id, answer.value["reason"]) for answer in desk.answers()] == [(2, "asked")]
    desk.bye(worker)
    answer = desk.answer()
    assert (answer.message.id, answer.value) == (1, {"state": "shutoff", "reason": "guest", "epoch": 1})


def test_waiting_needs_no_worker_and_outlives_them() -> None:
    desk = Desk()
    desk.known("web1")
    wait(desk, "running")
    assert desk.core.actions == [], "none is made for it"
    worker = desk.process("web1")
    desk.hello(worker, state="starting")
    desk.exit(worker)
    desk.tick(1.0)
    desk.hello(desk.forked("web1"), state="running")
    assert desk.answer().value["state"] == "running"


def test_waiting_ends_at_its_own_deadline_and_says_how_things_stand() -> None:
    desk = Desk()
    desk.worker("web1")
    wait(desk, "shutoff", seconds=2.0)
    desk.tick(1.99)
    assert desk.core.actions == []
    desk.tick(0.04)
    answer = desk.answer()
    assert answer.code == "deadline"
    assert "running" in answer.value["message"]
    assert "shutoff" in answer.value["message"]


@pytest.mark.parametrize("state", [state.value for state in VmState])
def test_every_state_can_be_waited_for(state: str) -> None:
    desk = Desk()
    worker = desk.worker("web1", state="starting")
    wait(desk, state)
    desk.status(worker, state=state)
    assert desk.answer().value["state"] == state


# -- shutdown ---------------------------------------------------------------------------------------------------------------


def finish(desk: Desk) -> None:
    due = desk.core.next_due()
    assert due is not None
    desk.tick(due - desk.now)
    assert desk.core.finished


@pytest.mark.parametrize("arguments", [{}, {"vms": "leave"}])
def test_a_shutdown_leaves_vms_and_workers_running(arguments: dict[str, Any]) -> None:
    desk = Desk()
    desk.worker("web1")
    desk.worker("web2", alive=False, state="shutoff")
    assert desk.value("shutdown", arguments) == {"vms": "left running", "count": 1}
    assert desk.take(ToWorker) == []
    assert desk.take(EndZygote) == []
    assert desk.code("list") == "busy"
    finish(desk)


def kills(desk: Desk) -> list[ToWorker]:
    return [action for action in desk.take(ToWorker) if decode(action.frame).op == "kill"]


def killed(desk: Desk, worker: Worker) -> None:
    desk.bye(worker, state="shutoff", reason="killed")
    desk.exit(worker)


def test_a_shutdown_with_kill_ends_every_vm_and_then_answers() -> None:
    desk = Desk()
    workers = [desk.worker("web1"), desk.worker("web2")]
    desk.worker("off", alive=False, state="shutoff")
    desk.ask("shutdown", args={"vms": "kill"}, id=9)
    assert desk.take(EndZygote) == [EndZygote()]
    assert [action.identity for action in kills(desk)] == [worker.identity for worker in workers]
    killed(desk, workers[0])
    assert desk.core.actions == []
    killed(desk, workers[1])
    answer = desk.answer()
    assert (answer.message.id, answer.value) == (9, {"vms": "killed", "count": 2})
    finish(desk)


def test_a_shutdown_with_kill_and_nothing_running_ends_at_once() -> None:
    desk = Desk()
    desk.known("web1")
    assert desk.value("shutdown", {"vms": "kill"}) == {"vms": "killed", "count": 0}
    finish(desk)


def test_a_shutdown_kills_also_the_vm_whose_worker_is_being_made_again() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.exit(worker)
    desk.tick(1.0)
    desk.ask("shutdown", args={"vms": "kill"})
    successor = desk.forked("web1")
    desk.hello(successor)
    assert [action.identity for action in kills(desk)] == [successor.identity]
    killed(desk, successor)
    assert desk.answer().value == {"vms": "killed", "count": 1}


def test_a_vm_whose_worker_dies_while_it_kills_is_killed_by_the_next_one() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("shutdown", args={"vms": "kill"})
    assert len(kills(desk)) == 1
    desk.exit(worker)
    desk.tick(1.0)
    successor = desk.forked("web1")
    desk.hello(successor)
    assert [action.identity for action in kills(desk)] == [successor.identity]
    killed(desk, successor)
    assert desk.answer().value == {"vms": "killed", "count": 1}


def test_a_vm_with_many_requests_in_flight_is_killed_all_the_same() -> None:
    desk = Desk(BrokerSettings(requests_per_vm=2))
    worker = desk.worker("web1")
    for number in range(2):
        desk.ask("qmp", "vm/web1", id=number)
    desk.requests(worker)
    desk.ask("shutdown", args={"vms": "kill"}, id=9)
    assert len(kills(desk)) == 1
    killed(desk, worker)
    assert sorted((answer.message.id, answer.code) for answer in desk.answers()) == [
        (0, "not-running"),
        (1, "not-running"),
        (9, None),
    ]


def test_a_shutdown_whose_vms_do_not_end_in_time_is_answered_once() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("shutdown", args={"vms": "kill"})
    desk.tick(SHUTDOWN_SECONDS + 1.0)
    assert desk.answer().code == "deadline"
    killed(desk, worker)
    assert desk.answers() == []
    assert desk.value("list")[0]["state"] == "shutoff", "the broker goes on"
    desk.ask("start", args={"name": "web1"})
    assert [action.name for action in desk.take(Fork)] == ["web1"]


def test_a_vm_that_is_starting_while_all_are_killed_is_killed_too() -> None:
    desk = Desk()
    worker = desk.worker("web1", alive=False, state="shutoff")
    desk.ask("start", args={"name": "web1"}, id=1)
    [start] = desk.requests(worker)
    beside = desk.worker("web2")
    desk.ask("shutdown", args={"vms": "kill"}, id=2)
    desk.core.actions.clear()
    desk.status(worker, state="running")
    desk.reply(worker, start)
    killed(desk, beside)
    assert [action.identity for action in kills(desk)] == [worker.identity]
    killed(desk, worker)
    assert desk.answers()[-1].value["vms"] == "killed"


def test_nothing_is_started_while_all_are_killed() -> None:
    desk = Desk()
    desk.worker("web1")
    desk.known("web2")
    desk.ask("shutdown", args={"vms": "kill"})
    desk.core.actions.clear()
    assert desk.code("start", {"name": "web2"}) == "busy"
    assert desk.take(Fork) == []


def test_every_answer_of_the_host_has_the_time_it_took() -> None:
    desk = Desk()
    desk.ask("list")
    message = desk.answer().message
    assert (message.kind, message.seconds, message.epoch) == (Kind.REPLY, 0.0, 0)
