# SPDX-License-Identifier: Apache-2.0
"""What QEMU still owes an answer, on the status page: entered before a command is sent, struck out after its answer went out.

A successor finds here whom the replies in the socket belong to. Each entry has 16 words:

    0  0 free, else 1 | reading << 1 | oob << 2 | answered << 3          1  QMP id
    2  the broker's request number, 0 for vmloop's own commands          3  deadline (f64, CLOCK_MONOTONIC)
    4  length of key    5-12  key    13  if answered: PROGRESS once the line of the answer is settled

Word 0 is stored last on entry, so that an entry is either whole or not there. An entry is marked as answered before the line that answers
it is settled (worker/events.py), and struck out after that: a successor that finds the mark sees from PROGRESS whether it will read that
line again. Used by session.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import Final

import msgspec

from ...common.page import LEDGER_SLOTS, Page, Word, float_to_word, text_to_words, word_to_float, words_to_text
from ..events import LineChange

_TAKEN: Final = 1
_READING: Final = 2
_OOB: Final = 4
_ANSWERED: Final = 8
_PROGRESS_AT: Final = 13
_KEY_AT: Final = 5
_KEY_WORDS: Final = 8


class Owed(msgspec.Struct, frozen=True):
    """A command that was sent and is not answered yet."""

    qmp_id: int
    request: int
    reading: bool
    oob: bool
    deadline: float
    key: bytes


class LedgerFull(Exception):
    """More commands on the wire than the ledger has room for: a defect of the session, which keeps count."""


class Ledger:
    """The entries of one page, and the QMP ids that never repeat within a run."""

    def __init__(self, page: Page) -> None:
        self._words = page.words
        self._slots = [page.slot(index) for index in range(LEDGER_SLOTS)]
        self._slot_of: dict[int, int] = {}
        self._free: list[int] = []
        for index, slot in enumerate(self._slots):
            if slot[0] & _ANSWERED:
                settled = slot[_PROGRESS_AT] == self._words[Word.PROGRESS]
                slot[0] = 0 if settled else slot[0] & ~_ANSWERED
            if slot[0] & _TAKEN and slot[1] not in self._slot_of and isfinite(word_to_float(slot[3])):
                self._slot_of[slot[1]] = index
            else:  # also what no worker of ours has written
                slot[0] = 0
                self._free.append(index)

    def next_qmp_id(self) -> int:
        """A fresh id; the page remembers it across workers."""
        fresh: int = self._words[Word.QMP_ID] + 1
        self._words[Word.QMP_ID] = fresh
        return fresh

    def enter(self, owed: Owed) -> None:
        """Write a command down, before its first byte is sent. Raises `LedgerFull`."""
        if not self._free:
            raise LedgerFull(f"{LEDGER_SLOTS} commands are on the wire already")
        index = self._free.pop()
        slot = self._slots[index]
        slot[1] = owed.qmp_id
        slot[2] = owed.request
        slot[3] = float_to_word(owed.deadline)
        slot[4] = len(owed.key)
        if owed.key:
            for at, word in enumerate(text_to_words(owed.key, _KEY_WORDS), _KEY_AT):
                slot[at] = word
        slot[0] = _TAKEN | (_READING if owed.reading else 0) | (_OOB if owed.oob else 0)
        self._slot_of[owed.qmp_id] = index

    def strike(self, qmp_id: int) -> None:
        """The command is answered, and the answer is on its way."""
        index = self._slot_of.pop(qmp_id, None)
        if index is not None:
            self._slots[index][0] = 0
            self._free.append(index)

    def answered_by_line(self, qmp_id: int) -> LineChange:
        """The command is answered by the line at hand: mark it before that is settled, and strike it out after."""
        return _Answered(self, qmp_id)

    def mark_answered(self, qmp_id: int, progress: int) -> None:
        """Its answer is read once PROGRESS is this."""
        index = self._slot_of.get(qmp_id)
        if index is not None:
            slot = self._slots[index]
            slot[_PROGRESS_AT] = progress
            slot[0] |= _ANSWERED

    def clear(self) -> None:
        """Nothing is owed any more: the connection is a new one."""
        for qmp_id in list(self._slot_of):
            self.strike(qmp_id)

    def __iter__(self) -> Iterator[Owed]:
        """Everything owed, oldest id first."""
        for qmp_id in sorted(self._slot_of):
            slot = self._slots[self._slot_of[qmp_id]]
            length = min(slot[4], _KEY_WORDS * 8)
            key = words_to_text([slot[_KEY_AT + at] for at in range(_KEY_WORDS)])[:length]
            yield Owed(
                qmp_id=qmp_id,
                request=slot[2],
                reading=bool(slot[0] & _READING),
                oob=bool(slot[0] & _OOB),
                deadline=word_to_float(slot[3]),
                key=key,
            )

    def release(self) -> None:
        """Let go of the page, which can only be closed then."""
        for slot in self._slots:
            slot.release()


class _Answered(LineChange):
    def __init__(self, ledger: Ledger, qmp_id: int) -> None:
        self._ledger = ledger
        self._qmp_id = qmp_id

    def prepare(self, progress: int) -> None:
        self._ledger.mark_answered(self._qmp_id, progress)

    def afterwards(self) -> None:
        self._ledger.strike(self._qmp_id)
