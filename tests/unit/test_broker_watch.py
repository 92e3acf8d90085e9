# SPDX-License-Identifier: Apache-2.0
"""Workers that do not get on, as their pages show: told, made to write down their stack, replaced. Kills, which none may hold up."""

from __future__ import annotations

from typing import Any

import pytest

from vmloop.broker.actions import DumpStack, Fork, KillWorker, Publish, ToWorker
from vmloop.broker.crew import LAST_WORDS
from vmloop.broker.roster import WorkerState
from vmloop.broker.watch import KILL_PATIENCE, LOOK_EVERY
from vmloop.common.names import VmName
from vmloop.common.pack import unpack
from vmloop.common.settings import BrokerSettings, RestartSettings
from vmloop.common.wire import Kind, decode

from ..fakes.broker_desk import CLIENT, Desk, Worker

WEB1 = VmName("web1")
SETTINGS = BrokerSettings(blocked_after=1.0, blocked_limit=30.0)


class Scene:
    """A VM with a worker, watched."""

    def __init__(self, **status: Any) -> None:
        self.desk = Desk(SETTINGS)
        self.worker = self.desk.worker("web1", stack_signal=True, **status)

    def look(self, blocked: float = 0.0, ahead: float = LOOK_EVERY) -> None:
        """Some time later the broker looks; the worker's page says how long it has been held up."""
        self.desk.looker.blocked_for["web1"] = blocked
        self.desk.now += ahead
        self.desk.core.watch.on_tick(self.desk.now)

    def told(self) -> list[tuple[str, dict[str, Any]]]:
        """What was published since the last look: event and data."""
        bodies = [unpack(action.body) for action in self.desk.take(Publish)]
        return [(body["event"], body["data"]) for body in bodies]


def test_a_worker_that_is_held_up_is_told_of_once_with_what_it_does_and_made_to_write_down_its_stack() -> None:
    scene = Scene()
    scene.desk.looker.tasks["web1"] = "handler mail.send on STOP 7"
    scene.look(1.2)
    data = {"pid": scene.worker.pid, "seconds": 1.2, "task": "handler mail.send on STOP 7"}
    assert scene.told() == [("LOOP_BLOCKED", data)]
    assert scene.desk.take(DumpStack) == [DumpStack(WEB1)]
    scene.look(1.7)
    scene.look(5.0)
    assert scene.desk.core.actions == []


def test_a_turn_that_is_short_enough_is_not_told_of() -> None:
    scene = Scene()
    scene.look(0.9)
    assert scene.desk.core.actions == []


def test_a_worker_that_moves_again_is_told_of_and_may_be_held_up_anew() -> None:
    scene = Scene()
    scene.look(2.0)
    scene.desk.core.actions.clear()
    scene.look(0.0)
    assert scene.told() == [("LOOP_RECOVERED", {"pid": scene.worker.pid})]
    scene.look(1.0)
    assert [event for event, _ in scene.told()] == ["LOOP_BLOCKED"]


def test_a_worker_that_knows_no_stack_signal_is_not_sent_one_as_it_would_die_of_it() -> None:
    scene = Scene()
    scene.desk.status(scene.worker, stack_signal=False)
    scene.look(2.0)
    assert scene.desk.take(DumpStack) == []


def test_a_worker_that_stays_held_up_is_replaced_and_its_successor_is_looked_at_afresh() -> None:
    scene = Scene()
    scene.look(29.9)
    scene.desk.core.actions.clear()
    scene.look(30.1)
    assert scene.desk.core.actions == [KillWorker(WEB1)]
    scene.desk.core.actions.clear()
    scene.desk.exit(scene.worker)
    scene.desk.tick(LAST_WORDS)
    successor = scene.desk.forked("web1")
    scene.desk.hello(successor)
    scene.desk.core.actions.clear()
    scene.look(1.5)
    assert scene.told() == [("LOOP_BLOCKED", {"pid": successor.pid, "seconds": 1.5, "task": ""})]


def test_a_worker_that_has_ended_is_not_killed_again() -> None:
    scene = Scene()
    scene.desk.exit(scene.worker)
    scene.look(40.0)
    scene.look(41.0)
    assert scene.desk.take(KillWorker) == []


