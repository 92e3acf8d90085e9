# SPDX-License-Identifier: Apache-2.0
"""What the status page keeps of a VM's run for the next worker: its state with reason and time, and facts about it. Used by vm.py."""

from __future__ import annotations

from enum import IntFlag
from typing import Final

from ..common.page import Page, Word
from ..common.states import VmState
from .events import Event
from .transitions import Move

_STATES: Final = tuple(VmState)


class Fact(IntFlag):
    """What the next worker must know of the run."""

    STARTED = 1  # it came up once
    SHUTDOWN_SEEN = 2
    KILLED = 4  # vmloop ended it
    ATTACHED = 8  # somebody else started it


class RunPage:
    """The run's part of one page."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._words = page.words

    @property
    def epoch(self) -> int:
        epoch: int = self._words[Word.EPOCH]
        return epoch

    @property
    def incarnation(self) -> int:
        """How many workers the VM has had, this one included."""
        incarnation: int = self._words[Word.INCARNATION]
        return incarnation

    @property
    def state(self) -> Move:
        """The VM's state and its reason."""
        return Move(_STATES[self._words[Word.STATE] % len(_STATES)], self._page.state_reason())

    @property
    def since(self) -> int:
        """When it entered that state, microseconds since 1970."""
        since: int = self._words[Word.SINCE]
        return since

    def begin(self) -> None:
        """A run begins: nothing is known of it yet."""
        self._words[Word.FACTS] = 0
        self._words[Word.QMP_ID] = 0
        self._words[Word.FROZEN_UNTIL] = 0

    def has(self, fact: Fact) -> bool:
        return bool(self._words[Word.FACTS] & fact)

    def note(self, fact: Fact) -> None:
        self._words[Word.FACTS] |= fact

    def strike(self, fact: Fact) -> None:
        self._words[Word.FACTS] &= ~fact

    def put(self, event: Event) -> None:
        """What an event says of the VM. May be done twice."""
        if event.event == "VM_STATE":
            names = [state.value for state in _STATES]
            if event.data.get("new") in names:  # else of a later vmloop, whose journal this is
                self._page.put_state(names.index(event.data["new"]), str(event.data.get("reason")), event.time)
        elif event.event == "AGENT_THAWED":
            self._words[Word.FROZEN_UNTIL] = 0
