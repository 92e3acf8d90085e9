# SPDX-License-Identifier: Apache-2.0
"""Workers that come and die: each scenario as a sequence of what the broker is told. At random: test_broker_crew_random."""

from __future__ import annotations

from typing import Any

import pytest

from vmloop.broker.actions import Fork, KillWorker, Publish, ToWorker, WatchWorker
from vmloop.broker.crew import LAST_WORDS
from vmloop.broker.roster import WorkerState
from vmloop.common.names import VmName
from vmloop.common.pack import unpack
from vmloop.common.process import Identity
from vmloop.common.settings import BrokerSettings, RestartSettings
from vmloop.common.wire import Kind, Message, encode

from ..fakes.broker_desk import Desk, Worker

WEB1 = VmName("web1")


def control(worker: Worker, op: str) -> ToWorker:
    return ToWorker(worker.identity, encode(Message(Kind.CONTROL, op=op)), 0)


def state(desk: Desk, name: str = "web1") -> WorkerState:
    return desk.vm(name).worker.state


def die(desk: Desk, worker: Worker) -> Worker:
    """The worker is killed under its VM; the next one, which has not presented itself."""
    desk.exit(worker)
    desk.tick(LAST_WORDS)
    return desk.forked(worker.name)


# -- they present themselves ------------------------------------------------------------------------------------------------


def test_a_worker_that_was_not_forked_for_this_broker_is_watched() -> None:
    desk = Desk()
    worker = desk.process("web1")
    desk.hello(worker, epoch=3, seq=14)
    assert desk.core.actions == [WatchWorker(WEB1, worker.pid, worker.pid * 10)]
    vm = desk.vm("web1")
    assert (vm.worker.state, vm.identity, vm.epoch, vm.seq) == (WorkerState.READY, worker.identity, 3, 14)


def test_a_worker_that_was_forked_is_watched_already() -> None:
    desk = Desk()
    desk.known("web1")
    desk.ask("start", args={"name": "web1"})
    worker = desk.forked("web1")
    desk.hello(worker, alive=False)
    assert desk.take(WatchWorker) == []
    assert [request.op for request in desk.requests(worker)] == ["start"]


def test_a_worker_that_presents_itself_before_the_news_of_its_fork_is_taken_as_it_is() -> None:
    desk = Desk()
    desk.known("web1")
    desk.ask("start", args={"name": "web1"})
    desk.take(Fork)
    worker = desk.process("web1")
    desk.hello(worker, alive=False)
    desk.core.crew.on_forked(WEB1, worker.pid)
    assert state(desk) is WorkerState.READY
    assert len(desk.requests(worker)) == 1
    desk.tick(60.0)
    assert desk.take(KillWorker) == []


def test_a_worker_that_connects_again_keeps_what_it_has_and_gets_nothing_twice() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("stop", "vm/web1", id=1)
    desk.ask("qmp", "vm/web1", id=2, reading=True)
    stop, qmp = desk.requests(worker)
    again = desk.reconnected(worker)
    desk.hello(again)
    assert desk.core.actions == []
    assert desk.vm("web1").restarts == 0
    desk.reply(again, qmp)
    desk.reply(again, stop)
    assert [answer.message.id for answer in desk.answers()] == [2, 1]
    desk.ask("qmp", "vm/web1")
    assert len(desk.requests(again)) == 1, "on its newest connection"


def test_a_worker_that_connects_again_has_not_become_younger() -> None:
    desk = Desk(restart=RestartSettings(stable_after=10.0))
    worker = desk.worker("web1")
    desk.vm("web1").deaths = 5
    desk.now += 9.0
    again = desk.reconnected(worker)
    desk.hello(again)
    desk.now += 2.0
    assert die(desk, again), "at once, for it had lived for long"


def test_an_older_worker_is_told_to_leave_and_speaks_for_nobody() -> None:
    desk = Desk()
    old = desk.process("web1", incarnation=1)
    new = desk.process("web1", incarnation=2)
    desk.hello(new)
    desk.core.actions.clear()
    desk.hello(old, state="crashed")
    assert desk.core.actions == [control(old, "leave")]
    assert desk.vm("web1").identity == new.identity
    desk.bye(old)
    assert (state(desk), desk.vm("web1").state) == (WorkerState.READY, "running")