def test_a_worker_stopped_in_its_sleep_is_held_up_only_while_a_request_waits_for_it() -> None:
    scene = Scene()
    scene.desk.looker.stopped_pids.add(scene.worker.pid)
    scene.look()
    assert scene.desk.core.actions == []
    scene.desk.ask("qmp", "vm/web1", seconds=100.0)
    scene.desk.core.actions.clear()
    scene.look(ahead=0.9)
    assert scene.desk.core.actions == []
    scene.look()
    assert [event for event, _ in scene.told()] == ["LOOP_BLOCKED"]
    scene.desk.core.actions.clear()
    scene.look(ahead=28.0)
    assert scene.desk.core.actions == []
    scene.look(ahead=2.0)
    assert scene.desk.core.actions == [KillWorker(WEB1)]


def test_without_workers_there_is_nothing_to_look_at() -> None:
    desk = Desk(SETTINGS)
    desk.known("web1")
    assert desk.core.watch.next_due() is None
    desk.worker("web2")
    due = desk.core.watch.next_due()
    assert due is not None
    assert due <= desk.now
    desk.core.watch.on_tick(desk.now)
    assert desk.core.watch.next_due() == desk.now + LOOK_EVERY


# -- kill -------------------------------------------------------------------------------------------------------------------


def ask_kill(desk: Desk, worker: Worker) -> None:
    desk.ask("kill", "vm/web1", id=9)
    assert [request.op for request in desk.requests(worker)] == ["kill"]


@pytest.mark.parametrize("held_up_by", ["a callback", "SIGSTOP"])
def test_a_kill_that_a_worker_does_not_take_up_goes_to_the_next_one(held_up_by: str) -> None:
    scene = Scene()
    desk = scene.desk
    ask_kill(desk, scene.worker)
    assert desk.core.watch.next_due() is not None
    if held_up_by == "SIGSTOP":
        desk.looker.stopped_pids.add(scene.worker.pid)
    scene.look(0.0 if held_up_by == "SIGSTOP" else KILL_PATIENCE, ahead=KILL_PATIENCE)
    assert desk.take(KillWorker) == [KillWorker(WEB1)]
    desk.exit(scene.worker)
    desk.tick(LAST_WORDS)
    successor = desk.forked("web1")
    desk.core.actions.clear()
    desk.hello(successor)
    [request] = desk.requests(successor)
    assert request.op == "kill"
    desk.reply(successor, request, {"state": "shutoff"})
    assert (desk.answer().message.id, desk.core.actions) == (9, [])


def test_a_kill_that_only_takes_its_time_does_not_cost_the_worker() -> None:
    scene = Scene()
    ask_kill(scene.desk, scene.worker)
    for _ in range(20):
        scene.look(ahead=KILL_PATIENCE)
    assert scene.desk.core.actions == []


def test_a_kill_that_is_answered_is_forgotten() -> None:
    scene = Scene()
    desk = scene.desk
    desk.ask("kill", "vm/web1")
    [request] = desk.requests(scene.worker)
    desk.reply(scene.worker, request, {})
    scene.look(ahead=KILL_PATIENCE)
    desk.core.actions.clear()
    scene.look(0.5, ahead=KILL_PATIENCE)
    assert desk.core.actions == []


def test_a_kill_does_not_wait_for_the_delay_of_a_worker_that_keeps_dying() -> None:
    desk = Desk(SETTINGS, RestartSettings(first_delay=5.0))
    worker = desk.worker("web1")
    for _ in range(2):
        desk.exit(worker)
        desk.tick(LAST_WORDS)
        if desk.vm("web1").worker.state is WorkerState.STARTING:
            worker = desk.forked("web1")
            desk.hello(worker)
            desk.core.actions.clear()
    assert desk.vm("web1").worker.state is WorkerState.LOST
    desk.core.actions.clear()
    desk.ask("kill", "vm/web1")
    assert desk.take(Fork) == [Fork(WEB1)]


# -- clients that are gone ----------------------------------------------------------------------------------------------------


def test_a_worker_hears_which_of_its_requests_have_lost_their_caller() -> None:
    scene = Scene()
    desk = scene.desk
    desk.ask("agent", "vm/web1", id=1)
    desk.ask("agent", "vm/web1", id=2, client=b"other")
    [mine, _] = desk.requests(scene.worker)
    desk.core.on_client_gone(CLIENT)
    [action] = desk.take(ToWorker)
    cancel = decode(action.frame)
    assert (action.identity, cancel.kind, cancel.op, cancel.id) == (
        scene.worker.identity,
        Kind.CONTROL,
        "cancel",
        mine.id,
    )
