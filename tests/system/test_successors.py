# SPDX-License-Identifier: Apache-2.0
"""What a worker must leave to the next one, and what it must not: events, reactions half done, stacks, exits, requests."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress

import pytest

from vmloop.client.session import Host
from vmloop.common.errors import VmloopError

from .site import Site, kill_process, signal_process, wait_for

SECONDS = 10.0


@pytest.fixture
def settings() -> str:
    """Whoever is held up is told and replaced soon."""
    return "[broker]\nblocked_after = 0.3\nblocked_limit = 1.0\n"


def started(site: Site, host: Host, handlers: str, **section: str) -> int:
    """The VM `odd` with a file of handlers; its worker's pid."""
    directory = site.paths.etc / "handlers"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "odd.py").write_text(f"import asyncio, time\nfrom vmloop.worker.handlers import on\n{handlers}")
    site.define(host, "odd", handlers={"load": ["odd"], **section})
    host.vm("odd").start()
    return worker_of(host)


def worker_of(host: Host) -> int:
    pid = host.vm("odd").show().worker_pid
    assert pid is not None
    return pid


def test_a_directory_of_handlers_that_cannot_be_listed_costs_no_vm_its_next_worker(site: Site, host: Host) -> None:
    site.define(host, "odd")
    host.vm("odd").start()
    directory = site.paths.etc / "handlers"
    directory.parent.mkdir(exist_ok=True)
    directory.symlink_to("handlers")  # ELOOP; the same with a dead network file system, or without permission
    try:
        kill_process(worker_of(host))
        assert host.vm("odd").qmp("query-status", timeout=4.0)["status"] == "running"
    finally:
        os.unlink(directory)
        assert wait_for(lambda: host.list()[0].worker == "ready", 15.0)  # the pauses between its workers have grown


def test_an_event_that_a_leaving_worker_reads_is_handled(site: Site, host: Host) -> None:
    worker = started(
        site,
        host,
        "@on('X_GO')\n"
        "async def act(vm, event):\n"
        "    try:\n"
        "        await asyncio.sleep(30)\n"
        "    except asyncio.CancelledError:\n"
        "        await vm.qmp('x-simulate', {'panic': True})\n",
        on_crash="destroy",
    )
    host.vm("odd").qmp("x-simulate", {"emit": {"event": "X_GO"}})
    with host.events("odd") as events:
        signal_process(worker, signal.SIGTERM)
        events.wait_for("GUEST_PANICKED", SECONDS)
    assert wait_for(lambda: host.vm("odd").show().state == "shutoff", 3.0)


def test_a_guest_that_is_being_restarted_is_restarted_under_the_next_worker_too(site: Site, host: Host) -> None:
    started(site, host, "@on('GUEST_PANICKED')\nasync def act(vm, event):\n    time.sleep(600)\n", on_crash="restart")
    with host.events("odd") as events:
        with suppress(VmloopError):
            host.vm("odd").qmp("x-simulate", {"panic": True}, timeout=3.0)
        events.wait_for("WORKER_LOST", SECONDS)
    assert wait_for(lambda: host.vm("odd").show().state == "running", 3.0)


def test_a_worker_that_is_killed_later_is_not_said_to_have_been_where_it_once_was(site: Site, host: Host) -> None:
    site.define(host, "odd")
    host.vm("odd").start()
    worker = worker_of(host)

    def ask() -> None:
        with suppress(VmloopError):
            site.host().vm("odd").qmp("query-status", timeout=SECONDS)

    thread = threading.Thread(target=ask)
    with host.events() as everything:
        signal_process(worker, signal.SIGSTOP)
        thread.start()
        everything.wait_for("LOOP_BLOCKED", SECONDS)
        signal_process(worker, signal.SIGCONT)
        everything.wait_for("LOOP_RECOVERED", SECONDS)
    thread.join()
    with host.events("odd") as events:
        kill_process(worker)
        assert "stack" not in events.wait_for("WORKER_LOST", SECONDS).data


def test_how_a_worker_ended_is_not_how_an_earlier_one_did(site: Site, host: Host) -> None:
    worker = started(site, host, "@on('X_GO')\nasync def act(vm, event):\n    __import__('os')._exit(3)\n")
    with host.events("odd") as events:
        kill_process(worker)
        assert "SIGKILL" in events.wait_for("WORKER_LOST", SECONDS).data["how"]
        assert wait_for(lambda: host.list()[0].worker == "ready")
        [zygote] = [pid for pid in site.processes() if _comm(pid) == "vml-zygote"]
        signal_process(zygote, signal.SIGSTOP)  # a busy host
        with suppress(VmloopError):
            host.vm("odd").qmp("x-simulate", {"emit": {"event": "X_GO"}}, timeout=0.5)
        wait_for(lambda: host.list()[0].worker == "starting")
        signal_process(zygote, signal.SIGCONT)
        assert "SIGKILL" not in events.wait_for("WORKER_LOST", SECONDS).data["how"]


def _comm(pid: int) -> str:
    with open(f"/proc/{pid}/comm") as file:
        return file.read().strip()


def test_a_command_that_a_leaving_worker_did_not_take_up_is_carried_out_by_the_next(site: Site, host: Host) -> None:
    worker = started(
        site,
        host,
        "@on('X_GO')\n"
        "async def act(vm, event):\n"
        "    end = time.monotonic() + 1.5\n"
        "    while time.monotonic() < end:\n"
        "        try:\n"
        "            await asyncio.sleep(0.05)\n"
        "        except asyncio.CancelledError:\n"
        "            pass\n",
    )
    host.vm("odd").qmp("x-simulate", {"emit": {"event": "X_GO"}})
    signal_process(worker, signal.SIGTERM)
    wait_for(lambda: False, 0.3)  # the signal has been taken
    assert host.vm("odd").qmp("stop", timeout=SECONDS) == {}
    assert host.vm("odd").qmp("query-status", timeout=SECONDS)["status"] == "paused"
    assert host.vm("odd").show().worker_pid != worker
