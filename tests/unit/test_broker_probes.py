# SPDX-License-Identifier: Apache-2.0
"""The host's operation `capabilities` in the core: one prober for a binary, whoever asks; what becomes of requests when one ends."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from vmloop.broker.actions import Fork, KillWorker, ToClient, ToWorker, WatchWorker
from vmloop.broker.probes import MAX_PROBERS
from vmloop.common.definition import DEFAULT_BINARY
from vmloop.common.errors import BadRequest
from vmloop.common.majordomo import Dialect, Envelope, build_request
from vmloop.common.names import VmName, is_prober, vm_name
from vmloop.common.pack import pack, unpack, unpack_map
from vmloop.common.settings import BrokerSettings
from vmloop.common.wire import Kind, Message, decode, encode

from ..fakes.broker_desk import Desk

PID = 501


class Prober(NamedTuple):
    """One that was forked, as the desk plays it."""

    name: VmName
    pid: int
    identity: bytes


def forked(desk: Desk, pid: int = PID) -> Prober:
    [fork] = desk.take(Fork)
    desk.core.probes.on_forked(fork.name, pid)
    return Prober(fork.name, pid, b"p%d" % pid)


def hello(desk: Desk, prober: Prober) -> None:
    body = pack({"worker_pid": prober.pid, "worker_ticks": 7})
    frame = encode(Message(kind=Kind.HELLO, service=f"probe/{prober.name}", body=body))
    desk.core.on_worker(prober.identity, [frame], desk.now)


def sent(desk: Desk, prober: Prober) -> list[Message]:
    actions = desk.take(ToWorker)
    assert {action.identity for action in actions} <= {prober.identity}
    return [decode(action.frame) for action in actions]


def answer(desk: Desk, prober: Prober, request: Message, value: object) -> None:
    frame = encode(Message(kind=Kind.REPLY, id=request.id, body=pack(value)))
    desk.core.on_worker(prober.identity, [frame], desk.now)


def ended(desk: Desk, prober: Prober) -> None:
    desk.core.probes.on_exit(prober.name, prober.pid, desk.now)


def asked(desk: Desk, binary: str | None = None, **more: object) -> None:
    desk.ask("capabilities", args={**({"binary": binary} if binary else {}), **more}, reading=True)


def ready(desk: Desk, binary: str | None = None, pid: int = PID) -> tuple[Prober, Message]:
    """One that has the first request."""
    asked(desk, binary)
    prober = forked(desk, pid)
    hello(desk, prober)
    [request] = sent(desk, prober)
    return prober, request


def test_the_request_waits_for_its_prober_and_the_answer_goes_back() -> None:
    desk = Desk()
    asked(desk)
    assert not desk.take(ToWorker)
    prober = forked(desk)
    hello(desk, prober)
    [request] = sent(desk, prober)
    assert (request.op, unpack_map(request.body)) == ("capabilities", {"binary": DEFAULT_BINARY, "refresh": False})
    answer(desk, prober, request, {"format": 1})
    got = desk.answer()
    assert (got.message.id, got.value) == (7, {"format": 1})


def test_many_who_ask_for_a_binary_get_one_prober() -> None:
    desk = Desk()
    for _ in range(5):
        asked(desk, "/usr/bin/q")
    prober = forked(desk)
    hello(desk, prober)
    requests = sent(desk, prober)
    assert len(requests) == 5
    asked(desk, "/usr/bin/q")
    assert not desk.take(Fork)
    requests += sent(desk, prober)
    for request in requests:
        answer(desk, prober, request, 1)
    assert len(desk.answers()) == 6


def test_two_binaries_have_a_prober_each() -> None:
    desk = Desk()
    ready(desk, "/a", 501)
    other, request = ready(desk, "/b", 502)
    answer(desk, other, request, 2)
    assert desk.answer().value == 2  # whatever the first is at


def test_a_prober_has_a_name_that_no_vm_can_have() -> None:
    desk = Desk()
    prober, _ = ready(desk)
    assert is_prober(prober.name)
    with pytest.raises(BadRequest):
        vm_name(prober.name)
    assert desk.value("list") == []


def test_a_prober_that_nobody_waits_for_may_go() -> None:
    desk = Desk()
    prober, request = ready(desk)
    answer(desk, prober, request, 1)
    ended(desk, prober)
    assert not desk.take(Fork)
    ready(desk, pid=502)  # and the next request gets another one


def test_what_an_ended_prober_owes_the_next_one_gets() -> None:
    desk = Desk()
    prober, _ = ready(desk)
    ended(desk, prober)
    after = forked(desk, 502)
    hello(desk, after)
    [request] = sent(desk, after)
    answer(desk, after, request, 3)
    assert desk.answer().value == 3


def test_a_request_that_has_cost_two_probers_is_answered() -> None:
    desk = Desk()
    prober, _ = ready(desk)
    ended(desk, prober)
    after = forked(desk, 502)
    hello(desk, after)
    ended(desk, after)
    assert desk.answer().code == "worker-lost"
    assert not desk.take(Fork)


def test_a_prober_that_cannot_be_made_is_told() -> None:
    desk = Desk()
    asked(desk)
    [fork] = desk.take(Fork)
    desk.core.probes.on_not_forked(fork.name, "no memory", desk.now)
    got = desk.answer()
    assert (got.code, "no memory" in got.value["message"]) == ("worker-lost", True)


def test_a_prober_that_does_not_present_itself_is_ended() -> None:
    desk = Desk(BrokerSettings(worker_hello=3.0))
    desk.ask("capabilities", seconds=20.0)
    prober = forked(desk)
    assert desk.core.next_due() == desk.now + 3.0
    desk.tick(3.0)
    assert [action.name for action in desk.take(KillWorker)] == [prober.name]
    assert desk.answer().code == "worker-lost"


def test_each_who_waits_has_a_deadline_of_its_own() -> None:
    desk = Desk()
    desk.ask("capabilities", id=1, seconds=1.0)
    desk.ask("capabilities", id=2, seconds=9.0)
    prober = forked(desk)
    hello(desk, prober)
    _, second = sent(desk, prober)
    desk.tick(2.0)
    got = desk.answer()
    assert (got.message.id, got.code) == (1, "deadline")
    answer(desk, prober, second, 1)
    assert desk.answer().message.id == 2


def test_a_prober_of_an_earlier_broker_gets_nothing_to_do() -> None:
    desk = Desk()
    hello(desk, Prober(VmName("@0123456789abcdef"), 9, b"old"))
    assert desk.core.actions == []
    assert desk.value("list") == []


def test_a_prober_whose_fork_was_not_told_is_watched_from_its_greeting() -> None:
    desk = Desk()
    asked(desk)
    [fork] = desk.take(Fork)
    hello(desk, Prober(fork.name, 77, b"p"))
    assert desk.take(WatchWorker) == [WatchWorker(fork.name, 77, 7)]


def test_a_prober_that_connects_anew_gets_what_it_may_not_have_got() -> None:
    desk = Desk()
    prober, _ = ready(desk)
    again = prober._replace(identity=b"again")
    hello(desk, again)
    [request] = sent(desk, again)
    answer(desk, again, request, 1)
    assert desk.answer().value == 1


@pytest.mark.parametrize("body", [b"", b"\xc1", pack([1])])
def test_a_greeting_that_makes_no_sense_harms_nobody(body: bytes) -> None:
    desk = Desk()
    asked(desk)
    prober = forked(desk)
    frame = encode(Message(kind=Kind.HELLO, service=f"probe/{prober.name}", body=body))
    desk.core.on_worker(b"x", [frame], desk.now)
    hello(desk, prober)
    assert len(desk.take(ToWorker)) >= 1


@pytest.mark.parametrize("kind", [Kind.STATUS, Kind.BYE, Kind.CONTROL])
def test_a_prober_that_says_anything_else_is_not_heard(kind: Kind) -> None:
    desk = Desk()
    dropped = desk.core.dropped
    desk.core.on_worker(b"x", [encode(Message(kind=kind, service="probe/@x", body=pack({"worker_pid": 5})))], desk.now)
    desk.core.on_worker(b"x", [encode(Message(kind=kind, service="probe/@x"))[:-1]], desk.now)
    assert desk.core.dropped == dropped + 2
    assert desk.core.actions == []


def test_a_majordomo_client_gets_the_document_too() -> None:
    desk = Desk()
    envelope = Envelope(Dialect.V02, False, "vmloop")
    desk.core.on_client(b"m", build_request(envelope, {"op": "capabilities", "id": "a"}, None), desk.now)
    prober = forked(desk)
    hello(desk, prober)
    [request] = sent(desk, prober)
    answer(desk, prober, request, {"format": 1})
    [reply] = desk.take(ToClient)
    assert unpack(reply.frames[-1]) == {"format": 1}


def test_probers_are_bounded() -> None:
    desk = Desk()
    for number in range(MAX_PROBERS):
        asked(desk, f"/q{number}")
    asked(desk, "/q0")  # has one already
    assert not desk.answers()
    assert desk.code("capabilities", {"binary": "/one/more"}) == "busy"


@pytest.mark.parametrize("wrong", [{"binary": ""}, {"binary": 3}, {"x": 1}, {"refresh": "yes"}, {"binary": "x" * 5000}])
def test_wrong_arguments_are_refused_before_anything_is_made(wrong: dict[str, object]) -> None:
    desk = Desk()
    assert desk.code("capabilities", wrong) == "bad-request"
    assert not desk.take(Fork)


def test_the_end_of_the_host_ends_probers() -> None:
    desk = Desk()
    prober, _ = ready(desk)
    desk.ask("shutdown", args={"vms": "kill"})
    assert KillWorker(prober.name) in desk.core.actions
