# SPDX-License-Identifier: Apache-2.0
"""Handlers without any process: a fake VM on a loop in a thread of its own, and the worker's own dispatcher before it. For unit tests.

Made by the fixture `handler_bench`. What handlers get is the view of worker/handlers/view.py, with its limits and errors, in the lanes and
the order of a worker; what they ask, the test has prepared (fake_vm). Nothing here needs a broker, and a call takes milliseconds.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from ..client.stream import Event as SeenEvent
from ..common.definition import Definition, HandlersSection
from ..common.errors import ConfigError, DeadlineExceeded
from ..common.states import VmState
from ..worker.events import Event, Origin
from ..worker.handlers.dispatch import Dispatcher
from ..worker.handlers.naming import TaskNames
from ..worker.handlers.registry import Handler, LoadFailure, handler_of, load_directory
from .double import FAILED, HandlerFailed
from .fake_vm import FakeVm
from .handler_files import Source, require_handler

LIMIT: Final = 5.0  # seconds that a handler has for one event: less than the usual 30, for tests that hang end soon
GRACE: Final = 5.0  # that long after it the dispatcher has ended it
CLOSE_SECONDS: Final = 10.0  # to end the loop; the dispatcher's own end takes two

T = TypeVar("T")


class _Page:
    """The status page that there is not."""

    held_up_in = ""

    def doing(self, task: str) -> None:
        """Nobody looks."""


class HandlerBench:
    """Some handlers and a fake VM. `vm`: prepare its answers (`vm.qmp_answers`), see what was done to it (`vm.calls`, `vm.emitted`)."""

    def __init__(self, *handlers: Source, name: str = "web1", limit: float = LIMIT) -> None:
        """`handlers`: functions with `@on`, also such that are made inside of a test, or files of them. `limit`: seconds for one call.

        Raises `ConfigError` for what is no handler, or for a file that cannot be run.
        """
        self._directory = tempfile.TemporaryDirectory(prefix="vmloop-")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="handler bench", daemon=True)
        self._limit = limit
        self.patience = limit + GRACE + CLOSE_SECONDS  # seconds that the test waits for the loop at most
        self._expected: set[int] = set()  # numbers of HANDLER_FAILED that the test has asked for
        try:
            self.handlers = tuple(itertools.chain.from_iterable(map(_loaded, handlers)))
            definition = Definition(name, handlers=HandlersSection(limit=limit))
            self.vm = FakeVm(Path(self._directory.name), name, definition, self._loop)
        except BaseException:
            self._loop.close()
            self._directory.cleanup()
            raise
        self._thread.start()
        self._dispatcher = self._on_loop(self._begin())

    def _run(self) -> None:
        """The thread: until `close` stops the loop."""
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()

    async def _begin(self) -> Dispatcher:
        dispatcher = Dispatcher(self.vm, _Page(), self.handlers, on_replace=lambda _: None)
        self.vm.listen(dispatcher.dispatch)
        return dispatcher

    def happen(self, event: str, data: dict[str, Any] | None = None, *, origin: Origin = "qmp") -> list[Event]:
        """Something happens to the VM; returns when the handlers have come to their end: the events that they have caused, in order.

        Raises `HandlerFailed` if one failed, `DeadlineExceeded` if they go on and on.
        """
        caused = self._on_loop(self._happen(event, data, origin))
        self.check()
        return caused

    def expect_failure(self, event: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
        """As `happen`, of an event on which a handler must fail: the data of HANDLER_FAILED. Raises `AssertionError` if none did."""
        caused = self._on_loop(self._happen(event, data, "qmp"))
        failures = [one for one in caused if one.event == FAILED]
        assert failures, f"no handler failed on {event}"
        self._expected |= {one.seq for one in failures}
        return failures[0].data

    def move(self, state: VmState, reason: str) -> list[Event]:
        """The VM gets into another state, which is the event VM_STATE; else as `happen`. Nothing if there is no such move."""
        caused = self._on_loop(self._settled(lambda: self.vm.move(state, reason)))
        self.check()
        return caused

    async def _happen(self, event: str, data: dict[str, Any] | None, origin: Origin) -> list[Event]:
        return await self._settled(lambda: self.vm.happen(event, data, origin))

    async def _settled(self, deed: Callable[[], object]) -> list[Event]:
        """Do something that is one event, and wait for the handlers' end: what they have caused."""
        seen = len(self.vm.events) + 1
        deed()
        if not await self._dispatcher.settle(self._limit + GRACE):
            raise DeadlineExceeded(f"VM {self.vm.name}: its handlers do not come to rest")
        return self.vm.events[seen:]

    def check(self) -> None:
        """Raises `HandlerFailed` for the first handler that has failed and was not expected to."""
        for event in self.vm.events:
            if event.event == FAILED and event.seq not in self._expected:
                self._expected.add(event.seq)  # told once: the test fails anyway
                raise HandlerFailed(SeenEvent(event=FAILED, data=event.data))

    def close(self) -> None:
        """End the loop and its thread. Raises `HandlerFailed` as `check`."""
        try:
            self._on_loop(self._dispatcher.close())
            self.check()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CLOSE_SECONDS)  # one that a handler holds up for good ends with the process
            self._directory.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """What a coroutine gives on the bench's loop; the caller may be in a loop of its own."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(self.patience)
        except TimeoutError:
            if future.done():
                raise
            raise DeadlineExceeded(
                f"VM {self.vm.name}: a handler holds up the loop: use `def`, or await what takes time"
            ) from None


def _loaded(source: Source) -> tuple[Handler, ...]:
    if not isinstance(source, str | Path):
        return (_of_function(source),)
    path = Path(source)
    found = load_directory(path.parent, [path.stem], lambda _, __: False, TaskNames(_Page()))
    for failure in found.failures:
        raise _refused(failure)
    return found.handlers


def _of_function(function: Callable[..., Any]) -> Handler:
    module, name = require_handler(function)
    handler = handler_of(function, f"{module}.{name}", module)
    assert handler is not None
    return handler


def _refused(failure: LoadFailure) -> ConfigError:
    return ConfigError(f"{failure.error}\n{failure.traceback}".rstrip())
