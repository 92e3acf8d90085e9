# SPDX-License-Identifier: Apache-2.0
"""What an operator's handler can do with its VM: `AsyncVm` for an `async def`, `SyncVm` for a plain `def`. docs/handlers.md is the guide.

A view belongs to one call of one handler. It is good for that call's time limit and for the run that the event was of: a handler that
comes back late, or holds on to its view, is told so and touches nothing. The dispatcher makes the views.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, TypeVar

import msgspec

from ...common.errors import BadRequest, Busy, DeadlineExceeded, Denied, NotRunning, TooLarge
from ...common.names import VmName
from ...common.pack import pack, unpack
from ...common.states import AgentState, VmState
from ..events import Event
from .context import VmContext
from .event_names import require_free_name
from .forks import forked
from .report import TokenBucket

MAX_DATA_BYTES: Final = 64 * 1024
EMITS_PER_SECOND: Final = 100.0  # of all handlers of one VM together
EMITS_AT_ONCE: Final = 200.0

# A blocking call waits this much longer than the loop does, so that the loop's own, better error comes first.
_LOOP_GRACE: Final = 2.0

T = TypeVar("T")


class _Reach:
    """How far one call of a handler reaches: the run of its event, for its time limit. `left`, `loop` and `name` are for any thread."""

    __slots__ = ("context", "emits", "epoch", "loop", "name", "until")

    def __init__(self, context: VmContext, epoch: int, limit: float, emits: TokenBucket) -> None:
        self.context = context
        self.epoch = epoch
        self.loop = context.loop
        self.name = context.name
        self.until = self.loop.time() + limit
        self.emits = emits

    def present(self) -> VmContext:
        """The VM, if it is still in the handler's run."""
        if self.context.epoch != self.epoch:
            text = f"VM {self.name}: run {self.epoch}, which this handler was called in, is over; the VM is in run {self.context.epoch}"
            raise NotRunning(text)
        return self.context

    def left(self, timeout: float | None) -> float:
        """Seconds that a command may take."""
        self.refuse_child()
        left = self.until - self.loop.time()
        if left <= 0:
            raise DeadlineExceeded(
                f"VM {self.name}: this handler's time is over; give it a larger limit or do less in it"
            )
        if timeout is None:
            return left
        if not timeout > 0:
            raise BadRequest(f"timeout is {timeout!r:.40}, it must be a number of seconds above 0")
        return min(left, float(timeout))

    def refuse_child(self) -> None:
        if forked():
            raise Denied(
                f"VM {self.name}: a process that was forked off has no VM; return to the handler what it shall do"
            )

    async def qmp(self, command: str, arguments: Mapping[str, Any] | None, timeout: float | None) -> Any:
        seconds = self.left(timeout)
        return await self.present().qmp(command, arguments, seconds=seconds, reading=command.startswith("query-"))

    async def agent(self, command: str, arguments: Mapping[str, Any] | None, timeout: float | None) -> Any:
        seconds = self.left(timeout)
        return await self.present().agent(command, arguments, seconds=seconds)

    async def can(self, name: str, timeout: float | None) -> bool:
        if not isinstance(name, str):
            raise BadRequest(f"{name!r:.100} is no name of a command, an event or a feature")
        seconds = self.left(timeout)
        return await self.present().can(name, seconds=seconds)

    def emit(self, event: str, data: Mapping[str, Any] | None) -> Event:
        self.left(None)
        name = require_free_name(event)
        plain = _plain(data)
        context = self.present()
        if not self.emits.take():
            raise Busy(
                f"VM {self.name}: handlers emit over {EMITS_PER_SECOND:g} events a second; {name} was not emitted"
            )
        return context.emit(name, plain)

    def definition(self) -> dict[str, Any] | None:
        definition = self.present().definition
        return None if definition is None else msgspec.to_builtins(definition)

    def data(self) -> dict[str, Any]:
        return copy.deepcopy(dict(self.present().facts))


