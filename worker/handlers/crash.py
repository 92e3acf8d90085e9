# SPDX-License-Identifier: Apache-2.0
"""A guest that has failed: GUEST_PANICKED, GUEST_CRASHLOADED, WATCHDOG, and the end of a dump. Called by the dispatcher through shipped.py.

What happens then is the definition's: on_crash = preserve, destroy, restart, dump; on_watchdog = none, dump. power.prepare has told QEMU to
pause in these cases, so that there is something left to decide about. A VM that was attached has no definition: what happens is told and
noted.
"""

from __future__ import annotations

import logging
from typing import Final

from ...common.errors import NotRunning, VmloopError
from ...common.states import VmState
from ..events import Event
from . import fields
from .context import VmContext
from .dump import keep_dump
from .power import STEP_SECONDS, restart_guest, settle, wanted_actions

log = logging.getLogger(__name__)

# A dump of some hundred GiB onto a slow disk ends within it; the handler's own limit in shipped.py is above it.
DUMP_SECONDS: Final = 3 * 3600.0

# After these there is no guest left in the state that the watchdog found it in.
_GUEST_IS_GONE: Final = ("reset", "poweroff")


async def guest_panicked(vm: VmContext, event: Event) -> None:
    """GUEST_PANICKED. Fact `panic` {at, action?, info?}; then what on_crash says."""
    action, info = fields.text(event.data, "action"), fields.plain(event.data.get("info"))
    vm.set_fact("panic", {"at": event.time, **fields.present(action=action, info=info)})
    log.warning("VM %s: its guest has panicked: %s", vm.name, info or "it tells no more")
    on_crash = vm.definition.handlers.on_crash if vm.definition is not None else "preserve"
    if on_crash == "destroy":
        try:
            vm.kill("crashed")
        except NotRunning:
            if action != "poweroff":  # then QEMU ends by itself, and may be through with it
                raise
    elif action == "poweroff":
        log.warning("VM %s: QEMU's panic action ends it; on_crash = %s comes too late", vm.name, on_crash)
    elif on_crash == "restart":
        await restart_guest(vm, event, "crashed")
    elif on_crash == "dump":
        await keep_dump(vm, event.epoch, event.seq, DUMP_SECONDS)
    if action == "run" and on_crash in ("preserve", "dump"):  # -action panic=none: the guest goes on
        await settle(vm)


async def guest_crashloaded(vm: VmContext, event: Event) -> None:
    """GUEST_CRASHLOADED: the guest's own crash kernel is at work and will dump. Fact `crashloaded` {at, info?}; nothing else is due."""
    info = fields.plain(event.data.get("info"))
    vm.set_fact("crashloaded", {"at": event.time, **fields.present(info=info)})
    log.warning("VM %s: its guest has crashed and loaded its crash kernel: %s", vm.name, info or "it tells no more")


async def watchdog_expired(vm: VmContext, event: Event) -> None:
    """WATCHDOG. Fact `watchdog` {at, action?}. on_watchdog = dump: dump, then end the pause that was for it.

    The guest goes on if the user's arguments chose to pause; else it is reset, as it would have been by QEMU's default.
    """
    action = fields.text(event.data, "action")
    vm.set_fact("watchdog", {"at": event.time, **fields.present(action=action)})
    if vm.definition is None or vm.definition.handlers.on_watchdog != "dump" or action in _GUEST_IS_GONE:
        return
    try:
        await keep_dump(vm, event.epoch, event.seq, DUMP_SECONDS)
    except VmloopError:  # the pause was for the dump's sake: without one it has no use either
        await _end_pause(vm, event, action)
        raise
    await _end_pause(vm, event, action)


async def dump_completed(vm: VmContext, event: Event) -> None:
    """DUMP_COMPLETED, of anybody's dump: its reason goes to the fact `dump` if that is one of vmloop's which failed."""
    error, known = fields.text(event.data, "error"), fields.mapping(vm.facts.get("dump"))
    if error and known.get("status") == "failed":
        vm.set_fact("dump", {**known, "error": error})


async def _end_pause(vm: VmContext, event: Event, action: str) -> None:
    """End the pause that the watchdog's action began, if it is still that one: somebody may have ended it, or have wanted another."""
    if action != "pause" or vm.state is not VmState.PAUSED or vm.reason != "watchdog" or vm.definition is None:
        return
    if "watchdog" in wanted_actions(vm.definition):  # vmloop chose the pause: QEMU's default is a reset
        await restart_guest(vm, event, "booted")
    else:
        await vm.qmp("cont", seconds=STEP_SECONDS, reading=False)
