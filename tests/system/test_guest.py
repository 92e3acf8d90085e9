# SPDX-License-Identifier: Apache-2.0
"""A real guest with the real qemu-ga on real QEMU, under broker and worker: its agent, its frozen file systems, and its ends.

A boot takes two to three seconds under TCG, so one guest serves all tests that leave it alive. tests/system/test_guest_alone.py shows
the same guest without vmloop.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest

from vmloop.client.session import Host
from vmloop.client.subscription import Events
from vmloop.client.vm import Vm
from vmloop.common.cursor import Cursor
from vmloop.common.errors import (
    AgentAbsent,
    AgentError,
    AgentUnresponsive,
    DeadlineExceeded,
    NotRunning,
    OutcomeUnknown,
    VmloopError,
)

from ..guest.image import GuestImage, guest_args, guest_disk, require_guest
from .figures import MIB, agent_owes, answering_as_before, usage_of_worker
from .site import START_SECONDS, Site, kill_process, wait_for

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("require_qemu")]

BOOT: Final = 40.0  # seconds; a reset under TCG takes three times as long as the first boot
SECONDS: Final = 15.0
TIMEOUT: Final = 0.8  # of the agent
LIMIT: Final = 1.5  # of a freeze
COMMAND: Final = [sys.executable, "-m", "vmloop.client.cli.main", "--root"]


class House:
    """A broker with a simulated VM beside the real guests, for all tests of this file."""

    def __init__(self, image: GuestImage) -> None:
        self.site = Site()
        self._image = image

    def open(self) -> None:
        self.site.start_broker()
        self.host: Host = self.site.host()
        self.site.define(self.host, "beside")
        self.host.vm("beside").start()

    def boot(self, name: str, **handlers: Any) -> Vm:
        """Start a guest; it is not up yet."""
        disk = guest_disk(self.site.root / f"{name}.img")
        args = guest_args(self._image, disk=disk, memory=160)
        agent = {"enabled": True, "timeout": TIMEOUT, "freeze_limit": LIMIT}
        self.site.define(self.host, name, *args, binary="qemu-system-x86_64", agent=agent, handlers=handlers)
        vm = self.host.vm(name)
        vm.start()
        return vm


@pytest.fixture(scope="module")
def house(require_qemu: str) -> Iterator[House]:
    del require_qemu
    made = House(require_guest())
    try:
        made.open()
        yield made
    finally:
        made.site.close()


@pytest.fixture(scope="module")
def guest(house: House) -> Vm:
    """The guest of those tests that leave it as it was: up, running, thawed, its agent ready."""
    vm = house.boot("web1")
    with vm.events(since=Cursor(1, 0)) as events:
        agent_states(events, "ready", BOOT)
    return vm


@pytest.fixture
def events(guest: Vm) -> Iterator[Events]:
    """What happens to that guest from now on; it must come out of the test with its agent ready."""
    with guest.events(since=guest.cursor()) as stream:
        yield stream
    assert wait_for(lambda: guest.show().agent == "ready", SECONDS), guest.show().agent
    assert guest.agent("guest-fsfreeze-status") == "thawed"


def agent_states(events: Events, last: str, seconds: float = SECONDS) -> list[str]:
    """The agent's states on its way to one of them."""
    seen: list[str] = []
    deadline = time.monotonic() + seconds
    while last not in seen:
        seen.append(events.wait_for("AGENT_STATE", deadline - time.monotonic()).data["new"])
    return seen


def trouble(vm: Vm, *words: str) -> None:
    """Set off something in the guest (tests/guest/trouble)."""
    vm.agent("guest-exec", {"path": "/bin/trouble", "arg": list(words)})


def ping_until_silent(vm: Vm) -> float:
    """Ask an agent that is about to be stopped; the time at which it was asked the question that it did not answer (raised)."""
    for _ in range(100):
        began = time.monotonic()
        try:
            vm.agent("guest-ping")
        except AgentUnresponsive as silent:
            assert silent.fields["sent"] is True
            return began
    raise AssertionError("the agent goes on answering")


