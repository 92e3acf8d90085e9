# SPDX-License-Identifier: Apache-2.0
"""Handlers that do everything wrong, in real workers: each harms its own VM's worker at most, is reported, and never ends its QEMU."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmloop.client.session import Host
from vmloop.client.stream import Event
from vmloop.client.subscription import Events
from vmloop.client.vm import Vm
from vmloop.common.errors import VmloopError

from .site import Site, signal_process, wait_for

pytestmark = pytest.mark.usefixtures("beside")

SECONDS = 15.0


@pytest.fixture
def settings() -> str:
    """A worker that is held up is reported soon and replaced soon; the memory is small."""
    return "[broker]\nblocked_after = 0.4\nblocked_limit = 3.0\n[worker]\nmemory_limit = 402653184\n"


class Stage:
    """One VM with a handler on X_GO, and its stream from before the handler is called."""

    def __init__(self, site: Site, host: Host, events: Events) -> None:
        self.site = site
        self.host = host
        self.vm: Vm = host.vm("odd")
        self.events = events
        self._threads: list[threading.Thread] = []

    def trigger(self) -> None:
        """Let QEMU say X_GO. In a thread: the answer may come only when the handler lets go, or never."""
        thread = threading.Thread(target=self._trigger)
        self._threads.append(thread)
        thread.start()

    def _trigger(self) -> None:
        with contextlib.suppress(VmloopError):  # no answer while it is held up
            self.host.vm("odd").qmp("x-simulate", {"emit": {"event": "X_GO"}}, timeout=SECONDS)

    def close(self) -> None:
        for thread in self._threads:
            thread.join()

    def event(self, name: str) -> Event:
        """The next event of that name."""
        return self.events.wait_for(name, SECONDS)

    @property
    def blocked(self) -> float:
        return next(vm.blocked for vm in self.host.list() if vm.name == "odd")


@pytest.fixture
def stage(request: pytest.FixtureRequest, site: Site, host: Host) -> Iterator[Stage]:
    """Set with the text of a file of handlers (indirect), for the VM `odd` alone."""
    directory = site.paths.etc / "handlers"
    directory.mkdir(parents=True, exist_ok=True)
    text = f"import asyncio, ctypes, os, time\nfrom vmloop.worker.handlers import on\n{request.param}"
    (directory / "odd.py").write_text(text)
    site.define(host, "odd", handlers={"load": ["odd"]})
    with host.events("odd") as events:
        qemu = host.vm("odd").start().pid
        stage = Stage(site, host, events)
        yield stage
        stage.close()
    after = host.vm("odd").show()
    assert (after.state, after.pid) in (("running", qemu), ("shutoff", None)), "a handler must not end its QEMU"


def handler(body: str, *, on_loop: bool = False) -> str:
    """A file with one handler on X_GO."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return f"@on('X_GO')\n{'async ' if on_loop else ''}def act(vm, event):\n{lines}\n"


SLEEP = "time.sleep(1.5)"
SPIN = "end = time.monotonic() + 1.5\nwhile time.monotonic() < end: pass"


@pytest.mark.parametrize("stage", [handler(SLEEP, on_loop=True), handler(SPIN, on_loop=True)], indirect=True)
def test_a_loop_that_is_held_up_is_told_of_while_it_lasts_and_in_the_vms_own_stream_with_the_stack(
    stage: Stage, host: Host
) -> None:
    worker = stage.vm.show().worker_pid
    with host.events() as everything:
        stage.trigger()
        told = everything.wait_for("LOOP_BLOCKED", SECONDS)
        assert (told.vm, told.seq, told.data["pid"]) == ("odd", 0, worker)
        assert stage.blocked > 0.2
        assert "act" in told.data["task"]
    event = stage.event("LOOP_BLOCKED")
    assert event.data["seconds"] >= 0.4
    assert "in act" in event.data["stack"]
    assert "act on X_GO" in event.data["task"]
    assert stage.event("LOOP_RECOVERED").seq == event.seq + 1
    assert stage.vm.show().worker_pid == worker
    assert wait_for(lambda: stage.blocked == 0.0)


@pytest.mark.parametrize("stage", [handler("time.sleep(600)", on_loop=True)], indirect=True)
def test_a_loop_that_stays_held_up_gets_another_worker_under_the_running_vm(stage: Stage) -> None:
    before = stage.vm.show()
    stage.trigger()
    lost = stage.event("WORKER_LOST")
    assert lost.data["how"] == "it was killed by SIGKILL"
    assert "in act" in lost.data["stack"]
    failed = stage.event("HANDLER_FAILED")
    assert (failed.data["why"], failed.data["handler"]) == ("killed its worker", "odd.act")
    after = stage.vm.show()
    assert (after.pid, after.epoch) == (before.pid, before.epoch)
    assert after.worker_pid != before.worker_pid
    assert stage.vm.qmp("query-status")["status"] == "running"


