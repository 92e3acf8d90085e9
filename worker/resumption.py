# SPDX-License-Identifier: Apache-2.0
"""The third way in which a run begins: a new worker goes on with what the last one left, its connection and what QEMU owes on it.

Called by app.py. The other two ways are in beginnings.py.
"""

from __future__ import annotations

import logging
import socket
from typing import Final

from ..common.definition import AgentSection, Definition, definition_from_mapping
from ..common.errors import ConfigError, OutcomeUnknown, VmloopError
from ..common.page import Page
from ..common.process import boot_id
from .beginnings import AGENT_PORT
from .handling import Handling
from .predecessor import Predecessor
from .qmp.ledger import Ledger
from .qmp.writer import end_connection
from .recognition import FACT, UNRECOGNISED, hold_again
from .requests import Requests
from .runfile import Run
from .vm import Vm

log = logging.getLogger(__name__)

# The broker gives this worker at once what the last one had not answered; what QEMU does later has another reason.
INTENT_SECONDS: Final = 10.0


def resume(
    vm: Vm,
    handling: Handling,
    requests: Requests,
    page: Page,
    kept: socket.socket | None,
    agent: socket.socket | None,
    predecessor: Predecessor,
) -> None:
    """Go on with a run. `kept`, `agent`: the monitor's and the guest agent's connection, if they outlived the last worker."""
    run = vm.run
    assert run is not None
    _take_up_intent(vm, requests)
    definition = _definition_of(run)
    handling.begin(definition, predecessor)
    section = definition.agent if definition is not None else AgentSection(enabled=run.agent is not None)
    port = AGENT_PORT if run.launched else None
    vm.agent.begin(run.agent, section, port, taken_over=True)
    vm.agent.take_over(agent, requests.inherit_agent)
    if kept is not None and vm.page_lost:  # nobody knows how far it was read
        give_up_connections(vm, kept)
        kept = None
    rebooted = run.boot_id != boot_id()
    gone = rebooted or not hold_again(vm, kept)
    if kept is not None and not rebooted:
        _take_over(vm, requests, kept, run)
    else:
        vm.reconnection.unwatched()
        _give_up_owed(vm, requests, page)
    if rebooted:
        vm.finish("the host was restarted under it", "host-reboot")
    elif gone:
        vm.finish("it ended while no worker watched")
    elif kept is None:
        vm.reconnection.begin(UNRECOGNISED if FACT in vm.facts else "monitor-lost")


def give_up_connections(vm: Vm, *connections: socket.socket | None) -> None:
    """Kept ones that nobody goes on with: ended everywhere, so that QEMU and the agent take new ones."""
    given = [connection for connection in connections if connection is not None]
    if given:
        vm.keeper.drop()
    for connection in given:
        end_connection(connection)


def _take_up_intent(vm: Vm, requests: Requests) -> None:
    """What an operation asked of QEMU under the last worker may come true before the broker gives the operation to this one."""
    intent = vm.intent = requests.intent_left()
    if intent:
        vm.loop.call_later(INTENT_SECONDS, _drop_intent, vm, requests)


def _drop_intent(vm: Vm, requests: Requests) -> None:
    if requests.intent_left():  # else the operation goes on, and minds it itself
        vm.intent = ""


def _definition_of(run: Run) -> Definition | None:
    """What the run was started from; None if it was attached, or by a vmloop whose definitions this one does not understand."""
    if run.definition is None:
        return None
    try:
        return definition_from_mapping(run.definition, f"run {run.epoch}")
    except ConfigError as error:
        log.error("the definition that the run was started from is not understood: %s", error)
        return None


def _take_over(vm: Vm, requests: Requests, connection: socket.socket, run: Run) -> None:
    """Go on with the connection that an earlier worker read from."""
    connection.setblocking(False)
    session = vm.open_session(connection)
    session.take_over(oob=run.oob, answer=requests.inherit)
    vm.keeper.keep("monitor", connection.fileno())
    if vm.came_up:
        vm.look_at_agent()
    else:  # the worker before this one had not come so far
        vm.settling_in = vm.loop.create_task(_settle_in_late(vm))


async def _settle_in_late(vm: Vm) -> None:
    try:
        await vm.settle_in(vm.loop.time() + vm.settings.launch)
    except VmloopError as error:  # without a connection it is sought, and settled then
        log.warning("VM %s: QEMU does not say what it is at: %s", vm.name, error)


def _give_up_owed(vm: Vm, requests: Requests, page: Page) -> None:
    """No connection outlived the last worker: what it had sent and QEMU had not answered is not answered any more."""
    ledger = Ledger(page)
    for owed in ledger:
        done = None if owed.reading else requests.inherit(owed)  # what reads is asked again
        if done is not None:
            text = f"VM {vm.name}: the connection to its monitor was lost before QEMU answered; look at the VM before you repeat it"
            done(None, OutcomeUnknown(text))
    ledger.clear()
    ledger.release()
