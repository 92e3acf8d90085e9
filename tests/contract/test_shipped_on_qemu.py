# SPDX-License-Identifier: Apache-2.0
"""The shipped handlers on real QEMU, whose guests are of a few bytes each: panic, power-off, watchdog, dump."""

from __future__ import annotations

import asyncio
import stat
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmloop.common.definition import Definition, HandlersSection, QemuSection
from vmloop.common.errors import BadRequest, Denied, QmpError
from vmloop.common.states import VmState
from vmloop.worker.handlers.dump import dump_guest, dumps
from vmloop.worker.handlers.power import MAX_RESTARTS

from ..fakes.boot_sectors import CRASHLOAD, HANG, HANG_ARGS, PANIC, PANIC_ARGS, SPIN, SWITCH_OFF, boots
from ..fakes.vm_on_qemu import VmOnQemu

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("require_qemu")]

Steps = Callable[[VmOnQemu], Awaitable[None]]


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short enough for a unix socket."""
    with tempfile.TemporaryDirectory(prefix="vml-") as path:
        yield Path(path)


def play(directory: Path, steps: Steps, sector: bytes, *args: str, **handlers: Any) -> VmOnQemu:
    """Run a guest under the handlers of a definition, and take some steps meanwhile."""

    async def run() -> VmOnQemu:
        definition = Definition("web1", QemuSection(args=list(args)), handlers=HandlersSection(**handlers))
        vm = VmOnQemu(directory, definition)
        async with vm.running(boots(directory, sector, *args)):
            await steps(vm)
        return vm

    return asyncio.run(run())


async def status(vm: VmOnQemu) -> str:
    return str((await vm.qmp("query-status", seconds=5.0))["status"])


def test_a_panicked_guest_is_preserved(directory: Path) -> None:
    async def steps(vm: VmOnQemu) -> None:
        await vm.until(lambda: "panic" in vm.facts)
        assert await status(vm) == "guest-panicked"
        assert (vm.state, vm.reason) == (VmState.CRASHED, "panicked")

    vm = play(directory, steps, PANIC, *PANIC_ARGS)
    assert vm.facts["actions"] == {"panic": "pause"}
    assert vm.facts["panic"]["action"] == "pause"
    assert not vm.emitted("SHUTDOWN")


def test_a_panicked_guest_is_destroyed_for_that_reason(directory: Path) -> None:
    async def steps(vm: VmOnQemu) -> None:
        await vm.until(lambda: vm.state is VmState.SHUTOFF)

    vm = play(directory, steps, PANIC, *PANIC_ARGS, on_crash="destroy")
    assert vm.kills == ["crashed"]
    assert vm.failures == []


def test_a_guest_that_panics_again_and_again_is_restarted_so_often_and_then_left(directory: Path) -> None:
    async def steps(vm: VmOnQemu) -> None:
        await vm.until(lambda: bool(vm.failures))
        assert await status(vm) == "guest-panicked"

    vm = play(directory, steps, PANIC, *PANIC_ARGS, on_crash="restart")
    assert [type(error) for error in vm.failures] == [Denied]
    assert len(vm.emitted("GUEST_PANICKED")) == MAX_RESTARTS + 1
    assert [(new, reason) for _, new, reason in vm.moves if new is VmState.RUNNING][1:] == [
        (VmState.RUNNING, "crashed")
    ] * MAX_RESTARTS


def test_a_panicked_guest_is_dumped_and_left(directory: Path) -> None:
    async def steps(vm: VmOnQemu) -> None:
        await vm.until_event("DUMP_FINISHED")
        assert await status(vm) == "guest-panicked"

    vm = play(directory, steps, PANIC, *PANIC_ARGS, on_crash="dump")
    (dump,) = dumps(vm.paths.state)
    assert vm.emitted("DUMP_FINISHED") == [{"path": str(dump), "bytes": dump.stat().st_size}]
    assert dump.read_bytes()[:8] in (b"makedump", b"KDUMP   ")
    assert stat.S_IMODE(dump.stat().st_mode) == 0o600
    assert (vm.state, vm.failures) == (VmState.CRASHED, [])


def test_a_loaded_crash_kernel_is_noted_and_nothing_else(directory: Path) -> None:
    async def steps(vm: VmOnQemu) -> None:
        await vm.until(lambda: "crashloaded" in vm.facts)
        assert await status(vm) == "running"

    play(directory, steps, CRASHLOAD, *PANIC_ARGS, on_crash="destroy")


def test_a_power_off_becomes_a_restart(directory: Path) -> None:
    async def steps(vm: VmOnQemu) -> None:
        await vm.until_event("SHUTDOWN", 2)

    vm = play(directory, steps, SWITCH_OFF, on_poweroff="restart")
    states = [new for _, new, _ in vm.moves]
    assert states[:3] == [VmState.RUNNING, VmState.SHUTDOWN, VmState.RUNNING]
    assert vm.moves[2][2] == "booted"
    assert vm.failures == []


def test_a_power_off_is_preserved_and_a_reset_and_resume_begin_again(directory: Path) -> None:
    async def steps(vm: VmOnQemu) -> None:
        await vm.until_event("SHUTDOWN")
        assert await status(vm) == "shutdown"
        await vm.qmp("system_reset", seconds=5.0)
        await vm.until(lambda: vm.state is VmState.PAUSED)
        await vm.qmp("cont", seconds=5.0)
        await vm.until_event("SHUTDOWN", 2)

    play(directory, steps, SWITCH_OFF, on_poweroff="preserve")


def test_a_power_off_ends_qemu_unless_the_definition_says_otherwise(directory: Path) -> None:
    async def steps(vm: VmOnQemu) -> None:
        await asyncio.to_thread(vm.process.wait, 10.0)

    assert play(directory, steps, SWITCH_OFF).process.returncode == 0


def test_a_restart_that_no_reboot_forbids_is_told_and_the_vm_left(directory: Path) -> None:
    async def steps(vm: VmOnQemu) -> None:
        await vm.until(lambda: bool(vm.failures))
        assert await status(vm) == "shutdown"

    vm = play(directory, steps, SWITCH_OFF, "-no-reboot", on_poweroff="restart")
    assert [type(error) for error in vm.failures] == [Denied]
    assert "-no-reboot" in str(vm.failures[0])


def test_a_hung_guest_is_dumped_and_goes_on_if_the_user_chose_the_pause(directory: Path) -> None:
    async def steps(vm: VmOnQemu) -> None:
        await vm.until_event("DUMP_FINISHED")
        await vm.until(lambda: vm.state is VmState.RUNNING)
        assert await status(vm) == "running"

    vm = play(directory, steps, HANG, *HANG_ARGS, "-action", "watchdog=pause", on_watchdog="dump")
    assert vm.failures == []
    assert len(dumps(vm.paths.state)) == 1


def test_a_hung_guest_is_dumped_and_then_reset_as_by_default(directory: Path) -> None:
    async def steps(vm: VmOnQemu) -> None:
        await vm.until_event("WATCHDOG", 2)

    vm = play(directory, steps, HANG, *HANG_ARGS, on_watchdog="dump")
    assert vm.emitted("RESET")[0]["reason"] == "host-qmp-system-reset"
    assert len(vm.emitted("DUMP_FINISHED")) == 1


def test_a_running_guest_is_paused_for_its_dump_only(directory: Path) -> None:
    async def steps(vm: VmOnQemu) -> None:
        size = await dump_guest(vm, vm.paths.state / "by-hand.elf", 30.0)
        assert size > 64 << 20
        await vm.until(lambda: vm.state is VmState.RUNNING)
        with pytest.raises(BadRequest, match="File exists"):
            await dump_guest(vm, vm.paths.state / "by-hand.elf", 30.0)

    vm = play(directory, steps, SPIN)
    assert [(new, reason) for _, new, reason in vm.moves][1:3] == [
        (VmState.PAUSED, "dump"),
        (VmState.RUNNING, "unpaused"),
    ]


def test_a_second_dump_is_refused_and_leaves_no_file(directory: Path) -> None:
    async def steps(vm: VmOnQemu) -> None:
        first = asyncio.ensure_future(dump_guest(vm, vm.paths.state / "a.elf", 30.0))
        await vm.until_event("STOP")
        with pytest.raises(QmpError, match="dump in process"):
            await dump_guest(vm, vm.paths.state / "b.elf", 30.0)
        await first

    vm = play(directory, steps, SPIN, "-m", "512")
    assert not (vm.paths.state / "b.elf").exists()
