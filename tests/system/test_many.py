# SPDX-License-Identifier: Apache-2.0
"""Many VMs at once, and the death of each of vmloop's own processes under them: every VM runs on, every command gets its true answer."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmloop.client import requests
from vmloop.client.session import Host
from vmloop.client.stream import Event
from vmloop.client.vm import Vm
from vmloop.common.errors import Busy, VmloopError
from vmloop.common.names import vm_name
from vmloop.common.page import LEDGER_SLOTS, Page

from .doors import open_files, resident_bytes
from .site import Site, kill_process, signal_process, wait_for

# Generous: a machine with two busy cores takes a tenth of it.
MANY_SECONDS = 60.0
SERVED_SECONDS = 3.0  # design, section 12
KILLS = 4  # in a row: each next worker is made later than the one before


def answers_of(host: Host, asked: list[requests.Request[Any]]) -> list[Any]:
    """All answers in the order of the requests; an error is raised."""
    found: dict[int, Any] = {}
    for place, answer in host.call_many(asked):
        assert not isinstance(answer, VmloopError), answer
        found[place] = answer.value
    return [found[place] for place in range(len(asked))]


def attach_all(host: Host, directory: Path, names: list[str]) -> None:
    answers_of(host, [requests.attach(name, directory / f"{name}.qmp", None, None) for name in names])


def query(name: str, command: str = "query-name") -> requests.Request[Any]:
    return requests.qmp(f"vm/{name}", command, None, False, False, None, None)


def facts(host: Host) -> list[tuple[str, str, int, int | None, int | None]]:
    """What must not change of each VM."""
    return [(vm.name, vm.state, vm.epoch, vm.pid, vm.worker_pid) for vm in host.list()]


def own_bytes(pid: int) -> int:
    """Memory of a process that it shares with nobody, not with the zygote that it was forked from either."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def test_two_hundred_vms_are_attached_listed_commanded_and_let_go(site: Site, host: Host, beside: Vm) -> None:
    directory, names = site.simulate(200)
    broker = host.version().pid
    files = open_files(broker)
    took: dict[str, float] = {}

    def timed(what: str, act: Callable[[], Any]) -> Any:
        began = time.monotonic()
        value = act()
        took[what] = time.monotonic() - began
        return value

    timed("attach", lambda: attach_all(host, directory, names))
    listed = timed("list", host.list)
    assert {(vm.state, vm.epoch) for vm in listed} == {("running", 1)}
    assert [vm.name for vm in listed] == ["beside", *names]
    assert len({vm.worker_pid for vm in listed}) == 201
    answers = timed("command", lambda: answers_of(host, [query(name) for name in names * 5]))
    assert answers == [{"name": name} for name in names * 5]
    stats = timed("stats", host.stats)
    assert len(stats) == 201
    own = [own_bytes(vm.worker_pid) for vm in listed[:20] if vm.worker_pid is not None]
    timed("detach", lambda: answers_of(host, [requests.detach(f"vm/{name}") for name in names]))
    assert wait_for(lambda: [vm.name for vm in host.list()] == ["beside"])
    assert wait_for(lambda: open_files(broker) <= files)
    assert wait_for(lambda: [path.name for path in site.paths.vms_state.iterdir()] == ["beside"])
    print(f"worker memory {sum(own) / len(own) / 1e6:.2f} MB, broker {resident_bytes(broker) / 1e6:.1f} MB")
    print(", ".join(f"{what} {seconds * 1000:.0f} ms" for what, seconds in took.items()))
    assert max(took.values()) < MANY_SECONDS


def test_a_broker_killed_under_thirty_vms_is_followed_by_one_that_serves_them_all(site: Site, host: Host) -> None:
    directory, names = site.simulate(30)
    attach_all(host, directory, names)
    before = facts(host)
    site.kill_broker()
    site.start_broker()
    began = time.monotonic()
    assert answers_of(host, [query(name) for name in names]) == [{"name": name} for name in names]
    print(f"all served again after {time.monotonic() - began:.2f} s")
    assert facts(host) == before
    assert sum(1 for command in site.processes().values() if "vmloop.broker.zygote" in command) == 1 + len(names)


def test_a_broker_killed_under_two_hundred_vms_serves_them_all_within_three_seconds(site: Site, host: Host) -> None:
    directory, names = site.simulate(200)
    attach_all(host, directory, names)
    before = facts(host)
    site.kill_broker()
    site.start_broker()
    with site.host() as again:  # it is up when it takes a connection
        began = time.monotonic()
        assert answers_of(again, [query(name) for name in names]) == [{"name": name} for name in names]
        took = time.monotonic() - began
    print(f"200 VMs served again {took:.2f} s after the broker was up")
    assert took < SERVED_SECONDS
    assert facts(host) == before
    answers_of(host, [requests.detach(f"vm/{name}") for name in names])


def test_a_vm_that_ends_while_no_broker_is_there_is_known_to_the_next(site: Site, host: Host) -> None:
    site.define(host, "web1")
    pid = host.vm("web1").start().pid
    assert pid is not None
    site.kill_broker()
    kill_process(pid)
    site.start_broker()
    assert host.vm("web1").wait("shutoff", timeout=15).reason == "crashed"
    assert host.vm("web1").start().epoch == 2


# -- a worker dies ----------------------------------------------------------------------------------------------------------


def owed(site: Site, name: str) -> int:
    """How many commands QEMU owes an answer, by the VM's status page."""
    with Page(site.paths.vm(vm_name(name)).page, writable=False) as page:
        taken = 0
        for index in range(LEDGER_SLOTS):
            with page.slot(index) as slot:
                taken += slot[0] & 1
        return taken


def worker_of(vm: Vm) -> int:
    pid = vm.show().worker_pid
    assert pid is not None
    return pid


