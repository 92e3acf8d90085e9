# SPDX-License-Identifier: Apache-2.0
"""What the guest agent still owes, on the status page: for a successor. Used by session.py and agent.py.

Eight entries of 24 words. The command on the wire has one, the newest sync and the commands that were given up have theirs as long as
there is room (the oldest give way), and a command that ends the guest keeps its own until QEMU's event has come:

    0  0 free, else what it is | flags << 8 | length of key << 16     1  its id        2  the broker's request number, 0 if nobody asked
    3  deadline                4  sent (both f64, CLOCK_MONOTONIC)    5  freeze limit  6-13  key          14-23  name (80 bytes)

Word 0 is stored last on entry, so that an entry is either whole or not there. Word.AGENT_LINK says what is known of the connection:
which one it is (the socket's inode), that it was opened, that a sync was answered, and that the agent repeats ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from math import isfinite
from typing import Final

import msgspec

from ...common.page import (
    AGENT_LEDGER_AT,
    AGENT_SLOT_WORDS,
    AGENT_SLOTS,
    Page,
    Word,
    float_to_word,
    text_to_words,
    word_to_float,
    words_to_text,
)

_READING: Final = 1
_QUIET: Final = 2
_REBOOT: Final = 4
_TOLD: Final = 8
_FLAGS_SHIFT: Final = 8
_KEY_SHIFT: Final = 16
_KEY_AT: Final = 6
_KEY_WORDS: Final = 8
_NAME_AT: Final = 14
_NAME_WORDS: Final = 10

_OPENED: Final = 1
_SYNCED: Final = 2
_REPEATS_IDS: Final = 4
_INODE_SHIFT: Final = 32
_INODE_MASK: Final = (1 << 32) - 1


class Part(IntEnum):
    """What an entry is."""

    CURRENT = 1  # the command on the wire → struck, GIVEN_UP or ENDING
    GIVEN_UP = 2  # nobody waits any more, and its late reply may come → struck
    SYNC = 3  # → struck
    ENDING = 4  # the agent has nothing more to say, and QEMU's event is waited for → struck


class AgentOwed(msgspec.Struct, frozen=True):
    """One entry. Times are loop time. reboot: it ends with the guest's RESET; told: whoever asked has an answer already."""

    part: Part
    number: int
    request: int = 0
    reading: bool = False
    quiet: bool = False
    reboot: bool = False
    told: bool = False
    deadline: float = 0.0
    sent: float = 0.0
    limit: float = 0.0
    key: bytes = b""
    name: str = ""


