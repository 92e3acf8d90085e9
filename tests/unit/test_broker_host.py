# SPDX-License-Identifier: Apache-2.0
"""Operations of the host, and show: answered from what is known, checked before a worker is bothered."""

from __future__ import annotations

import time
from typing import Any

import pytest

import vmloop
from vmloop.broker.host import PROTOCOL
from vmloop.common.pack import unpack

from ..fakes.broker_desk import Desk

# -- looking ----------------------------------------------------------------------------------------------------------------


def test_ping_tells_the_time() -> None:
    before = time.time()
    assert before <= Desk().value("ping")["time"] <= time.time()


def test_version_tells_program_protocol_and_process() -> None:
    answer = Desk().value("version")
    assert (answer["version"], answer["protocol"], answer["pid"]) == (vmloop.__version__, PROTOCOL, 4242)
    assert answer["started"] <= time.time()


def test_a_new_host_has_no_vms() -> None:
    desk = Desk()
    assert desk.value("list") == []
    assert desk.value("stats") == []


def test_list_has_every_vm_in_the_order_of_names_with_what_its_worker_said() -> None:
    desk = Desk()
    worker = desk.process("web2")
    desk.hello(worker, epoch=3, seq=14, since=1.5, monitor="ready", agent="waiting", pid=77, attached=True)
    desk.known("web1", state="crashed", reason="panic")
    desk.core.actions.clear()
    off, on = desk.value("list")
    assert on == {
        "name": "web2",
        "state": "running",
        "reason": "resumed",
        "since": 1.5,
        "monitor": "ready",
        "agent": "waiting",
        "epoch": 3,
        "seq": 14,
        "pid": 77,
        "worker": "ready",
        "worker_pid": worker.pid,
        "blocked": 0.0,
        "age": 0.0,
        "defined": True,
        "attached": True,
    }
    assert (off["name"], off["state"], off["reason"]) == ("web1", "crashed", "panic")
    assert (off["worker"], off["worker_pid"], off["pid"], off["age"], off["monitor"], off["agent"]) == (
        ("absent", None, None, None, "lost", "absent")
    )


def test_age_is_how_long_ago_the_worker_last_said_anything() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.now += 2.5
    assert desk.value("list")[0]["age"] == 2.5
    desk.ask("qmp", "vm/web1")
    [request] = desk.requests(worker)
    desk.reply(worker, request)
    desk.answers()
    desk.now += 0.25
    assert desk.value("list")[0]["age"] == 0.25
    assert desk.value("stats")[0]["age"] == 0.25


def test_blocked_is_what_the_status_page_says() -> None:
    desk = Desk()
    desk.worker("web1")
    desk.looker.blocked_for["web1"] = 4.56789
    assert desk.value("list")[0]["blocked"] == 4.568
    assert desk.value("show", service="vm/web1")["blocked"] == 4.568


def test_a_worker_that_is_gone_is_not_blocked_whatever_its_page_says() -> None:
    desk = Desk()
    worker = desk.worker("web1")
    desk.looker.blocked_for["web1"] = 99.0  # a page keeps what a dead worker last wrote
    desk.bye(worker)
    desk.exit(worker)
    assert desk.value("list")[0]["blocked"] == 0.0
    assert desk.value("show", service="vm/web1")["blocked"] == 0.0


def test_looking_bothers_no_worker() -> None:
    desk = Desk()
    desk.worker("web1")
    desk.known("web2")
    for op, service in (("list", "vmloop"), ("stats", "vmloop"), ("show", "vm/web1"), ("show", "vm/web2")):
        desk.value(op, service=service)
        assert desk.core.actions == []
        assert len(desk.core.inflight) == 0


