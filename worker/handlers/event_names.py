# SPDX-License-Identifier: Apache-2.0
"""Which names a handler may give to events of its own. Used by view.py."""

from __future__ import annotations

import re
from typing import Final

from ...common.errors import BadRequest

_NAME = re.compile(r"[A-Z][A-Z0-9_]{1,63}", re.ASCII)

# vmloop's own, those to come included: what they say must be true.
_OWN_PREFIXES: Final = (
    "VM_",
    "MONITOR_",
    "AGENT_",
    "LOOP_",
    "WORKER_",
    "HANDLER_",
    "EVENTS_",
    "COMMAND_",
    "JOURNAL_",
    "VMLOOP_",
    "AUTOSTART_",
)

# Those of vmloop's shipped handlers (docs/handlers-shipped.md) that no prefix covers.
_SHIPPED: Final = frozenset(
    {"DUMP_STARTED", "DUMP_PROGRESS", "DUMP_FINISHED", "JOB_FAILED", "NIC_RX_FILTER", "PR_MANAGER_LOST", "RDMA_ADDRESS"}
)

# QEMU's, of query-qmp-schema in 7.2 and those that came since: whoever waits for one acts on it.
_QEMU: Final = frozenset(
    """
    ACPI_DEVICE_OST BALLOON_CHANGE BLOCK_EXPORT_DELETED BLOCK_IMAGE_CORRUPTED BLOCK_IO_ERROR BLOCK_JOB_CANCELLED
    BLOCK_JOB_COMPLETED BLOCK_JOB_ERROR BLOCK_JOB_PENDING BLOCK_JOB_READY BLOCK_WRITE_THRESHOLD COLO_EXIT
    CPU_POLARIZATION_CHANGE CXL_MEMORY_ERROR DEVICE_DELETED DEVICE_TRAY_MOVED DEVICE_UNPLUG_GUEST_ERROR
    DUMP_COMPLETED FAILOVER_NEGOTIATED GUEST_CRASHLOADED GUEST_PANICKED GUEST_PVSHUTDOWN HV_BALLOON_STATUS_REPORT
    JOB_STATUS_CHANGE MEMORY_DEVICE_SIZE_CHANGE MEMORY_FAILURE MEM_UNPLUG_ERROR MIGRATION MIGRATION_PASS
    NETDEV_STREAM_CONNECTED NETDEV_STREAM_DISCONNECTED NETDEV_VHOST_USER_CONNECTED NETDEV_VHOST_USER_DISCONNECTED
    NIC_RX_FILTER_CHANGED POWERDOWN PR_MANAGER_STATUS_CHANGED QUORUM_FAILURE QUORUM_REPORT_BAD
    RDMA_GID_STATUS_CHANGED RESET RESUME RTC_CHANGE SHUTDOWN SPICE_CONNECTED SPICE_DISCONNECTED SPICE_INITIALIZED
    SPICE_MIGRATE_COMPLETED STOP SUSPEND SUSPEND_DISK UNPLUG_PRIMARY VFIO_MIGRATION VFU_CLIENT_HANGUP VNC_CONNECTED
    VNC_DISCONNECTED VNC_INITIALIZED VSERPORT_CHANGE WAKEUP WATCHDOG
    """.split()  # noqa: SIM905 - a list of 60 lines says no more
)


def require_free_name(name: object) -> str:
    """The name itself; `BadRequest` if it is no name of an event, or one of vmloop's or QEMU's."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadRequest(f"{name!r:.80} is no name of an event: use 2 to 64 of A-Z 0-9 _ and start with a letter")
    if name.startswith(_OWN_PREFIXES) or name in _SHIPPED:
        raise BadRequest(
            f"an event {name} would be vmloop's own; begin your events with a word of yours, e.g. SITE_{name}"[:300]
        )
    if name in _QEMU:
        raise BadRequest(f"{name} is an event of QEMU's; begin your events with a word of yours, e.g. SITE_{name}")
    return name
