# SPDX-License-Identifier: Apache-2.0
"""What the plugin's fixtures give, each switch once: a private broker, a simulated VM and its faults, a recorded dialogue as a VM."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import pytest

from vmloop.common.errors import (
    AgentAbsent,
    ConfigError,
    DeadlineExceeded,
    LaunchFailed,
    MonitorFrozen,
    NotRunning,
    QmpError,
)
from vmloop.testing.double import Double, FaultChanges, HandlerFailed
from vmloop.testing.plugin import ReplayedVm, SimulatedVms, VmloopHandlers
from vmloop.testing.private_broker import PrivateBroker
from vmloop.worker.handlers import AsyncVm, Event, SyncVm, on
from vmloop.worker.qemu.simulated_faults import Faults

from ..contract.test_recorded_dialogue import QEMU_7_2
from .site import kill_process, processes_of, signal_process, wait_for

# -- a simulated VM -------------------------------------------------------------------------------------------------------


def test_the_switches_are_those_of_the_stand_in() -> None:
    fields = {field.name for field in msgspec.structs.fields(Faults)}
    assert set(FaultChanges.__annotations__) == fields


def test_its_agent_is_ready_when_the_test_begins(simulated_vm: Double) -> None:
    assert simulated_vm.vm.show().agent == "ready"
    assert simulated_vm.vm.agent("guest-info")["version"]


def test_one_without_an_agent_and_with_arguments(simulated_vms: SimulatedVms) -> None:
    double = simulated_vms("web1", "-name", "mine", "-simulate", "slow=0.01", agent={"enabled": False})
    assert double.name == "web1"
    assert double.vm.qmp("query-name") == {"name": "mine"}
    with pytest.raises(AgentAbsent):
        double.vm.agent("guest-ping")


def test_several_have_names_of_their_own_and_need_not_wait_for_each_other(simulated_vms: SimulatedVms) -> None:
    first, second = simulated_vms(), simulated_vms()
    assert (first.name, second.name) == ("vm1", "vm2")
    with first.faults(busy=True):
        assert second.vm.qmp("query-status", timeout=5)["running"] is True


@pytest.mark.parametrize(
    ("happen", "event", "state"),
    [
        (Double.panic, "GUEST_PANICKED", "crashed"),
        (Double.crash_loaded, "GUEST_CRASHLOADED", "running"),
        (Double.fire_watchdog, "WATCHDOG", "running"),
        (Double.suspend, "SUSPEND", "pmsuspended"),
        (Double.switch_off, "SHUTDOWN", "shutoff"),
        (Double.hibernate, "SUSPEND_DISK", "shutoff"),
        (Double.reboot, "RESET", "running"),
        (Double.crash, "VM_STATE", "shutoff"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_what_a_guest_does_is_an_event_and_a_state(
    simulated_vm: Double, happen: Callable[[Double], None], event: str, state: str
) -> None:
    happen(simulated_vm)
    simulated_vm.wait_event(event)
    assert simulated_vm.vm.wait(state, timeout=10).state == state


def test_events_are_waited_for_in_their_order_and_by_their_data(simulated_vm: Double) -> None:
    for number in range(3):
        simulated_vm.emit("SITE", {"number": number, "kind": "x"})
    assert simulated_vm.wait_event("SITE").data["number"] == 0
    assert simulated_vm.wait_event("SITE", kind="x", number=2).data["number"] == 2
    assert [event.data["number"] for event in simulated_vm.events("SITE")] == [0, 1, 2]
    with pytest.raises(DeadlineExceeded, match=r"no event SITE with \{'number': 0\} within 0.3 s"):
        simulated_vm.wait_event("SITE", timeout=0.3, number=0)


def test_a_vm_that_is_started_again_is_the_same_double(simulated_vm: Double) -> None:
    simulated_vm.switch_off()
    simulated_vm.vm.wait("shutoff", timeout=10)
    simulated_vm.vm.start()
    simulated_vm.emit("SITE")
    assert simulated_vm.wait_event("SITE").epoch == 2
    assert {event.epoch for event in simulated_vm.events()} == {1, 2}
    assert [event.seq for event in simulated_vm.events()][:3] == [1, 2, 3]


def test_a_vm_that_the_test_undefines_is_nobodys_failure(simulated_vm: Double, broker: PrivateBroker) -> None:
    simulated_vm.vm.kill()
    broker.host.undefine(simulated_vm.name)


def test_jobs_are_what_the_test_says(simulated_vm: Double) -> None:
    job = {"id": "j", "type": "backup", "status": "running"}
    simulated_vm.set_jobs([job])
    assert simulated_vm.vm.qmp("query-jobs") == [job]


# -- faults ---------------------------------------------------------------------------------------------------------------


def test_a_frozen_vm_thaws_at_the_end_of_the_block(simulated_vm: Double) -> None:
    with simulated_vm.faults(frozen=True):
        with pytest.raises((MonitorFrozen, DeadlineExceeded)):
            simulated_vm.vm.qmp("query-status", timeout=3.0)
        assert wait_for(lambda: simulated_vm.vm.show().monitor == "frozen")
    assert simulated_vm.vm.qmp("query-status", wait_frozen=True)["running"] is True


def test_a_stopped_process_goes_on_when_it_is_healed(simulated_vm: Double) -> None:
    pid = simulated_vm.vm.show().pid
    assert pid is not None
    signal_process(pid, signal.SIGSTOP)
    simulated_vm.heal()
    assert simulated_vm.vm.qmp("query-status", wait_frozen=True, timeout=10)["running"] is True


def test_the_faults_before_a_block_are_those_after_it(simulated_vm: Double) -> None:
    simulated_vm.set_faults(big_reply=3000)
    with simulated_vm.faults(busy=True, agent_disabled=["guest-info", "guest-ping"]):
        assert simulated_vm.vm.qmp("x-simulate", oob=True)["agent_disabled"] == ["guest-info", "guest-ping"]
    assert len(msgspec.json.encode(simulated_vm.vm.qmp("query-status"))) > 3000
    simulated_vm.heal()
    now = simulated_vm.vm.qmp("x-simulate", oob=True)
    assert msgspec.convert(now, Faults) == Faults()


def test_a_fault_that_is_none_is_refused(simulated_vm: Double) -> None:
    with pytest.raises(QmpError, match="Object contains unknown field `flying`"):
        simulated_vm.set_faults(flying=True)  # type: ignore[call-arg]


def test_a_vm_that_is_gone_says_so(simulated_vm: Double) -> None:
    simulated_vm.crash()
    with pytest.raises(NotRunning):
        simulated_vm.crash()
    with pytest.raises(NotRunning):
        simulated_vm.emit("STOP")
    simulated_vm.heal()


# -- handlers -------------------------------------------------------------------------------------------------------------


WORK: Final = 0.2  # seconds that a handler takes, so that a single look comes too early


@on("SITE_FIRST")
async def pass_on(vm: AsyncVm, event: Event) -> None:
    await asyncio.sleep(WORK)
    vm.emit("SITE_SECOND", event.data)


@on("SITE_SECOND")
def pass_on_again(vm: SyncVm, event: Event) -> None:
    threading.Event().wait(WORK)
    vm.emit("SITE_THIRD", event.data)


@on("SITE_THIRD")
async def fail(vm: AsyncVm, event: Event) -> None:
    raise RuntimeError("on purpose")


def test_settling_waits_for_what_handlers_cause_in_other_handlers(vmloop_handlers: VmloopHandlers) -> None:
    double = vmloop_handlers(pass_on, pass_on_again)
    double.emit("SITE_FIRST", {"number": 7})
    double.settle()
    assert [event.data for event in double.events("SITE_THIRD")] == [{"number": 7}]


def test_a_failure_ends_a_wait_and_a_settling_at_once(vmloop_handlers: VmloopHandlers) -> None:
    double = vmloop_handlers(fail)
    double.emit("SITE_THIRD")
    with pytest.raises(HandlerFailed, match="on purpose"):
        double.wait_event("SITE_NEVER", timeout=60)
    with pytest.raises(HandlerFailed, match="on purpose"):
        double.settle()
    [failure] = double.events("HANDLER_FAILED")
    double.forgive(failure)
    double.settle()


def test_a_vm_without_handlers_cannot_settle(simulated_vm: Double) -> None:
    with pytest.raises(NotRunning, match="start it with vmloop_handlers"):
        simulated_vm.settle()


def test_two_files_of_one_name_are_not_mixed_up(vmloop_handlers: VmloopHandlers, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mail.py").write_text(f"# {name}\n")
    vmloop_handlers(tmp_path / "a" / "mail.py")
    with pytest.raises(ConfigError, match=r"another mail\.py is loaded by a VM of this broker already"):
        vmloop_handlers(tmp_path / "b" / "mail.py")


# -- the broker -----------------------------------------------------------------------------------------------------------


def test_a_broker_with_settings_of_its_own() -> None:
    with PrivateBroker('[log]\nlevel = "debug"\n') as broker:
        assert broker.host.version().pid
        assert len(os.fsencode(broker.paths.client_socket)) < 60
    assert not broker.root.exists()


def test_a_long_temporary_directory_leaves_room_for_sockets(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 60)
    deep.mkdir()
    script = "from vmloop.testing import PrivateBroker\nwith PrivateBroker() as b: print(b.root.parent, b.host.list())"
    environment = {**os.environ, "TMPDIR": str(deep)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("/tmp []\n", "")


def test_a_broker_that_does_not_come_up_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(LaunchFailed) as caught:
        PrivateBroker("no toml")
    assert "vmloop.toml" in caught.value.fields["log"]


def test_a_broker_that_is_killed_on_purpose_has_a_successor(broker: PrivateBroker, simulated_vm: Double) -> None:
    before = simulated_vm.vm.show().pid
    broker.kill()
    broker.start()
    assert simulated_vm.vm.qmp("query-status")["running"] is True  # waits for the VM's worker
    assert simulated_vm.vm.show().pid == before


def test_what_a_killed_broker_leaves_is_ended_all_the_same() -> None:
    with PrivateBroker() as broker:
        broker.define_simulated("web1")
        broker.host.vm("web1").start()
        broker.kill()
    assert broker._processes() == {}


def test_a_broker_that_died_fails_the_test_and_leaves_nothing() -> None:
    broker = PrivateBroker()
    broker.define_simulated("web1")
    broker.host.vm("web1").start()
    kill_process(broker.host.version().pid)
    with pytest.raises(AssertionError, match="ended during the test"):
        broker.close()
    assert not broker.root.exists()
    assert broker._processes() == {}


def test_a_run_of_tests_that_is_killed_leaves_nothing() -> None:
    script = (
        "import os, signal\nfrom vmloop.testing import PrivateBroker\nbroker = PrivateBroker()\n"
        "broker.define_simulated('web1')\nbroker.host.vm('web1').start()\nprint(broker.root, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    root = Path(done.stdout.strip())
    assert wait_for(lambda: not processes_of(root), 30.0)
    assert wait_for(lambda: not root.exists(), 30.0)


# -- recorded dialogues ---------------------------------------------------------------------------------------------------


def test_a_recorded_qemu_is_a_vm(replayed_vm: ReplayedVm) -> None:
    vm = replayed_vm(QEMU_7_2)
    assert vm.show().state == "paused"
    start = vm.cursor()
    assert vm.qmp("query-version")["qemu"]["major"] == 7
    vm.resume()
    with vm.events(since=start) as events:
        assert events.wait_for("RESUME", 10).origin == "qmp"
    assert vm.wait("running", timeout=10).state == "running"
    with pytest.raises(QmpError, match="device_add was not recorded; recorded were qmp_capabilities, query-status"):
        vm.qmp("device_add", {"driver": "e1000"})


def test_a_recorded_end_is_the_vms_end(replayed_vm: ReplayedVm) -> None:
    vm = replayed_vm(QEMU_7_2, name="recorded")
    vm.qmp("quit")
    assert vm.wait("shutoff", timeout=10).state == "shutoff"


def test_a_file_that_is_no_recording_is_refused_before_anything_starts(replayed_vm: ReplayedVm, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello\n")
    with pytest.raises(ConfigError, match="text is no recording of a monitor"):
        replayed_vm(tmp_path / "text")
