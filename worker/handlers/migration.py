# SPDX-License-Identifier: Apache-2.0
"""Migrations that somebody runs by QMP: MIGRATION. Called by the dispatcher through shipped.py.

vmloop starts none yet; but one that ends while nobody looks must not leave a VM in a state that is not its own. QEMU decides what
runs where, so its own word, query-status, settles the state; the status of the migration gives the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from ...common.states import VmState
from ..events import Event
from . import fields
from .context import VmContext
from .power import settle

log = logging.getLogger(__name__)

# By the status of the migration. A VM that is paused after a completed one is its source: the guest runs elsewhere now.
REASONS: Final[Mapping[str, Mapping[VmState, str]]] = {
    "completed": {VmState.RUNNING: "migrated", VmState.PAUSED: "migration"},
    **{
        status: {VmState.RUNNING: reason, VmState.PAUSED: reason}
        for status, reason in (
            ("failed", "migration failed"),
            ("cancelled", "migration canceled"),
            ("postcopy-active", "post-copy"),
            ("postcopy-recover", "post-copy"),
            ("postcopy-paused", "post-copy failed"),
        )
    },
}


async def migration_changed(vm: VmContext, event: Event) -> None:
    """MIGRATION. Fact `migration` {at, status, state?, reason?}; where the status decides what runs where, the VM's state by query-status.

    The source of a completed migration stays paused: only who knows that the destination runs may end it.
    """
    status = fields.text(event.data, "status")
    fact: dict[str, Any] = {"at": event.time, "status": status}
    reasons = REASONS.get(status)
    if reasons is not None:
        state = await settle(vm, reasons)
        reason = reasons.get(state, "")
        fact |= {"state": state.value, "reason": reason}
        log.info("VM %s: migration %s: %s, %s", vm.name, status, state.value, reason)
    vm.set_fact("migration", fact)