def test_stats_tells_figures_of_qemu_and_worker_and_counts_of_requests() -> None:
    desk = Desk()
    worker = desk.worker("web1", pid=77)
    qemu = {"pid": 77, "cpu_seconds": 1.5, "rss_bytes": 4096, "threads": 3}
    desk.looker.processes[77] = qemu
    for number in range(3):
        desk.ask("qmp", "vm/web1", id=number)
    desk.reply(worker, desk.requests(worker)[0])
    desk.answers()
    [figures] = desk.value("stats")
    assert figures == {
        "name": "web1",
        "state": "running",
        "epoch": 1,
        "seq": 0,
        "age": 0.0,
        "in_flight": 2,
        "requests": 3,
        "restarts": 0,
        "qemu": qemu,
        "worker": None,
    }
    assert desk.looker.looked_at == [77, worker.pid]


def test_stats_of_some_are_of_these_in_the_order_asked() -> None:
    desk = Desk()
    for name in ("a", "b", "c"):
        desk.known(name)
    assert [figures["name"] for figures in desk.value("stats", {"names": ["c", "a"]})] == ["c", "a"]
    assert desk.value("stats", {"names": []}) == []
    assert desk.code("stats", {"names": ["a", "nobody"]}) == "no-such-vm"


def test_a_pid_that_is_none_is_looked_at_nowhere() -> None:
    desk = Desk()
    desk.worker("web1", pid="77")
    assert desk.value("stats")[0]["qemu"] is None


def test_show_has_all_of_list_and_more_and_null_for_what_is_not_known() -> None:
    desk = Desk()
    desk.worker(
        "web1", definition={"name": "web1"}, argv=["qemu"], binary="qemu", qmp={"oob": True}, worker_started=3.0
    )
    desk.known("web2")
    shown, listed = desk.value("show", service="vm/web1"), desk.value("list")[0]
    assert listed.items() <= shown.items()
    assert (shown["definition"], shown["argv"], shown["qmp"]) == ({"name": "web1"}, ["qemu"], {"oob": True})
    assert (shown["incarnation"], shown["worker_started"]) == (1, 3.0)
    unknown = desk.value("show", service="vm/web2")
    assert set(unknown) == set(shown)
    assert [unknown[key] for key in ("definition", "argv", "binary", "qmp", "started", "worker_started")] == [None] * 6


# -- names and arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "-a", "_a", "a b", "a\n", "ä", "a" * 65, None, 5, ["a"]]
)
@pytest.mark.parametrize("op", ["define", "undefine", "start", "attach", "stats"])
def test_what_is_no_name_is_refused_before_anything_is_made_of_it(op: str, name: Any) -> None:
    desk = Desk()
    arguments: dict[str, Any] = {"name": name}
    if op == "define":
        arguments = {"definition": {"name": name}}
    elif op == "stats":
        arguments = {"names": [name]}
    assert desk.code(op, arguments) == "bad-request"
    assert (desk.core.actions, len(desk.core.roster)) == ([], 0)


@pytest.mark.parametrize(
    ("op", "service", "arguments"),
    [
        ("ping", "vmloop", {"bogus": 1}),
        ("version", "vmloop", {"bogus": 1}),
        ("list", "vmloop", {"names": ["a"]}),
        ("stats", "vmloop", {"name": "a"}),
        ("stats", "vmloop", {"names": "a"}),
        ("stats", "vmloop", {"names": [1]}),
        ("define", "vmloop", {}),
        ("define", "vmloop", {"definition": "name"}),
        ("define", "vmloop", {"definition": {}}),
        ("define", "vmloop", {"definition": {"name": "a"}, "bogus": 1}),
        ("undefine", "vmloop", {}),
        ("start", "vmloop", {}),
        ("attach", "vmloop", {}),
        ("shutdown", "vmloop", {"vms": "both"}),
        ("shutdown", "vmloop", {"vms": "leave\n"}),
        ("shutdown", "vmloop", {"vms": None}),
        ("shutdown", "vmloop", {"bogus": 1}),
        ("show", "vm/web1", {"bogus": 1}),
        ("wait", "vm/web1", {}),
        ("wait", "vm/web1", {"state": "running"}),
        ("wait", "vm/web1", {"for": "gone"}),
        ("wait", "vm/web1", {"for": None}),
        ("wait", "vm/web1", {"for": "running", "bogus": 1}),
        ("bogus", "vmloop", {}),
        ("show", "vmloop", {}),
        ("LIST", "vmloop", {}),
    ],
)
def test_wrong_arguments_are_refused(op: str, service: str, arguments: dict[str, Any]) -> None:
    desk = Desk()
    desk.worker("web1")
    assert desk.code(op, arguments, service) == "bad-request"
    assert (desk.core.actions, len(desk.core.inflight), len(desk.core.roster)) == ([], 0, 1)
    assert not desk.core.finished


