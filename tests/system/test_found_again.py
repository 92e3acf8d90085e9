# SPDX-License-Identifier: Apache-2.0
"""A QEMU under a worker that did not start it, when broker, zygote and worker were all killed: held, or in doubt, never wrongly killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from vmloop.client.session import Host
from vmloop.common.errors import AlreadyRunning, Denied
from vmloop.common.names import VmName
from vmloop.common.page import Page, Word
from vmloop.common.process import identify
from vmloop.worker.runfile import Run, read_run, write_run

from ..fakes.scripted_qemu import install
from .site import REAL_ARGS, Site, kill_process, signal_process, wait_for

SECONDS = 10.0


@pytest.fixture
def settings() -> str:
    return "[worker]\nlaunch = 2.0\nreconnect_max_delay = 0.2\n"


def started(site: Site, host: Host, binary: str = "simulated", *args: str) -> int:
    """The VM `odd`; its QEMU's pid."""
    site.define(host, "odd", *args, binary=binary)
    host.vm("odd").start()
    pid = host.vm("odd").show().pid
    assert pid is not None
    return pid


def all_killed(site: Site, host: Host, change: Callable[[Run], Run] = lambda run: run) -> Host:
    """Broker, zygote and worker die at once; run.json is changed; then a broker comes. A client of that one."""
    worker = host.vm("odd").show().worker_pid
    assert worker is not None
    zygote = next(
        pid for pid, command in site.processes().items() if "vmloop.broker.zygote" in command and pid != worker
    )
    site.kill_broker()
    signal_process(zygote, signal.SIGSTOP)
    kill_process(worker)
    kill_process(zygote)
    path = site.paths.vm(VmName("odd")).run_file
    run = read_run(path)
    assert run is not None
    write_run(path, change(run))
    site.start_broker()
    return site.host()


def state_of(host: Host) -> str:
    return host.vm("odd").show().state


def moved_away(run: Run, **also: Any) -> Run:
    """As if the process that is noted had been another program."""
    assert run.process is not None
    return msgspec.structs.replace(
        run, process=msgspec.structs.replace(run.process, executable="/opt/old/qemu"), **also
    )


# -- held ---------------------------------------------------------------------------------------------------------------------


def test_a_qemu_whose_worker_died_before_it_noted_the_pid_is_held_by_the_next(site: Site, host: Host) -> None:
    pid = started(site, host)
    host = all_killed(site, host, lambda run: msgspec.structs.replace(run, process=None, argv=[]))
    assert wait_for(lambda: state_of(host) == "running", SECONDS)
    assert host.vm("odd").show().pid == pid
    run = read_run(site.paths.vm(VmName("odd")).run_file)
    assert run is not None
    assert run.process == identify(pid)
    assert host.vm("odd").kill().state == "shutoff"
    assert pid not in site.processes()


def test_a_start_that_never_came_to_a_qemu_has_failed(site: Site, host: Host) -> None:
    pid = started(site, host)
    paths = site.paths.vm(VmName("odd"))

    def never(run: Run) -> Run:
        kill_process(pid)
        paths.page.unlink()
        return msgspec.structs.replace(run, process=None, argv=[])

    host = all_killed(site, host, never)
    assert wait_for(lambda: state_of(host) == "shutoff", SECONDS)
    assert host.vm("odd").show().reason == "failed"
    host.vm("odd").start()
    assert state_of(host) == "running"


def test_a_qemu_whose_file_was_replaced_by_an_upgrade_is_held(site: Site, host: Host, require_qemu: str) -> None:
    pid = started(site, host, require_qemu, *REAL_ARGS)
    host = all_killed(site, host, moved_away)
    assert wait_for(lambda: state_of(host) == "running", SECONDS)
    assert host.vm("odd").show().pid == pid
    assert host.vm("odd").kill().state == "shutoff"


