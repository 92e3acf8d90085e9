# SPDX-License-Identifier: Apache-2.0
"""Busy or frozen: what an unanswered command means. Part of a session; costs nothing while nothing is outstanding.

    ready   ── a command is unanswered for `probe_after` s ──► ask out of band
    answered out of band   → busy    (QEMU's main loop is occupied), ask again after `probe_after`
    no answer at all within `frozen_after` s → frozen   (the process stands still)
    any in-band answer     → ready

A monitor without out-of-band execution cannot be asked: there an unanswered command only ever means busy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ...common.settings import WorkerSettings
from ...common.states import MonitorState


class Liveness:
    """The ladder of one session."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        settings: WorkerSettings,
        probe: Callable[[float], bool],
        on_state: Callable[[MonitorState, str], None],
    ) -> None:
        """`probe(deadline)` sends the out-of-band question, and says False if it cannot."""
        self.state = MonitorState.CONNECTING
        self._loop = loop
        self._probe_after = settings.probe_after
        self._frozen_after = settings.frozen_after
        self._probe = probe
        self._on_state = on_state
        self._oldest: float | None = None  # when the oldest unanswered in-band command was sent
        self._probing = False
        self._timer: asyncio.TimerHandle | None = None

    def start(self, oldest: float | None) -> None:
        """The session is negotiated; `oldest`: see `answered`."""
        self.state = MonitorState.READY
        self._oldest = oldest
        self._watch()

    def silent_for(self) -> float:
        """Seconds for which the oldest command has been unanswered."""
        return 0.0 if self._oldest is None else self._loop.time() - self._oldest

    def sent(self, oob: bool) -> None:
        """A command has gone out."""
        if not oob and self._oldest is None:
            self._oldest = self._loop.time()
            self._watch()

    def answered(self, oob: bool, oldest: float | None) -> None:
        """A reply has come; `oldest`: when the oldest in-band command that is still unanswered was sent."""
        self._oldest = oldest
        self._probing = False  # in band too: whoever answers there is not asked any more, and can be asked anew
        if oob:
            if (oldest is not None and self.state is not MonitorState.READY) or (
                oldest is not None and self.silent_for() >= self._probe_after
            ):
                self._become(MonitorState.BUSY, "QEMU answers out of band only: its main loop is occupied")
        elif self.state is not MonitorState.READY and self.state is not MonitorState.CONNECTING:
            self._become(MonitorState.READY, "QEMU answers")

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch(self) -> None:
        """Look again `probe_after` after the oldest command. One timer at a time: while commands are answered it is hardly ever moved."""
        if self._timer is None and self._oldest is not None and self.state is not MonitorState.CONNECTING:
            self._timer = self._loop.call_at(
                max(self._oldest + self._probe_after, self._loop.time()), self._on_unanswered
            )

    def _on_unanswered(self) -> None:
        self._timer = None
        if self._oldest is None:
            return
        if self.silent_for() < self._probe_after:
            self._watch()
            return
        if not self._probing and self._probe(self._loop.time() + self._frozen_after):
            self._probing = True
            self._timer = self._loop.call_later(self._frozen_after, self._on_probe_due)
            return
        if not self._probing:
            self._become(MonitorState.BUSY, "a command waits, and this monitor cannot be asked out of band")
        self._timer = self._loop.call_later(self._probe_after, self._on_unanswered)

    def _on_probe_due(self) -> None:
        self._timer = None
        if self._probing:
            self._become(MonitorState.FROZEN, "QEMU answers nothing, not even out of band")
        self._timer = self._loop.call_later(self._probe_after, self._on_unanswered)

    def _become(self, state: MonitorState, reason: str) -> None:
        if state is not self.state:
            self.state = state
            self._on_state(state, reason)
