# SPDX-License-Identifier: Apache-2.0
"""The machine under vmloop: disks that are full or read-only, no free fds, no processes, a clock that jumps. VMs that run go on running.

Needs to mount small file systems, and so root; skips where that is not possible, and fails there under CI=true. The one with a control
group skips where there can be none.
"""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from vmloop.client.session import Host
from vmloop.common.errors import ConfigError, LaunchFailed, VmloopError
from vmloop.common.names import VmName
from vmloop.worker.runfile import read_run

from .site import Site, kill_process, wait_for

SECONDS = 15.0
# Enough for the files of two VMs, and soon full.
SIZE = "size=512k,mode=700"


@pytest.fixture
def settings() -> str:
    return "[restart]\nfirst_delay = 0.05\nmax_delay = 0.2\n[worker]\nreconnect_max_delay = 0.2\n"


def mount(*arguments: str) -> None:
    """mount(8). Skips where it is not possible, fails under CI=true."""
    result = subprocess.run(["mount", *arguments], capture_output=True, text=True, timeout=SECONDS, check=False)
    if result.returncode:
        text = f"mount {' '.join(arguments)}: {result.stderr.strip()}"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)


@contextmanager
def site_on(part: str, settings: str) -> Iterator[Site]:
    """A site whose directory `part` is a small file system of its own."""
    site = Site(settings)
    place = site.root / part
    place.mkdir()
    mounted = False
    try:
        mount("-t", "tmpfs", "-o", SIZE, "tmpfs", str(place))
        mounted = True
        site.start_broker()
        yield site
    finally:
        try:
            site.close_processes()
        finally:
            if mounted:
                subprocess.run(["umount", "-l", str(place)], timeout=SECONDS, check=True)
            site.close()


def fill(directory: Path) -> Path:
    """Take all the room there is."""
    filler = directory / "filler"
    with filler.open("ab", buffering=0) as file:
        size = 1 << 16
        while size:
            try:
                file.write(b"x" * size)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                size //= 2
    return filler


@pytest.fixture
def small_state(settings: str) -> Iterator[Site]:
    with site_on("state", settings) as site:
        yield site


@pytest.fixture
def small_run(settings: str) -> Iterator[Site]:
    with site_on("run", settings) as site:
        yield site


def started(site: Site, host: Host, name: str = "odd") -> int:
    site.define(host, name)
    host.vm(name).start()
    pid = host.vm(name).show().pid
    assert pid is not None
    return pid


def replaced(host: Host, name: str = "odd") -> None:
    """Its worker is killed; the next one serves the VM, and it is the same QEMU."""
    before = host.vm(name).show()
    assert before.worker_pid is not None
    kill_process(before.worker_pid)
    assert host.vm(name).qmp("query-status", timeout=SECONDS)["status"] == "running"
    after = host.vm(name).show()
    assert (after.pid, after.epoch) == (before.pid, before.epoch)
    assert after.worker_pid != before.worker_pid


def zygote_of(site: Site) -> int:
    for pid in site.processes():
        with suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == "vml-zygote":
                return pid
    raise AssertionError("there is no zygote")


# -- state/ -------------------------------------------------------------------------------------------------------------------


def test_on_a_full_disk_vms_run_on_workers_are_replaced_and_a_start_says_why_not(small_state: Site) -> None:
    site = small_state
    host = site.host()
    started(site, host)
    site.define(host, "late")
    filler = fill(site.paths.state)
    replaced(host)
    with pytest.raises(LaunchFailed) as caught:
        host.vm("late").start()
    assert "No space left on device" in caught.value.message
    assert str(site.paths.state) in caught.value.message
    with pytest.raises(ConfigError, match="No space left on device"):
        site.define(host, "new")
    assert [pid for pid, command in site.processes().items() if "chardev=vmloop-monitor" in command] == [
        host.vm("odd").show().pid
    ]
    left = [path.name for path in site.paths.vm(VmName("late")).state.iterdir() if path.name.endswith(".new")]
    assert left == []
    host.vm("odd").kill()  # its end cannot be written down
    for _ in range(2):
        with pytest.raises(LaunchFailed, match="No space left on device"):  # and no loop of workers that find it ended
            host.vm("odd").start()
    filler.unlink()
    host.vm("late").start()
    host.vm("odd").start()
    assert {vm.state for vm in host.list() if vm.name != "new"} == {"running"}
    replaced(host)


