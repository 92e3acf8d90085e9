# SPDX-License-Identifier: Apache-2.0
"""Clients that pause, resume, stop, kill and start VMs with a process of their own, and start again those that a fault has killed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, Final

from vmloop.client import connect
from vmloop.client.vm import Vm
from vmloop.common.errors import VmloopError

from .commands import CONNECT, Stage
from .recording import RESULT, STOP_SECONDS, Command

TIMEOUT: Final = 15.0  # seconds; a launch on a busy machine takes its time
PACE: Final = 0.25  # seconds between two operations of one client

_OPERATIONS: Final[dict[str, Callable[[Vm], Any]]] = {
    "pause": Vm.pause,
    "resume": Vm.resume,
    "stop": lambda vm: vm.stop(timeout=STOP_SECONDS, force=True),
    "kill": Vm.kill,
}
_WEIGHTS: Final = {"pause": 4, "resume": 6, "stop": 1, "kill": 1}


def power(stage: Stage, client: str) -> None:
    """Run until the stage ends."""
    chance = random.Random(f"{client} {stage.seed}")
    own = [actor.name for actor in stage.actors if actor.own_process]
    with connect(root=stage.root, wait=CONNECT, timeout=TIMEOUT) as host:
        while not stage.stop.wait(PACE):
            name = chance.choice(own)
            (operation,) = chance.choices([*_WEIGHTS], [*_WEIGHTS.values()])
            try:
                off = [vm.name for vm in host.list() if vm.state == "shutoff" and vm.name in own]
            except VmloopError as error:
                stage.broken.append(f"list of {client}: {error.code}: {error}")
                continue
            if off:
                name, operation = chance.choice(off), "start"
            act = _OPERATIONS.get(operation, Vm.start)
            stage.commands.append(carry_out(client, host.vm(name), operation, act))


def carry_out(client: str, vm: Vm, operation: str, act: Callable[[Vm], Any]) -> Command:
    """Do it, and what is written down of it. Used by storm.py too, for the end of a run."""
    began = time.monotonic()
    outcome, text = RESULT, ""
    try:
        act(vm)
    except VmloopError as error:
        outcome, text = error.code, str(error)
    return Command(client, vm.name, operation, began, time.monotonic(), outcome, text, keyed=True)
