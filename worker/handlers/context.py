# SPDX-License-Identifier: Apache-2.0
"""What handlers stand on: one VM, as the dispatcher, the operator's handlers (through view.py) and the shipped ones see it.

Implemented by worker/handling.py over vm.py and the agent; by a fake in the tests of handlers. Everything here is called on the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

from ...common.definition import Definition
from ...common.names import VmName
from ...common.paths import VmPaths
from ...common.states import AgentState, VmState
from ..events import Event


class VmContext(Protocol):
    """One VM and its present run."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...
    @property
    def name(self) -> VmName: ...
    @property
    def paths(self) -> VmPaths: ...
    @property
    def definition(self) -> Definition | None:
        """What this run was started from; None if it was attached."""

    @property
    def epoch(self) -> int: ...
    @property
    def pid(self) -> int | None: ...
    @property
    def state(self) -> VmState: ...
    @property
    def reason(self) -> str: ...
    @property
    def agent_state(self) -> AgentState: ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What handlers have found out about this run, shown by `show`; see `set_fact`."""

    async def qmp(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, seconds: float, reading: bool = True
    ) -> Any:
        """The `return` of a QMP command. Raises the error tree's members. `reading`: it changes nothing, so it is safe to repeat."""

    async def agent(self, command: str, arguments: Mapping[str, Any] | None = None, *, seconds: float) -> Any:
        """The `return` of a guest agent command. Raises the error tree's members."""

    async def can(self, name: str, *, seconds: float) -> bool:
        """Whether this run's QEMU has a command, an event or a feature of the schema of this name. Raises the error tree's members."""

    def emit(self, event: str, data: dict[str, Any]) -> Event:
        """Add an event of origin `vmloop` to the VM's stream."""

    def move(self, state: VmState, reason: str) -> None:
        """Change the VM's state if the table allows it; for what only a query can tell."""

    def expect(self, intent: str) -> None:
        """The reason that the next state change of QEMU's has; "" when it is over."""

    def set_fact(self, name: str, value: Any) -> None:
        """Note something small and msgpack-able about this run; None removes it. Facts end with the run."""

    def kill(self, reason: str) -> None:
        """End QEMU at once; the run ends as shutoff for this reason. Raises `NotRunning` if no process is surely this VM's."""

    def agent_port_gone(self, why: str) -> None:
        """The device of the agent's port was removed from the VM."""

    def look_at_agent_port(self) -> None:
        """Something changed about serial ports: ask query-chardev anew (coalesced)."""
