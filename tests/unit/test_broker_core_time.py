# SPDX-License-Identifier: Apache-2.0
"""The broker's core when things take long or are too many: deadlines, limits, cut connections, and going down."""

from __future__ import annotations

import pytest

from vmloop.broker.actions import Fork, ToWorker
from vmloop.broker.core import FAREWELL
from vmloop.broker.inflight import MAX_HELD_BYTES, MAX_REPEATABLE_BYTES, WORKER_GRACE
from vmloop.common.deadlines import SLICE
from vmloop.common.pack import MAX_MESSAGE_BYTES
from vmloop.common.settings import BrokerSettings

from ..fakes.broker_desk import Desk

OTHER = b"client-2"


# -- time -------------------------------------------------------------------------------------------------------------------


def test_a_request_that_its_worker_does_not_answer_ends_a_moment_after_its_deadline() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("stop", "vm/web1", seconds=2.0)
    [request] = desk.requests(worker)
    desk.tick(2.0 + WORKER_GRACE - 0.001)
    assert desk.core.actions == []
    due = desk.core.next_due()
    assert due is not None
    desk.tick(due - desk.now)
    answer = desk.answer()
    assert answer.code == "deadline"
    assert "may still take effect" in answer.value["message"]
    assert 2.0 + WORKER_GRACE <= answer.message.seconds <= 2.0 + WORKER_GRACE + 2 * SLICE
    desk.reply(worker, request, "too late")
    assert desk.core.actions == []
    assert desk.core.next_due() is None


def test_a_request_for_which_no_worker_comes_up_ends_at_its_deadline_and_says_so() -> None:
    desk = Desk()
    desk.known("web1")
    desk.ask("start", args={"name": "web1"}, seconds=2.0)
    assert [action.name for action in desk.take(Fork)] == ["web1"]
    desk.tick(2.0 + WORKER_GRACE + 2 * SLICE)
    answer = desk.answer()
    assert answer.code == "deadline"
    assert "no worker" in answer.value["message"]
    desk.hello(desk.process("web1"), alive=False)
    assert desk.take(ToWorker) == [], "nobody waits for it any more"


def test_the_next_due_time_is_the_earliest_of_all_requests() -> None:
    desk = Desk()
    desk.worker("web1")
    for seconds in (50.0, 3.0, 20.0):
        desk.ask("qmp", "vm/web1", seconds=seconds)
    due = desk.core.next_due()
    assert due is not None
    assert 3.0 + WORKER_GRACE <= due - desk.now <= 3.0 + WORKER_GRACE + 2 * SLICE


# -- limits -----------------------------------------------------------------------------------------------------------------


def test_a_client_has_only_so_many_requests_in_flight_and_others_are_not_held_up() -> None:
    desk = Desk(BrokerSettings(requests_per_client=3))
    worker = desk.worker("web1")
    for number in range(3):
        desk.ask("qmp", "vm/web1", id=number)
    for op, service in (("qmp", "vm/web1"), ("list", "vmloop"), ("wait", "vm/web1")):
        desk.ask(op, service, {"for": "shutoff"} if op == "wait" else None, id=9)
        assert desk.answer().code == "busy"
    desk.ask("qmp", "vm/web1", client=OTHER)
    requests = desk.requests(worker)
    assert len(requests) == 4
    desk.reply(worker, requests[0])
    desk.answers()
    desk.ask("qmp", "vm/web1")
    assert len(desk.requests(worker)) == 1, "an answer makes room"


def test_a_vm_has_only_so_many_requests_in_flight_and_other_vms_are_not_held_up() -> None:
    desk = Desk(BrokerSettings(requests_per_vm=2))
    worker, beside = desk.worker("web1"), desk.worker("web2")
    for number in range(2):
        desk.ask("qmp", "vm/web1", id=number, client=b"%d" % number)
    assert len(desk.requests(worker)) == 2
    desk.ask("qmp", "vm/web1")
    assert desk.answer().code == "busy"
    desk.ask("qmp", "vm/web2")
    assert len(desk.requests(beside)) == 1


def test_a_refused_request_is_in_flight_nowhere() -> None:
    desk = Desk(BrokerSettings(requests_per_vm=1))
    desk.worker("web1")
    desk.ask("qmp", "vm/web1", seconds=1.0)
    desk.ask("qmp", "vm/web1", seconds=1.0)
    assert desk.answer().code == "busy"
    desk.tick(10.0)
    assert desk.answer().code == "deadline"


