# SPDX-License-Identifier: Apache-2.0
"""Ends of runs with whole processes: in the middle of a command, a stop, a start, a handler; twice; and a new run in the same instant.

The table of races is in tests/unit/test_worker_teardown.py, with those that need no second process.
"""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from vmloop.client.session import Host
from vmloop.common.errors import LaunchFailed, MonitorLost, OutcomeUnknown, VmloopError
from vmloop.common.names import VmName

from .site import REAL_ARGS, Site, kill_process, signal_process, wait_for

SECONDS = 10.0


@pytest.fixture
def settings() -> str:
    """Workers that die in a row come back soon."""
    return "[restart]\nfirst_delay = 0.01\nmax_delay = 0.1\n"


class Aside:
    """A call in a thread of its own, over a connection of its own."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.value: Any = None
        self.error: VmloopError | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.value = self._work()
        except VmloopError as error:
            self.error = error

    def join(self) -> Aside:
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), "it was never answered"
        return self


def started(site: Site, host: Host, *args: str, **sections: Any) -> int:
    """The simulated VM `odd`; its QEMU's pid."""
    site.define(host, "odd", *args, **sections)
    host.vm("odd").start()
    pid = host.vm("odd").show().pid
    assert pid is not None
    return pid


def events_of(host: Host) -> list[tuple[str, Any]]:
    """The events of `odd` that are kept, but for its worker's own."""
    with host.events("odd", follow=False, recent=True) as stream:
        return [(event.event, event.data) for event in stream if not event.event.startswith("WORKER")]


def in_flight(host: Host) -> bool:
    qmp = host.vm("odd").show().qmp
    return qmp is not None and bool(qmp.in_flight)


# -- in the middle of something ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reading", [True, False])
def test_a_command_that_waits_when_qemu_dies_is_answered_at_once(site: Site, host: Host, reading: bool) -> None:
    qemu = started(site, host)
    host.vm("odd").qmp("x-simulate", {"silent": True})
    other = site.host()
    command = "query-status" if reading else "stop"
    asked = Aside(lambda: other.vm("odd").qmp(command))
    with host.events("odd") as events:
        assert wait_for(lambda: in_flight(host))
        kill_process(qemu)
        events.wait_for("VM_STATE", SECONDS)
    error = asked.join().error
    assert isinstance(error, (MonitorLost, OutcomeUnknown)), error


def test_a_qemu_that_dies_while_it_is_asked_to_stop_is_stopped(site: Site, host: Host) -> None:
    qemu = started(site, host, "-simulate", "ignore_powerdown")
    other = site.host()
    with host.events("odd") as events:
        stopping = Aside(lambda: other.vm("odd").stop(timeout=SECONDS))
        # Before the button is pressed, while it is, or after: each is good.
        host.vm("odd").pause()
        kill_process(qemu)
        while events.wait_for("VM_STATE", SECONDS).data["new"] != "shutoff":
            pass
    assert stopping.join().error is None
    assert host.vm("odd").show().state == "shutoff"


def test_a_qemu_that_dies_while_its_monitor_is_negotiated_is_no_start(site: Site, host: Host) -> None:
    site.define(host, "odd", "-simulate", "no_greeting")
    other = site.host()
    starting = Aside(lambda: other.vm("odd").start())
    assert wait_for(lambda: bool(host.list()[0].pid), SECONDS)
    pid = host.list()[0].pid
    assert pid is not None
    kill_process(pid)
    error = starting.join().error
    assert isinstance(error, LaunchFailed)
    assert "SIGKILL" in error.message
    shown = host.list()[0]
    assert (shown.state, shown.reason) == ("shutoff", "failed")


def test_the_vm_ends_while_a_handler_runs(site: Site, host: Host) -> None:
    directory = site.paths.etc / "handlers"
    directory.mkdir(parents=True)
    code = "import time\nfrom vmloop.worker.handlers import on\n@on('X_GO')\ndef act(vm, event):\n    time.sleep(600)\n"
    (directory / "odd.py").write_text(code)
    started(site, host)
    host.vm("odd").qmp("x-simulate", {"emit": {"event": "X_GO"}})
    with host.events("odd") as events:
        host.vm("odd").kill()  # answered although the handler is at it
        assert events.wait_for("VM_STATE", 2.0).data["new"] == "shutoff"
    host.vm("odd").start()  # the next run waits for the last handlers' time, no longer
    assert host.vm("odd").show().epoch == 2


