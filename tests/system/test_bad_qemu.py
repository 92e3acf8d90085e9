# SPDX-License-Identifier: Apache-2.0
"""Whatever a QEMU does wrong, at its start, on its monitor or at its end, gets a coded error and costs nobody but itself."""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest

from vmloop.client import requests
from vmloop.client.session import Host
from vmloop.client.stream import Event
from vmloop.client.vm import Vm
from vmloop.common.cursor import Cursor
from vmloop.common.errors import (
    DeadlineExceeded,
    LaunchFailed,
    MonitorLost,
    OutcomeUnknown,
    TooLarge,
    VmloopError,
)

from ..fakes.scripted_qemu import install
from .doors import open_files
from .site import Site, signal_process, wait_for

pytestmark = pytest.mark.usefixtures("beside")

MIB = 1 << 20
MAX_REPLY = 24 * MIB


@pytest.fixture
def settings() -> str:
    """Short patience with a QEMU that says nothing."""
    return f"[worker]\nlaunch = 2.0\nmax_reply = {MAX_REPLY}\nreconnect_max_delay = 0.5\n"


# -- the start --------------------------------------------------------------------------------------------------------------


def script(site: Site, text: str, mode: int = 0o755) -> str:
    """A program for a definition's binary."""
    path = site.root / "qemu"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def not_started(site: Site, host: Host, binary: str, *args: str) -> LaunchFailed:
    """Why a VM did not start; afterwards it is shut off, and nothing of it runs."""
    site.define(host, "bad", *args, binary=binary)
    with pytest.raises(LaunchFailed) as caught:
        host.vm("bad").start()
    shown = next(vm for vm in host.list() if vm.name == "bad")
    assert (shown.state, shown.reason, shown.pid) == ("shutoff", "failed", None)
    with_monitor = [pid for pid, command in site.processes().items() if "chardev=vmloop-monitor" in command]
    assert with_monitor == [host.vm("beside").show().pid]
    assert "bad" in caught.value.message or binary in caught.value.message
    return caught.value


SCRIPTS: dict[str, tuple[str, int, str]] = {
    "is not executable": ("#!/bin/sh\n", 0o644, "no executable"),
    "is no program": ("\x01\x02\x03", 0o755, "cannot start"),
    "has no interpreter": ("#!/nowhere/sh\n", 0o755, "cannot start"),
    "ends without a word": ("#!/bin/sh\nexit 3\n", 0o755, "exited with status 3: nothing was printed"),
    "says why it ends": ("#!/bin/sh\necho one\necho two >&2\nexit 1\n", 0o755, "exited with status 1: two"),
    "ends well, but ends": ("#!/bin/sh\nexit 0\n", 0o755, "exited with status 0"),
    "is killed": ("#!/bin/sh\nkill -9 $$\n", 0o755, "ended by SIGKILL"),
    "prints no UTF-8": ("#!/bin/sh\nprintf '\\377\\376\\n'\nexit 1\n", 0o755, "\ufffd\ufffd"),
    "prints megabytes": ("#!/bin/sh\nhead -c 9000000 /dev/zero | tr '\\0' x\necho; echo done; exit 1\n", 0o755, "done"),
    "never greets": ("#!/bin/sh\nexec sleep 600\n", 0o755, "no QMP greeting"),
    "ignores signals": ("#!/bin/sh\ntrap '' TERM INT HUP\nexec sleep 600\n", 0o755, "no QMP greeting"),
}


def test_a_binary_that_does_not_come_up_is_told_about(site: Site, host: Host) -> None:
    for kind, (text, mode, wanted) in SCRIPTS.items():
        error = not_started(site, host, script(site, text, mode))
        assert wanted in error.message, kind
        assert len(error.fields["log"]) <= 4096, kind
        if kind == "says why it ends":
            assert error.fields["log"] == "one\ntwo"


