# SPDX-License-Identifier: Apache-2.0
"""No guest file system stays frozen for ever: the guard of guest-fsfreeze-freeze. Used by agent.py.

When vmloop has frozen a guest, the status page says until when (Word.FROZEN_UNTIL). At that time, or when whoever asked has gone away,
guest-fsfreeze-thaw is sent until it succeeds. The word is written before the freeze is sent, so that a worker killed in between leaves
it to the next one. A freeze of which nobody knows what became (no answer, or a late one) counts as perhaps frozen: the agent is asked,
and the guest thawed if need be. An agent that dies leaves its guest frozen; a reset of the guest thaws it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

import tenacity

from ...common.errors import AgentError, VmloopError
from ...common.page import Page, Word, float_to_word, word_to_float
from ..events import EventLog
from ..qmp.commands import Done

log = logging.getLogger(__name__)

FREEZES: Final = frozenset({"guest-fsfreeze-freeze", "guest-fsfreeze-freeze-list"})
THAW: Final = "guest-fsfreeze-thaw"
STATUS: Final = "guest-fsfreeze-status"
THAW_SECONDS: Final = 30.0  # for one attempt; it waits for disks
MAX_DELAY: Final = 10.0  # seconds between attempts


class Execute(Protocol):
    """Send a command to the agent and wait for its answer; past the guard."""

    def __call__(self, command: str, arguments: dict[str, Any] | None = None, *, seconds: float) -> Awaitable[Any]: ...


class FreezeGuard:
    """What vmloop knows of frozen file systems in one guest."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, name: str, page: Page, events: EventLog, execute: Execute
    ) -> None:
        self._loop = loop
        self._name = name
        self._words = page.words
        self._events = events
        self._execute = execute
        self._timer: asyncio.TimerHandle | None = None
        self._thawing: asyncio.Task[None] | None = None
        self._active = False  # between begin and stop
        self._certain = False  # the agent has said that it froze something
        self._listeners: list[Callable[[str], None]] = []

    @property
    def until(self) -> float:
        """Loop time at which the guest is thawed; 0.0 if vmloop has not frozen it."""
        return word_to_float(self._words[Word.FROZEN_UNTIL])

    def on_thawed(self, listener: Callable[[str], None]) -> Callable[[], None]:
        """Call `listener` with why, each time the guest is thawed; returns the function that ends it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    # -- the run --------------------------------------------------------------------------------------------------------------

    def begin(self, *, taken_over: bool) -> None:
        """A run begins; taken_over: it had begun under an earlier worker, whose freeze goes on."""
        self.stop()
        self._active = True
        if not taken_over:
            self._words[Word.FROZEN_UNTIL] = 0
        elif self.until:
            self._arm(self.until)

    def stop(self) -> None:
        """Leave the guest as it is; the page keeps what is known, for the next worker."""
        self._active = False
        self._give_up_thawing()

    def _give_up_thawing(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._thawing is not None:
            self._thawing.cancel()
            self._thawing = None

    def over(self, why: str) -> None:
        """The guest was reset or is gone: nothing is frozen any more."""
        if self.until:
            self._thawed(why)

    # -- commands ---------------------------------------------------------------------------------------------------------------

    def watch(self, command: str, done: Done, deadline: float, limit: float) -> Done:
        """What to give the session instead of `done`. Called before the command is sent. limit: seconds it may stay frozen."""
        if command in FREEZES:
            return self._watch_freeze(done, deadline, limit)
        if command == THAW:
            return self._watch_thaw(done)
        return done

    def _watch_freeze(self, done: Done, deadline: float, limit: float) -> Done:
        before = self.until
        if not before:
            self._words[Word.FROZEN_UNTIL] = float_to_word(min(deadline, self._loop.time() + limit))

        def answered(value: Any, error: VmloopError | None) -> None:
            if error is None:
                self._frozen(value, limit)
            elif (isinstance(error, AgentError) and error.fields.get("kind") != "damaged") or not error.fields.get(
                "sent"
            ):
                # Refused or not sent: qemu-ga thaws what it has frozen when it cannot freeze the rest.
                if not before:
                    self._words[Word.FROZEN_UNTIL] = 0
            else:
                self.thaw("unanswered")
            done(value, error)

        return answered

    def _frozen(self, value: Any, limit: float) -> None:
        if type(value) is int and value == 0:  # nothing to freeze
            if not self._certain:
                self._words[Word.FROZEN_UNTIL] = 0
            return
        self._certain = True
        until = self._loop.time() + limit
        self._words[Word.FROZEN_UNTIL] = float_to_word(until)
        self._events.emit("AGENT_FROZEN", {"count": value if type(value) is int else None, "until": limit})
        self._arm(until)

    def _watch_thaw(self, done: Done) -> Done:
        def answered(value: Any, error: VmloopError | None) -> None:
            if error is None and self.until:
                self._thawed("asked")
            done(value, error)

        return answered

    # -- thawing ----------------------------------------------------------------------------------------------------------------

    def thaw(self, why: str) -> None:
        """Thaw the guest now, and try until it is thawed. Nothing happens if it is not, perhaps, frozen."""
        if not self.until or (self._thawing is not None and not self._thawing.done()):
            return
        self._words[Word.FROZEN_UNTIL] = float_to_word(min(self.until, self._loop.time()))
        if not self._active:
            return  # the next worker does it at once
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._thawing = self._loop.create_task(self._thaw(why))

    def _arm(self, until: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(until, self.thaw, "limit")

    async def _thaw(self, why: str) -> None:
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(VmloopError),
            wait=tenacity.wait_exponential(multiplier=0.25, max=MAX_DELAY),
            before_sleep=self._log_failure,
        )
        async for attempt in retrying:  # ends with the guest thawed, or with the run
            with attempt:
                if not self._certain and await self._execute(STATUS, seconds=THAW_SECONDS) == "thawed":
                    self._words[Word.FROZEN_UNTIL] = 0
                    return
                await self._execute(THAW, seconds=THAW_SECONDS)
        self._thawing = None
        self._thawed(why)

    def _log_failure(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        log.warning("VM %s: its file systems are, or may be, frozen, and cannot be thawed now: %s", self._name, error)

    def _thawed(self, why: str) -> None:
        self._words[Word.FROZEN_UNTIL] = 0
        self._certain = False
        self._give_up_thawing()
        self._events.emit("AGENT_THAWED", {"why": why})
        for listener in tuple(self._listeners):
            listener(why)
