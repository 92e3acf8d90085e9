# SPDX-License-Identifier: Apache-2.0
"""What happened to a VM while nobody was connected to its monitor, as far as it can still be told. Pure; used by reconnection.py.

Before is what the journal says; after is what QEMU answers. From both follows what EVENTS_LOST says beside its span.
"""

from __future__ import annotations

from typing import Any

import msgspec

from .events import Event

MAX_JOBS = 256  # of each kind that are named; a VM has a handful


class Known(msgspec.Struct):
    """What is known of a VM at one moment. None: not known."""

    state: str | None = None
    jobs: dict[str, str] = {}  # id → status, as in JOB_STATUS_CHANGE and query-jobs
    agent_port: bool | None = None  # whether the guest has its agent's port open


def note(known: Known, event: Event, agent_port_id: str | None) -> None:
    """Take in one event of the run, in order."""
    data = event.data
    if event.event == "JOB_STATUS_CHANGE" and event.origin == "qmp":
        job, status = data.get("id"), data.get("status")
        if isinstance(job, str) and isinstance(status, str):
            known.jobs.pop(job, None)
            if status != "null" and len(known.jobs) < MAX_JOBS:
                known.jobs[job] = status
    elif event.event == "VSERPORT_CHANGE" and agent_port_id is not None and data.get("id") == agent_port_id:
        known.agent_port = data.get("open") is True
    elif event.event == "VM_STATE" and data.get("new") != "unknown":
        known.state = str(data.get("new"))


def jobs_of(reply: object) -> dict[str, str]:
    """The jobs in QEMU's answer to query-jobs; any JSON value is survived."""
    jobs: dict[str, str] = {}
    for entry in reply if isinstance(reply, list) else ():
        job, status = (entry.get("id"), entry.get("status")) if isinstance(entry, dict) else (None, None)
        if isinstance(job, str) and isinstance(status, str) and len(jobs) < MAX_JOBS:
            jobs[job] = status
    return jobs


def difference(before: Known, after: Known) -> dict[str, Any]:
    """What has changed; empty if nothing that is known of both has. Jobs: `{id: [old, new]}`, null for not there."""
    changed: dict[str, Any] = {}
    if before.state is not None and after.state is not None and before.state != after.state:
        changed["state"] = [before.state, after.state]
    jobs = {
        job: [before.jobs.get(job), after.jobs.get(job)]
        for job in sorted(before.jobs.keys() | after.jobs.keys())
        if before.jobs.get(job) != after.jobs.get(job)
    }
    if jobs:
        changed["jobs"] = jobs
    if None not in (before.agent_port, after.agent_port) and before.agent_port != after.agent_port:
        changed["agent_port"] = [before.agent_port, after.agent_port]
    return changed
