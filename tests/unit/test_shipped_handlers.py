# SPDX-License-Identifier: Apache-2.0
"""The shipped handlers on a fake VM: what each does with what QEMU says. On real QEMU: tests/contract/test_shipped_on_qemu.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmloop.common.definition import Definition, HandlersSection, QemuSection
from vmloop.common.errors import Denied, MonitorLost, QmpError
from vmloop.common.states import VmState
from vmloop.testing.fake_vm import FakeVm
from vmloop.worker.events import Event
from vmloop.worker.handlers.network import gid_address
from vmloop.worker.handlers.power import (
    MAX_RESTARTS,
    RESTART_SPAN,
    by_guest,
    prepare,
    restart_guest,
    users_actions,
    wanted_actions,
)
from vmloop.worker.handlers.shipped import TABLE, shipped_handlers

RESET_NEEDED = QmpError("cont", **{"class": "GenericError", "desc": "Resetting the Virtual Machine is required"})


def defined(*args: str, **handlers: Any) -> Definition:
    return Definition("web1", QemuSection(args=list(args)), handlers=HandlersSection(**handlers))


def run(vm: FakeVm, *events: tuple[str, dict[str, Any]], between: Callable[[], None] = lambda: None) -> None:
    """Let events happen and every handler of theirs run, one after the other."""

    async def go() -> None:
        made = [vm.happen(name, data) for name, data in events]
        for event in made:
            await handle(vm, event)
            between()

    asyncio.run(go())


async def handle(vm: FakeVm, event: Event) -> None:
    for name, function in TABLE:
        if name == event.event:
            await function(vm, event)


def off(vm: FakeVm, reason: str = "unknown") -> FakeVm:
    """The guest has powered off."""
    vm._loop = asyncio.new_event_loop()
    vm.move(VmState.SHUTDOWN, reason)
    vm._loop.close()
    vm._loop = None
    return vm


@pytest.fixture
def vm(tmp_path: Path) -> FakeVm:
    made = FakeVm(tmp_path)
    for command in ("system_reset", "cont", "set-action", "migrate-set-capabilities"):
        made.qmp_answers(command, {})
    return made


# -- what QEMU is told before the first cont -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "given"),
    [
        ([], {}),
        (["-no-shutdown"], {"shutdown": "pause", "panic": "pause"}),
        (["--no-shutdown"], {"shutdown": "pause", "panic": "pause"}),
        (["-no-reboot"], {"reboot": "shutdown"}),
        (["-action", "panic=none,watchdog=poweroff"], {"panic": "none", "watchdog": "poweroff"}),
        (["-watchdog-action", "pause"], {"watchdog": "pause"}),
        (["-action"], {"": ""}),
    ],
)
def test_the_users_own_actions_are_read_from_the_arguments(args: list[str], given: dict[str, str]) -> None:
    assert users_actions(args) == given


@pytest.mark.parametrize(
    ("definition", "wanted"),
    [
        (defined(), {"panic": "pause"}),
        (defined(on_crash="destroy"), {"panic": "pause"}),
        (defined(on_poweroff="restart"), {"panic": "pause", "shutdown": "pause"}),
        (
            defined(on_poweroff="preserve", on_watchdog="dump"),
            dict.fromkeys(("panic", "shutdown", "watchdog"), "pause"),
        ),
        (defined("-no-shutdown", on_poweroff="restart"), {}),
        (defined("-action", "panic=shutdown", on_poweroff="restart"), {"shutdown": "pause"}),
    ],
)
def test_qemu_is_told_what_the_definition_needs_and_the_arguments_leave_open(
    definition: Definition, wanted: dict[str, str]
) -> None:
    assert wanted_actions(definition) == wanted


def test_an_old_qemu_that_has_no_set_action_starts_all_the_same(tmp_path: Path) -> None:
    vm = FakeVm(tmp_path, definition=defined(on_poweroff="restart"))
    asyncio.run(prepare(vm))
    assert "-no-shutdown" in vm.facts["actions"]["refused"]


def test_an_attached_vm_is_told_nothing(vm: FakeVm) -> None:
    vm.definition = None
    asyncio.run(prepare(vm))
    assert vm.calls == []


# -- power ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "theirs"),
    [
        ({"guest": True, "reason": "guest-shutdown"}, True),
        ({"guest": True}, True),  # before QEMU told reasons
        ({"guest": True, "reason": "guest-panic"}, False),
        ({"guest": True, "reason": "guest-reset"}, False),
        ({"guest": False, "reason": "host-qmp-quit"}, False),
        ({"guest": "true", "reason": "guest-shutdown"}, False),
        ({}, False),
        (None, False),
    ],
)
def test_only_the_guests_own_power_off_counts(data: object, theirs: bool) -> None:
    assert by_guest(data) is theirs


GUEST_OFF = ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})


def test_a_restart_resets_and_tries_until_the_reset_is_carried_out(vm: FakeVm) -> None:
    vm.definition = defined(on_poweroff="restart")
    vm.qmp_answers("cont", RESET_NEEDED, RESET_NEEDED, {})
    run(off(vm), GUEST_OFF)
    assert vm.commands() == ["system_reset", "cont", "cont", "cont"]
    assert vm.intents == ["booted", ""]
    assert not any(call.reading for call in vm.calls)


def test_a_restart_that_fails_leaves_the_vm_as_it_is(vm: FakeVm) -> None:
    vm.definition = defined(on_poweroff="restart")
    vm.qmp_answers("cont", MonitorLost("gone"))
    with pytest.raises(MonitorLost):
        run(off(vm), GUEST_OFF)
    assert (vm.kills, vm.intents[-1], vm.state) == ([], "", VmState.SHUTDOWN)


def test_vmloops_own_stop_ends_the_vm_and_does_not_restart_it(vm: FakeVm) -> None:
    vm.definition = defined(on_poweroff="restart")
    run(off(vm, "user"), GUEST_OFF)
    assert vm.calls == []


@pytest.mark.parametrize("policy", ["off", "preserve"])
def test_other_power_offs_are_left_alone(vm: FakeVm, policy: str) -> None:
    vm.definition = defined(on_poweroff=policy)
    run(off(vm), GUEST_OFF)
    assert vm.calls == []


def test_restarts_are_counted_over_a_span_only(vm: FakeVm) -> None:
    async def go() -> None:
        for number in range(3 * MAX_RESTARTS):
            gap = RESTART_SPAN / (MAX_RESTARTS - 1)
            await restart_guest(vm, vm.happen("SHUTDOWN", at=int(number * gap * 1e6)), "booted")
        last = vm.happen("SHUTDOWN", at=vm.events[-1].time)
        while len(vm.facts["restarts"]) < MAX_RESTARTS:
            await restart_guest(vm, last, "booted")
        with pytest.raises(Denied, match="left as it is"):
            await restart_guest(vm, last, "booted")

    asyncio.run(go())


def test_a_reset_ends_what_was_known_of_the_crash_and_settles_the_state(vm: FakeVm) -> None:
    vm.facts = {"panic": {}, "crashloaded": {}, "watchdog": {}, "io_error": {}}
    vm.qmp_answers("query-status", {"status": "prelaunch", "running": False})
    run(off(vm), ("RESET", {"guest": False}))
    assert vm.facts == {"io_error": {}}
    assert (vm.state, vm.agent_port_looks) == (VmState.PAUSED, 1)


def test_a_reset_of_a_running_vm_asks_nothing(vm: FakeVm) -> None:
    run(vm, ("RESET", {}))
    assert (vm.calls, vm.agent_port_looks) == ([], 1)


# -- crash ---------------------------------------------------------------------------------------------------------------------


def test_a_panic_without_any_data_is_a_panic(vm: FakeVm) -> None:
    run(vm, ("GUEST_PANICKED", {}))
    assert vm.facts["panic"] == {"at": 0}
    assert vm.calls == []


def test_a_guest_that_goes_on_after_its_panic_is_running(vm: FakeVm) -> None:
    vm.qmp_answers("query-status", {"status": "running", "running": True})
    asyncio.run(_crash(vm))
    assert vm.state is VmState.RUNNING


async def _crash(vm: FakeVm) -> None:
    vm.move(VmState.CRASHED, "panicked")
    await handle(vm, vm.happen("GUEST_PANICKED", {"action": "run", "info": {"type": "s390"}}))


def test_destroy_is_content_with_a_qemu_that_ended_itself(vm: FakeVm) -> None:
    vm.definition, vm.pid = defined(on_crash="destroy"), None
    run(vm, ("GUEST_PANICKED", {"action": "poweroff"}))


@pytest.mark.parametrize("action", ["reset", "poweroff"])
def test_a_watchdog_that_has_ended_the_guest_leaves_nothing_to_dump(vm: FakeVm, action: str) -> None:
    vm.definition = defined(on_watchdog="dump")
    run(vm, ("WATCHDOG", {"action": action}))
    assert (vm.calls, vm.facts["watchdog"]) == ([], {"at": 0, "action": action})


def test_a_watchdogs_pause_ends_even_if_the_dump_fails(vm: FakeVm) -> None:
    vm.definition = defined("-action", "watchdog=pause", on_watchdog="dump")

    async def go() -> None:
        vm.move(VmState.PAUSED, "watchdog")
        await handle(vm, vm.happen("WATCHDOG", {"action": "pause"}))

    with pytest.raises(QmpError, match="query-memory-size-summary"):
        asyncio.run(go())
    assert vm.commands()[-1] == "cont"


# -- jobs ----------------------------------------------------------------------------------------------------------------------

FAILED = {
    "id": "j1",
    "type": "create",
    "status": "concluded",
    "current-progress": 1,
    "total-progress": 1,
    "error": "no",
}


def test_a_failed_job_is_told_once_and_again_when_its_id_is_used_again(vm: FakeVm) -> None:
    vm.qmp_answers("query-jobs", [FAILED], [FAILED], [], [FAILED])
    change = ("JOB_STATUS_CHANGE", {"id": "j1", "status": "concluded"})

    def older() -> None:  # the next event is newer than the last question
        vm.facts["jobs"]["at"] = 0

    run(vm, change, change, change, between=older)
    assert vm.emitted("JOB_FAILED") == [{"id": "j1", "type": "create", "error": "no"}]
    run(vm, change)
    assert len(vm.emitted("JOB_FAILED")) == 2
    assert set(vm.commands()) == {"query-jobs", "query-block-jobs"}  # never dismissed, never finalised


def test_a_job_that_dismissed_itself_is_told_by_its_last_event(vm: FakeVm) -> None:
    vm.qmp_answers("query-jobs", [])
    run(vm, ("BLOCK_JOB_COMPLETED", {"device": "d0", "type": "mirror", "error": "disk full"}))
    assert vm.emitted("JOB_FAILED") == [{"id": "d0", "type": "mirror", "error": "disk full"}]


def test_a_burst_is_one_question(vm: FakeVm) -> None:
    vm.qmp_answers("query-jobs", [])
    vm.qmp_answers("query-memory-devices", [])
    for event in ("JOB_STATUS_CHANGE", "MEMORY_DEVICE_SIZE_CHANGE"):
        vm.calls.clear()
        run(vm, *[(event, {"id": "x"})] * 50)
        assert len(vm.calls) <= 2


# -- network -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subnet", "interface", "address"),
    [
        (33022, 15880512517475447892, "fe80::54b4:44ff:fee9:62dc"),  # the example in QEMU's own documentation
        (0, int.from_bytes(bytes([0, 0, 255, 255, 192, 0, 2, 7]), "little"), "192.0.2.7"),
        (None, 1, "None"),
        (1 << 64, 1, "None"),
        (True, 1, "None"),
    ],
)
def test_a_gid_is_an_address(subnet: object, interface: object, address: str) -> None:
    assert str(gid_address({"subnet-prefix": subnet, "interface-id": interface})) == address


def test_an_rx_filter_is_asked_for_and_told_in_bounds(vm: FakeVm) -> None:
    vlans = list(range(4095, -1, -1))
    answer = {"name": "nic0", "main-mac": "52:54:00:12:34:56", "vlan": "all", "vlan-table": vlans, "promiscuous": True}
    vm.qmp_answers("query-rx-filter", [answer])
    run(vm, ("NIC_RX_FILTER_CHANGED", {"name": "nic0", "path": "/x"}))
    (told,) = vm.emitted("NIC_RX_FILTER")
    assert told["name"] == "nic0"
    assert told["filter"]["promiscuous"] is True
    assert "vlan-table" not in told["filter"]
    assert vm.facts["rx_filters"] == {"nic0": told["filter"]}


# -- devices and migrations ----------------------------------------------------------------------------------------------------


def test_a_deleted_device_takes_its_facts_with_it(vm: FakeVm) -> None:
    vm.facts = {"rx_filters": {"nic0": {}, "nic1": {}}, "memory": {"at": 0, "devices": {"d0": 1}}}
    vm.qmp_answers("query-memory-devices", [])
    deleted = [("DEVICE_DELETED", {"device": name}) for name in ("nic0", "d0", "vmloop-agent-port")]
    run(vm, *deleted, ("DEVICE_DELETED", {"path": "/machine/x"}))
    assert vm.facts["rx_filters"] == {"nic1": {}}
    assert vm.facts["memory"]["devices"] == {}
    assert len(vm.agent_ports_gone) == 1


def test_a_refused_unplug_is_noted_and_other_ost_reports_are_not(vm: FakeVm) -> None:
    ok = {"info": {"device": "d0", "source": 3, "status": 0, "slot-type": "DIMM"}}
    no = {"info": {"device": "d1", "source": 3, "status": 0x81, "slot-type": "DIMM"}}
    run(vm, ("ACPI_DEVICE_OST", ok), ("ACPI_DEVICE_OST", no), ("DEVICE_UNPLUG_GUEST_ERROR", {"device": "d2"}))
    assert list(vm.facts["unplug_refused"]) == ["d1", "d2"]


def test_a_lost_reservation_manager_is_told(vm: FakeVm) -> None:
    vm.qmp_answers("query-pr-managers", [{"id": "pr0", "connected": False}])
    run(vm, ("PR_MANAGER_STATUS_CHANGED", {"id": "pr0", "connected": False}))
    assert vm.facts["pr_managers"] == {"pr0": False}
    assert vm.emitted("PR_MANAGER_LOST") == [{"id": "pr0"}]


@pytest.mark.parametrize(
    ("before", "status", "says", "after", "reason"),
    [
        (VmState.PAUSED, "completed", "running", VmState.RUNNING, "migrated"),
        (VmState.RUNNING, "completed", "postmigrate", VmState.PAUSED, "migration"),
        (VmState.PAUSED, "cancelled", "running", VmState.RUNNING, "migration canceled"),
        (VmState.RUNNING, "postcopy-active", "finish-migrate", VmState.PAUSED, "post-copy"),
        (VmState.RUNNING, "postcopy-paused", "finish-migrate", VmState.PAUSED, "post-copy failed"),
    ],
)
def test_a_migration_that_nobody_watches_settles_the_state(
    tmp_path: Path, before: VmState, status: str, says: str, after: VmState, reason: str
) -> None:
    vm = FakeVm(tmp_path, state=before)
    vm.qmp_answers("query-status", {"status": says, "running": says == "running"})
    run(vm, ("MIGRATION", {"status": status}))
    assert (vm.state, vm.reason) == (after, reason)
    assert vm.facts["migration"] == {"at": 0, "status": status, "state": after.value, "reason": reason}


def test_a_migration_under_way_asks_nothing(vm: FakeVm) -> None:
    run(vm, ("MIGRATION", {"status": "active"}))
    assert vm.calls == []


def test_every_row_is_in_the_dispatchers_table_once() -> None:
    handlers = shipped_handlers()
    assert {(event, handler.function) for handler in handlers for event in handler.events} == set(TABLE)
    assert len({handler.name for handler in handlers}) == len(handlers)
    assert all(handler.trusted and handler.is_async and handler.limit for handler in handlers)