def test_a_binary_that_is_not_there_is_named(site: Site, host: Host) -> None:
    assert "'/nowhere/qemu'" in not_started(site, host, "/nowhere/qemu").message
    assert "no-such-qemu" in not_started(site, host, "no-such-qemu").message
    assert str(site.root) in not_started(site, host, str(site.root)).message
    assert "simulated disk" in not_started(site, host, "simulated", "-fail", "simulated disk is missing").message


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["greet=Hello, this is QEMU\n"], "no QMP greeting"),
        (["greet="], "no QMP greeting"),
        (["greet=" + "[" * 60_000 + "\n"], "no QMP greeting"),
        (["hang-up"], "no QMP greeting"),
        (["refuse"], "not today"),
    ],
    ids=["garbage", "nothing", "depth", "hangs up", "refuses"],
)
def test_a_monitor_that_does_not_greet_properly_is_no_start(
    site: Site, host: Host, args: list[str], wanted: str
) -> None:
    assert wanted in not_started(site, host, install(site.root), *args).message


@pytest.mark.parametrize("fault", ["no_greeting", "silent", "frozen", "busy"])
def test_a_simulated_qemu_that_says_nothing_is_no_start(site: Site, host: Host, fault: str) -> None:
    not_started(site, host, "simulated", "-simulate", fault)


def test_an_odd_greeting_is_good_enough(site: Site, host: Host) -> None:
    odd = ['{"QMP": 5}', '{"QMP": {"version": [], "capabilities": {}}}', '{"event": "A", "data": {}}\n{"QMP": {}}']
    for greeting in odd:
        site.define(host, "odd", f"greet={greeting}\n", binary=install(site.root))
        assert host.vm("odd").start().state == "running", greeting
        host.vm("odd").kill()


def test_events_before_the_greeting_do_not_keep_a_vm_from_starting(site: Site, host: Host) -> None:
    site.define(host, "early", "-simulate", "early_events=100")
    assert host.vm("early").start().state == "running"


def test_a_vm_whose_start_failed_can_be_mended_and_started(site: Site, host: Host) -> None:
    not_started(site, host, "simulated", "-fail", "no")
    site.define(host, "bad")
    assert host.vm("bad").start().epoch == 2


# -- what it says -----------------------------------------------------------------------------------------------------------


def scripted(site: Site, host: Host) -> Vm:
    """A VM that says what it is told to say."""
    site.define(host, "odd", binary=install(site.root))
    host.vm("odd").start()
    return host.vm("odd")


def say(vm: Vm, text: str, **more: Any) -> Any:
    return vm.qmp("x-say", {"text": text, **more}, timeout=10.0)


def garbled(vm: Vm) -> int:
    qmp = vm.show().qmp
    assert qmp is not None
    return qmp.garbled


LINES = {
    "no JSON": "%%%\n",
    "empty": "\r\n\n",
    "a list": "[1, 2]\n",
    "a number": "5\n",
    "neither": '{"colour": "blue"}\n',
    "no UTF-8": '{"event": "\xff\xfe"}\n',
    "half a pair": '{"event": "A", "data": {"text": "\\ud800"}}\n',
    "an event without a name": '{"event": null}\n',
    "an event with a list": '{"event": "A", "data": []}\n',
    "an event with a long name": '{"event": "' + "A" * 300 + '"}\n',
    "a reply to nobody": '{"return": {}, "id": 99999}\n{"return": {}, "id": "x"}\n{"return": {}, "id": [1]}\n{"return": {}}\n',
    "an error to nobody": '{"error": {"class": "GenericError", "desc": "?"}}\n{"error": null, "id": {}}\n',
    "a megabyte deep": "[" * MIB + "\n",
    "a megabyte of nothing": "x" * MIB + "\n",
    "zero bytes": "\0" * 1000 + "\n",
}


def test_lines_that_make_no_sense_are_counted_and_cost_nothing(site: Site, host: Host) -> None:
    vm = scripted(site, host)
    before = vm.show()
    for kind, line in LINES.items():
        assert say(vm, line) == {}, kind
        assert vm.qmp("query-status")["status"] == "running", kind
    assert wait_for(lambda: garbled(vm) >= 10)  # the worker tells of the first ten at once
    say(vm, '{"event": "STOP"}\n')
    vm.wait("paused", timeout=10)  # with this news comes the whole count
    assert garbled(vm) == sum(line.count("\n") for line in LINES.values())
    after = vm.show()
    assert (after.monitor, after.epoch, after.worker_pid) == ("ready", 1, before.worker_pid)
    assert [event.event for event in kept(host, "odd") if event.origin == "qmp"] == ["STOP"]


