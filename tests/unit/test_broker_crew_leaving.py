# SPDX-License-Identifier: Apache-2.0
"""Workers that go: last words, goodbyes, what becomes of requests then, and names behind which there is nothing any more."""

from __future__ import annotations

import pytest

from vmloop.broker.actions import Forget, Fork, ToWorker
from vmloop.broker.crew import GOODBYE, LAST_WORDS
from vmloop.broker.roster import WorkerState
from vmloop.common.names import VmName
from vmloop.common.wire import Kind, Message, decode, encode

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


# -- the greeting of a worker that has ended --------------------------------------------------------------------------------


def test_a_greeting_that_comes_after_its_workers_end_does_not_bring_it_back() -> None:
    desk = Desk()
    desk.known("web1", alive=True)
    desk.ask("pause", "vm/web1")
    worker = desk.forked("web1")
    desk.exit(worker)
    desk.hello(worker)
    assert desk.requests(worker) == [], "nobody is there to take it"
    desk.tick(LAST_WORDS)
    successor = desk.forked("web1")
    desk.hello(successor)
    assert [request.op for request in desk.requests(successor)] == ["pause"]


def test_greeting_and_goodbye_that_come_after_their_workers_end_are_its_goodbye() -> None:
    desk = Desk()
    desk.known("web1", alive=True)
    desk.core.crew.adopt(desk.vm("web1"), desk.now)
    worker = desk.forked("web1")
    desk.exit(worker)
    desk.hello(worker)
    desk.bye(worker)
    desk.tick(LAST_WORDS)
    assert (state(desk), desk.vm("web1").state) == (WorkerState.ABSENT, "shutoff")
    assert desk.take(Fork) == []


# -- they say goodbye -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["goodbye, end", "end, goodbye"])
def test_a_worker_that_said_goodbye_leaves_no_trace_but_its_last_word(order: str) -> None:
    desk = Desk()
    worker = desk.worker("web1")
    if order == "goodbye, end":
        desk.bye(worker)
    desk.exit(worker)
    if order == "end, goodbye":
        desk.bye(worker)
    desk.tick(LAST_WORDS)
    assert desk.core.actions == []
    vm = desk.vm("web1")
    assert (vm.worker.state, vm.state, vm.status["reason"]) == (WorkerState.ABSENT, "shutoff", "guest")


def test_a_start_sent_to_a_leaving_worker_reaches_the_next_one() -> None:
    desk = Desk()
    worker = desk.worker("web1", alive=False, state="shutoff")
    desk.ask("start", args={"name": "web1"}, id=1)
    [sent] = desk.requests(worker)
    desk.bye(worker)
    desk.ask("start", args={"name": "web1", "paused": True}, id=2)
    assert desk.core.actions == [], "nothing is sent to a worker that said goodbye"
    desk.exit(worker)
    successor = desk.forked("web1")
    desk.hello(successor, alive=False, state="shutoff")
    first, second = desk.requests(successor)
    assert (first, second.op, second.service) == (sent, "start", "vm/web1")
    assert desk.answers() == []


def test_events_asked_of_a_leaving_worker_are_answered_by_the_next_one() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.bye(worker)
    desk.ask("events", "vm/web1", {"since": "1.0"}, reading=True)
    desk.exit(worker)
    successor = desk.forked("web1")
    desk.hello(successor, alive=False, state="shutoff")
    assert [request.op for request in desk.requests(successor)] == ["events"]


def test_what_a_leaving_worker_of_an_ended_vm_did_not_take_up_is_not_running() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("pause", "vm/web1")
    desk.requests(worker)
    desk.bye(worker)
    desk.exit(worker)
    answer = desk.answer()
    assert (answer.code, desk.take(Fork)) == ("not-running", [])
    assert "shutoff" in answer.value["message"]


def test_a_worker_that_leaves_its_vm_running_is_followed_by_another_one() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("qmp", "vm/web1", id=1, reading=True)
    [request] = desk.requests(worker)
    desk.bye(worker, alive=True, state="running")
    desk.ask("pause", "vm/web1", id=2)
    desk.exit(worker)
    assert desk.answers() == []
    successor = desk.forked("web1")
    desk.hello(successor)
    assert [sent.op for sent in desk.requests(successor)] == ["qmp", "pause"]
    assert request.op == "qmp"


@pytest.mark.parametrize("inherits", [True, False])
def test_what_a_worker_had_sent_before_it_left_a_running_vm_is_for_the_next_one_to_say(inherits: bool) -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("qmp", "vm/web1")
    [request] = desk.requests(worker)
    desk.bye(worker, alive=True, state="running")
    desk.exit(worker)
    assert desk.answers() == [], "the VM runs on, and QEMU may still answer"
    successor = desk.forked("web1")
    desk.hello(successor, inherited=[request.id] if inherits else [])
    assert [answer.code for answer in desk.answers()] == ([] if inherits else ["outcome-unknown"])
    if inherits:
        desk.reply(successor, request, "true")
        assert desk.answer().value == "true"


