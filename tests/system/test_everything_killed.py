# SPDX-License-Identifier: Apache-2.0
"""Broker, zygote and all workers killed at once: with a service manager that stores fds nothing is lost; without one the gap is marked."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..fakes.raw_qmp import NEGOTIATION, RawClient
from .managed import ManagedSite, kill_everything, zygote_of
from .site import Site, wait_for

SECONDS = 15.0
GAP = "no connection to the monitor"  # of EVENTS_LOST


@pytest.fixture
def managed() -> Iterator[ManagedSite]:
    made = ManagedSite()
    try:
        made.start_broker()
        yield made
    finally:
        made.close()


@pytest.mark.qemu
@pytest.mark.usefixtures("require_qemu")
def test_with_a_service_manager_no_event_and_no_connection_is_lost(managed: ManagedSite) -> None:
    host = managed.host()
    beside = Path(managed.root / "raw.qmp")
    managed.define_real(host, "web1", "-qmp", f"unix:{beside},server=on,wait=off")
    before = host.vm("web1").start()
    assert managed.manager.wait_for(["vmloop.monitor.web1"])
    cursor = host.vm("web1").cursor()
    kill_everything(managed)
    with RawClient(beside) as raw:
        raw.send(NEGOTIATION)
        raw.send({"execute": "stop", "id": "beside"})
        assert wait_for(lambda: b"beside" in raw.socket.recv(65536, socket.MSG_PEEK))
    managed.start_broker()
    host = managed.host()
    vm = host.vm("web1")
    assert vm.qmp("query-status", timeout=SECONDS)["status"] == "paused"
    events = list(host.events("web1", since=cursor, follow=False))
    told = [event.event for event in events]
    assert "EVENTS_LOST" not in told
    assert "STOP" in told
    assert [event.seq for event in events] == list(range(cursor.seq + 1, cursor.seq + 1 + len(events)))
    assert (vm.show().epoch, vm.show().pid) == (before.epoch, before.pid)
    assert managed.manager.refused == []


def test_again_and_again(managed: ManagedSite) -> None:
    host = managed.host()
    for name in ("web1", "web2"):
        managed.define(host, name)
        host.vm(name).start()
    for number in (1, 2, 3):
        assert managed.manager.wait_for(["vmloop.monitor.web1", "vmloop.monitor.web2"])
        kill_everything(managed)
        managed.start_broker()
        host = managed.host()
        for name in ("web1", "web2"):
            assert host.vm(name).qmp("query-status", timeout=SECONDS)["status"] == "running"
            events = list(host.events(name, since="1.0", follow=False))
            told = [event.event for event in events]
            assert told.count("WORKER_LOST") == number
            assert "EVENTS_LOST" not in told
            assert [(event.epoch, event.seq) for event in events] == [(1, seq) for seq in range(1, len(events) + 1)]
    host.vm("web1").kill()
    assert managed.manager.wait_for(["vmloop.monitor.web2"])


def test_a_vm_that_ended_meanwhile_is_told_and_leaves_nothing_in_the_store(managed: ManagedSite) -> None:
    host = managed.host()
    managed.define(host, "web1")
    pid = host.vm("web1").start().pid
    assert pid is not None
    assert managed.manager.wait_for(["vmloop.monitor.web1"])
    kill_everything(managed)
    os.kill(pid, 9)
    managed.start_broker()
    assert managed.host().vm("web1").wait("shutoff", timeout=SECONDS).reason == "crashed"
    assert managed.manager.wait_for([])


def test_a_zygote_that_outlived_the_broker_keeps_its_own_and_nothing_is_stored_twice(managed: ManagedSite) -> None:
    host = managed.host()
    managed.define(host, "web1")
    host.vm("web1").start()
    assert managed.manager.wait_for(["vmloop.monitor.web1"])
    zygote = zygote_of(managed)
    managed.kill_broker()
    managed.start_broker()
    assert managed.host().vm("web1").qmp("query-status", timeout=SECONDS)["status"] == "running"
    assert zygote_of(managed) == zygote
    assert managed.manager.names == ["vmloop.monitor.web1"]
    assert managed.manager.said[-1].startswith("READY=1")


def test_foreign_fds_are_closed_and_those_of_vms_that_are_gone_are_removed(managed: ManagedSite) -> None:
    managed.host().ping()
    managed.kill_broker()
    for name in ("stored", "vmloop.monitor.nobody", "vmloop.monitor.", "other.monitor.web1"):
        ends = socket.socketpair()
        managed.manager.add(name, ends[0].fileno())
        for end in ends:
            end.close()
    managed.start_broker()
    managed.host().ping()
    assert managed.manager.wait_for(["stored", "vmloop.monitor.", "other.monitor.web1"])
    assert managed.broker is not None
    environ = Path(f"/proc/{zygote_of(managed)}/environ").read_bytes()
    assert b"LISTEN_" not in environ
    assert b"NOTIFY_SOCKET" not in environ


def sockets_of(pid: int) -> set[str]:
    links = (os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir())
    return {link for link in links if link.startswith("socket:")}


def test_a_worker_that_outlived_broker_and_zygote_hands_the_next_zygote_its_connections(site: Site) -> None:
    host = site.host()
    site.define(host, "web1")
    host.vm("web1").start()
    [worker] = [vm.worker_pid for vm in host.list()]
    assert worker is not None
    assert site.broker is not None
    for pid in (site.broker.pid, zygote_of(site)):
        os.kill(pid, 9)
    site.broker.wait()
    site.start_broker()
    host = site.host()
    vm = host.vm("web1")
    assert vm.qmp("query-status", timeout=SECONDS)["status"] == "running"
    assert vm.show().worker_pid == worker
    assert wait_for(lambda: sockets_of(worker) & sockets_of(zygote_of(site)))
    cursor = vm.cursor()
    os.kill(worker, 9)
    assert vm.qmp("query-status", timeout=SECONDS)["status"] == "running"
    told = [event.event for event in host.events("web1", since=cursor, follow=False)]
    assert "WORKER_LOST" in told
    assert "EVENTS_LOST" not in told


def test_without_a_service_manager_the_gap_is_marked(site: Site) -> None:
    host = site.host()
    site.define(host, "web1")
    pid = host.vm("web1").start().pid
    kill_everything(site)
    site.start_broker()
    vm = site.host().vm("web1")
    assert vm.wait("running", timeout=SECONDS).epoch == 1
    events = list(site.host().events("web1", since="1.0", follow=False))
    assert GAP in [event.data.get("reason") for event in events if event.event == "EVENTS_LOST"]
    assert vm.show().pid == pid
