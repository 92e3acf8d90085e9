# SPDX-License-Identifier: Apache-2.0
"""Holding a run's process again, in a worker that did not start it: at its birth, with each attempt to reach the monitor, before a kill.

Called by beginnings.py, vm.py and verbs/lifecycle.py; who the process is, is found out in qemu/recognise.py.
"""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING, Final

import msgspec

from ..common.process import ProcessGone
from .qemu.recognise import recognise

if TYPE_CHECKING:
    from .vm import Vm

log = logging.getLogger(__name__)

UNRECOGNISED: Final = "process-unrecognised"  # the reason of `unknown`
FACT: Final = "process"  # what `show` has under facts: why it cannot be recognised
WAY_OUT: Final = "nothing is killed; if it is this VM's QEMU, detach the VM and attach it again with --pid"


def hold_again(vm: Vm, connection: socket.socket | None = None) -> bool:
    """Hold the run's process, if it can be told which it is. False if it is known to be gone. `connection`: to the VM's monitor."""
    run = vm.run
    if vm.process is not None or run is None:
        return True
    try:
        process = recognise(run, vm.paths, connection)
    except ProcessGone as error:
        log.info("VM %s: %s", vm.name, error)
        return False
    except OSError as error:  # whatever it is, it is no end
        text = f"{error.strerror or error}; {WAY_OUT}"
        if vm.facts.get(FACT) != text:
            log.error("VM %s: its process cannot be recognised: %s", vm.name, text)
            vm.set_fact(FACT, text)
        return True
    if process is not None:
        if FACT in vm.facts:
            vm.set_fact(FACT, None)
        vm.hold(process)
        if run.process != process.identity:
            vm.save_soon(msgspec.structs.replace(run, process=process.identity))
    return True
