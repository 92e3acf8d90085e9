# SPDX-License-Identifier: Apache-2.0
"""Every operation on real QEMU, from start to end, through broker, zygote and worker."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vmloop.client.session import Host
from vmloop.common.cursor import Cursor
from vmloop.common.errors import (
    AlreadyRunning,
    DeadlineExceeded,
    LaunchFailed,
    MonitorFrozen,
    MonitorLost,
    NoSuchVm,
    NotRunning,
    QmpError,
)

from .site import REAL_ARGS, Site, kill_process, signal_process, wait_for

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("require_qemu")]


def started(site: Site, host: Host, name: str = "web1", *more: str, paused: bool = False) -> int:
    """A running real VM; its pid."""
    site.define_real(host, name, *more)
    pid = host.vm(name).start(paused=paused).pid
    assert pid is not None
    return pid


def events_of(host: Host, name: str) -> list[tuple[str, dict[str, object]]]:
    """What the worker still keeps of the VM's events."""
    vm = host.vm(name)
    newest = vm.cursor()
    with host.events(name, since=Cursor(newest.epoch, 0), follow=False) as events:
        return [(event.event, dict(event.data)) for event in events]


def test_a_vm_starts_runs_and_its_life_is_told_in_order(site: Site, host: Host) -> None:
    pid = started(site, host)
    vm = host.vm("web1")
    assert host.list()[0].state == "running"
    assert Path(f"/proc/{pid}/exe").resolve().name == "qemu-system-x86_64"
    states = [data["new"] for name, data in events_of(host, "web1") if name == "VM_STATE"]
    assert states == ["starting", "paused", "running"]
    assert vm.kill().reason == "destroyed"
    summary = host.list()[0]
    assert (summary.state, summary.reason, summary.pid) == ("shutoff", "destroyed", None)
    assert not Path(f"/proc/{pid}").exists()


def test_start_paused_then_resume_pause_reset(site: Site, host: Host) -> None:
    started(site, host, paused=True)
    vm = host.vm("web1")
    assert vm.qmp("query-status")["status"] == "prelaunch"
    assert vm.resume().state == "running"
    assert vm.qmp("query-status")["status"] == "running"
    assert (vm.pause().state, vm.show().reason) == ("paused", "user")
    assert vm.pause().state == "paused"  # again: no event comes, and it still answers
    before = vm.cursor()
    vm.reset()
    with vm.events(since=before) as events:
        event = events.get(5.0)
        assert event is not None
        assert (event.event, event.data["reason"]) == ("RESET", "host-qmp-system-reset")


def test_stop_asks_the_guest_and_force_kills_one_that_does_not_listen(site: Site, host: Host) -> None:
    started(site, host)
    vm = host.vm("web1")
    with pytest.raises(DeadlineExceeded, match="power button"):
        vm.stop(timeout=0.5)  # the firmware ignores it
    assert host.list()[0].state == "running"
    vm.qmp("stop")
    assert vm.wait("paused", timeout=10).reason == "unknown"  # not the stop's, which came to nothing
    vm.resume()
    assert "POWERDOWN" in [name for name, _ in events_of(host, "web1")]
    changed = vm.stop(timeout=0.5, force=True)
    assert (changed.state, changed.reason) == ("shutoff", "destroyed")


def test_qmp_errors_arguments_hmp_and_out_of_band(site: Site, host: Host) -> None:
    started(site, host)
    vm = host.vm("web1")
    with pytest.raises(QmpError) as caught:
        vm.qmp("no-such-command")
    assert caught.value.fields["class"] == "CommandNotFound"
    with pytest.raises(QmpError, match="Parameter"):
        vm.qmp("query-name", {"x": 1})
    assert len(vm.qmp("query-qmp-schema")) > 800
    assert vm.qmp("query-yank", oob=True)
    with pytest.raises(QmpError, match="OOB"):
        vm.qmp("query-status", oob=True)
    assert "VM status: running" in vm.hmp("info status")
    assert "unknown command" in vm.hmp("bogus")


def test_quit_and_a_guest_that_shuts_down_end_as_shutdown(site: Site, host: Host) -> None:
    started(site, host)
    host.vm("web1").qmp("quit")
    ended = host.vm("web1").wait("shutoff", timeout=10)
    assert ended.reason == "shutdown"


def test_a_killed_qemu_is_reported_as_crashed_with_the_signal(site: Site, host: Host) -> None:
    pid = started(site, host)
    with host.events("web1") as events:
        signal_process(pid, signal.SIGKILL)
        for event in events:
            if event.event == "VM_STATE":
                break
    assert (event.data["new"], event.data["reason"]) == ("shutoff", "crashed")
    assert "SIGKILL" in event.data["detail"]


def test_a_frozen_qemu_is_told_apart_and_holds_up_nobody(site: Site, host: Host) -> None:
    frozen = started(site, host, "cold")
    started(site, host, "warm")
    signal_process(frozen, signal.SIGSTOP)
    with pytest.raises(DeadlineExceeded):
        host.vm("cold").qmp("query-status", timeout=0.5)
    assert wait_for(lambda: host.vm("cold").show().monitor == "frozen")
    with pytest.raises(MonitorFrozen):
        host.vm("cold").qmp("query-status")
    assert host.vm("warm").qmp("query-status")["status"] == "running"
    assert host.vm("cold").kill().reason == "destroyed"
    assert host.vm("warm").qmp("query-status")["status"] == "running"


def test_a_thawed_qemu_is_ready_again_and_its_late_answer_is_told(site: Site, host: Host) -> None:
    pid = started(site, host)
    vm = host.vm("web1")
    signal_process(pid, signal.SIGSTOP)
    with pytest.raises(DeadlineExceeded):
        vm.qmp("query-name", timeout=0.3)
    with host.events("web1") as events:
        signal_process(pid, signal.SIGCONT)
        late = next(event for event in events if event.event == "COMMAND_LATE")
    assert late.data["return"] == {}
    assert wait_for(lambda: vm.show().monitor == "ready")


