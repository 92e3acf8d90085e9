# SPDX-License-Identifier: Apache-2.0
"""Jobs and disks: JOB_STATUS_CHANGE, BLOCK_JOB_*, BLOCK_IO_ERROR. Called by the dispatcher through shipped.py.

The jobs are those of whoever started them: vmloop shows them and tells their failure. It never finalises or dismisses one: a job waits
for that so that its owner can see the result, and pivot, cancel or keep what it made; who wants none of it starts it with auto-dismiss,
QEMU's default.
"""

from __future__ import annotations

from typing import Any, Final

from ...common.errors import QmpError
from ..events import Event
from . import fields
from .context import VmContext
from .devices import QUERY_SECONDS, answered, now

_ENDS: Final = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")


async def job_changed(vm: VmContext, event: Event) -> None:
    """JOB_STATUS_CHANGE and BLOCK_JOB_*. Fact `jobs` {at, jobs, failed} anew, once for a burst; event JOB_FAILED {id, type?, error}.

    A failure is told once. A job that dismisses itself is gone before anybody can ask: its BLOCK_JOB_COMPLETED tells how it ended.
    """
    if event.event in _ENDS and (error := fields.text(event.data, "error")):
        _tell_failure(vm, fields.text(event.data, "device"), fields.text(event.data, "type"), error)
    if not answered(vm, "jobs", event):
        await refresh_jobs(vm)


async def refresh_jobs(vm: VmContext) -> None:
    """The fact `jobs` from query-jobs and query-block-jobs. Raises the monitor's errors."""
    at = now()
    jobs = [_job(item) for item in fields.items(await vm.qmp("query-jobs", seconds=QUERY_SECONDS))]
    try:
        block = fields.items(await vm.qmp("query-block-jobs", seconds=QUERY_SECONDS)) if jobs else []
    except QmpError:  # a program that has jobs and no block layer of a VM
        block = []
    more = {fields.text(item, "device"): item for item in block}
    for job in jobs:
        item = more.get(job.get("id", ""), {})
        job.update(fields.present(ready=fields.flag(item, "ready"), speed=fields.number(item, "speed")))
        job.update(fields.present(io_status=fields.text(item, "io-status")))
    there = {job.get("id") for job in jobs}
    told = [name for name in _told(vm) if name in there]  # an id that is gone may be used again
    vm.set_fact("jobs", {"at": at, "jobs": jobs, "failed": told})
    for job in jobs:
        if job.get("status") == "concluded" and "error" in job:
            _tell_failure(vm, job.get("id", ""), job.get("type", ""), job["error"])


async def io_error(vm: VmContext, event: Event) -> None:
    """BLOCK_IO_ERROR. Fact `io_error` {at, device?, node-name?, operation?, action?, nospace?, reason?} of the last one."""
    names = ("device", "node-name", "operation", "action", "reason")
    told = {name: found for name in names if (found := fields.text(event.data, name))}
    vm.set_fact("io_error", {"at": event.time, **told, **fields.present(nospace=fields.flag(event.data, "nospace"))})


def _job(item: Any) -> dict[str, Any]:
    return fields.present(
        id=fields.text(item, "id"),
        type=fields.text(item, "type"),
        status=fields.text(item, "status"),
        current=fields.number(item, "current-progress"),
        total=fields.number(item, "total-progress"),
        error=fields.text(item, "error"),
    )


def _told(vm: VmContext) -> list[str]:
    failed: list[str] = fields.mapping(vm.facts.get("jobs")).get("failed", [])
    return failed


def _tell_failure(vm: VmContext, name: str, kind: str, error: str) -> None:
    told = _told(vm)
    if name in told:
        return
    known = {"at": 0, "jobs": [], **fields.mapping(vm.facts.get("jobs"))}
    vm.set_fact("jobs", {**known, "failed": [*told, name][-fields.MAX_ITEMS :]})
    vm.emit("JOB_FAILED", {"id": name, "error": error, **fields.present(type=kind)})
