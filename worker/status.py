# SPDX-License-Identifier: Apache-2.0
"""What a worker tells the broker of its VM: the map that HELLO, STATUS and BYE carry; docs/protocol.md lists it. Pure; used by app.py."""

from __future__ import annotations

import os
import time
from typing import Any

from .. import __version__
from ..common.page import Page, Word
from ..common.worker_protocol import NEWEST, PROTOCOLS
from .vm import Vm


def status_of(
    vm: Vm,
    page: Page,
    *,
    definition: dict[str, Any] | None,
    born: float,
    forget: bool,
    inherited: list[int],
    journal: str,
) -> dict[str, Any]:
    """All that is known of the VM now. `inherited`: numbers of requests that this worker answers; `journal`: its trouble, or ""."""
    run = vm.run
    session = vm.session
    return {
        "protocol": NEWEST,
        "protocols": list(PROTOCOLS),
        "version": __version__,
        "worker_pid": os.getpid(),
        "worker_ticks": page.words[Word.WORKER_STARTED],
        "worker_started": born,
        "stack_signal": True,
        "incarnation": page.words[Word.INCARNATION],
        "inherited": inherited,
        "forget": forget,
        "defined": definition is not None,
        "state": vm.state.state.value,
        "reason": vm.state.reason,
        "since": vm.since,
        "monitor": vm.monitor.state.value,
        "agent": vm.agent.state.state.value,
        "pid": vm.process.pid if vm.process is not None else None,
        "alive": vm.alive,
        "started": run.started if run is not None else None,
        "attached": run is not None and not run.launched and vm.alive,
        "binary": run.binary if run is not None else None,
        "argv": run.argv if run is not None else None,
        "definition": definition,
        "qmp": {
            "version": run.qemu_version if run is not None else None,
            "path": run.monitor if run is not None else None,
            "oob": session.oob if session is not None else False,
            "in_flight": session.in_flight if session is not None else 0,
            "queued": session.queued if session is not None else 0,
            "garbled": session.garbled if session is not None else 0,
        },
        "journal": journal,
        "facts": vm.facts,
        "sent": time.time(),
    }