def test_a_worker_killed_with_commands_in_flight_leaves_none_without_its_true_answer(
    site: Site, host: Host, beside: Vm
) -> None:
    site.define(host, "web1", "-name", "web1")
    vm = host.vm("web1")
    pid = vm.start().pid
    vm.qmp("x-simulate", {"slow": 0.2})
    worker = worker_of(vm)
    commands = ["query-name", "query-status", "stop", "query-uuid", "query-kvm", "query-version"]
    expected = [{"name": "web1"}, "running", {}, None, {"enabled": False, "present": True}, None]

    def kill_it() -> None:
        if wait_for(lambda: owed(site, "web1") == len(commands)):
            kill_process(worker)

    killer = threading.Thread(target=kill_it)
    with host.events("web1") as events:
        killer.start()
        answers = answers_of(host, [query("web1", command) for command in commands])
        killer.join()
        vm.qmp("x-simulate", {"slow": 0}, oob=True)
        vm.resume()
        seen = until(events.get, "RESUME")
    for command, answer, wanted in zip(commands, answers, expected, strict=True):
        found = answer["status"] if command == "query-status" else answer
        assert wanted is None or found == wanted, (command, answer)
    assert worker_of(vm) != worker
    assert (vm.show().epoch, vm.show().pid, vm.show().monitor) == (1, pid, "ready")
    numbers = [event.seq for event in seen]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    names = [event.event for event in seen]
    assert names.count("STOP") == names.count("RESUME") == names.count("WORKER_LOST") == 1
    assert "EVENTS_LOST" not in names


def until(get: Callable[[float], Event | None], name: str) -> list[Event]:
    """Events up to the first of that name."""
    seen: list[Event] = []
    while True:
        event = get(10.0)
        assert event is not None, [event.event for event in seen]
        seen.append(event)
        if event.event == name:
            return seen


def test_a_worker_killed_again_and_again_costs_no_event(site: Site, host: Host, beside: Vm) -> None:
    site.define(host, "web1")
    vm = host.vm("web1")
    vm.start()
    with host.events("web1") as events:
        for number in range(KILLS):
            worker = worker_of(vm)
            kill_process(worker)
            assert wait_for(lambda worker=worker: vm.show().worker_pid not in (None, worker))  # type: ignore[misc]
            vm.qmp("x-simulate", {"emit": {"event": "TICK", "data": {"number": number}}})
        seen: list[Event] = []
        while len([event for event in seen if event.event == "TICK"]) < KILLS:
            event = events.get(10.0)
            assert event is not None
            seen.append(event)
    assert [event.data["number"] for event in seen if event.event == "TICK"] == list(range(KILLS))
    assert [event.seq for event in seen] == list(range(seen[0].seq, seen[0].seq + len(seen)))
    assert "EVENTS_LOST" not in [event.event for event in seen]


# -- the zygote dies --------------------------------------------------------------------------------------------------------


def zygote_of(site: Site) -> int | None:
    """The pid of the root's zygote; its workers have another name."""
    for pid, command in site.processes().items():
        with contextlib.suppress(OSError):
            if "vmloop.broker.zygote" in command and Path(f"/proc/{pid}/comm").read_text().strip() == "vml-zygote":
                return pid
    return None


def sockets_of(pid: int) -> set[str]:
    found = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(entry.path))
    return {name for name in found if name.startswith("socket:")}


def test_a_new_zygote_is_handed_the_connections_of_the_one_that_died(site: Site, host: Host) -> None:
    for name in ("web1", "web2"):
        site.define(host, name)
        host.vm(name).start()
    before = facts(host)
    old = zygote_of(site)
    assert old is not None
    kill_process(old)
    new = wait_for(lambda: zygote_of(site))
    assert new not in (None, old)
    for name in ("web1", "web2"):
        worker = worker_of(host.vm(name))
        assert wait_for(lambda worker=worker: len(sockets_of(worker) & sockets_of(new)) == 1), name  # type: ignore[misc]
    assert facts(host) == before
    with host.events("web1") as events:
        kill_process(worker_of(host.vm("web1")))
        assert host.vm("web1").qmp("query-status")["status"] == "running"
        host.vm("web1").pause()
        assert "EVENTS_LOST" not in [event.event for event in until(events.get, "STOP")]
    assert facts(host)[1] == before[1]
    assert host.vm("web1").show().epoch == 1
    site.define(host, "web3")
    assert host.vm("web3").start().state == "running"


# -- the broker goes --------------------------------------------------------------------------------------------------------


def test_a_broker_told_to_end_answers_what_is_in_flight_and_leaves_the_vms(site: Site, host: Host) -> None:
    assert site.broker is not None
    for name in ("web1", "web2"):
        site.define(host, name)
        host.vm(name).start()
    before = facts(host)
    host.vm("web1").qmp("x-simulate", {"slow": 1.0})
    answered: list[Any] = []
    with site.host() as other:
        asker = threading.Thread(target=lambda: answered.append(other.vm("web1").qmp("query-status")))
        asker.start()
        assert wait_for(lambda: owed(site, "web1") == 1)
        signal_process(site.broker.pid, signal.SIGTERM)
        refused = wait_for(lambda: _is_refused(host))
        asker.join()
    assert [answer["status"] for answer in answered] == ["running"]
    assert refused
    assert site.broker.wait(15.0) == 0
    assert "Traceback" not in site.log()
    site.start_broker()
    host.vm("web1").qmp("x-simulate", {"slow": 0}, oob=True)
    assert host.vm("web2").qmp("query-status")["status"] == "running"
    assert facts(host) == before


def _is_refused(host: Host) -> bool:
    try:
        host.vm("web2").qmp("query-status", timeout=1.0)
    except Busy:
        return True
    return False
