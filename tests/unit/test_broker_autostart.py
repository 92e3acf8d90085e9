# SPDX-License-Identifier: Apache-2.0
"""VMs that are started with the host: once in a boot, a few at a time, and a failure is told and stops no other."""

from __future__ import annotations

from vmloop.broker.actions import BootServed, Fork, Publish
from vmloop.broker.autostart import AT_ONCE, SETTLE_SECONDS, START_SECONDS
from vmloop.common.names import VmName
from vmloop.common.pack import unpack
from vmloop.common.wire import Kind

from ..fakes.broker_desk import Desk, Worker


def begun(desk: Desk, *names: str) -> None:
    desk.core.autostart.begin([VmName(name) for name in names], desk.now)


def started(desk: Desk, worker: Worker) -> None:
    """A worker that was made for it carries out the start."""
    desk.hello(worker, alive=False, state="shutoff", started=None)
    [request] = [message for message in desk.requests(worker) if message.kind is Kind.REQUEST]
    assert (request.op, unpack(request.body)) == ("start", {"name": worker.name})
    desk.status(worker)
    desk.reply(worker, request, {"name": worker.name, "state": "running"})


def failures(desk: Desk) -> list[tuple[str, str]]:
    events = [unpack(action.body) for action in desk.take(Publish) if action.topic == b"host/AUTOSTART_FAILED"]
    return [(event["vm"], event["data"]["error"]) for event in events]


def made(desk: Desk) -> list[Worker]:
    return [desk.process(action.name) for action in desk.take(Fork)]


def test_a_few_at_a_time_and_the_boot_is_served_when_all_were_tried() -> None:
    desk = Desk()
    names = [f"vm{number}" for number in range(AT_ONCE + 2)]
    for name in names:
        desk.known(name)
    begun(desk, *names)
    workers = made(desk)
    assert [worker.name for worker in workers] == names[:AT_ONCE]
    started(desk, workers[0])
    [another] = made(desk)
    assert another.name == names[AT_ONCE]
    for worker in (*workers[1:], another):
        assert desk.take(BootServed) == []
        started(desk, worker)
    [last] = made(desk)
    started(desk, last)
    assert len(desk.take(BootServed)) == 1
    assert failures(desk) == []
    desk.tick(START_SECONDS)
    assert made(desk) == []


def test_a_start_that_fails_is_told_and_the_others_go_on() -> None:
    desk = Desk()
    desk.known("web1")
    desk.known("web2")
    begun(desk, "web1", "web2")
    first, second = made(desk)
    desk.hello(first, alive=False, state="shutoff", started=None)
    [request] = desk.requests(first)
    desk.reply(first, request, {"code": "launch-failed", "message": "no such disk"}, kind=Kind.ERROR)
    assert failures(desk) == [("web1", "no such disk")]
    started(desk, second)
    assert len(desk.take(BootServed)) == 1


def test_one_that_a_killed_broker_had_started_is_no_failure() -> None:
    desk = Desk()
    desk.known("web1")
    begun(desk, "web1")
    [worker] = made(desk)
    desk.hello(worker)
    [request] = [message for message in desk.requests(worker) if message.kind is Kind.REQUEST]
    desk.reply(worker, request, {"code": "already-running", "message": "VM web1 is running"}, kind=Kind.ERROR)
    assert failures(desk) == []
    assert len(desk.take(BootServed)) == 1


def test_one_that_takes_too_long_is_told() -> None:
    desk = Desk()
    desk.known("web1")
    begun(desk, "web1")
    desk.tick(START_SECONDS + 1)
    [(name, why)] = failures(desk)
    assert name == "web1"
    assert "no worker for it came up in time" in why
    assert len(desk.take(BootServed)) == 1


def test_what_runs_already_is_left_and_what_ran_before_the_boot_is_started_when_that_is_known() -> None:
    desk = Desk()
    desk.worker("runs")
    before = desk.known("before", alive=True, state="unknown")
    desk.core.crew.adopt(before, desk.now)
    begun(desk, "runs", "before")
    assert desk.take(BootServed) == []
    worker = desk.forked("before")
    desk.hello(worker, alive=False, state="shutoff", reason="host-reboot")
    assert [message.op for message in desk.requests(worker)] == ["start"], (
        "it is on its way out, and will not take it up"
    )
    desk.bye(worker, reason="host-reboot")
    desk.exit(worker, went=True)
    started(desk, desk.forked("before"))
    assert len(desk.take(BootServed)) == 1


def test_a_vm_of_which_nobody_can_tell_whether_it_runs_is_not_started() -> None:
    desk = Desk()
    desk.known("web1", alive=True, state="unknown")
    begun(desk, "web1")
    desk.tick(SETTLE_SECONDS + 1)
    assert [name for name, _ in failures(desk)] == ["web1"]
    assert made(desk) == []


def test_none_is_started_while_the_host_ends_and_the_boot_is_not_served() -> None:
    desk = Desk()
    for number in range(AT_ONCE + 1):
        desk.known(f"vm{number}")
    begun(desk, *(f"vm{number}" for number in range(AT_ONCE + 1)))
    workers = made(desk)
    desk.core.drain(desk.now)
    started(desk, workers[0])
    assert made(desk) == []
    assert desk.take(BootServed) == []


def test_nothing_to_start_serves_the_boot_at_once() -> None:
    desk = Desk()
    begun(desk)
    assert len(desk.take(BootServed)) == 1