def test_a_newer_worker_takes_the_place_of_one_whose_end_nobody_has_seen() -> None:
    desk = Desk()
    old = desk.worker("web1")
    desk.ask("qmp", "vm/web1", id=1, reading=True)
    [request] = desk.requests(old)
    new = desk.process("web1")
    desk.hello(new)
    assert [sent.id for sent in desk.requests(new)] == [request.id]
    desk.bye(old)
    desk.exit(old)
    desk.tick(1.0)
    assert desk.vm("web1").identity == new.identity
    assert desk.take(Fork) == []


# -- they die under their VM ------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_under_its_vm_is_made_again_at_once_and_the_loss_is_published() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.exit(worker)
    assert desk.core.actions == [], "its last words may still be on their way"
    desk.tick(LAST_WORDS)
    [published] = desk.take(Publish)
    assert published.topic == b"host/WORKER_LOST"
    event = unpack(published.body)
    assert (event["vm"], event["event"], event["data"]) == ("web1", "WORKER_LOST", {"pid": worker.pid})
    assert desk.core.actions == [Fork(WEB1)]
    assert (state(desk), desk.vm("web1").state) == (WorkerState.STARTING, "running"), "the VM is not said to be gone"


def test_reading_requests_go_to_the_successor_and_mutating_ones_end_as_unknown() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("qmp", "vm/web1", id=1, reading=True)
    desk.ask("pause", "vm/web1", id=2)
    desk.ask("events", "vm/web1", id=3, reading=True)
    first, _, third = desk.requests(worker)
    successor = die(desk, worker)
    assert desk.answers() == [], "the next one may have inherited them"
    desk.hello(successor)
    assert [(answer.message.id, answer.code) for answer in desk.answers()] == [(2, "outcome-unknown")]
    assert desk.requests(successor) == [first, third]
    assert desk.vm("web1").restarts == 1


def test_what_the_successor_has_inherited_is_not_sent_again_and_gets_its_true_answer() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("qmp", "vm/web1", id=1, reading=True)
    desk.ask("qmp", "vm/web1", id=2)
    reading, mutating = desk.requests(worker)
    successor = die(desk, worker)
    desk.hello(successor, inherited=[reading.id, mutating.id, 31337])
    assert desk.answers() == []
    assert desk.requests(successor) == []
    desk.reply(successor, mutating, "done once")
    assert desk.answer().value == "done once"


def test_what_the_first_successor_inherited_and_the_second_did_not_ends_as_unknown() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("qmp", "vm/web1", seconds=60.0)
    [request] = desk.requests(worker)
    second = die(desk, worker)
    desk.hello(second, inherited=[request.id])
    desk.now += desk.core.settings.restart.stable_after
    desk.hello(die(desk, second))
    assert desk.answer().code == "outcome-unknown"


@pytest.mark.parametrize("inherited", ["all", 7, None, {"1": 2}, [[1], {"a": 1}, None, True]])
def test_nonsense_about_what_was_inherited_means_nothing_was(inherited: object) -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("stop", "vm/web1")
    desk.requests(worker)
    successor = die(desk, worker)
    desk.say(Kind.HELLO, successor, {"inherited": inherited})
    assert desk.answer().code == "outcome-unknown"


@pytest.mark.parametrize(
    ("op", "arguments"), [("start", {"name": "web1"}), ("define", {"definition": {"name": "web1"}})]
)
def test_what_had_a_worker_made_is_not_sent_twice_either(op: str, arguments: dict[str, Any]) -> None:
    desk = Desk()
    worker = desk.worker("web1", alive=False, state="shutoff")
    desk.ask(op, args=arguments)
    assert len(desk.requests(worker)) == 1
    successor = die(desk, worker)
    desk.hello(successor, alive=False, state="shutoff")
    assert (desk.answer().code, desk.requests(successor)) == ("outcome-unknown", [])