class AsyncVm:
    """The VM that an event came from, for `async def` handlers.

    Everything but `name` and `epoch` raises `NotRunning` once the VM is in another run than the event's; commands and `emit` raise
    `DeadlineExceeded` once the handler's time is over.
    """

    __slots__ = ("_reach",)

    def __init__(self, context: VmContext, epoch: int, limit: float, emits: TokenBucket) -> None:
        self._reach = _Reach(context, epoch, limit, emits)

    def __repr__(self) -> str:
        return f"<AsyncVm {self.name} run {self.epoch}>"

    @property
    def name(self) -> VmName:
        """The VM's name."""
        return self._reach.name

    @property
    def epoch(self) -> int:
        """The number of the run that the event is of."""
        return self._reach.epoch

    @property
    def state(self) -> VmState:
        """The VM's state now, which may not be that of the moment of the event."""
        return self._reach.present().state

    @property
    def reason(self) -> str:
        """Why the VM is in its state: "booted", "ioerror" …"""
        return self._reach.present().reason

    @property
    def pid(self) -> int | None:
        """QEMU's process; None when there is none, or none that is surely this VM's."""
        return self._reach.present().pid

    @property
    def agent_state(self) -> AgentState:
        """The guest agent's state; commands make sense when it is `ready`."""
        return self._reach.present().agent_state

    @property
    def definition(self) -> dict[str, Any] | None:
        """What the run was started from, as plain values (a copy); None if the VM was attached."""
        return self._reach.definition()

    @property
    def data(self) -> dict[str, Any]:
        """What handlers have found out about this run, as `vmloop show` has it (a copy)."""
        return self._reach.data()

    async def qmp(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout: float | None = None
    ) -> Any:
        """Give QEMU a command; its `return`.

        `timeout`: seconds, what is left of the handler's limit if None and never more than that. Raises `QmpError` (QEMU refused),
        `DeadlineExceeded` (a command that was sent lives on), `MonitorLost`, `MonitorFrozen`, `NotRunning`, `Busy`, `OutcomeUnknown`.
        """
        return await self._reach.qmp(command, arguments, timeout)

    async def agent(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout: float | None = None
    ) -> Any:
        """Give the guest agent a command; its `return`. `timeout` as for `qmp`.

        Raises `AgentError` (the agent refused), `AgentAbsent`, `AgentUnresponsive`, `DeadlineExceeded`, `NotRunning`, `Busy`. What a guest
        answers may be anything: check it before you use it.
        """
        return await self._reach.agent(command, arguments, timeout)

    async def can(self, name: str, *, timeout: float | None = None) -> bool:
        """Whether this run's QEMU has a command, an event or a feature of its schema of this name: `await vm.can("query-yank")`.

        Answered from what was known of the binary when the run began; where nothing was, QEMU is asked, once. `timeout` and errors as
        for `qmp`.
        """
        return await self._reach.can(name, timeout)

    def emit(self, event: str, data: Mapping[str, Any] | None = None) -> Event:
        """Add an event of your own to the VM's stream; subscribers and handlers get it as any other.

        `event`: 2 to 64 of A-Z 0-9 _, no name of vmloop's or QEMU's (`BadRequest`). `data`: plain values, under 64 KiB packed
        (`BadRequest`, `TooLarge`).
        Raises `Busy` when the VM's handlers emit more than 100 events a second (200 at once).
        """
        return self._reach.emit(event, data)