def test_a_file_that_a_full_disk_did_not_take_is_written_when_there_is_room(small_state: Site) -> None:
    site = small_state
    host = site.host()
    pid = started(site, host)
    path = site.paths.vm(VmName("odd")).run_file
    before = read_run(path)
    assert before is not None
    filler = fill(site.paths.state)
    worker, zygote = host.vm("odd").show().worker_pid, zygote_of(site)
    assert worker is not None
    site.kill_broker()
    kill_process(zygote)
    kill_process(worker)  # so nobody keeps the connection, and the next worker negotiates a new one
    site.start_broker()
    host = site.host()
    assert wait_for(lambda: host.vm("odd").show().state == "running", SECONDS)
    shown = host.vm("odd").show()
    assert shown.pid == pid
    assert "No space left on device" in (shown.facts or {})["run_file"]
    filler.unlink()
    assert wait_for(lambda: "run_file" not in (host.vm("odd").show().facts or {}), SECONDS)
    assert read_run(path) == before


def test_with_a_read_only_state_directory_a_broker_starts_and_vms_are_served(small_state: Site) -> None:
    site = small_state
    host = site.host()
    pid = started(site, host)
    mount("--bind", str(site.paths.state), str(site.paths.state))  # over it: whoever has a file open keeps it
    try:
        mount("-o", "remount,bind,ro", str(site.paths.state))
        replaced(host)
        site.kill_broker()
        site.start_broker()
        host = site.host()
        assert host.vm("odd").qmp("query-status", timeout=SECONDS)["status"] == "running"
        replaced(host)
        with pytest.raises(ConfigError, match="Read-only file system"):
            host.vm("odd").detach()
        assert host.vm("odd").show().pid == pid
        host.vm("odd").kill()
        with pytest.raises(LaunchFailed, match="Read-only file system"):
            host.vm("odd").start()
    finally:
        subprocess.run(["umount", "-l", str(site.paths.state)], timeout=SECONDS, check=True)
    host.vm("odd").start()
    replaced(host)


# -- run/ ---------------------------------------------------------------------------------------------------------------------


def test_with_a_full_run_directory_vms_are_served_and_a_new_one_is_refused(small_run: Site) -> None:
    site = small_run
    host = site.host()
    started(site, host)
    site.define(host, "late")
    assert wait_for(lambda: next(vm for vm in host.list() if vm.name == "late").worker == "absent", 30.0)
    site.paths.vm(VmName("late")).page.unlink()
    filler = fill(site.paths.run)
    replaced(host)
    with pytest.raises(LaunchFailed) as caught:
        host.vm("late").start()
    assert f"{site.paths.vm(VmName('late')).page} cannot be made: No space left on device" in caught.value.message
    assert not site.paths.vm(VmName("late")).page.exists()
    filler.unlink()
    host.vm("late").start()
    replaced(host, "late")