def test_requests_that_come_while_there_is_no_worker_wait_for_the_next_one_in_their_order() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.exit(worker)
    desk.tick(LAST_WORDS)
    desk.ask("pause", "vm/web1", id=1)
    desk.ask("resume", "vm/web1", id=2)
    successor = desk.forked("web1")
    desk.ask("reset", "vm/web1", id=3)
    assert desk.take(ToWorker) == []
    desk.hello(successor)
    assert [request.op for request in desk.requests(successor)] == ["pause", "resume", "reset"]


def test_an_answer_that_was_still_on_its_way_counts() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("pause", "vm/web1")
    [request] = desk.requests(worker)
    desk.exit(worker)
    desk.reply(worker, request, "paused")
    desk.tick(LAST_WORDS)
    assert desk.answer().value == "paused"
    desk.hello(desk.forked("web1"))
    assert desk.answers() == []


def test_a_worker_that_dies_again_and_again_is_made_with_growing_delays() -> None:
    settings = RestartSettings(first_delay=0.5, max_delay=3.0, stable_after=100.0)
    desk = Desk(restart=settings)
    worker = desk.worker("web1")
    delays = []
    for _ in range(6):
        desk.exit(worker)
        desk.tick(LAST_WORDS)
        began = desk.now
        while not any(isinstance(action, Fork) for action in desk.core.actions):
            due = desk.core.crew.next_due()
            assert due is not None
            assert state(desk) is WorkerState.LOST
            desk.tick(due - desk.now)
        delays.append(round(desk.now - began, 6))
        worker = desk.forked("web1")
        desk.hello(worker)
    assert delays == [0.0, 0.5, 1.0, 2.0, 3.0, 3.0]


def test_a_worker_that_lived_long_enough_starts_the_row_anew() -> None:
    desk = Desk(restart=RestartSettings(stable_after=10.0))
    worker = desk.worker("web1")
    for _ in range(5):
        desk.now += 10.0
        worker = die(desk, worker)
        desk.hello(worker)
    assert desk.vm("web1").deaths == 1


def test_a_worker_that_dies_with_nothing_to_do_is_not_made_again() -> None:
    desk = Desk()
    worker = desk.worker("web1", alive=False, state="shutoff")
    desk.exit(worker)
    desk.tick(LAST_WORDS)
    assert (desk.take(Fork), state(desk)) == ([], WorkerState.ABSENT)
    assert desk.vm("web1").state == "shutoff"


def test_the_end_of_a_worker_that_is_not_this_vms_changes_nothing() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.core.crew.on_exit(WEB1, worker.pid + 1, desk.now)
    desk.core.crew.on_exit(VmName("nobody"), worker.pid, desk.now)
    desk.tick(1.0)
    assert (state(desk), desk.core.actions) == (WorkerState.READY, [])


# -- they are made ----------------------------------------------------------------------------------------------------------


def test_a_worker_that_cannot_be_made_is_tried_again_until_the_requests_are_over() -> None:
    desk = Desk(restart=RestartSettings(first_delay=0.5))
    desk.known("web1")
    desk.ask("start", args={"name": "web1"}, seconds=0.6)
    assert desk.take(Fork) == [Fork(WEB1)]
    desk.core.crew.on_not_forked(WEB1, "no memory", desk.now)
    assert desk.take(Fork) == [Fork(WEB1)], "at once"
    desk.core.crew.on_not_forked(WEB1, "no memory", desk.now)
    assert (desk.take(Fork), state(desk)) == ([], WorkerState.LOST)
    desk.tick(0.5)
    assert desk.take(Fork) == [Fork(WEB1)]
    desk.tick(0.5)
    assert desk.answer().code == "deadline"
    desk.core.crew.on_not_forked(WEB1, "no memory", desk.now)
    assert (desk.take(Fork), state(desk)) == ([], WorkerState.ABSENT)