def test_a_worker_killed_with_commands_in_flight_leaves_every_answer_to_the_next(site: Site, host: Host) -> None:
    pid = started(site, host)
    vm = host.vm("web1")
    worker = vm.show().worker_pid
    assert worker is not None
    signal_process(pid, signal.SIGSTOP)  # so that nothing is answered before the worker is gone
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(site.host().vm("web1").qmp, name) for name in ("query-version", "stop", "query-name")]
        assert wait_for(lambda: [stats.in_flight for stats in host.stats("web1")] == [3])
        signal_process(worker, signal.SIGKILL)
        assert wait_for(lambda: vm.show().worker_pid not in (worker, None))
        signal_process(pid, signal.SIGCONT)
        answers = [answer.result(20) for answer in asked]
    assert answers[0]["qemu"]["major"] >= 7
    assert answers[1:] == [{}, {}]
    assert (vm.wait("paused", timeout=10).epoch, vm.show().pid) == (1, pid)


def test_a_busy_main_loop_is_busy_and_not_frozen(site: Site, host: Host, tmp_path: Path) -> None:
    started(site, host)
    vm = host.vm("web1")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(DeadlineExceeded):
        # Opening a FIFO that nobody reads blocks QEMU's main loop.
        vm.qmp("pmemsave", {"val": 0, "size": 16, "filename": str(fifo)}, timeout=0.3)
    assert wait_for(lambda: vm.show().monitor == "busy")
    assert vm.qmp("query-yank", oob=True)
    fifo.read_bytes()
    assert wait_for(lambda: vm.show().monitor == "ready")


def test_a_qemu_that_does_not_start_says_why(site: Site, host: Host) -> None:
    site.define_real(host, "bad", "-drive", "file=/nonexistent,if=virtio")
    with pytest.raises(LaunchFailed, match="No such file") as caught:
        host.vm("bad").start()
    assert "/nonexistent" in caught.value.fields["log"]
    assert (host.list()[0].state, host.list()[0].reason) == ("shutoff", "failed")
    site.define(host, "none", binary="qemu-system-nowhere")
    with pytest.raises(LaunchFailed, match="qemu-system-nowhere"):
        host.vm("none").start()
    site.define(host, "true", binary="/bin/true")
    with pytest.raises(LaunchFailed, match="exited with status 0"):
        host.vm("true").start()
    site.define(host, "sleep", "600", binary="/bin/sleep")
    with pytest.raises(LaunchFailed):
        host.vm("sleep").start()


def test_attach_to_a_qemu_of_somebody_elses_and_let_it_go(site: Site, host: Host) -> None:
    path = site.root / "own.qmp"
    qemu = subprocess.Popen(["qemu-system-x86_64", *REAL_ARGS, "-qmp", f"unix:{path},server=on,wait=off"])
    try:
        assert wait_for(lambda: _accepts(path))
        attached = host.attach("guest", str(path))
        assert (attached.state, attached.pid) == ("running", qemu.pid)  # found by the socket's peer
        vm = host.vm("guest")
        assert vm.pause().state == "paused"
        with pytest.raises(AlreadyRunning):
            host.attach("guest", str(path))
        vm.detach()
        assert qemu.poll() is None
        assert host.list() == []
        host.attach("guest", str(path), pid=qemu.pid)
        assert vm.kill().reason == "destroyed"
        assert qemu.wait(5) == -signal.SIGKILL
    finally:
        qemu.kill()
        qemu.wait()


def test_attach_to_a_storage_daemon(site: Site, host: Host) -> None:
    path = site.root / "qsd.qmp"
    daemon = subprocess.Popen(
        ["qemu-storage-daemon", "--chardev", f"socket,id=c,path={path},server=on,wait=off", "--monitor", "chardev=c"]
    )
    try:
        assert wait_for(lambda: _accepts(path))
        assert host.attach("disks", str(path)).state == "running"
        assert host.vm("disks").qmp("query-block-exports") == []
        host.vm("disks").qmp("quit")
        assert host.vm("disks").wait("shutoff", timeout=10).state == "shutoff"
        assert daemon.wait(5) == 0
    finally:
        daemon.kill()
        daemon.wait()


def test_definitions_are_kept_replaced_and_forgotten(site: Site, host: Host) -> None:
    started(site, host)
    with pytest.raises(AlreadyRunning):
        host.undefine("web1")
    host.vm("web1").kill()
    with pytest.raises(NotRunning):
        host.vm("web1").qmp("query-status")
    assert host.vm("web1").start().epoch == 2
    host.vm("web1").kill()
    host.undefine("web1")
    with pytest.raises(NoSuchVm):
        host.vm("web1").show()
    assert list(site.paths.vms_state.iterdir()) == []


def test_a_detached_qemu_of_ours_is_not_started_twice(site: Site, host: Host) -> None:
    pid = started(site, host)
    host.vm("web1").detach()
    with pytest.raises(AlreadyRunning, match=str(pid)):
        host.vm("web1").start()
    kill_process(pid)
    assert host.vm("web1").start().state == "running"


def test_attach_says_what_is_wrong(site: Site, host: Host) -> None:
    with pytest.raises(MonitorLost, match="No such file"):
        host.attach("x", str(site.root / "nothing"))
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(site.root / "mute"))
        mute.listen(1)
        with site.host(timeout=0.5) as hasty, pytest.raises(DeadlineExceeded, match="greeting"):
            hasty.attach("x", str(site.root / "mute"))
    assert host.list() == [] or host.list()[0].state == "shutoff"


def _accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