KINDS = ["not-json", "truncated", "not-an-object", "unknown-id", "no-id", "neither", "nameless-event", "binary", "deep"]


def test_replies_that_make_no_sense_end_only_their_own_commands(site: Site, host: Host) -> None:
    """More of them than the worker keeps on the wire at once."""
    site.define(host, "odd")
    vm = host.vm("odd")
    vm.start()
    for kind in KINDS:
        with pytest.raises(DeadlineExceeded):
            vm.qmp("x-simulate", {"garbled": 1, "garbled_kind": kind}, timeout=0.1)
        with pytest.raises(DeadlineExceeded):
            vm.qmp("x-simulate", {"garbled": 1, "garbled_kind": kind}, timeout=0.1, reading=True)
        assert vm.qmp("query-status")["status"] == "running"
    assert vm.qmp("x-simulate", {"garbled": 1, "garbled_kind": "twice"})
    assert wait_for(lambda: garbled(vm) >= 10)  # and the rest at the next news of the VM
    assert vm.show().epoch == 1
    assert not wait_for(lambda: vm.show().monitor == "busy", 1.5)


def test_a_caller_whose_reply_was_damaged_is_told_when_the_next_one_comes(site: Site, host: Host) -> None:
    site.define(host, "odd")
    host.vm("odd").start()
    breaking = {"garbled": 1, "garbled_kind": "not-json"}
    asked = [
        requests.qmp("vm/odd", "x-simulate", breaking, False, False, 20.0, True),
        requests.qmp("vm/odd", "query-status", None, False, False, 20.0, True),
    ]
    answers = dict(host.call_many(asked))
    assert isinstance(answers[0], MonitorLost)
    assert not isinstance(answers[1], VmloopError)


def test_an_event_too_large_to_be_sent_is_told_by_its_size(site: Site, host: Host) -> None:
    vm = scripted(site, host)
    with host.events("odd") as events:
        say(vm, '{"event": "BIG", "data": {"text": "@"}}\n{"event": "SMALL", "data": {}}\n', fill=17 * MIB)
        big, small = events.wait_for("BIG", 10.0), events.wait_for("SMALL", 10.0)
    assert big.data["too_large"] > 17 * MIB
    assert small.seq == big.seq + 1
    assert [event.event for event in kept(host, "odd")][-2:] == ["BIG", "SMALL"]


def kept(host: Host, name: str) -> list[Event]:
    newest = host.vm(name).cursor()
    with host.events(name, since=Cursor(newest.epoch, 0), follow=False) as events:
        return list(events)


def test_a_deep_event_comes_through_or_is_counted(site: Site, host: Host) -> None:
    vm = scripted(site, host)
    for depth in (100, 500, 900, 990, 1000, 1020, 1100):
        say(vm, '{"event": "DEEP", "data": {"a": ' + "[" * depth + "]" * depth + "}}\n")
    assert vm.qmp("query-status")["status"] == "running"
    deep = [event for event in kept(host, "odd") if event.event == "DEEP"]
    assert wait_for(lambda: len(deep) + garbled(vm) == 7)
    assert len(deep) >= 2


# -- how much it says -------------------------------------------------------------------------------------------------------


def test_big_replies_come_through_up_to_a_message_and_are_refused_beyond(site: Site, host: Host) -> None:
    site.define(host, "odd")
    vm = host.vm("odd")
    vm.start()
    for size in (MIB, 15 * MIB):
        vm.qmp("x-simulate", {"big_reply": size})
        assert len(vm.qmp("query-status")["x-padding"]) == size
    with pytest.raises(TooLarge) as caught:
        vm.qmp("x-simulate", {"big_reply": 20 * MIB})
    assert caught.value.fields["limit"] == 16 * MIB
    with pytest.raises(TooLarge):
        vm.qmp("query-status")
    vm.qmp("x-simulate", {"big_reply": 0})
    assert vm.qmp("query-status")["status"] == "running"
    assert (vm.show().state, vm.show().monitor) == ("running", "ready")