class SyncVm:
    """The VM that an event came from, for plain `def` handlers; the same as `AsyncVm` with blocking calls. For any thread but the loop's.

    Everything but `name` and `epoch` raises `NotRunning` once the VM is in another run than the event's, and `DeadlineExceeded` once the
    handler's time is over.
    """

    __slots__ = ("_reach",)

    def __init__(self, context: VmContext, epoch: int, limit: float, emits: TokenBucket) -> None:
        self._reach = _Reach(context, epoch, limit, emits)

    def __repr__(self) -> str:
        return f"<SyncVm {self.name} run {self.epoch}>"

    @property
    def name(self) -> VmName:
        """The VM's name."""
        return self._reach.name

    @property
    def epoch(self) -> int:
        """The number of the run that the event is of."""
        return self._reach.epoch

    @property
    def state(self) -> VmState:
        """The VM's state now, which may not be that of the moment of the event."""
        return self._look(lambda: self._reach.present().state)

    @property
    def reason(self) -> str:
        """Why the VM is in its state: "booted", "ioerror" …"""
        return self._look(lambda: self._reach.present().reason)

    @property
    def pid(self) -> int | None:
        """QEMU's process; None when there is none, or none that is surely this VM's."""
        return self._look(lambda: self._reach.present().pid)

    @property
    def agent_state(self) -> AgentState:
        """The guest agent's state; commands make sense when it is `ready`."""
        return self._look(lambda: self._reach.present().agent_state)

    @property
    def definition(self) -> dict[str, Any] | None:
        """What the run was started from, as plain values (a copy); None if the VM was attached."""
        return self._look(self._reach.definition)

    @property
    def data(self) -> dict[str, Any]:
        """What handlers have found out about this run, as `vmloop show` has it (a copy)."""
        return self._look(self._reach.data)

    def qmp(self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout: float | None = None) -> Any:
        """Give QEMU a command and wait for its `return`; see `AsyncVm.qmp` for `timeout` and what it raises."""
        return self._wait(lambda: self._reach.qmp(command, arguments, timeout), timeout)

    def agent(self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout: float | None = None) -> Any:
        """Give the guest agent a command and wait for its `return`; see `AsyncVm.agent` for `timeout` and what it raises."""
        return self._wait(lambda: self._reach.agent(command, arguments, timeout), timeout)

    def can(self, name: str, *, timeout: float | None = None) -> bool:
        """Whether this run's QEMU has a command, an event or a feature of this name; see `AsyncVm.can`."""
        return self._wait(lambda: self._reach.can(name, timeout), timeout)

    def emit(self, event: str, data: Mapping[str, Any] | None = None) -> Event:
        """Add an event of your own to the VM's stream; see `AsyncVm.emit`."""
        return self._look(lambda: self._reach.emit(event, data))

    # -- to the loop and back -----------------------------------------------------------------------------------------------

    def _look(self, look: Callable[[], T]) -> T:
        """What `look` gives on the loop."""

        async def there() -> T:
            return look()

        return self._wait(there, None)

    def _wait(self, work: Callable[[], Coroutine[Any, Any, T]], timeout: float | None) -> T:
        reach = self._reach
        seconds = reach.left(timeout)
        with contextlib.suppress(RuntimeError):  # there is no loop in this thread, as it should be
            asyncio.get_running_loop()
            raise Denied(
                f"VM {self.name}: a SyncVm would block the event loop; use an `async def` handler and its AsyncVm"
            )
        coroutine = work()
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, reach.loop)
        except RuntimeError:
            coroutine.close()
            raise NotRunning(f"VM {self.name}: its worker ends") from None
        try:
            return future.result(seconds + _LOOP_GRACE)
        except TimeoutError:
            if future.done() and not future.cancelled():
                raise  # the loop's own answer was a TimeoutError
            future.cancel()
            raise DeadlineExceeded(f"VM {self.name}: no answer within {seconds:g} s: its loop is held up") from None


def _plain(data: Mapping[str, Any] | None) -> dict[str, Any]:
    """A private copy of an event's data, as its readers will get it."""
    if data is not None and not isinstance(data, Mapping):
        raise BadRequest(f"the data of an event is a map, not {type(data).__name__}")
    try:
        packed = pack(dict(data or {}))
        if len(packed) >= MAX_DATA_BYTES:
            raise TooLarge(
                f"the data of an event must be under {MAX_DATA_BYTES} bytes packed; this has {len(packed)}",
                limit=MAX_DATA_BYTES,
            )
        plain: dict[str, Any] = unpack(packed)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise BadRequest(
            f"the data of an event must be plain values (None, bool, int, float, str, bytes, list, dict): {error}"
        ) from error
    if not all(isinstance(key, str) for key in plain):
        raise BadRequest("the data of an event must have text keys")
    return plain
