# SPDX-License-Identifier: Apache-2.0
"""A recording of a chaos run, made by hand: one in which all went well, and what changes it. Used by tests/unit/test_chaos_*.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from ..system.chaos.recording import Account, Claim, Command, Emission, Injected, Life, Reading, Recording, Told
from ..system.chaos.verdict import judge

VM = "own-000"


def told(seq: int, event: str = "X", origin: str = "qmp", epoch: int = 1, data: str = "{}") -> Told:
    return Told(epoch, seq, event, 1000 * epoch + seq, data, origin)


def emission(event: Told) -> Emission:
    return Emission(event.event, event.time, event.data)


def command(**changes: Any) -> Command:
    return msgspec.structs.replace(
        Command("blocking0", VM, "qmp x-simulate", 110.0, 111.0, "result", mark="m1", keyed=True), **changes
    )


STARTED = told(1, "WORKER_STARTED", "vmloop")
LOST = Told(1, 3, "WORKER_LOST", 180_000_000, "{}", "vmloop")  # told at 180 s, long after the worker was killed


def state(seq: int, new: str, epoch: int = 1) -> Told:
    return told(seq, "VM_STATE", "vmloop", epoch, f'{{"new":"{new}"}}')


def good() -> Recording:
    """One VM, one process, one fault that hurts nothing, two events of its own and three of vmloop's, one command, two readers."""
    events = [STARTED, told(2), LOST, told(4), state(5, "shutoff")]
    return Recording(
        seed=1,
        vms=[VM],
        began=100.0,
        ended=200.0,
        faults=[Injected(120.0, "kill", "worker", VM)],
        commands=[command(), command(op="qmp query-status", began=130.0, ended=130.5, mark="", reading=True)],
        readings=[Reading("aio", VM, (0, 0), [*events]), Reading("slow", VM, (0, 0), [*events])],
        accounts=[Account(VM, 7, [emission(events[1]), emission(events[3])], ["m1"])],
        lives=[Life(VM, 7, 1, 101.0, 190.0)],
        claims=[Claim(VM, "running", 1, 150.0, 150.1)],
        zygotes=[Life("", 5, 0, 100.5)],
    )


def good_events() -> list[Told]:
    return good().readings[0].events


def rules(recording: Recording) -> set[str]:
    return {violation.rule for violation in judge(recording)}


def changed(change: Callable[[Recording], None]) -> Recording:
    recording = good()
    change(recording)
    return recording


def set_command(recording: Recording, marks: tuple[str, ...] = ("m1",), **changes: Any) -> None:
    recording.commands[0] = command(**changes)
    recording.accounts[0].marks[:] = marks


def fault(recording: Recording, at: float, what: str, whom: str, vm: str = "", until: float | None = None) -> None:
    recording.faults.append(Injected(at, what, whom, vm, until))


def both_die(recording: Recording, at: float = 110.5) -> None:
    fault(recording, at, "kill", "zygote")
    fault(recording, at, "kill", "worker", VM)
    recording.zygotes[:] = [Life("", 5, 0, 100.5, at + 0.01), Life("", 6, 0, at + 0.5)]


def read(recording: Recording, *events: Told, reader: int | None = None) -> None:
    """What one reader, or each of them, got."""
    for place in (0, 1) if reader is None else (reader,):
        recording.readings[place] = msgspec.structs.replace(recording.readings[place], events=[*events])


def kill_qemu(recording: Recording) -> None:
    fault(recording, 189.9, "kill", "qemu", VM)


def kill_command(recording: Recording) -> None:
    recording.commands.append(command(op="kill", mark="", began=189.5, ended=190.2))
