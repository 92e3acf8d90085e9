# SPDX-License-Identifier: Apache-2.0
"""`restart-workers` in the core: one after another, each with its deadlines, and what a broker and a worker agree on."""

from __future__ import annotations

from typing import Any

import pytest

from vmloop.broker.actions import Fork, KillWorker, Publish, RenewZygote, ToWorker
from vmloop.broker.rolling import LEAVE_SECONDS, READY_SECONDS
from vmloop.broker.roster import WorkerState
from vmloop.common.pack import unpack
from vmloop.common.wire import Kind, decode
from vmloop.common.worker_protocol import NEWEST, PROTOCOLS, agree

from ..fakes.broker_desk import Desk, Worker


def controls(desk: Desk) -> list[tuple[bytes, str]]:
    """What workers were told beside requests."""
    sent = [(action.identity, decode(action.frame)) for action in desk.take(ToWorker)]
    return [(identity, message.op) for identity, message in sent if message.kind is Kind.CONTROL]


def asked(desk: Desk, names: list[str] | None = None, seconds: float = 600.0) -> None:
    """Ask, and have the zygote replaced."""
    desk.ask("restart-workers", args={"names": names} if names is not None else {}, seconds=seconds)
    assert desk.take(RenewZygote) == [RenewZygote(even_fresh=True)]


def replaced(desk: Desk, worker: Worker) -> None:
    """A worker that was told to leave does, and its successor presents itself."""
    assert controls(desk) == [(worker.identity, "leave")]
    desk.bye(worker, alive=True, state="running")
    desk.exit(worker, went=True)
    desk.hello(desk.forked(worker.name))


def parts(desk: Desk) -> list[tuple[Kind, Any]]:
    return [(answer.message.kind, answer.value) for answer in desk.answers()]


def test_each_is_replaced_when_the_one_before_is_ready_again() -> None:
    desk = Desk()
    first, second = desk.worker("web1"), desk.worker("web2")
    asked(desk)
    assert controls(desk) == [], "not before there is a fresh zygote"
    desk.core.on_renewed("", desk.now)
    replaced(desk, first)
    assert parts(desk) == [(Kind.PARTIAL, {"name": "web1", "worker_pid": desk.vm("web1").worker_pid})]
    replaced(desk, second)
    partial, reply = parts(desk)
    assert partial[1]["name"] == "web2"
    assert reply == (Kind.REPLY, {"restarted": 2, "failed": []})
    assert desk.core.next_due() is None


def test_without_a_fresh_zygote_none_is_replaced() -> None:
    desk = Desk()
    desk.worker("web1")
    asked(desk)
    desk.core.on_renewed("no memory", desk.now)
    assert desk.answer().code == "internal"
    assert controls(desk) == []


def test_a_worker_that_does_not_leave_is_ended_and_one_that_does_not_come_back_is_failed() -> None:
    desk = Desk()
    first, second = desk.worker("web1"), desk.worker("web2")
    asked(desk)
    desk.core.on_renewed("", desk.now)
    assert controls(desk) == [(first.identity, "leave")]
    desk.tick(LEAVE_SECONDS - 0.1)
    assert desk.take(KillWorker) == []
    desk.tick(0.1)
    assert desk.take(KillWorker) == [KillWorker(first.name)]
    desk.exit(first)
    desk.tick(1.0)
    assert [action.name for action in desk.take(Fork)] == ["web1"]
    desk.tick(READY_SECONDS)
    [(kind, part)] = parts(desk)
    assert (kind, part["name"]) == (Kind.PARTIAL, "web1")
    assert "the VM runs on" in part["error"]
    replaced_later = controls(desk)
    assert replaced_later == [(second.identity, "leave")]
    desk.bye(second, alive=False)
    assert parts(desk)[-1][1]["restarted"] == 0, "its VM has ended"


def test_one_at_a_time_not_while_the_host_ends_and_only_what_runs() -> None:
    desk = Desk()
    desk.worker("web1")
    desk.known("web2")
    assert desk.code("restart-workers", {"names": ["web2"]}) == "not-running"
    assert desk.code("restart-workers", {"names": ["web3"]}) == "no-such-vm"
    asked(desk, ["web1"])
    assert desk.code("restart-workers") == "busy"
    desk.ask("shutdown", args={"vms": "kill"}, id=9)
    assert desk.answers()[0].code == "busy"
    assert desk.code("restart-workers") == "busy"


def test_what_is_left_when_its_time_is_over_is_left() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.worker("web2")
    asked(desk, seconds=5.0)
    desk.core.on_renewed("", desk.now)
    desk.tick(6.0)
    assert desk.answer().code == "deadline"
    replaced(desk, worker)
    assert controls(desk) == []
    asked(desk)


# -- what they speak --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "agreed"),
    [(None, 1), ([1], 1), ([1, 2], 2), ([2, 3, 99], 2), ([3], None), ([], None), ("12", None), ([True, "2"], None)],
)
def test_the_newest_that_both_speak_is_chosen(named: object, agreed: int | None) -> None:
    assert agree(named, (1, 2)) == agreed


def test_a_worker_is_told_what_was_agreed_and_an_old_one_is_not() -> None:
    desk = Desk()
    new, old = desk.process("web1"), desk.process("web2")
    desk.hello(new, protocols=list(PROTOCOLS))
    [told] = desk.take(ToWorker)
    assert (told.identity, decode(told.frame).op) == (new.identity, "agreed")
    assert unpack(decode(told.frame).body) == {"protocol": NEWEST}
    desk.hello(old)
    assert desk.take(ToWorker) == []
    assert (desk.vm("web1").protocol, desk.vm("web2").protocol) == (NEWEST, 1)


def test_a_worker_that_speaks_nothing_of_ours_is_replaced_by_one_with_our_code() -> None:
    desk = Desk()
    strange = desk.process("web1")
    desk.hello(strange, protocols=[7])
    assert controls(desk) == [(strange.identity, "leave")]
    assert desk.take(RenewZygote) == [RenewZygote(even_fresh=False)]
    [event] = desk.take(Publish)
    assert event.topic == b"host/WORKER_REFUSED"
    desk.ask("qmp", "vm/web1")
    assert desk.take(ToWorker) == [], "it waits for the next one"
    desk.bye(strange, alive=True)
    desk.exit(strange, went=True)
    desk.tick(1.0)
    next_one = desk.forked("web1")
    desk.hello(next_one, protocols=list(PROTOCOLS))
    assert [message.op for message in desk.requests(next_one)] == ["agreed", "qmp"]
    assert desk.vm("web1").worker.state is WorkerState.READY


def test_one_that_does_not_leave_is_ended() -> None:
    desk = Desk()
    desk.hello(desk.process("web1"), protocols=[7])
    desk.tick(10.1)
    assert [action.name for action in desk.take(KillWorker)] == ["web1"]