def test_a_line_longer_than_the_limit_costs_the_connection_and_not_the_vm(site: Site, host: Host) -> None:
    vm = scripted(site, host)
    pid = vm.show().pid
    with host.events("odd") as events:
        with pytest.raises(OutcomeUnknown):
            say(vm, "@", fill=MAX_REPLY + MIB, reply=False)
        lost = events.wait_for("EVENTS_LOST", 15.0)
    assert "monitor" in lost.data["reason"]
    assert (vm.qmp("query-status")["status"], vm.show().pid, vm.show().epoch) == ("running", pid, 1)


def test_a_flood_of_events_leaves_commands_and_neighbours_alone(site: Site, host: Host, beside: Vm) -> None:
    site.define(host, "odd", "-simulate", "flooding=3000")
    vm = host.vm("odd")
    vm.start()
    for _ in range(50):
        assert vm.qmp("query-status", timeout=5.0)["status"] == "running"
        assert beside.qmp("query-status", timeout=5.0)["status"] == "running"
    vm.qmp("x-simulate", {"flooding": 0})
    first, *rest = [event.seq for event in kept(host, "odd")]
    assert rest == list(range(first + 1, first + 1 + len(rest)))


# -- when it goes -----------------------------------------------------------------------------------------------------------


def states_of(host: Host, name: str) -> list[tuple[str, str]]:
    return [(event.data["new"], event.data["reason"]) for event in kept(host, name) if event.event == "VM_STATE"]


def test_a_monitor_that_closes_under_a_living_vm_is_found_again(site: Site, host: Host) -> None:
    site.define(host, "odd")
    vm = host.vm("odd")
    pid = vm.start().pid
    worker = vm.show().worker_pid
    assert worker is not None
    before = open_files(worker)
    with host.events("odd") as events:
        with pytest.raises(OutcomeUnknown):
            vm.qmp("x-simulate", {"close_midline": True})
        events.wait_for("EVENTS_LOST", 15.0)
    assert states_of(host, "odd")[-2:] == [("unknown", "monitor-lost"), ("running", "unknown")]
    assert vm.qmp("query-status")["status"] == "running"
    shown = vm.show()
    assert (shown.pid, shown.epoch, shown.worker_pid, shown.monitor) == (pid, 1, worker, "ready")
    assert wait_for(lambda: open_files(worker) == before)


def test_a_half_line_before_the_end_of_a_connection_is_not_mixed_with_the_next(site: Site, host: Host) -> None:
    vm = scripted(site, host)
    with host.events("odd") as events:
        with pytest.raises((OutcomeUnknown, MonitorLost)):
            say(vm, '{"event": "HALF", "da', reply=False, close=True)
        events.wait_for("EVENTS_LOST", 15.0)
    assert garbled(vm) == 0
    assert "HALF" not in [event.event for event in kept(host, "odd")]
    assert vm.qmp("query-status")["status"] == "running"


def test_commands_in_flight_when_qemu_dies_end_by_what_they_were(site: Site, host: Host) -> None:
    site.define(host, "odd")
    vm = host.vm("odd")
    pid = vm.start().pid
    assert pid is not None
    vm.qmp("x-simulate", {"slow": 600})
    asked = [
        requests.qmp("vm/odd", "query-status", None, False, False, 60.0, True),
        requests.qmp("vm/odd", "stop", None, False, False, 60.0, False),
        requests.qmp("vm/odd", "cont", None, False, False, 60.0, False),
    ]

    def end_it() -> None:
        wait_for(lambda: host.stats("odd")[0].in_flight == len(asked))
        signal_process(pid, signal.SIGKILL)

    killer = threading.Thread(target=end_it)
    killer.start()
    ended = dict(host.call_many(asked))
    killer.join()
    assert isinstance(ended[0], MonitorLost)
    assert isinstance(ended[1], OutcomeUnknown)
    assert isinstance(ended[2], VmloopError)
    assert vm.wait("shutoff", timeout=10).reason == "crashed"
