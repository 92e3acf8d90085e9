# SPDX-License-Identifier: Apache-2.0
"""Handlers: what a VM's worker does when something happens to its VM. This is also what an operator's file of handlers imports from.

    from vmloop.worker.handlers import AsyncVm, Event, SyncVm, on

Reading order: context (what handlers stand on), registry (what a handler is), view (what the operator's can do), dispatch and lane (who is
called when), calls, thread and hooks (how), forks, report, naming and quarantine (what goes wrong). The others are those that vmloop ships.
"""

from ..events import Event
from .registry import on
from .view import AsyncVm, SyncVm

__all__ = ["AsyncVm", "Event", "SyncVm", "on"]