def test_an_unknown_operation_is_told_what_there_is() -> None:
    desk = Desk()
    desk.ask("lsit")
    assert "list" in desk.answer().value["message"]


@pytest.mark.parametrize("op", ["undefine", "start"])
def test_a_vm_that_is_not_there_is_no_such_vm(op: str) -> None:
    desk = Desk()
    assert desk.code(op, {"name": "web1"}) == "no-such-vm"
    assert desk.core.actions == []


@pytest.mark.parametrize("op", ["start", "attach"])
def test_a_vm_that_runs_is_not_started_or_attached_again(op: str) -> None:
    desk = Desk()
    desk.worker("web1")
    assert desk.code(op, {"name": "web1", "qmp": "/x"}) == "already-running"
    assert desk.core.actions == []


# -- through a worker -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("define", {"definition": {"name": "web1", "bogus": 1}}),
        ("undefine", {"name": "web1", "bogus": 1}),
        ("start", {"name": "web1", "paused": True}),
        ("attach", {"name": "web1", "qmp": "/x", "pid": 7}),
    ],
)
def test_what_changes_a_vm_goes_to_a_worker_made_for_it_with_all_arguments(op: str, arguments: dict[str, Any]) -> None:
    desk = Desk()
    desk.known("web1")
    desk.ask(op, args=arguments, key=b"once", seconds=5.0, id=9)
    worker = desk.forked("web1")
    desk.hello(worker, alive=False, state="shutoff")
    [request] = desk.requests(worker)
    assert (request.service, request.op, unpack(request.body)) == ("vm/web1", op, arguments)
    assert (request.key, request.seconds) == (b"once", 5.0)
    desk.reply(worker, request, {"name": "web1"}, epoch=1, seq=2)
    answer = desk.answer()
    assert (answer.message.id, answer.value, answer.message.epoch, answer.message.seq) == (9, {"name": "web1"}, 1, 2)


def test_a_ready_worker_is_used_at_once() -> None:
    desk = Desk()
    worker = desk.worker("web1", alive=False, state="shutoff")
    desk.ask("start", args={"name": "web1"})
    assert [request.op for request in desk.requests(worker)] == ["start"]
    assert desk.core.actions == []


def test_several_requests_for_a_vm_have_one_worker_made() -> None:
    desk = Desk()
    for number in range(3):
        desk.ask("define", args={"definition": {"name": "web1", "n": number}}, id=number)
    worker = desk.forked("web1")
    desk.hello(worker, defined=False, alive=False, started=None)
    assert [unpack(request.body)["definition"]["n"] for request in desk.requests(worker)] == [0, 1, 2]


def test_a_name_is_listed_only_when_there_is_something_behind_it() -> None:
    desk = Desk()
    desk.ask("define", args={"definition": {"name": "web1"}})
    worker = desk.forked("web1")
    assert desk.value("list") == []
    assert desk.code("start", {"name": "web1"}) == "no-such-vm"
    desk.hello(worker, defined=False, alive=False, started=None)
    assert desk.value("list") == []
    desk.status(worker, defined=True, alive=False, started=None, state="shutoff")
    assert [vm["name"] for vm in desk.value("list")] == ["web1"]