def test_a_reading_request_that_cannot_be_kept_is_answered_once() -> None:
    desk = Desk()
    desk.worker("web1")
    desk.known("web2")
    filling = MAX_HELD_BYTES // MAX_MESSAGE_BYTES
    for number in range(filling):
        definition = {"name": "web2", "filling": b"x" * (MAX_MESSAGE_BYTES - 1000)}
        desk.ask("define", args={"definition": definition}, id=number, seconds=60.0)
    desk.ask("qmp", "vm/web1", {"filling": "x" * (MAX_REPEATABLE_BYTES - 1000)}, seconds=1.0, reading=True)
    desk.tick(5.0)
    assert len(desk.answers()) == 1
    assert len(desk.core.inflight) == filling


# -- undeliverable ----------------------------------------------------------------------------------------------------------


def test_a_request_for_which_the_workers_queue_is_full_ends_as_busy() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("qmp", "vm/web1")
    [request] = desk.requests(worker)
    desk.core.on_undeliverable(request.id, full=True)
    assert desk.answer().code == "busy"
    assert len(desk.core.inflight) == 0
    desk.core.on_undeliverable(request.id, full=True)
    assert desk.core.actions == []


@pytest.mark.parametrize("reading", [True, False])
@pytest.mark.parametrize(("filling", "becomes"), [(0, "sent again"), (MAX_REPEATABLE_BYTES, "worker-lost")])
def test_a_request_that_met_a_cut_connection_is_not_thought_to_be_with_the_worker(
    reading: bool, filling: int, becomes: str
) -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("qmp", "vm/web1", {"filling": "x" * filling}, reading=reading)
    [request] = desk.requests(worker)
    desk.core.on_undeliverable(request.id, full=False)
    again = desk.reconnected(worker)
    desk.hello(again)
    assert [answer.code for answer in desk.answers()] == (["worker-lost"] if filling else [])
    assert [sent.id for sent in desk.requests(again)] == ([] if filling else [request.id])


def test_a_control_message_that_cannot_be_delivered_concerns_nobody() -> None:
    desk = Desk()
    desk.worker("web1")
    desk.ask("qmp", "vm/web1")
    desk.take(ToWorker)
    desk.core.on_undeliverable(0, full=False)
    desk.core.on_undeliverable(0, full=True)
    assert desk.core.actions == []
    assert len(desk.core.inflight) == 1


# -- the end ----------------------------------------------------------------------------------------------------------------


def test_a_broker_that_goes_down_answers_what_is_in_flight_and_takes_nothing_new() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("qmp", "vm/web1", id=1)
    desk.ask("wait", "vm/web1", {"for": "shutoff"}, id=2)
    [request] = desk.requests(worker)
    desk.core.drain(desk.now)
    assert [(answer.message.id, answer.code) for answer in desk.answers()] == [(2, "busy")], (
        "waiting could take for ever"
    )
    for op, service in (("qmp", "vm/web1"), ("list", "vmloop"), ("show", "vm/web1"), ("stop", "vm/none")):
        desk.ask(op, service, id=3)
        assert desk.answer().code == "busy"
    desk.reply(worker, request, "done")
    assert desk.answer().value == "done"
    desk.tick(FAREWELL / 2)
    assert not desk.core.finished, "what was sent last must still leave"
    desk.tick(FAREWELL)
    assert desk.core.finished


def test_a_broker_with_nothing_in_flight_ends_after_its_farewell() -> None:
    desk = Desk()
    desk.core.drain(desk.now)
    assert desk.core.next_due() == desk.now + FAREWELL
    desk.tick(FAREWELL)
    assert desk.core.finished
    assert desk.core.actions == []


def test_what_is_not_answered_before_the_end_is_unknown_or_lost_but_never_silent() -> None:
    desk = Desk(BrokerSettings(drain=3.0))
    worker = desk.worker("web1")
    desk.ask("stop", "vm/web1", id=1)
    desk.ask("qmp", "vm/web1", id=2, reading=True)
    desk.requests(worker)
    desk.core.drain(desk.now)
    desk.tick(2.9)
    assert (desk.core.actions, desk.core.finished) == ([], False)
    desk.core.drain(desk.now)  # a second signal changes nothing
    desk.tick(0.1)
    assert [(answer.message.id, answer.code) for answer in desk.answers()] == [
        (1, "outcome-unknown"),
        (2, "worker-lost"),
    ]
    assert desk.core.finished