# -- fds ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def no_fds(pid: int) -> Iterator[None]:
    """The process gets no further fd."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
    used = sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
    lowest_free = next(number for number in range(highest + 2) if number not in used)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


def test_a_worker_without_free_fds_serves_its_monitor_and_recovers(site: Site, host: Host) -> None:
    started(site, host)
    worker = host.vm("odd").show().worker_pid
    assert worker is not None
    with no_fds(worker):
        for _ in range(20):
            assert host.vm("odd").qmp("query-status")["status"] == "running"
        host.vm("odd").pause()
        host.vm("odd").resume()
        assert host.vm("odd").show().worker_pid == worker
    replaced(host)


def test_a_zygote_without_free_fds_says_no_and_recovers(site: Site, host: Host) -> None:
    started(site, host)
    site.define(host, "late")
    zygote = zygote_of(site)
    worker = host.vm("odd").show().worker_pid
    assert worker is not None
    with no_fds(zygote):
        kill_process(worker)
        with suppress(VmloopError):
            host.vm("odd").qmp("query-status", timeout=1.0)
    assert host.vm("odd").qmp("query-status", timeout=SECONDS)["status"] == "running"
    assert zygote_of(site) == zygote
    host.vm("late").start()


def test_a_broker_without_free_fds_serves_whom_it_knows(site: Site, host: Host) -> None:
    pid = started(site, host)
    broker = host.version().pid
    with no_fds(broker):
        for _ in range(20):
            assert host.vm("odd").qmp("query-status")["status"] == "running"
        assert host.version().pid == broker
    replaced(host)
    assert host.vm("odd").show().pid == pid


def test_a_broker_that_cannot_take_a_connection_ends_and_the_next_one_finds_all_vms(site: Site, host: Host) -> None:
    """libzmq aborts the process there (ipc_listener.cpp): nothing of ours can prevent it, and nothing is lost by it."""
    pid = started(site, host)
    broker = host.version().pid
    with no_fds(broker):
        with suppress(VmloopError):
            site.host(timeout=1.0).ping()
        assert site.broker is not None
        site.broker.wait(SECONDS)
    site.start_broker()
    again = site.host()
    assert again.vm("odd").qmp("query-status", timeout=SECONDS)["status"] == "running"
    assert again.vm("odd").show().pid == pid


# -- processes ----------------------------------------------------------------------------------------------------------------


@contextmanager
def no_processes(pid: int) -> Iterator[None]:
    """The process can fork no more: a control group of its own, which is full. Skips where the host lets nobody make one."""
    root, old = _pids_controller(pid)
    group = root / f"vmloop-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"{group}: {error}")
    try:
        (group / "cgroup.procs").write_text(str(pid))
        (group / "pids.max").write_text((group / "pids.current").read_text())
        yield
    finally:
        (group / "pids.max").write_text("max")
        for member in (group / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                (root / old / "cgroup.procs").write_text(member)
        assert wait_for(lambda: _removed(group), SECONDS)


def _pids_controller(pid: int) -> tuple[Path, str]:
    """Where its groups are, of version 1 or 2, and the one that the process is in. It is the kernel's: nothing that could be installed."""
    groups = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    for hierarchy, root in ((":pids:", Path("/sys/fs/cgroup/pids")), ("0::", Path("/sys/fs/cgroup"))):
        controls = root / "cgroup.subtree_control"
        if hierarchy == "0::" and not (controls.exists() and "pids" in controls.read_text().split()):
            continue
        for line in groups:
            if hierarchy in line:
                return root, line.split(":", 2)[2].lstrip("/")
    pytest.skip("the kernel has no pids controller here")


def _removed(group: Path) -> bool:
    with suppress(OSError):  # a process that is ending is still in it
        group.rmdir()
    return not group.exists()


def test_without_a_process_for_a_worker_requests_are_told_why_and_it_recovers(site: Site, host: Host) -> None:
    pid = started(site, host)
    site.define(host, "late")
    assert wait_for(lambda: next(vm for vm in host.list() if vm.name == "late").worker == "absent", 30.0)
    worker, zygote, broker = host.vm("odd").show().worker_pid, zygote_of(site), host.version().pid
    assert worker is not None
    other = site.host(timeout=1.0)
    with no_processes(zygote):
        kill_process(worker)
        for ask in (lambda: other.vm("odd").qmp("query-status"), lambda: other.vm("late").start()):
            with pytest.raises(VmloopError, match="Resource temporarily unavailable"):
                ask()
        forks = site.log().count("no worker can be made")
        assert 0 < forks < 60, "it backs off"
        assert host.vm("odd").show().state == "running"  # of which nobody says that it is gone
    assert host.vm("odd").qmp("query-status", timeout=SECONDS)["status"] == "running"
    assert (host.vm("odd").show().pid, zygote_of(site), host.version().pid) == (pid, zygote, broker)
    host.vm("late").start()