def test_the_last_events_of_a_real_qemu_are_told_before_its_end(site: Site, host: Host, require_qemu: str) -> None:
    site.define(host, "odd", *REAL_ARGS, binary=require_qemu)
    host.vm("odd").start()
    told: list[str] = []
    with host.events("odd") as events:
        with suppress(VmloopError):  # its connection may end before the answer
            host.vm("odd").qmp("quit")
        while not told or told[-1] != "VM_STATE shutoff":
            event = next(events)
            told.append(f"{event.event} {event.data['new']}" if event.event == "VM_STATE" else event.event)
    assert told.index("SHUTDOWN") < told.index("MONITOR_STATE") < told.index("VM_STATE shutoff")


# -- twice, and at once -----------------------------------------------------------------------------------------------------


def test_two_stops_at_once_both_see_one_end(site: Site, host: Host) -> None:
    started(site, host)
    hosts = [site.host() for _ in range(4)]
    stops = [Aside(lambda host=host: host.vm("odd").stop(timeout=SECONDS)) for host in hosts]  # type: ignore[misc]
    errors = [stop.join().error for stop in stops]
    assert errors.count(None) >= 1
    assert {error.code for error in errors if error is not None} <= {"not-running", "monitor-lost", "outcome-unknown"}
    told = events_of(host)
    assert [data["new"] for name, data in told if name == "VM_STATE"].count("shutoff") <= 1
    assert host.vm("odd").show().state == "shutoff"


def test_a_vm_started_again_in_the_same_instant_is_a_run_of_its_own(site: Site, host: Host) -> None:
    """No end-of-file, exit or late event of a run reaches the next one: each is running until it is killed, and ends once."""
    started(site, host)
    with host.events("odd") as events:
        for epoch in range(2, 10):
            host.vm("odd").kill()
            host.vm("odd").start()
            shown = host.vm("odd").show()
            assert (shown.state, shown.epoch) == ("running", epoch)
        host.vm("odd").kill()
        ends: list[tuple[int, str]] = []
        states: dict[int, list[str]] = {}
        while len(ends) < 9:
            event = events.wait_for("VM_STATE", SECONDS)
            states.setdefault(event.epoch, []).append(event.data["new"])
            if event.data["new"] == "shutoff":
                ends.append((event.epoch, event.data["reason"]))
    assert ends == [(epoch, "destroyed") for epoch in range(1, 10)]
    assert all(seen[-1] == "shutoff" and seen.count("shutoff") == 1 for seen in states.values())


def test_a_worker_told_to_leave_before_it_has_begun_leaves_the_vm_to_the_next(site: Site, host: Host) -> None:
    qemu = started(site, host)
    for _ in range(5):
        worker = host.vm("odd").show().worker_pid
        assert worker is not None
        kill_process(worker)
        children = wait_for(lambda worker=worker: _worker_beside(site, worker), SECONDS)  # type: ignore[misc]
        for pid in children or []:
            with suppress(ProcessLookupError):
                signal_process(pid, signal.SIGTERM)
        assert host.vm("odd").qmp("query-status", timeout=SECONDS)["status"] == "running"
        assert host.vm("odd").show().pid == qemu


def _worker_beside(site: Site, old: int) -> list[int]:
    """Workers of `odd` that were just forked: the zygote's children by another pid than the old one's."""
    found = []
    for pid in site.processes():
        with suppress(OSError):  # gone meanwhile
            if pid != old and Path(f"/proc/{pid}/comm").read_text().strip() == "vml:odd":
                found.append(pid)
    return found


def test_the_lock_falls_and_the_files_are_gone_once_the_worker_is(site: Site, host: Host) -> None:
    started(site, host)
    paths = site.paths.vm(VmName("odd"))
    fd = os.open(paths.lock, os.O_RDWR | os.O_CLOEXEC)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        host.vm("odd").kill()
        assert not paths.monitor_socket.exists()
        assert wait_for(lambda: _locked(fd))
    finally:
        os.close(fd)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