def connections(path: Path) -> int:
    """How many are made to a unix socket."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return sum(line.endswith(f" {path}") and line.split()[5] == "03" for line in lines)


def worker_of(vm: Vm) -> int:
    pid = vm.show().worker_pid
    assert pid is not None
    return pid


# -- a boot, and the ends ---------------------------------------------------------------------------------------------------


def test_an_agent_is_waited_for_found_by_its_port_and_gone_with_its_guest(house: House) -> None:
    vm = house.boot("short")
    with pytest.raises(AgentAbsent) as absent:
        vm.agent("guest-ping")
    assert absent.value.fields["sent"] is False
    assert connections(house.site.paths.vm(vm.name).agent_socket) == 0  # nothing is said to a guest that boots
    with vm.events(since=Cursor(1, 0)) as events:
        told: list[str] = []
        while told[-1:] != ["ready"]:
            event = events.get(BOOT)
            assert event is not None, told
            if event.event in ("VSERPORT_CHANGE", "AGENT_STATE"):
                told.append(event.data.get("new", "the port is open"))
        assert told == ["waiting", "the port is open", "syncing", "ready"]
        assert connections(house.site.paths.vm(vm.name).agent_socket) == 1
        assert vm.agent("guest-shutdown", {"mode": "powerdown"}) == {}
        assert events.wait_for("SHUTDOWN", SECONDS).data == {"guest": True, "reason": "guest-shutdown"}
    ended = vm.wait("shutoff", timeout=SECONDS)
    assert (ended.reason, vm_state(house, "short").agent) == ("shutdown", "absent")
    with pytest.raises(NotRunning):
        vm.agent("guest-ping")


def vm_state(house: House, name: str) -> Any:
    return next(vm for vm in house.host.list() if vm.name == name)


def test_a_guest_begins_again_after_powering_off_and_after_a_reboot_and_obeys_the_power_button(house: House) -> None:
    vm = house.boot("again", on_poweroff="restart")
    qemu = vm.show().pid
    with vm.events(since=Cursor(1, 0)) as events:
        agent_states(events, "ready", BOOT)
        assert vm.agent("guest-shutdown", {"mode": "powerdown"}) == {}  # it has powered off, whatever comes then
        assert vm.last_cursor is not None
        assert events.wait_for("SHUTDOWN", SECONDS).data["guest"] is True
        assert events.wait_for("RESET", SECONDS).data["reason"] == "host-qmp-system-reset"
        assert agent_states(events, "ready", BOOT)[-2:] == ["syncing", "ready"]
        assert (vm.show().state, vm.show().reason, vm.show().pid) == ("running", "booted", qemu)
        assert vm.agent("guest-shutdown", {"mode": "reboot"}) == {}
        assert events.wait_for("RESET", SECONDS).data["reason"] == "guest-reset"
        assert agent_states(events, "ready", BOOT)[-2:] == ["syncing", "ready"]
    stopped = vm.stop(timeout=SECONDS)  # not restarted: it was asked for
    assert (stopped.state, stopped.reason) == ("shutoff", "shutdown")


@pytest.mark.parametrize("on_crash", ["restart", "dump"])
def test_a_panic_is_told_by_pvpanic_and_ends_as_the_definition_says(house: House, on_crash: str) -> None:
    vm = house.boot(f"panic-{on_crash}", on_crash=on_crash)
    with vm.events(since=Cursor(1, 0)) as events:
        agent_states(events, "ready", BOOT)
        trouble(vm, "panic")
        assert events.wait_for("GUEST_PANICKED", SECONDS).data["action"] == "pause"
        if on_crash == "restart":
            assert events.wait_for("RESET", SECONDS).data["reason"] == "host-qmp-system-reset"
            while (moved := events.wait_for("VM_STATE", SECONDS).data)["new"] != "running":
                pass
            assert moved["reason"] == "crashed"
        else:
            dumped = events.wait_for("DUMP_FINISHED", BOOT).data
            assert Path(dumped["path"]).stat().st_size == dumped["bytes"] > MIB
            Path(dumped["path"]).unlink()
            assert vm_state(house, vm.name).state == "crashed"
            with pytest.raises(VmloopError):
                vm.agent("guest-ping", timeout=0.3)
    assert vm.kill().state == "shutoff"


# -- programs and files -----------------------------------------------------------------------------------------------------


def test_programs_run_in_the_guest_with_their_input_output_and_end(guest: Vm, events: Events) -> None:
    del events
    ended = guest.guest_exec("/bin/sh", ["-c", "cat; echo no >&2; exit 3"], input=b"\x00\xff yes")
    assert (ended.exitcode, ended.out, ended.err) == (3, b"\x00\xff yes", b"no\n")
    killed = guest.guest_exec("/bin/sh", ["-c", "kill -9 $$"])
    assert (killed.exitcode, killed.signal) == (None, 9)
    assert guest.guest_exec("/bin/sh", ["-c", "echo $A"], env={"A": "a b"}).out == b"a b\n"
    with pytest.raises(DeadlineExceeded) as late:
        guest.guest_exec("/bin/sleep", ["2"], timeout=0.2)
    assert late.value.fields["pid"] > 0
    with pytest.raises(AgentError) as refused:
        guest.guest_exec("/nowhere/program")
    assert refused.value.fields["kind"] == "refused"
    with pytest.raises(AgentError) as unknown:
        guest.agent("guest-make-tea")
    assert unknown.value.fields["kind"] == "unknown"


def test_files_go_in_and_come_out_as_they_were(house: House, guest: Vm, events: Events, tmp_path: Path) -> None:
    del events
    content = os.urandom(600_000)
    steps: list[tuple[int, int | None]] = []
    copy = guest.write_guest_file("/data/f", io.BytesIO(content), lambda *step: steps.append(step), total=len(content))
    assert (copy.bytes, copy.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert steps[-1] == (len(content), len(content))
    back = io.BytesIO()
    assert guest.read_guest_file("/data/f", back) == copy
    assert back.getvalue() == content
    with pytest.raises(AgentError, match="No such file"):
        guest.read_guest_file("/data/nothing", back)
    (tmp_path / "in").write_bytes(content)
    for source, target in (("in", f"{guest.name}:/data/g"), (f"{guest.name}:/data/g", "out")):
        ran = subprocess.run(
            [*COMMAND, str(house.site.root), "cp", source, target], cwd=tmp_path, capture_output=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
        assert b"verified: sha256sum in the guest" in ran.stdout + ran.stderr
    assert (tmp_path / "out").read_bytes() == content


# -- frozen file systems ----------------------------------------------------------------------------------------------------


def test_a_frozen_guest_refuses_what_writes_and_is_thawed_at_the_end_and_at_its_limit(
    guest: Vm, events: Events
) -> None:
    with guest.frozen() as count:
        assert count == 1
        with pytest.raises(AgentError, match="thaw the guest's file systems first") as refused:
            guest.guest_exec("/bin/true")
        assert refused.value.fields["kind"] == "disabled"
        assert guest.agent("guest-ping") == {}
    assert guest.guest_exec("/bin/touch", ["/data/touched"]).exitcode == 0
    assert events.wait_for("AGENT_FROZEN", SECONDS).data["count"] == 1
    assert events.wait_for("AGENT_THAWED", SECONDS).data["why"] == "asked"
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="thawed at their limit"), guest.frozen(limit=0.5):
        assert events.wait_for("AGENT_THAWED", SECONDS).data["why"] == "limit"
    assert 0.4 < time.monotonic() - began < 3.0
    assert guest.agent("guest-fsfreeze-freeze") == 1  # held by nobody: the definition's limit is its end
    assert events.wait_for("AGENT_THAWED", SECONDS).data["why"] == "limit"


@pytest.fixture
def holder(house: House, guest: Vm) -> Iterator[subprocess.Popen[bytes]]:
    """Another program that freezes the guest and holds it so."""
    command = [*COMMAND, str(house.site.root), "--json", "agent", str(guest.name), "guest-fsfreeze-freeze", "--hold"]
    with subprocess.Popen([*command, "--limit", "60"], stdout=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_a_guest_is_thawed_when_the_program_that_held_it_is_killed(
    guest: Vm, events: Events, holder: subprocess.Popen[bytes]
) -> None:
    events.wait_for("AGENT_FROZEN", START_SECONDS)
    assert guest.agent("guest-fsfreeze-status") == "frozen"
    holder.kill()
    assert events.wait_for("AGENT_THAWED", 5.0).data["why"] == "caller gone"


def test_a_guest_is_thawed_when_who_froze_it_has_gone_before_the_answer(
    house: House, guest: Vm, events: Events, holder: subprocess.Popen[bytes]
) -> None:
    trouble(guest, "stopped", "1.5")  # at once; the holder is a program that takes longer to start
    assert wait_for(lambda: house.host.stats(guest.name)[0].in_flight > 0)
    gone = guest.cursor()
    holder.kill()
    assert events.wait_for("AGENT_FROZEN", SECONDS).cursor > gone
    assert events.wait_for("AGENT_THAWED", 5.0).data["why"] == "caller gone"


def test_a_freeze_outlives_its_worker_and_the_next_one_keeps_its_limit(guest: Vm, events: Events) -> None:
    began = time.monotonic()
    # Who held it learns that nobody can vouch for the time between the two workers.
    with pytest.raises((OutcomeUnknown, DeadlineExceeded)), guest.frozen():
        the_next_worker_keeps_the_limit(guest, events)
    assert LIMIT - 0.2 < time.monotonic() - began < LIMIT + 1.5


def the_next_worker_keeps_the_limit(guest: Vm, events: Events) -> None:
    worker = worker_of(guest)
    kill_process(worker)
    events.wait_for("WORKER_LOST", SECONDS)
    agent_states(events, "ready")
    assert guest.agent("guest-fsfreeze-status") == "frozen"
    assert worker_of(guest) != worker
    assert events.wait_for("AGENT_THAWED", SECONDS).data["why"] == "limit"


# -- an agent that does not answer, goes, floods ----------------------------------------------------------------------------


def test_a_stopped_agent_is_unresponsive_in_time_answers_late_and_is_ready_again(guest: Vm, events: Events) -> None:
    trouble(guest, "stopped", "2")
    began = ping_until_silent(guest)
    assert TIMEOUT <= time.monotonic() - began < TIMEOUT + 0.5
    assert guest.show().agent == "unresponsive"
    late = events.wait_for("COMMAND_LATE", SECONDS)
    assert (late.data["command"], late.data["return"], late.origin) == ("guest-ping", {}, "agent")
    assert agent_states(events, "ready") == ["syncing", "ready"]


def test_an_agent_that_goes_away_is_absent_and_found_again(guest: Vm, events: Events) -> None:
    trouble(guest, "away", "1")
    assert agent_states(events, "waiting") == ["waiting"]
    with pytest.raises(AgentAbsent, match="closed its agent's port"):
        guest.agent("guest-ping")
    assert agent_states(events, "ready") == ["syncing", "ready"]
    assert guest.agent("guest-ping") == {}


def test_an_agent_that_restarts_or_flaps_is_asked_anew(guest: Vm, events: Events) -> None:
    for words in (["restart"], ["flap", "50"]):
        trouble(guest, *words)
        assert agent_states(events, "ready")[-2:] == ["syncing", "ready"]
        assert wait_for(lambda: guest.agent("guest-ping") == {})


def test_a_flood_costs_its_worker_little_and_others_nothing(house: House, guest: Vm, events: Events) -> None:
    beside = house.host.vm("beside")
    worker = worker_of(guest)
    used = usage_of_worker(guest)
    began = time.monotonic()
    with answering_as_before(beside, 5.0):
        trouble(guest, "flood", "2")
        agent_states(events, "unresponsive")
    with pytest.raises((AgentUnresponsive, AgentAbsent)):
        guest.agent("guest-ping", timeout=0.3)
    agent_states(events, "ready", 30.0)
    assert time.monotonic() - began > 2.0
    assert used.cpu < 0.5
    assert used.peak < 8 * MIB
    assert worker_of(guest) == worker


# -- the worker, and sleep --------------------------------------------------------------------------------------------------


def test_the_next_worker_finds_the_agent_within_a_second(guest: Vm, events: Events) -> None:
    assert guest.agent("guest-ping") == {}
    began = time.monotonic()
    kill_process(worker_of(guest))
    events.wait_for("WORKER_LOST", SECONDS)
    assert agent_states(events, "ready") == ["waiting", "syncing", "ready"]
    assert time.monotonic() - began < 1.0
    assert guest.guest_exec("/bin/echo", ["here"]).out == b"here\n"


@pytest.mark.parametrize("command", ["guest-exec", "guest-file-read"])
def test_a_command_in_flight_is_answered_by_the_next_worker(
    house: House, guest: Vm, events: Events, command: str
) -> None:
    content = os.urandom(2 * MIB)
    guest.write_guest_file("/data/long", io.BytesIO(content))
    handle = guest.agent("guest-file-open", {"path": "/data/long", "mode": "r"})
    arguments = {
        "guest-exec": {"path": "/bin/echo", "arg": ["once"], "capture-output": True},
        "guest-file-read": {"handle": handle, "count": len(content)},
    }[command]
    guest.pause()
    with ThreadPoolExecutor(1) as beside:
        answer = beside.submit(guest.agent, command, arguments, timeout=SECONDS)
        assert wait_for(lambda: agent_owes(house.site, guest.name), SECONDS)
        kill_process(worker_of(guest))
        events.wait_for("WORKER_LOST", SECONDS)
        guest.resume()
        value = answer.result(SECONDS)
    if command == "guest-exec":
        assert wait_for(lambda: guest.agent("guest-exec-status", {"pid": value["pid"]})["exited"], SECONDS)
    else:
        assert base64.b64decode(value["buf-b64"]) == content
    guest.agent("guest-file-close", {"handle": handle})


def test_a_suspended_guest_says_so_by_its_event_and_wakes_up(guest: Vm, events: Events) -> None:
    # The last test of this guest: after S3 its machine does not power off any more.
    assert guest.agent("guest-suspend-ram") == {}
    assert events.wait_for("SUSPEND", SECONDS).origin == "qmp"
    assert guest.wait("pmsuspended", timeout=SECONDS).state == "pmsuspended"
    with pytest.raises((AgentAbsent, AgentUnresponsive, DeadlineExceeded)):
        guest.agent("guest-ping", timeout=0.3)
    guest.qmp("system_wakeup")
    events.wait_for("WAKEUP", SECONDS)
    assert guest.wait("running", timeout=SECONDS).reason == "wakeup"
    assert wait_for(lambda: guest.show().agent == "ready", SECONDS)