def test_a_goodbye_that_is_known_to_be_on_its_way_is_waited_for_longer_than_last_words() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("detach", "vm/web1")
    [request] = desk.requests(worker)
    desk.exit(worker, went=True)
    desk.tick(GOODBYE - 0.01)
    assert desk.core.actions == []
    desk.reply(worker, request, {"name": "web1"})
    desk.bye(worker, state="unknown")
    assert desk.answer().value == {"name": "web1"}
    assert (state(desk), desk.take(Fork)) == (WorkerState.ABSENT, [])


def test_a_goodbye_that_never_comes_is_not_waited_for_for_ever() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.exit(worker, went=True)
    desk.tick(GOODBYE)
    assert desk.take(Fork) == [Fork(WEB1)]


def test_a_goodbye_ends_the_row_of_deaths() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    successor = die(desk, worker)
    desk.hello(successor)
    desk.bye(successor)
    desk.exit(successor)
    assert desk.vm("web1").deaths == 0


# -- they are forgotten -----------------------------------------------------------------------------------------------------


def test_an_undefined_vm_is_forgotten_when_its_worker_is_gone() -> None:
    desk = Desk()
    worker = desk.worker("web1", alive=False, state="shutoff")
    desk.ask("wait", "vm/web1", {"for": "running"}, id=1)
    desk.bye(worker, forget=True, defined=False)
    assert desk.code("show", service="vm/web1") == "no-such-vm"
    desk.exit(worker)
    assert desk.answer().code == "no-such-vm", "who waits for it learns so"
    assert desk.core.actions == [Forget(WEB1)]
    assert desk.core.roster.get(WEB1) is None
    desk.tick(100.0)
    assert desk.core.actions == [Forget(WEB1)]


def test_a_define_that_comes_while_its_vm_is_being_forgotten_makes_it_anew() -> None:
    desk = Desk()
    worker = desk.worker("web1", alive=False, state="shutoff")
    desk.bye(worker, forget=True, defined=False)
    desk.ask("define", args={"definition": {"name": "web1"}})
    desk.exit(worker)
    assert desk.take(Forget) == []
    successor = desk.forked("web1")
    desk.hello(successor, defined=False, alive=False, started=None)
    [request] = desk.requests(successor)
    desk.status(successor, alive=False, state="shutoff")
    desk.reply(successor, request, {"name": "web1"})
    assert desk.answer().value == {"name": "web1"}
    assert desk.vm("web1").known


def test_a_name_whose_definition_was_refused_is_forgotten_with_its_worker() -> None:
    desk = Desk()
    desk.ask("define", args={"definition": {"name": "web1", "bogus": 1}})
    worker = desk.forked("web1")
    desk.hello(worker, defined=False, alive=False, started=None)
    [request] = desk.requests(worker)
    desk.reply(worker, request, {"code": "config-error", "message": "bogus"}, kind=Kind.ERROR)
    assert desk.answer().code == "config-error"
    assert desk.value("list") == []
    desk.exit(worker)
    desk.tick(LAST_WORDS)
    assert desk.take(Forget) == [Forget(WEB1)]


# -- the zygote -------------------------------------------------------------------------------------------------------------


def test_a_new_zygote_makes_every_ready_worker_hand_it_its_connections() -> None:
    desk = Desk()
    ready, leaving = desk.worker("a"), desk.worker("b")
    desk.known("c")
    desk.bye(leaving)
    desk.core.crew.on_new_zygote()
    assert desk.core.actions == [control(ready, "keep")]


def test_every_worker_that_presents_itself_hands_its_connections_to_the_zygote_that_is_there_now() -> None:
    """It may have been born before it, and a broker that died with the zygote before tells nobody."""
    desk = Desk()
    worker = desk.worker("a")
    again = desk.reconnected(worker)
    desk.hello(again)
    assert desk.asked_to_keep == [worker.identity, again.identity]
    desk.exit(again)
    desk.hello(again)
    assert len(desk.asked_to_keep) == 2, "these are its last words"


def test_idle_workers_are_told_to_leave_and_those_with_a_vm_are_not() -> None:
    desk = Desk()
    idle = desk.worker("a", alive=False, state="shutoff")
    desk.worker("b")
    desk.core.crew.dismiss_idle()
    [action] = desk.take(ToWorker)
    assert (action.identity, decode(action.frame).op) == (idle.identity, "leave")
