# SPDX-License-Identifier: Apache-2.0
"""The handlers of one VM's run: loads them, feeds them its events, and is the VM that they see. Used by app.py and beginnings.py.

begin (a run starts, is adopted or taken over) ─► every event of the stream goes to the dispatcher ─► end (the run is over) or leave
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ..common.definition import Definition
from ..common.errors import ConfigError
from ..common.names import VmName
from ..common.page import Page
from ..common.paths import VmPaths
from ..common.states import AgentState, VmState
from .events import Event
from .handlers.context import VmContext
from .handlers.dispatch import Dispatcher
from .handlers.naming import TaskNames
from .handlers.pending import EVENTS as PENDING_EVENTS
from .handlers.pending import Pending
from .handlers.power import prepare
from .handlers.quarantine import Quarantine
from .handlers.registry import Handler, Loaded, LoadFailure, load_directory
from .handlers.shipped import shipped_handlers
from .predecessor import Predecessor
from .run_capabilities import RunCapabilities
from .vm import Vm

log = logging.getLogger(__name__)


class Handling:
    """Implements handlers/context.VmContext for one VM, and drives its dispatcher. All on the loop."""

    def __init__(
        self, vm: Vm, page: Page, etc: Path, on_replace: Callable[[str], None], binaries: Path | None = None
    ) -> None:
        """`etc`: the host's directory of settings; `binaries`: what is known of QEMU binaries (state/capabilities).

        `on_replace` is told why this worker should make way for another one.
        """
        self.capabilities = RunCapabilities(vm, binaries)
        self._vm = vm
        self._page = page
        self._etc = etc
        self._on_replace = on_replace
        self._definition: Definition | None = None
        self._dispatcher: Dispatcher | None = None
        self._pending: Pending | None = None
        self._unlisten: Callable[[], None] | None = None

    # -- start, run, stop -----------------------------------------------------------------------------------------------------

    def begin(self, definition: Definition | None, predecessor: Predecessor | None = None) -> None:
        """A run begins, or is taken over from a worker that may have died in a handler: load what is for it.

        Raises `ConfigError` if the definition names a file of handlers that is not there; of a run that goes on that is only told.
        """
        self._definition = definition
        quarantine = Quarantine(self)
        if predecessor is not None and predecessor.died:
            quarantine.blame(predecessor.task, predecessor.how)
        loaded = self._load(quarantine, goes_on=predecessor is not None)
        self._dispatcher = Dispatcher(
            self,
            self._page,
            [*(self._struck_out(handler) for handler in shipped_handlers()), *loaded.handlers],
            on_replace=self._on_replace,
            hooks=self._etc / "hooks.d",
            quarantined=quarantine.holds,
        )
        self._dispatcher.report(loaded.failures)
        self._pending = Pending(self.paths.run, self.epoch)
        for event in self._pending.events:  # that a worker before this one did not handle to its end
            log.info("VM %s: %s %d is handled again", self.name, event.event, event.seq)
            self._dispatcher.dispatch(event, only_shipped=True)
        for event in self._vm.events.since(
            self._vm.events.unheard
        ):  # that the run has begun, or what the last worker did not come to
            self._on_event(event)
        self._unlisten = self._vm.events.listen(self._on_event)

    def _on_event(self, event: Event) -> None:
        assert self._dispatcher is not None
        assert self._pending is not None
        self._pending.add(event)
        self._dispatcher.dispatch(event)

    def _struck_out(self, handler: Handler) -> Handler:
        """A shipped handler whose events are pending until it has come to its end, well or not; a worker that ends leaves them so."""
        if not handler.events & PENDING_EVENTS:
            return handler
        call = handler.function

        async def to_its_end(vm: VmContext, event: Event) -> None:
            try:
                await call(vm, event)
            except asyncio.CancelledError:
                if self._dispatcher is not None and self._unlisten is not None and self._pending is not None:
                    self._pending.done(event)  # its limit is over; not this worker's time
                raise
            except BaseException:
                self._strike_out(event)
                raise
            self._strike_out(event)

        return msgspec.structs.replace(handler, function=to_its_end)

    def _strike_out(self, event: Event) -> None:
        if self._pending is not None:
            self._pending.done(event)

    def _load(self, quarantine: Quarantine, *, goes_on: bool) -> Loaded:
        directory = self._etc / "handlers"
        wanted = self._definition.handlers.load if self._definition is not None else None
        try:
            return load_directory(directory, wanted, quarantine.holds, TaskNames(self._page))
        except ConfigError as error:
            if not goes_on:
                raise
            return Loaded((), (LoadFailure(str(directory), "import", str(error)),))

    async def prepare(self) -> None:
        """QEMU is there and its guest has not run yet: tell it what the definition asks for in on_crash and on_poweroff."""
        await prepare(self)

    async def end(self, seconds: float) -> None:
        """The run is over: let the handlers of its last events end, for so long at most."""
        if self._dispatcher is not None:
            await self._dispatcher.settle(seconds)
            await self.leave()

    async def leave(self) -> None:
        """This worker ends, or its VM is let go: what handlers are at is given up."""
        if self._unlisten is not None:
            self._unlisten()
            self._unlisten = None
        if self._dispatcher is not None:
            await self._dispatcher.close()
            self._dispatcher = None

    # -- the VM, as handlers see it (VmContext) -------------------------------------------------------------------------------

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._vm.loop

    @property
    def name(self) -> VmName:
        return self._vm.name

    @property
    def paths(self) -> VmPaths:
        return self._vm.paths

    @property
    def definition(self) -> Definition | None:
        return self._definition

    @property
    def epoch(self) -> int:
        return self._vm.run.epoch if self._vm.run is not None else 0

    @property
    def pid(self) -> int | None:
        return self._vm.process.pid if self._vm.process is not None else None

    @property
    def state(self) -> VmState:
        return self._vm.state.state

    @property
    def reason(self) -> str:
        return self._vm.state.reason

    @property
    def agent_state(self) -> AgentState:
        return self._vm.agent.state.state

    @property
    def facts(self) -> Mapping[str, Any]:
        return self._vm.facts

    async def qmp(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, seconds: float, reading: bool = True
    ) -> Any:
        session = self._vm.require_session()
        return await session.execute(command, dict(arguments or {}), seconds=seconds, reading=reading)

    async def agent(self, command: str, arguments: Mapping[str, Any] | None = None, *, seconds: float) -> Any:
        return await self._vm.agent.execute(command, dict(arguments or {}), seconds=seconds)

    async def can(self, name: str, *, seconds: float) -> bool:
        return await self.capabilities.has(name, seconds)

    def emit(self, event: str, data: dict[str, Any]) -> Event:
        return self._vm.events.emit(event, data)

    def move(self, state: VmState, reason: str) -> None:
        if self._vm.state.can(state):
            self._vm.state.move(state, reason)

    def expect(self, intent: str) -> None:
        self._vm.intent = intent

    def set_fact(self, name: str, value: Any) -> None:
        self._vm.set_fact(name, value)

    def kill(self, reason: str) -> None:
        self._vm.kill(reason)

    def agent_port_gone(self, why: str) -> None:
        self._vm.agent.close(why)

    def look_at_agent_port(self) -> None:
        self._vm.look_at_agent()
