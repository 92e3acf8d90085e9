# SPDX-License-Identifier: Apache-2.0
"""What is told of a request that no worker has answered: as much as is known of it, and no more. Pure; used by core.py."""

from __future__ import annotations

from ..common.errors import Busy, DeadlineExceeded, OutcomeUnknown, VmloopError, WorkerLost
from .inflight import Entry
from .roster import VmEntry, WorkerState


def undelivered(entry: Entry, *, full: bool) -> VmloopError:
    """It did not reach the worker it was sent to; `full`: that one lives and does not keep up."""
    if entry.given and not entry.reading:
        text = f"VM {entry.vm}: its worker died while it had '{entry.op}', and the next one does not keep up"
        return OutcomeUnknown(text + "; look at the VM before you repeat it")
    if full:
        return Busy(f"VM {entry.vm}: its worker does not keep up; try again later")
    return WorkerLost(f"VM {entry.vm}: its worker was gone before it had '{entry.op}'; nothing was done, try again")


def overdue(entry: Entry, vm: VmEntry | None) -> VmloopError:
    """Its time is over."""
    if vm is None:
        return DeadlineExceeded(f"{entry.op}: not done in time")
    if entry.waits_for is not None:
        return DeadlineExceeded(f"VM {vm.name} is {vm.state} ({vm.status.get('reason')}), not {entry.waits_for}")
    if vm.worker.state is WorkerState.READY:
        text = f"VM {vm.name}: its worker has not answered '{entry.op}' in time; what was begun may still take effect"
        return DeadlineExceeded(text)
    waited = f"no worker for it came up in time (it is {vm.worker.state.value}: {vm.worker.reason})"
    if entry.sent_to is not None and not entry.reading:
        text = f"VM {vm.name}: its worker was lost while it had '{entry.op}', and {waited}"
        return OutcomeUnknown(text + "; look at the VM before you repeat it")
    return DeadlineExceeded(f"VM {vm.name}: {waited}")


def cut_off(entry: Entry) -> VmloopError:
    """The broker ends before it was answered."""
    text = f"'{entry.op}' was not answered before the broker went down"
    return WorkerLost(text) if entry.reading else OutcomeUnknown(text + "; look at the VM before you repeat it")
