# SPDX-License-Identifier: Apache-2.0
"""What an import tells the operator: what of a domain was left out, what was changed, what to look at. Made by this folder's modules."""

from __future__ import annotations

from enum import Enum

import msgspec


class Kind(Enum):
    """What became of the thing; the value is the key of its list in the command's JSON."""

    LEFT_OUT = "left_out"  # the definition does not have it
    CHANGED = "changed"  # the definition has it in another form
    WARNING = "warnings"  # it is there as it was, and may not work

    @property
    def words(self) -> str:
        return {"left_out": "left out", "changed": "changed", "warnings": "warning"}[self.value]


class Note(msgspec.Struct, frozen=True):
    """`what` names the thing as the XML or QEMU's command line does; `why` gives the reason, and what to do."""

    kind: Kind
    what: str
    why: str


def left_out(what: str, why: str) -> Note:
    return Note(Kind.LEFT_OUT, what, why)


def changed(what: str, why: str) -> Note:
    return Note(Kind.CHANGED, what, why)


def warning(what: str, why: str) -> Note:
    return Note(Kind.WARNING, what, why)
