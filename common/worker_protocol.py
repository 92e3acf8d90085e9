# SPDX-License-Identifier: Apache-2.0
"""Which protocols a broker and a worker speak with each other, and how they agree on one. Used by broker/crew.py and worker/status.py.

A worker outlives its broker, so either may be the older one. The worker says in HELLO all that it speaks; the broker chooses the newest
that both do and says so in a control `agreed`.

    1  as it was before anybody agreed on anything; a worker that names no protocols speaks this one alone
    2  the worker understands the flag "repeat" on a request: it may have been carried out by the worker before it
"""

from __future__ import annotations

from typing import Final

PROTOCOLS: Final = (1, 2)  # all that this version speaks
NEWEST: Final = max(PROTOCOLS)
# Numbers that one side may name; further ones are not read.
MAX_NAMED: Final = 64


def agree(named: object, ours: tuple[int, ...] = PROTOCOLS) -> int | None:
    """The newest protocol that both speak; None if there is none. `named`: what the worker says, None if it says nothing."""
    if named is None:
        named = [1]
    if not isinstance(named, list):
        return None
    theirs = {number for number in named[:MAX_NAMED] if isinstance(number, int) and not isinstance(number, bool)}
    return max(theirs & set(ours), default=None)
