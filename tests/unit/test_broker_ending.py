# SPDX-License-Identifier: Apache-2.0
"""The end of a private broker, as its core decides it: what becomes of the VMs, also of those that do not listen or just begin."""

from __future__ import annotations

from typing import Any

from vmloop.broker.actions import EndZygote, ToWorker
from vmloop.broker.ending import SHUTDOWN_SECONDS, STOP_GRACE
from vmloop.common.pack import unpack_map
from vmloop.common.settings import BrokerSettings
from vmloop.common.wire import Kind, Message, decode

from ..fakes.broker_desk import Desk, Worker


def asked(desk: Desk, op: str) -> list[tuple[bytes, Message]]:
    """The workers that were asked for something, with the request."""
    sent = [(action.identity, decode(action.frame)) for action in desk.take(ToWorker)]
    return [(identity, message) for identity, message in sent if message.op == op]


def over(desk: Desk, worker: Worker) -> None:
    desk.bye(worker, state="shutoff", reason="shutdown")
    desk.exit(worker)


def finish(desk: Desk) -> None:
    due = desk.core.next_due()
    assert due is not None
    desk.tick(due - desk.now)
    assert desk.core.finished


def test_guests_are_asked_to_power_down_with_their_time_and_then_all_ends() -> None:
    desk = Desk()
    workers = [desk.worker("web1"), desk.worker("web2")]
    desk.worker("off", alive=False, state="shutoff")
    desk.core.end("stop", 7.0, desk.now)
    stops = asked(desk, "stop")
    assert [identity for identity, _ in stops] == [worker.identity for worker in workers]
    assert [unpack_map(message.body) for _, message in stops] == [{"timeout": 7.0, "force": True}] * 2
    over(desk, workers[0])
    assert desk.take(EndZygote) == [], "one of them still runs"
    over(desk, workers[1])
    assert desk.take(EndZygote) == [EndZygote()]
    finish(desk)
    assert desk.core.leaves_nothing
    assert desk.core.next_due() is None, "a broker that sees its workers off is not kept busy by what is over"


def test_one_that_cannot_be_asked_or_refuses_is_killed() -> None:
    desk = Desk(BrokerSettings(requests_per_vm=1))
    full, refuses = desk.worker("full"), desk.worker("refuses")
    desk.ask("qmp", "vm/full")
    desk.core.actions.clear()
    desk.core.end("stop", 7.0, desk.now)
    sent = [(action.identity, decode(action.frame)) for action in desk.take(ToWorker)]
    assert [(identity, message.op) for identity, message in sent] == [
        (full.identity, "kill"),
        (refuses.identity, "stop"),
    ]
    desk.reply(refuses, sent[1][1], {"code": "busy", "message": "not now"}, kind=Kind.ERROR)
    assert [identity for identity, _ in asked(desk, "kill")] == [refuses.identity]


def test_one_whose_worker_says_nothing_is_killed_when_its_time_is_over() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.core.end("stop", 7.0, desk.now)
    desk.core.actions.clear()
    desk.tick(7.0 + STOP_GRACE - 0.1)
    assert asked(desk, "kill") == []
    desk.tick(1.0)
    assert [identity for identity, _ in asked(desk, "kill")] == [worker.identity]


def test_a_second_word_kills_what_is_being_stopped() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.core.end("stop", 7.0, desk.now)
    desk.core.actions.clear()
    desk.core.end("kill", 7.0, desk.now)
    assert [identity for identity, _ in asked(desk, "kill")] == [worker.identity]
    desk.core.end("kill", 7.0, desk.now)
    assert asked(desk, "kill") == [], "once is enough"


def test_what_cannot_be_ended_is_left_and_the_broker_ends_all_the_same() -> None:
    desk = Desk()
    desk.worker("web1")
    desk.core.end("kill", 7.0, desk.now)
    desk.tick(STOP_GRACE + SHUTDOWN_SECONDS + 1.0)
    assert not desk.core.leaves_nothing, "its worker is not waited for, and its root not removed"
    finish(desk)


def test_vms_that_are_to_be_left_are_not_asked_for_anything() -> None:
    desk = Desk()
    desk.worker("web1")
    desk.core.end("leave", 7.0, desk.now)
    assert desk.take(ToWorker) == []
    assert desk.take(EndZygote) == []
    finish(desk)
    assert not desk.core.leaves_nothing


def test_a_vm_that_is_starting_is_stopped_too_and_no_other_is_started() -> None:
    desk = Desk()
    starting, beside = desk.worker("web1", alive=False, state="shutoff"), desk.worker("web2")
    desk.ask("start", args={"name": "web1"}, id=1)
    desk.core.actions.clear()
    desk.core.end("stop", 7.0, desk.now)
    desk.core.actions.clear()
    assert desk.code("define", {"definition": {"name": "web3"}}) == "busy"
    desk.status(starting, state="running")
    assert [identity for identity, _ in asked(desk, "stop")] == [starting.identity]
    over(desk, beside)
    over(desk, starting)
    assert desk.take(EndZygote) == [EndZygote()]


def test_two_who_ask_for_a_shutdown_are_both_answered() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    arguments: dict[str, Any] = {"vms": "kill"}
    desk.ask("shutdown", args=arguments, id=1)
    desk.ask("shutdown", args=arguments, id=2)
    assert len(asked(desk, "kill")) == 1
    over(desk, worker)
    assert sorted((answer.message.id, answer.value["count"]) for answer in desk.answers()) == [(1, 1), (2, 1)]
