# SPDX-License-Identifier: Apache-2.0
"""`restart-workers`, zygotes of other versions and zygotes that hang: the VMs run on, and no connection to a monitor is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmloop.broker.spawner import ANSWER_SECONDS
from vmloop.client import aio
from vmloop.client.cli.main import main
from vmloop.client.session import Host
from vmloop.common.errors import Busy, NoSuchVm, NotRunning

from .managed import comm, zygote_of
from .site import Site, kill_process, signal_process, wait_for

SECONDS = 20.0


def worker_of(host: Host, name: str) -> int:
    pid = host.vm(name).show().worker_pid
    assert pid is not None
    return pid


def start_all(site: Site, host: Host, *names: str) -> None:
    for name in names:
        site.define(host, name)
        host.vm(name).start()


def parent_of(pid: int) -> int:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("PPid:")]
    return int(line.split()[1])


@pytest.fixture
def no_gap(site: Site, host: Host) -> Iterator[None]:
    """No VM's monitor was out of reach in between."""
    with host.events() as events:
        yield
        host.ping()
        names = [event.event for event in iter(lambda: events.get(0.2), None)]
    assert "EVENTS_LOST" not in names


def test_workers_are_replaced_one_after_another_from_a_fresh_zygote(site: Site, host: Host, no_gap: None) -> None:
    names = ["web1", "web2", "web3"]
    start_all(site, host, *names)
    before = {name: host.vm(name).show() for name in names}
    zygote = zygote_of(site)
    parts: list[Any] = []
    done = host.restart_workers(on_part=parts.append)
    assert (done.restarted, done.failed) == (3, [])
    assert [part["name"] for part in parts] == names
    after = {name: host.vm(name).show() for name in names}
    for name, part in zip(names, parts, strict=True):
        assert after[name].worker_pid == part["worker_pid"] != before[name].worker_pid
        assert (after[name].pid, after[name].epoch) == (before[name].pid, before[name].epoch)
        assert host.vm(name).qmp("query-status")["status"] == "running"
    assert wait_for(lambda: [pid for pid in site.processes() if comm(pid) == "vml-zygote" and pid != zygote] and True)
    fresh = parent_of(worker_of(host, "web1"))
    assert fresh != zygote
    assert comm(fresh) == "vml-zygote"


def test_some_workers_and_the_old_zygote_ends_with_its_last_child(site: Site, host: Host) -> None:
    start_all(site, host, "web1", "web2")
    old, beside = zygote_of(site), worker_of(host, "web2")
    assert host.restart_workers("web1").restarted == 1
    assert worker_of(host, "web2") == beside
    assert comm(old) == "vml-zygote", "its worker of web2 lives"
    kill_process(beside)
    assert host.vm("web2").qmp("query-status", timeout=SECONDS)["status"] == "running"
    # The VMs were started by workers of the old zygote, so they are its children now.
    assert comm(old) == "vml-zygote"
    for name in ("web1", "web2"):
        host.vm(name).kill()
    assert wait_for(lambda: comm(old) != "vml-zygote")


def test_asyncio_and_the_command_line_do_the_same(site: Site, host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    start_all(site, host, "web1")
    first = worker_of(host, "web1")

    async def restart() -> int:
        async with aio.connect(root=site.root) as other:
            return (await other.restart_workers("web1")).restarted

    assert asyncio.run(restart()) == 1
    second = worker_of(host, "web1")
    assert main(["--root", str(site.root), "restart-workers"]) == 0
    assert "1 workers restarted" in capsys.readouterr().out
    assert len({first, second, worker_of(host, "web1")}) == 3
    assert main(["--root", str(site.root), "restart-workers", "nobody"]) == 1


def test_what_does_not_run_has_no_worker_to_restart(site: Site, host: Host) -> None:
    site.define(host, "web1")
    with pytest.raises(NotRunning):
        host.restart_workers("web1")
    with pytest.raises(NoSuchVm):
        host.restart_workers("web2")
    assert host.restart_workers().restarted == 0


def test_a_worker_that_does_not_leave_is_ended_and_only_one_restart_goes_on(site: Site, host: Host) -> None:
    start_all(site, host, "web1")
    stuck = worker_of(host, "web1")
    signal_process(stuck, signal.SIGSTOP)
    ends: list[Any] = []

    def restart() -> None:
        try:
            ends.append(site.host().restart_workers())
        except Busy as error:
            ends.append(error)

    threads = [threading.Thread(target=restart) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused, done = ends
    assert isinstance(refused, Busy)
    assert (done.restarted, done.failed) == (1, [])
    assert worker_of(host, "web1") != stuck
    assert host.vm("web1").qmp("query-status", timeout=SECONDS)["status"] == "running"


# -- a zygote that hangs ------------------------------------------------------------------------------------------------------


def test_a_broker_comes_up_beside_a_stopped_zygote_and_serves(site: Site, host: Host) -> None:
    start_all(site, host, "web1")
    worker, zygote = worker_of(host, "web1"), zygote_of(site)
    site.kill_broker()
    signal_process(zygote, signal.SIGSTOP)
    site.start_broker()
    began = time.monotonic()
    assert host.vm("web1").qmp("query-status", timeout=SECONDS)["status"] == "running"
    assert time.monotonic() - began < ANSWER_SECONDS
    assert worker_of(host, "web1") == worker
    site.define(host, "web2")  # needs a worker, and so another zygote
    assert host.vm("web2").start().state == "running"
    assert zygote_of(site) != zygote
    kill_process(worker)
    assert host.vm("web1").qmp("query-status", timeout=SECONDS)["status"] == "running"


def test_a_zygote_that_stops_is_replaced_when_a_fork_is_not_answered(site: Site, host: Host) -> None:
    start_all(site, host, "web1")
    zygote = zygote_of(site)
    signal_process(zygote, signal.SIGSTOP)
    site.define(host, "web2")
    assert host.vm("web2").start().state == "running"
    assert not os.path.exists(f"/proc/{zygote}")
    kill_process(worker_of(host, "web1"))
    with host.events("web1") as events:
        assert host.vm("web1").qmp("query-status", timeout=SECONDS)["status"] == "running"
        assert "EVENTS_LOST" not in [event.event for event in iter(lambda: events.get(0.2), None)]