class AgentLedger:
    """The entries of one page."""

    def __init__(self, page: Page) -> None:
        self._words = page.words
        self._at_of: dict[int, int] = {}  # number → first word
        self._free: list[int] = []
        on_wire = False
        for index in range(AGENT_SLOTS):
            at = AGENT_LEDGER_AT + index * AGENT_SLOT_WORDS
            part, number = self._words[at] & 0xFF, self._words[at + 1]
            times = all(isfinite(word_to_float(word)) for word in self._words[at + 3 : at + 6])
            second = part == Part.CURRENT and on_wire
            on_wire = on_wire or part == Part.CURRENT
            if part in set(Part) and number and number not in self._at_of and times and not second:
                self._at_of[number] = at
            else:  # also what no worker of ours has written
                if self._words[at]:
                    self._words[at] = 0
                self._free.append(at)

    # -- entries ----------------------------------------------------------------------------------------------------------------

    def enter(self, owed: AgentOwed) -> None:
        """Write something down, before its first byte is sent. Where there is no room, the oldest that is not on the wire gives way."""
        if not self._free:
            others = [owed for owed in self if owed.part is not Part.CURRENT]
            self.strike(min(others, key=lambda owed: owed.part is Part.ENDING).number)
        at = self._free.pop()
        words = self._words
        words[at + 1] = owed.number
        words[at + 2] = owed.request
        words[at + 3] = float_to_word(owed.deadline)
        words[at + 4] = float_to_word(owed.sent)
        words[at + 5] = float_to_word(owed.limit)
        for index, word in enumerate(text_to_words(owed.key, _KEY_WORDS), at + _KEY_AT):
            words[index] = word
        for index, word in enumerate(text_to_words(owed.name.encode(), _NAME_WORDS), at + _NAME_AT):
            words[index] = word
        flags = _READING * owed.reading | _QUIET * owed.quiet | _REBOOT * owed.reboot | _TOLD * owed.told
        words[at] = owed.part | flags << _FLAGS_SHIFT | min(len(owed.key), _KEY_WORDS * 8) << _KEY_SHIFT
        self._at_of[owed.number] = at

    def strike(self, number: int) -> None:
        """It is over."""
        at = self._at_of.pop(number, None)
        if at is not None:
            self._words[at] = 0
            self._free.append(at)

    def answered(self, number: int) -> None:
        """The agent has no more to say to this command; whoever asked has been told, unless QEMU's event does that."""
        if not self._ends_by_event(number):
            self.strike(number)

    def given_up(self, number: int) -> None:
        """Nobody waits for the agent's reply to this command any more."""
        at = self._at_of.get(number)
        if at is not None and not self._ends_by_event(number):
            self._words[at] = self._words[at] & ~0xFF | Part.GIVEN_UP

    def told(self, number: int) -> None:
        """Whoever asked for the guest's end has an answer."""
        at = self._at_of.get(number)
        if at is None:
            return
        if self._words[at] & 0xFF == Part.ENDING:
            self.strike(number)
        else:
            self._words[at] |= _TOLD << _FLAGS_SHIFT

    def in_step(self) -> None:
        """A sync was answered: what came before it will not be answered any more."""
        for owed in list(self):
            if owed.part in (Part.GIVEN_UP, Part.SYNC):
                self.strike(owed.number)

    def clear(self) -> None:
        """Nothing is owed any more: the run is over, or a new one begins."""
        for number in list(self._at_of):
            self.strike(number)
        self._words[Word.AGENT_SENDING] = 0
        self._words[Word.AGENT_LINK] = 0

    def _ends_by_event(self, number: int) -> bool:
        """Whether QEMU's event is still waited for; then that is what its entry is for."""
        at = self._at_of.get(number)
        if at is None or self._words[at] >> _FLAGS_SHIFT & (_QUIET | _TOLD) != _QUIET:
            return False
        self._words[at] = self._words[at] & ~0xFF | Part.ENDING
        return True

    def __iter__(self) -> Iterator[AgentOwed]:
        """Everything owed, in the order in which it was sent."""
        return iter(sorted((self._read(at) for at in self._at_of.values()), key=lambda owed: owed.sent))

    def _read(self, at: int) -> AgentOwed:
        words = self._words
        flags = words[at] >> _FLAGS_SHIFT
        length = min(words[at] >> _KEY_SHIFT & 0xFF, _KEY_WORDS * 8)
        key = words_to_text([words[at + _KEY_AT + index] for index in range(_KEY_WORDS)])[:length]
        name = words_to_text([words[at + _NAME_AT + index] for index in range(_NAME_WORDS)])
        return AgentOwed(
            part=Part(words[at] & 0xFF),
            number=words[at + 1],
            request=words[at + 2],
            reading=bool(flags & _READING),
            quiet=bool(flags & _QUIET),
            reboot=bool(flags & _REBOOT),
            told=bool(flags & _TOLD),
            deadline=word_to_float(words[at + 3]),
            sent=word_to_float(words[at + 4]),
            limit=word_to_float(words[at + 5]),
            key=key,
            name=name.rstrip(b"\0").decode("utf-8", "ignore"),
        )

    # -- the connection -----------------------------------------------------------------------------------------------------------

    @property
    def sending(self) -> int:
        """The id of the command that is being written; found by a successor: the worker died inside its send."""
        number: int = self._words[Word.AGENT_SENDING]
        return number

    @sending.setter
    def sending(self, number: int) -> None:
        self._words[Word.AGENT_SENDING] = number

    @property
    def synced(self) -> bool:
        """Whether the agent is known to be in step, and the start of its line to be kept."""
        return bool(self._words[Word.AGENT_LINK] & _SYNCED)

    @property
    def repeats_ids(self) -> bool:
        return bool(self._words[Word.AGENT_LINK] & _REPEATS_IDS)

    def opened(self, inode: int) -> None:
        """A connection is there, and nothing has been said on it. inode: of its socket."""
        self._words[Word.AGENT_SENDING] = 0
        self._words[Word.AGENT_LINK] = (inode & _INODE_MASK) << _INODE_SHIFT | _OPENED

    def is_of(self, inode: int) -> bool:
        """Whether the page speaks of this connection."""
        link = self._words[Word.AGENT_LINK]
        return bool(link & _OPENED) and link >> _INODE_SHIFT == inode & _INODE_MASK

    def ended(self) -> None:
        """The connection is over for good."""
        self._words[Word.AGENT_LINK] = 0
        self._words[Word.AGENT_SENDING] = 0

    def note(self, *, synced: bool, repeats_ids: bool) -> None:
        """What is known of the agent at the other end."""
        flags = _SYNCED * synced | _REPEATS_IDS * repeats_ids
        self._words[Word.AGENT_LINK] = self._words[Word.AGENT_LINK] & ~(_SYNCED | _REPEATS_IDS) | flags