def test_a_qemu_that_a_wrapper_script_became_is_held(site: Site, host: Host) -> None:
    """The process that was started is noted as the shell that it was for a moment."""
    pid = started(site, host, install(site.root))
    host = all_killed(site, host)
    assert wait_for(lambda: state_of(host) == "running", SECONDS)
    assert host.vm("odd").show().pid == pid


def test_a_pid_that_somebody_else_has_now_is_the_end_of_the_run_and_nobody_is_killed(site: Site, host: Host) -> None:
    pid = started(site, host)

    def reused(run: Run) -> Run:
        kill_process(pid)
        me = identify(os.getpid())
        return msgspec.structs.replace(run, process=msgspec.structs.replace(me, started=me.started - 1))

    host = all_killed(site, host, reused)
    assert wait_for(lambda: state_of(host) == "shutoff", SECONDS)


# -- in doubt -----------------------------------------------------------------------------------------------------------------


def in_doubt(run: Run) -> Run:
    return moved_away(run, mark="/elsewhere:1")


def test_a_qemu_in_doubt_that_answers_is_served_and_can_be_told_to_quit(site: Site, host: Host) -> None:
    pid = started(site, host)
    host = all_killed(site, host, in_doubt)
    assert wait_for(lambda: state_of(host) == "running", SECONDS)
    shown = host.vm("odd").show()
    assert shown.pid is None
    fact = (shown.facts or {})["process"]
    assert f"process {pid}" in fact
    assert "--pid" in fact
    assert host.vm("odd").kill().state == "shutoff"  # by its own monitor
    assert pid not in site.processes()


def test_a_qemu_in_doubt_that_is_silent_is_unknown_and_never_killed_until_its_pid_is_given(
    site: Site, host: Host
) -> None:
    pid = started(site, host)
    signal_process(pid, signal.SIGSTOP)
    host = all_killed(site, host, in_doubt)
    assert wait_for(lambda: host.vm("odd").show().reason == "process-unrecognised", SECONDS)
    assert state_of(host) == "unknown"
    for refused in (host.vm("odd").kill, lambda: host.vm("odd").stop(timeout=1.0, force=True)):
        with pytest.raises(Denied, match="--pid"):
            refused()
    assert identify(pid).pid == pid
    host.vm("odd").detach()
    with pytest.raises(AlreadyRunning, match="--pid"):  # two QEMUs would share its disks
        host.vm("odd").start()
    signal_process(pid, signal.SIGCONT)
    monitor = str(site.paths.vm(VmName("odd")).monitor_socket)
    assert host.attach("odd", monitor, pid=pid).pid == pid
    assert host.vm("odd").kill().state == "shutoff"
    assert pid not in site.processes()


# -- pids of ours that somebody else has now ----------------------------------------------------------------------------------


def test_a_lock_file_with_the_pid_of_somebody_who_lives_keeps_no_broker_away(site: Site, host: Host) -> None:
    """The lock on it counts, and falls with its holder; the pid is for people."""
    host.ping()
    site.kill_broker()
    site.paths.broker_lock.write_text(f"{os.getpid()}\n")
    site.start_broker()
    assert site.host().version().pid != os.getpid()


def test_a_worker_whose_pid_somebody_else_has_now_is_replaced_and_nobody_is_killed(site: Site, host: Host) -> None:
    pid = started(site, host)
    page = site.paths.vm(VmName("odd")).page

    def reused(run: Run) -> Run:
        with Page(page, writable=True) as words:
            words.words[Word.WORKER_PID] = os.getpid()  # with the start time of the worker that is dead
        return run

    host = all_killed(site, host, reused)
    assert wait_for(lambda: state_of(host) == "running", SECONDS)
    shown = host.vm("odd").show()
    assert shown.pid == pid
    assert shown.worker_pid != os.getpid()


def test_a_zygotes_socket_without_a_zygote_is_replaced(site: Site, host: Host) -> None:
    """No pid of it is kept: who answers at its socket is the zygote."""
    pid = started(site, host)
    host = all_killed(site, host)
    assert wait_for(lambda: state_of(host) == "running", SECONDS)
    assert host.vm("odd").show().pid == pid
