# SPDX-License-Identifier: Apache-2.0
"""Rules about what `list` claims: no VM reported gone that lives, none reported alive that is long gone. Pure.

`unknown` and `starting` are no claims, but a VM that lives and that no fault has touched for a while must not stay so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Final

from .recording import Claim, Life, Recording
from .violation import Violation

# A VM's end is told by its worker, which may have died with it: so long until the next one has told it.
LONG_GONE: Final = 5.0  # seconds
# A new process is told of by its worker, the run's number a moment before its state: so long until `list` must know.
NEW: Final = 2.0  # seconds
# A VM in doubt is looked for at once, and a launch takes a second: nothing of vmloop's own takes so long.
LONG_IN_DOUBT: Final = 20.0  # seconds

GONE: Final = "shutoff"
ALIVE: Final = frozenset({"running", "paused"})
IN_DOUBT: Final = frozenset({"unknown", "starting"})


def wrong_claims(recording: Recording) -> Iterator[Violation]:
    """The first wrong claim of each kind about each process: the following ones say the same."""
    lives: dict[str, list[Life]] = defaultdict(list)
    for life in recording.lives:
        lives[life.vm].append(life)
    said: set[tuple[str, str, int]] = set()
    told: set[tuple[str, int]] = set()  # runs that `list` has known as begun
    for claim in recording.claims:
        violation = _wrong(claim, lives[claim.vm], known=(claim.vm, claim.epoch) in told)
        if claim.state != GONE:
            told.add((claim.vm, claim.epoch))
        if violation is not None and (violation.rule, claim.vm, claim.epoch) not in said:
            said.add((violation.rule, claim.vm, claim.epoch))
            yield violation
    for vm in recording.vms:
        yield from _long_in_doubt(vm, recording, lives[vm])


def _long_in_doubt(vm: str, recording: Recording, lives: list[Life]) -> Iterator[Violation]:
    """One finding for each time that a VM stays unknown, from the last fault that touched it on, while its process lives."""
    touched = sorted(
        at for fault in recording.faults if fault.vm == vm for at in (fault.at, fault.until) if at is not None
    )
    since: float | None = None
    told = False
    for claim in recording.claims:
        if claim.vm != vm:
            continue
        if claim.state not in IN_DOUBT:
            since, told = None, False
            continue
        since = claim.asked if since is None else since
        last = max((at for at in touched if at <= claim.answered), default=since)
        begun = max(since, last)
        life = next((life for life in lives if _lives_through(life, begun, claim.asked)), None)
        if life is not None and not told and claim.asked - begun > LONG_IN_DOUBT:
            told = True
            text = f"{claim.state} from {since:.3f} to {claim.answered:.3f}, and process {life.pid} lives all the time"
            yield Violation("long in doubt", vm, text)


def _lives_through(life: Life, began: float, ended: float) -> bool:
    return life.born <= began + NEW and (life.gone is None or life.gone >= ended)


def _wrong(claim: Claim, lives: list[Life], *, known: bool) -> Violation | None:
    """`known`: an earlier claim has told that the run had begun; then no moment of it may be called its end."""
    when = f"claimed {claim.state} (epoch {claim.epoch}) at {claim.answered:.3f}"
    if claim.state == GONE:
        for life in lives:
            lived = life.born < claim.asked and life.surely_lived(claim.answered)
            if lived and ((known and life.epoch == claim.epoch) or life.born < claim.asked - NEW):
                text = f"{when}, but process {life.pid} (epoch {life.epoch or '?'}) lives since {life.born:.3f}"
                return Violation("said gone, lives", claim.vm, text)
    elif claim.state in ALIVE:
        newest = max(lives, key=lambda life: life.born, default=None)
        if newest is not None and newest.gone is not None and newest.gone < claim.asked - LONG_GONE:
            text = f"{when}, but its last process {newest.pid} is gone since {newest.gone:.3f}"
            return Violation("said alive, gone", claim.vm, text)
        if newest is not None and _long_without_life(claim, lives):
            return Violation("said alive, gone", claim.vm, f"{when}, but it had had no process for {LONG_GONE:g} s")
    return None


def _long_without_life(claim: Claim, lives: list[Life]) -> bool:
    """No process of the VM was there at any time of the span before the claim."""
    return not any(
        life.born <= claim.answered and (life.gone is None or life.gone >= claim.asked - LONG_GONE) for life in lives
    )
