# SPDX-License-Identifier: Apache-2.0
"""The faults of a seed: when, what, whom. Pure: the same seed, length and number of VMs give the same plan. Carried out by faults.py."""

from __future__ import annotations

import random
from typing import Final

import msgspec

SHORTEST_STOP: Final = 0.05  # seconds under SIGSTOP
LONGEST_STOP: Final = 2.0
LONGEST_ABSENCE: Final = 1.0  # seconds until the operator's init starts a dead broker again
SHORTEST_PAUSE: Final = 0.1  # seconds between two strikes
LONGEST_PAUSE: Final = 1.2

KILL: Final = "kill"
STOP: Final = "stop"
BROKER: Final = "broker"
ZYGOTE: Final = "zygote"
WORKER: Final = "worker"
QEMU: Final = "qemu"
ALL_WORKERS: Final = "workers"


class Blow(msgspec.Struct, frozen=True):
    """One signal to one process. `vm`: its place in the list; `seconds`: under SIGSTOP, or until a killed broker is started again."""

    what: str
    whom: str
    vm: int = 0
    seconds: float = 0.0


class Strike(msgspec.Struct, frozen=True):
    """What is struck at one moment, so many seconds after the beginning."""

    at: float
    blows: tuple[Blow, ...]

    def describe(self) -> str:
        blows = (
            f"{blow.what} {blow.whom}{f' #{blow.vm}' if blow.whom in (WORKER, QEMU) else ''}"
            f"{f' {blow.seconds:.2f} s' if blow.seconds else ''}"
            for blow in self.blows
        )
        return f"{self.at:8.2f}  {' + '.join(blows)}"


# (weight, the processes that are struck together)
_SINGLE: Final = ((WORKER,), (QEMU,), (BROKER,), (ZYGOTE,))
_KINDS: Final[tuple[tuple[int, tuple[str, ...]], ...]] = (
    (30, (WORKER,)),
    (10, (QEMU,)),
    (10, (BROKER,)),
    (6, (ZYGOTE,)),
    (8, (WORKER, WORKER)),
    (8, (BROKER, WORKER)),
    (6, (WORKER, QEMU)),
    (4, (ZYGOTE, WORKER)),
    (2, (BROKER, ZYGOTE, ALL_WORKERS)),
)
_STOPPED: Final = 0.35  # the share of single strikes that stop rather than kill


def plan(seed: int, seconds: float, vms: int, launched: int) -> list[Strike]:
    """The strikes of a run of so many seconds over so many VMs, in order. The first `launched` VMs have a process of their own to kill."""
    chance = random.Random(f"faults {seed}")
    strikes: list[Strike] = []
    at = chance.uniform(SHORTEST_PAUSE, LONGEST_PAUSE)
    while at < seconds:
        strikes.append(Strike(round(at, 3), _blows(chance, vms, launched)))
        at += chance.uniform(SHORTEST_PAUSE, LONGEST_PAUSE)
    return strikes


def _blows(chance: random.Random, vms: int, launched: int) -> tuple[Blow, ...]:
    (whom,) = chance.choices([kind for _, kind in _KINDS], [weight for weight, _ in _KINDS])
    what = STOP if whom in _SINGLE and chance.random() < _STOPPED else KILL
    among = launched if QEMU in whom and what == KILL else vms
    places = chance.sample(range(among), min(among, whom.count(WORKER) or 1))
    blows = []
    for position, one in enumerate(whom):
        # A worker dies together with its own QEMU, two workers are those of two VMs.
        vm = places[position % len(places)] if one == WORKER else places[0]
        blows.append(Blow(what, one, vm if one in (WORKER, QEMU) else 0, _seconds(chance, what, one)))
    return tuple(blows)


def _seconds(chance: random.Random, what: str, whom: str) -> float:
    if what == STOP:
        return round(chance.uniform(SHORTEST_STOP, LONGEST_STOP), 3)
    return round(chance.uniform(0.0, LONGEST_ABSENCE), 3) if whom == BROKER else 0.0
