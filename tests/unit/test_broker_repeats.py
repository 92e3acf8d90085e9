# SPDX-License-Identifier: Apache-2.0
"""Requests whose worker died, left or was cut off are given to a worker again, which knows what became of them; never without saying so."""

from __future__ import annotations

from typing import Any

import pytest

from vmloop.broker.actions import Fork, ToWorker
from vmloop.broker.crew import REPEAT_SECONDS
from vmloop.broker.inflight import MAX_KEPT_OF_VM_BYTES, MAX_REPEATABLE_BYTES, WORKER_GRACE
from vmloop.common.wire import FLAG_ASKING, FLAG_READING, FLAG_REPEATED, Kind, Message

from ..fakes.broker_desk import CLIENT, Desk, Worker

LONG = {"filling": "x" * MAX_REPEATABLE_BYTES}
SPEAKS: dict[str, Any] = {"protocol": 2, "protocols": [1, 2]}


def given(desk: Desk, worker: Worker) -> list[Message]:
    """The requests that have gone out to a worker."""
    return [message for message in desk.requests(worker) if message.kind is Kind.REQUEST]


def dead(desk: Desk, worker: Worker) -> Worker:
    """The worker dies; its successor is forked."""
    desk.exit(worker)
    desk.tick(0.05)
    return desk.forked("web1")


def asked(desk: Desk, worker: Worker, *, reading: bool = False, long: bool = False) -> Message:
    """A request that the worker has."""
    desk.ask("qmp", "vm/web1", LONG if long else {"command": "stop"}, reading=reading, seconds=10.0, key=b"k")
    [request] = given(desk, worker)
    assert not request.repeated
    return request


@pytest.mark.parametrize("reading", [True, False])
def test_the_next_worker_is_given_what_the_dead_one_had(reading: bool) -> None:
    desk = Desk()
    request = asked(desk, desk.worker("web1", **SPEAKS), reading=reading)
    desk.tick(1.0)
    [entry] = desk.core.inflight
    assert entry.sent_to is not None
    worker = desk.core.roster.by_identity[entry.sent_to]
    after = dead(desk, Worker(worker.name, worker.worker_pid or 0, worker.incarnation, worker.identity))
    desk.hello(after, **SPEAKS)
    [again] = given(desk, after)
    assert (again.id, again.op, again.body, again.key) == (request.id, request.op, request.body, request.key)
    assert again.flags == FLAG_REPEATED | (FLAG_READING if reading else 0)
    assert again.seconds == pytest.approx(entry.deadline - WORKER_GRACE - desk.now)
    assert again.seconds < 9.0
    desk.reply(after, again, {"done": True})
    assert desk.answer().value == {"done": True}


def test_what_the_next_worker_has_inherited_is_left_to_it() -> None:
    desk = Desk()
    worker = desk.worker("web1", **SPEAKS)
    request = asked(desk, worker)
    after = dead(desk, worker)
    desk.hello(after, inherited=[request.id], **SPEAKS)
    assert given(desk, after) == []
    desk.reply(after, request, {})
    assert desk.answer().code is None


def test_of_a_request_that_was_not_kept_the_next_worker_is_asked_what_became_of_it() -> None:
    desk = Desk()
    worker = desk.worker("web1", **SPEAKS)
    request = asked(desk, worker, long=True)
    after = dead(desk, worker)
    desk.hello(after, **SPEAKS)
    [asking] = given(desk, after)
    assert (asking.id, asking.op, asking.service, asking.body) == (request.id, "qmp", "vm/web1", b"")
    assert asking.flags == FLAG_REPEATED | FLAG_ASKING
    assert asking.asking


def test_a_worker_that_speaks_the_first_protocol_is_given_nothing_twice() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    asked(desk, worker)
    after = dead(desk, worker)
    desk.hello(after)
    assert given(desk, after) == []
    assert desk.answer().code == "outcome-unknown"