@pytest.mark.parametrize("stage", [handler("time.sleep(600)", on_loop=True)], indirect=True)
def test_a_vm_is_killed_at_once_while_its_loop_is_held_up(stage: Stage) -> None:
    stage.trigger()
    assert wait_for(lambda: stage.blocked > 0.2)
    began = time.monotonic()
    assert stage.vm.kill().state == "shutoff"
    assert time.monotonic() - began < 2.0  # 0.2 s on a quiet machine


@pytest.mark.parametrize("who", ["the worker", "the worker and QEMU"])
@pytest.mark.parametrize("stage", [""], indirect=True)
def test_a_vm_is_killed_at_once_while_everything_of_it_is_stopped(stage: Stage, who: str) -> None:
    shown = stage.vm.show()
    assert shown.pid is not None
    assert shown.worker_pid is not None
    for pid in (shown.worker_pid, shown.pid) if who != "the worker" else (shown.worker_pid,):
        signal_process(pid, signal.SIGSTOP)
    began = time.monotonic()
    assert stage.vm.kill().state == "shutoff"
    assert time.monotonic() - began < 2.0


@pytest.mark.parametrize(
    "stage", [handler("os._exit(3)", on_loop=True), handler("ctypes.string_at(0)", on_loop=True)], indirect=True
)
def test_a_handler_that_ends_its_worker_is_told_of_and_left_out_when_it_does_so_again(stage: Stage) -> None:
    for expected in (False, True):
        stage.trigger()
        stage.event("WORKER_LOST")
        failed = stage.event("HANDLER_FAILED")
        assert (failed.data["handler"], failed.data["quarantined"]) == ("odd.act", expected)
    worker = stage.vm.show().worker_pid
    stage.trigger()
    assert stage.vm.qmp("query-status")["status"] == "running"
    assert stage.vm.show().worker_pid == worker


@pytest.mark.parametrize("stage", [handler("time.sleep(3)")], indirect=True)
def test_a_plain_handler_that_sleeps_leaves_its_own_vms_monitor_working(stage: Stage) -> None:
    stage.trigger()
    began = time.monotonic()
    for _ in range(50):
        stage.vm.qmp("query-status")
    assert time.monotonic() - began < 2.0
    assert stage.blocked == 0.0


@pytest.mark.parametrize(
    "stage", [handler("1/0"), handler("1/0", on_loop=True), handler("raise SystemExit(3)", on_loop=True)], indirect=True
)
def test_a_handler_that_raises_is_told_of_with_its_traceback(stage: Stage) -> None:
    worker = stage.vm.show().worker_pid
    stage.trigger()
    failed = stage.event("HANDLER_FAILED")
    assert failed.data["why"] == "raised"
    assert "in act" in failed.data["traceback"]
    assert stage.vm.show().worker_pid == worker


@pytest.mark.parametrize("stage", ["1/0\n", "def broken(:\n"], indirect=True)
def test_a_file_that_cannot_be_imported_is_told_of_and_the_vm_runs(stage: Stage) -> None:
    failed = stage.event("HANDLER_FAILED")
    assert (failed.data["handler"], failed.data["why"]) == ("odd.py", "import")
    assert stage.vm.qmp("query-status")["status"] == "running"


@pytest.mark.parametrize(
    "stage",
    [handler("kept = []\nwhile True: kept.append(bytearray(1 << 20))", on_loop=on_loop) for on_loop in (False, True)],
    indirect=True,
)
def test_a_handler_that_leaks_gets_no_more_than_the_limit(stage: Stage) -> None:
    stage.trigger()
    failed = stage.event("HANDLER_FAILED")
    assert failed.data["why"] in ("raised", "killed its worker")
    [figures] = stage.host.stats("odd")
    assert figures.worker is not None
    assert figures.worker.rss_bytes < 402653184
    assert stage.vm.qmp("query-status")["status"] == "running"


@pytest.mark.parametrize(
    "stage",
    [handler("os.fork()"), handler("os.fork()\nawait asyncio.sleep(0.1)", on_loop=True)],
    indirect=True,
)
def test_a_handler_that_forks_makes_no_second_worker(stage: Stage) -> None:
    worker = stage.vm.show().worker_pid
    stage.trigger()
    assert stage.vm.qmp("query-status")["status"] == "running"
    assert wait_for(lambda: list(_workers_of(stage)) == [worker])
    stage.trigger()
    assert stage.vm.qmp("query-status")["status"] == "running"


def _workers_of(stage: Stage) -> Iterator[int]:
    page = str(stage.site.paths.vm(stage.vm.name).page)
    for pid in stage.site.processes():
        with contextlib.suppress(OSError):  # it ended meanwhile
            mapped = Path(f"/proc/{pid}/maps").read_text().splitlines()
            if any(page in line and " rw-s " in line for line in mapped):  # the broker maps it for reading
                yield pid


@pytest.mark.parametrize(
    "stage",
    ["@on('X_GO')\nasync def act(vm, event):\n    vm.emit('SEEN', await vm.qmp('query-status'))\n"],
    indirect=True,
)
def test_a_good_handler_asks_qemu_and_adds_to_the_stream(stage: Stage) -> None:
    stage.trigger()
    seen = stage.event("SEEN")
    assert seen.data["status"] == "running"
    assert seen.origin == "vmloop"
