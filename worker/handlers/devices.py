# SPDX-License-Identifier: Apache-2.0
"""Devices that come, go, or change their size: DEVICE_DELETED, refused unplugs, memory devices, persistent reservation managers.

Called by the dispatcher through shipped.py. vmloop keeps no device model: it notes what QEMU says, and looks after the agent's port, its
own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

from ...common.definition import AGENT_ID
from ...common.errors import QmpError
from ..events import Event
from . import fields
from .context import VmContext

QUERY_SECONDS: Final = 10.0  # for one query; a QEMU that is well answers within milliseconds

_AGENT_DEVICES: Final = (f"{AGENT_ID}-port", f"{AGENT_ID}-bus")

# ACPI_DEVICE_OST: ejecting (by the guest's own wish, or asked to), and the codes by which the guest refuses (ACPI 6.5, 6.3.5).
_OST_SOURCES: Final = (0x3, 0x103)
_OST_REFUSALS: Final = (0x1, 0x80, 0x81, 0x82, 0x83)


async def device_deleted(vm: VmContext, event: Event) -> None:
    """DEVICE_DELETED. What was known of the device is over; if it was the agent's port or its bus, so is the agent."""
    device = fields.text(event.data, "device")
    if not device:  # one without an id: only QEMU's path is told, and vmloop keeps nothing by paths
        return
    if device in _AGENT_DEVICES:
        vm.agent_port_gone(f"the device {device} was removed from the VM")
    for fact in ("rx_filters", "unplug_refused", "pr_managers"):
        known = fields.mapping(vm.facts.get(fact))
        if device in known:
            vm.set_fact(fact, {key: value for key, value in known.items() if key != device} or None)
    if device in fields.mapping(fields.mapping(vm.facts.get("memory")).get("devices")):
        await refresh_memory(vm)


async def unplug_refused(vm: VmContext, event: Event) -> None:
    """DEVICE_UNPLUG_GUEST_ERROR, MEM_UNPLUG_ERROR, ACPI_DEVICE_OST: the guest keeps a device. Fact `unplug_refused` {device: {at, why}}."""
    data: Mapping[str, Any] = event.data
    why = fields.text(data, "msg") or event.event
    if event.event == "ACPI_DEVICE_OST":
        data = fields.mapping(data.get("info"))
        source, status = fields.number(data, "source"), fields.number(data, "status")
        if source not in _OST_SOURCES or status not in _OST_REFUSALS:
            return
        why = f"the guest refused: _OST status {status:#x}"
    device = fields.text(data, "device")
    if device:
        add_to_fact(vm, "unplug_refused", device, {"at": event.time, "why": why})


async def memory_size_changed(vm: VmContext, event: Event) -> None:
    """MEMORY_DEVICE_SIZE_CHANGE. Fact `memory` anew; once for a burst."""
    if not answered(vm, "memory", event):
        await refresh_memory(vm)


async def refresh_memory(vm: VmContext) -> None:
    """Fact `memory` {at, devices: {id: bytes}, balloon?: bytes}. Raises the monitor's errors."""
    at = now()
    devices: dict[str, int] = {}
    for device in fields.items(await vm.qmp("query-memory-devices", seconds=QUERY_SECONDS)):
        data = fields.mapping(device.get("data"))
        size = fields.number(data, "size")
        if size is not None:
            devices[fields.text(data, "id") or fields.text(data, "memdev") or "?"] = size
    try:
        balloon = fields.number(fields.mapping(await vm.qmp("query-balloon", seconds=QUERY_SECONDS)), "actual")
    except QmpError:  # there is no balloon
        balloon = None
    vm.set_fact("memory", {"at": at, "devices": devices, **fields.present(balloon=balloon)})


async def pr_manager_changed(vm: VmContext, event: Event) -> None:
    """PR_MANAGER_STATUS_CHANGED. Fact `pr_managers` {id: connected}; event PR_MANAGER_LOST {id} when one has gone.

    Who started the qemu-pr-helper starts it again: QEMU connects to it by itself with the next reservation.
    """
    lost = fields.text(event.data, "id")
    managers = fields.items(await vm.qmp("query-pr-managers", seconds=QUERY_SECONDS))
    connected = {fields.text(item, "id"): fields.flag(item, "connected") is True for item in managers}
    vm.set_fact("pr_managers", connected or None)
    if lost and fields.flag(event.data, "connected") is False:
        vm.emit("PR_MANAGER_LOST", {"id": lost})


# -- for the other families ---------------------------------------------------------------------------------------------------


def now() -> int:
    """Microseconds since 1970, as QEMU stamps its events."""
    return time.time_ns() // 1000


def answered(vm: VmContext, fact: str, event: Event) -> bool:
    """Whether the question that made a fact was asked after this event, so that its answer holds it already.

    This makes one question of a burst: the events that queue up behind a handler are older than its question. Both times are the host's
    clock; one set back by more than a burst lasts costs the refresh of the events in between, and the next event makes it good.
    """
    at = fields.mapping(vm.facts.get(fact)).get("at")
    return type(at) is int and event.time < at


def add_to_fact(vm: VmContext, fact: str, key: str, value: Any) -> None:
    """Set one entry of a fact that is a map; the oldest one goes when there are too many."""
    known = {**fields.mapping(vm.facts.get(fact))}
    known.pop(key, None)
    known[key] = value
    while len(known) > fields.MAX_ITEMS:
        del known[next(iter(known))]
    vm.set_fact(fact, known)
