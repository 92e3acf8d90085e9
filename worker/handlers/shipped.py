# SPDX-License-Identifier: Apache-2.0
"""The handlers that vmloop ships, by event: what libvirt does in the one thread that all VMs of a host share, here in each VM's own worker.

Loaded by handling.py before the operator's. Trusted: each gets the VmContext itself, runs on the loop, in the order of the events, and
raises nothing but `VmloopError`. docs/handlers-shipped.md is the same table for operators, with what is left to them; a test compares
the two.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from ..events import Event
from . import block, crash, devices, migration, network, power
from .context import VmContext
from .registry import Handler

Shipped = Callable[[VmContext, Event], Awaitable[None]]

# One row for each call; an event may have several, in this order.
TABLE: Final[tuple[tuple[str, Shipped], ...]] = (
    # the guest fails
    ("GUEST_PANICKED", crash.guest_panicked),
    ("GUEST_CRASHLOADED", crash.guest_crashloaded),
    ("WATCHDOG", crash.watchdog_expired),
    ("DUMP_COMPLETED", crash.dump_completed),
    # it powers off, or begins again
    ("SHUTDOWN", power.guest_shutdown),
    ("RESET", power.guest_reset),
    # disks and jobs
    ("JOB_STATUS_CHANGE", block.job_changed),
    ("BLOCK_JOB_COMPLETED", block.job_changed),
    ("BLOCK_JOB_CANCELLED", block.job_changed),
    ("BLOCK_JOB_ERROR", block.job_changed),
    ("BLOCK_JOB_READY", block.job_changed),
    ("BLOCK_JOB_PENDING", block.job_changed),
    ("BLOCK_IO_ERROR", block.io_error),
    # the network
    ("NIC_RX_FILTER_CHANGED", network.rx_filter_changed),
    ("RDMA_GID_STATUS_CHANGED", network.rdma_gid_changed),
    # devices
    ("DEVICE_DELETED", devices.device_deleted),
    ("DEVICE_UNPLUG_GUEST_ERROR", devices.unplug_refused),
    ("MEM_UNPLUG_ERROR", devices.unplug_refused),
    ("ACPI_DEVICE_OST", devices.unplug_refused),
    ("MEMORY_DEVICE_SIZE_CHANGE", devices.memory_size_changed),
    ("PR_MANAGER_STATUS_CHANGED", devices.pr_manager_changed),
    # migrations
    ("MIGRATION", migration.migration_changed),
)

# What libvirt also defers to its pool, and vmloop does where the connection is read: it must not wait behind a handler.
ELSEWHERE: Final[Mapping[str, str]] = {
    "VSERPORT_CHANGE": "worker/agent",
    "end of the monitor": "worker/vm.py",
}

# Seconds for one event. Each of the queries below has a deadline of 10 s of its own; the longest chain is reset, cont and what a RESET
# asks.
LIMIT: Final = 60.0
LIMITS: Final[Mapping[Shipped, float]] = {
    crash.guest_panicked: crash.DUMP_SECONDS + LIMIT,
    crash.watchdog_expired: crash.DUMP_SECONDS + LIMIT,
}


def shipped_handlers() -> tuple[Handler, ...]:
    """The table as the dispatcher takes it: one handler for each function, in the order of the table."""
    events: dict[Shipped, list[str]] = {}
    for event, function in TABLE:
        events.setdefault(function, []).append(event)
    return tuple(
        Handler(
            name=f"vmloop.{function.__name__}",
            events=frozenset(names),
            function=function,
            is_async=True,
            limit=LIMITS.get(function, LIMIT),
            source="vmloop",
            trusted=True,
        )
        for function, names in events.items()
    )