def test_a_worker_that_connects_again_is_given_what_it_does_not_have() -> None:
    desk = Desk()
    worker = desk.worker("web1", **SPEAKS)
    first, second = asked(desk, worker), asked(desk, worker)
    again = desk.reconnected(worker)
    desk.hello(again, inherited=[second.id], **SPEAKS)
    [repeated] = given(desk, again)
    assert (repeated.id, repeated.repeated) == (first.id, True)


def test_what_a_leaving_worker_did_not_answer_goes_to_the_next_one_also_if_the_vm_is_over() -> None:
    for alive in (True, False):
        desk = Desk()
        worker = desk.worker("web1", **SPEAKS)
        request = asked(desk, worker)
        desk.bye(worker, alive=alive)
        desk.exit(worker)
        after = desk.forked("web1")
        desk.hello(after, alive=alive, state="running" if alive else "shutoff", **SPEAKS)
        [again] = given(desk, after)
        assert (again.id, again.repeated) == (request.id, True)
        assert desk.answers() == []


def test_a_request_that_is_nearly_over_is_given_to_the_next_worker_all_the_same() -> None:
    desk = Desk()
    worker = desk.worker("web1", **SPEAKS)
    asked(desk, worker)
    desk.exit(worker)
    desk.tick(10.0 + WORKER_GRACE / 2)
    after = desk.forked("web1")
    desk.hello(after, **SPEAKS)
    [again] = given(desk, after)
    assert again.seconds == REPEAT_SECONDS


def undeliverable(desk: Desk, worker: Worker) -> Message:
    """What was given to a worker did not reach it: it was killed in the instant of its HELLO. The request that was to go."""
    [request] = given(desk, worker)
    desk.core.on_undeliverable(request.id, full=False)
    return request


@pytest.mark.parametrize("long", [False, True])
def test_a_request_that_did_not_reach_the_second_worker_is_given_to_the_third_as_one_that_the_first_had(
    long: bool,
) -> None:
    desk = Desk()
    first = desk.worker("web1", **SPEAKS)
    request = asked(desk, first, long=long)
    second = dead(desk, first)
    desk.hello(second, **SPEAKS)
    assert undeliverable(desk, second).repeated
    assert desk.answers() == [], "the first may have done it"
    desk.exit(second)
    desk.tick(0.05)
    desk.tick(1.0)
    third = desk.forked("web1")
    desk.hello(third, **SPEAKS)
    [again] = given(desk, third)
    assert (again.id, again.repeated, again.asking) == (request.id, True, long)


def test_what_the_third_worker_has_inherited_from_the_first_is_left_to_it() -> None:
    desk = Desk()
    first = desk.worker("web1", **SPEAKS)
    request = asked(desk, first)
    second = dead(desk, first)
    desk.hello(second, **SPEAKS)
    undeliverable(desk, second)
    desk.exit(second)
    desk.tick(0.05)
    desk.tick(1.0)
    third = desk.forked("web1")
    desk.hello(third, inherited=[request.id], **SPEAKS)
    assert given(desk, third) == []
    desk.reply(third, request, {})
    assert desk.answer().code is None


@pytest.mark.parametrize(("reading", "code"), [(False, "outcome-unknown"), (True, "busy")])
def test_a_next_worker_that_does_not_keep_up_makes_what_the_dead_one_had_unknown(reading: bool, code: str) -> None:
    desk = Desk()
    first = desk.worker("web1", **SPEAKS)
    asked(desk, first, reading=reading)
    second = dead(desk, first)
    desk.hello(second, **SPEAKS)
    [again] = given(desk, second)
    desk.core.on_undeliverable(again.id, full=True)
    assert desk.answer().code == code


@pytest.mark.parametrize(("reading", "code"), [(False, "outcome-unknown"), (True, "deadline")])
def test_what_a_dead_worker_had_is_unknown_when_no_other_comes_up_in_time(reading: bool, code: str) -> None:
    desk = Desk()
    first = desk.worker("web1", **SPEAKS)
    asked(desk, first, reading=reading)
    dead(desk, first)
    desk.tick(10.5)
    answer = desk.answer()
    assert answer.code == code
    assert "no worker for it came up in time" in answer.value["message"]


