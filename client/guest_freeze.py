# SPDX-License-Identifier: Apache-2.0
"""Frozen file systems: what the parts of a hold say, and whether it held. Used by vm.py, aio_vm.py and `vmloop agent --hold`.

A hold is one request that is answered in parts: `{"return": n}` when n file systems are frozen, `{"left": seconds}` each second, and at its
end `{"thawed": why}`. It ends at its limit, when the guest is thawed, and when its client goes away.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from ..common.errors import AgentUnresponsive, DeadlineExceeded, OutcomeUnknown, VmloopError
from .guest_answers import DAMAGED, fitting, vm_of

FREEZE: Final = "guest-fsfreeze-freeze"

# After these nobody knows whether the guest is frozen, or will be when it comes to it.
_UNSURE: Final = (AgentUnresponsive, DeadlineExceeded, OutcomeUnknown)


class Frozen(msgspec.Struct, frozen=True, rename={"count": "return"}):
    """The part that says that it is done."""

    count: int


def may_be_frozen(error: BaseException) -> bool:
    """Whether a freeze that failed so may have frozen something. What the caller was interrupted by says nothing about the guest."""
    if not isinstance(error, VmloopError):
        return True
    if isinstance(error, _UNSURE):
        return error.fields.get("sent") is not False  # the worker knows whether the command has left for the guest
    return error.fields.get("kind") == DAMAGED  # nobody could make sense of the answer


def frozen_count(part: object, service: str) -> int:
    """How many file systems the first part of a hold says to be frozen; 0 for the end of one that had nothing to freeze."""
    if reason_of(part):
        return 0
    return fitting(part, Frozen, service, FREEZE).count


def reason_of(final: Any) -> str:
    """Why the guest was thawed, as the end of a hold says."""
    return str(final.get("thawed", "")) if isinstance(final, dict) else ""


def at_the_limit(why: str) -> bool:
    """Whether the limit ended it, or the deadline of the request, which comes after it."""
    return why in ("limit", "deadline")


def thawed_early(service: str, why: str) -> VmloopError:
    """The error for a hold that ended before its holder was done."""
    vm = vm_of(service)
    what = "what was copied meanwhile may not be consistent"
    if at_the_limit(why):
        return DeadlineExceeded(
            f"the file systems of {vm} were thawed at their limit, before you were done: {what}; hold for longer"
        )
    return OutcomeUnknown(
        f"the file systems of {vm} were thawed by others ({why or 'unknown why'}), before you were done: {what}"
    )
