# SPDX-License-Identifier: Apache-2.0
"""`x-simulate`, the one command of a simulated monitor that QEMU has not: faults, and what happens to the guest.

    any field of Faults     a fault, with "for": SECONDS only for that long
    "emit": {"event": NAME, "data"?: {...}}, "count"?: N       any event
    "mark": TEXT            leaves one mark: a line in the file of -emitted, and the event X_SIMULATED_MARK {"mark": TEXT}
    "panic": true or {the event's "info"}, "crashloaded": true, "watchdog": true,
    "suspend": true, "hibernate": true, "switch_off": true, "reboot": true      what the guest does or suffers, while it runs
    "jobs": [...], "block_jobs": [...]         what query-jobs and query-block-jobs list from now on

Carried out by simulated_commands. Returns the faults in force.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from .simulated_faults import changed
from .simulated_requests import Refused
from .simulated_table import Monitor
from .simulated_vm import MARK_EVENT, SimulatedVm


class _Emitted(msgspec.Struct, forbid_unknown_fields=True):
    event: str
    data: dict[str, Any] | None = None


class _Happening(msgspec.Struct, rename={"seconds": "for"}):
    """What is no fault: it happens once."""

    emit: _Emitted | None = None
    count: int = 1
    mark: str | None = None
    panic: bool | dict[str, Any] = False
    crashloaded: bool = False
    watchdog: bool = False
    suspend: bool = False
    hibernate: bool = False
    switch_off: bool = False
    reboot: bool = False
    jobs: list[dict[str, Any]] | None = None
    block_jobs: list[dict[str, Any]] | None = None
    seconds: float | None = None


def x_simulate(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    """Do what the arguments say; `Refused` and nothing done if one of them is wrong."""
    vm, before = monitor.vm, monitor.vm.faults
    once = {name: value for name, value in arguments.items() if name in _ONCE}
    try:
        wanted = msgspec.convert(once, _Happening)
        faults = changed(before, {name: value for name, value in arguments.items() if name not in _ONCE})
    except msgspec.ValidationError as error:
        raise Refused(str(error)) from None
    deeds = _deeds(vm, wanted)
    if deeds and not vm.running:
        raise Refused(f"The guest does not run: {vm.status}")
    if wanted.emit is not None:
        for _ in range(wanted.count):
            vm.emit(wanted.emit.event, wanted.emit.data)
    if wanted.mark is not None:
        monitor.emitted.mark(wanted.mark)
        vm.emit(MARK_EVENT, {"mark": wanted.mark})
    if wanted.jobs is not None:
        monitor.jobs.jobs = wanted.jobs
    if wanted.block_jobs is not None:
        monitor.jobs.block_jobs = wanted.block_jobs
    for deed in deeds:
        deed()
    if faults.frozen:
        vm.freeze_soon(faults)
    else:
        vm.set_faults(faults)
    if wanted.seconds is not None:
        vm.after_a_while(wanted.seconds, before)
    return msgspec.to_builtins(faults)


_ONCE = {field.encode_name for field in msgspec.structs.fields(_Happening)}


def _deeds(vm: SimulatedVm, wanted: _Happening) -> list[Callable[[], None]]:
    info = wanted.panic if isinstance(wanted.panic, dict) else None
    deeds: list[tuple[bool, Callable[[], None]]] = [
        (wanted.crashloaded, vm.guest_crash_loaded),
        (wanted.panic is not False, lambda: vm.guest_panic(info)),
        (wanted.watchdog, vm.watchdog),
        (wanted.suspend, vm.guest_suspend),
        (wanted.hibernate, vm.guest_hibernate),
        (wanted.switch_off, vm.guest_shutdown),
        (wanted.reboot, lambda: vm.reset(guest=True, reason="guest-reset")),
    ]
    return [deed for happens, deed in deeds if happens]