def test_a_worker_that_never_presents_itself_is_ended_and_another_one_made() -> None:
    desk = Desk(BrokerSettings(worker_hello=4.0))
    desk.known("web1", alive=True)
    desk.ask("pause", "vm/web1")
    mute = desk.forked("web1")
    desk.tick(3.9)
    assert desk.core.actions == []
    desk.tick(0.1)
    assert desk.core.actions == [KillWorker(WEB1), Fork(WEB1)]
    desk.take(KillWorker)
    successor = desk.forked("web1")
    desk.exit(mute)
    desk.hello(successor)
    assert [request.op for request in desk.requests(successor)] == ["pause"]
    desk.tick(4.0)
    assert (desk.core.actions, state(desk)) == ([], WorkerState.READY)


def test_a_worker_that_ends_before_it_presents_itself_is_made_again() -> None:
    desk = Desk()
    desk.known("web1", alive=True)
    desk.ask("pause", "vm/web1")
    worker = desk.forked("web1")
    desk.exit(worker)
    assert desk.core.actions == []
    desk.tick(LAST_WORDS)
    assert desk.take(Fork) == [Fork(WEB1)]


def test_news_of_another_fork_does_not_make_a_dead_worker_of_a_living_one() -> None:
    desk = Desk()
    desk.known("web1", alive=True)
    desk.core.crew.adopt(desk.vm("web1"), desk.now)
    ended, living = desk.forked("web1"), desk.process("web1")
    desk.exit(ended)
    desk.core.crew.on_forked(WEB1, living.pid)
    desk.hello(living)
    desk.tick(LAST_WORDS)
    assert (state(desk), desk.vm("web1").identity) == (WorkerState.READY, living.identity)


def test_news_of_forks_for_forgotten_vms_change_nothing() -> None:
    desk = Desk()
    desk.core.crew.on_forked(WEB1, 5)
    desk.core.crew.on_not_forked(WEB1, "why", desk.now)
    desk.core.crew.on_exit(WEB1, 5, desk.now)
    assert desk.core.actions == []


def test_a_vm_that_an_earlier_broker_left_running_gets_a_worker() -> None:
    desk = Desk()
    desk.core.crew.adopt(desk.known("web1", state="unknown"), desk.now)
    assert desk.take(Fork) == [Fork(WEB1)]
    assert desk.vm("web1").alive


def test_the_worker_that_an_earlier_broker_left_is_used_and_the_one_made_beside_it_gives_up() -> None:
    desk = Desk()
    desk.core.crew.adopt(desk.known("web1", state="unknown"), desk.now)
    spare = desk.forked("web1")
    old = desk.process("web1", incarnation=4)
    desk.hello(old)
    assert desk.core.actions == [WatchWorker(WEB1, old.pid, old.pid * 10)]
    desk.core.actions.clear()
    desk.exit(spare)
    desk.tick(20.0)
    assert (desk.core.actions, state(desk)) == ([], WorkerState.READY)
    assert desk.vm("web1").identity == old.identity


def expected(desk: Desk) -> Worker:
    """A worker that an earlier broker had made, and that lives."""
    worker = desk.process("web1", incarnation=4)
    entry = desk.known("web1", state="unknown", alive=True)
    desk.core.crew.expect(entry, Identity(worker.pid, 77, "python"), desk.now)
    return worker


def test_a_worker_that_lives_is_waited_for_and_watched_and_no_other_one_made() -> None:
    desk = Desk()
    worker = expected(desk)
    assert desk.core.actions == [WatchWorker(WEB1, worker.pid, 77)]
    desk.ask("pause", "vm/web1")
    desk.hello(worker)
    assert [request.op for request in desk.requests(worker)] == ["pause"]
    assert desk.take(Fork) == []


def test_a_worker_that_was_waited_for_and_ends_is_replaced() -> None:
    desk = Desk()
    worker = expected(desk)
    desk.exit(worker)
    desk.tick(LAST_WORDS)
    desk.hello(desk.forked("web1"))
    assert state(desk) is WorkerState.READY


def test_a_worker_that_was_waited_for_in_vain_is_ended_and_replaced() -> None:
    desk = Desk(BrokerSettings(worker_hello=4.0))
    expected(desk)
    desk.take(WatchWorker)
    desk.tick(4.0)
    assert desk.core.actions == [KillWorker(WEB1), Fork(WEB1)]