def test_a_frozen_vm_takes_no_room_from_the_requests_of_others() -> None:
    desk = Desk()
    frozen = desk.worker("web1", **SPEAKS)
    desk.known("web2")
    for number in range(1024):
        desk.ask("qmp", "vm/web1", {"filling": "x" * (MAX_REPEATABLE_BYTES - 500)}, id=number, client=b"other")
    desk.ask("kill", "vm/web1", id=1024)
    for number in range(300):
        desk.ask("start", args={"name": "web2", "filling": "x" * 200_000}, id=number)
    assert desk.answers() == []
    assert [action.name for action in desk.take(Fork)] == ["web2"]
    assert len(given(desk, frozen)) == 1025
    after = dead(desk, frozen)
    desk.hello(after, **SPEAKS)
    again = given(desk, after)
    assert len(again) == 1025
    whole = [message for message in again if not message.asking]
    assert sum(len(message.body) for message in whole) < MAX_KEPT_OF_VM_BYTES
    assert len(whole) > 60
    assert whole[-1].op == "kill", "which is the way out"


def test_a_client_cannot_mark_its_request_as_repeated() -> None:
    desk = Desk()
    worker = desk.worker("web1", **SPEAKS)
    frame = bytearray(desk.ask("qmp", "vm/web1", {"command": "stop"}))
    given(desk, worker)
    frame[5] = 0xFF
    desk.core.on_client(b"other", [bytes(frame)], desk.now)
    [request] = given(desk, worker)
    assert request.flags == FLAG_READING


# -- a client that sends a request again ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [b"once", b""])
def test_a_start_that_is_sent_again_is_asked_of_the_worker_that_may_have_done_it(key: bytes) -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.ask("start", "vmloop", {"name": "web1"}, key=key, again=True)
    if key:
        [request] = given(desk, worker)
        assert (request.op, request.key) == ("start", key)
        assert not request.repeated  # it has another number, and no worker was given it
    else:
        assert desk.answer().code == "already-running"


@pytest.mark.parametrize("again", [True, False])
def test_a_kill_that_is_sent_again_after_its_vms_end_is_asked_of_a_new_worker(again: bool) -> None:
    desk = Desk()
    desk.known("web1", state="shutoff", reason="destroyed")
    desk.ask("kill", "vm/web1", key=b"once", again=again)
    if again:
        assert [fork.name for fork in desk.take(Fork)] == ["web1"]
    else:
        assert desk.answer().code == "not-running"


def test_with_a_worker_of_a_later_version_what_both_speak_holds() -> None:
    desk = Desk()
    worker = desk.worker("web1", protocol=3, protocols=[1, 3])
    assert (desk.vm("web1").protocol, desk.vm("web1").repeats) == (1, False)
    asked(desk, worker)
    again = desk.reconnected(worker)
    desk.hello(again, protocol=3, protocols=[1, 3])
    assert given(desk, again) == []


@pytest.mark.parametrize("when", ["before the death", "between", "it waits"])
def test_that_its_client_is_gone_the_next_worker_hears_too(when: str) -> None:
    desk = Desk()
    worker = desk.worker("web1", **SPEAKS)
    if when == "it waits":
        worker = dead(desk, worker)
        desk.ask("qmp", "vm/web1", {"command": "stop"})
    else:
        asked(desk, worker)
    if when == "before the death":
        desk.core.on_client_gone(CLIENT)
    successor = worker if when == "it waits" else dead(desk, worker)
    if when != "before the death":
        desk.core.on_client_gone(CLIENT)
    desk.take(ToWorker)  # the dead one's
    desk.hello(successor, **SPEAKS)
    heard = [message.op for message in desk.requests(successor) if message.op in ("qmp", "cancel")]
    assert heard == ["qmp", "cancel"]
