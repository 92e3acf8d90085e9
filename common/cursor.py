# SPDX-License-Identifier: Apache-2.0
"""A place in a VM's stream of events: `EPOCH.SEQ`.

The epoch counts the runs of a VM (each start or attach), seq its events within that run, from 1. Cursors order as pairs.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .errors import BadRequest

_TEXT = re.compile(r"(\d{1,10})\.(\d{1,20})", re.ASCII)


class Cursor(NamedTuple):
    """`Cursor(3, 17)` stands just after event 17 of run 3; `Cursor(3, 0)` is the start of run 3."""

    epoch: int
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.seq}"


def parse_cursor(text: object) -> Cursor:
    """The cursor written as `EPOCH.SEQ`; `BadRequest` for anything else, or for numbers that no header could carry."""
    found = _TEXT.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise BadRequest(f"{text!r:.60} is no cursor: it is written EPOCH.SEQ, for example 3.17")
    cursor = Cursor(int(found[1]), int(found[2]))
    if cursor.epoch >= 1 << 32 or cursor.seq >= 1 << 64:
        raise BadRequest(f"cursor {text!r:.60} is out of range: 32 bits of epoch, 64 bits of seq")
    return cursor
