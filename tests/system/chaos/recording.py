# SPDX-License-Identifier: Apache-2.0
"""What is written down during a chaos run: plain values, without a socket or process in them. Written by all, judged by verdict.py.

Times are time.monotonic() in seconds, but for those of events, which are microseconds since 1970 as QEMU said them.
"""

from __future__ import annotations

from typing import Final

import msgspec

RESULT: Final = "result"  # the outcome of a command that was answered with one; others are error codes
NO_ANSWER: Final = "no-answer"  # nobody said anything, long after the deadline
THE_END: Final = "the end"  # the client that kills what still runs when everything has settled
STOP_SECONDS: Final = 3.0  # that a guest has for every `stop` of a run; then it is killed


class Injected(msgspec.Struct, frozen=True):
    """A fault that was injected. `whom`: broker, zygote, worker or qemu; `until`: when the stopped one went on."""

    at: float
    what: str  # kill or stop
    whom: str
    vm: str = ""
    until: float | None = None


class Command(msgspec.Struct, frozen=True):
    """One command and its one outcome."""

    client: str
    vm: str
    op: str
    began: float
    ended: float
    outcome: str
    text: str = ""  # of the error
    mark: str = ""
    keyed: bool = False
    reading: bool = False
    answers: int = 1  # how many came; only a raw client can see more than one
    sent: bool | None = None  # whether the error says that the guest's agent was given the command


class Told(msgspec.Struct, frozen=True):
    """An event as a reader got it. `data` is canonical JSON; `origin` qmp, agent or vmloop."""

    epoch: int
    seq: int
    event: str
    time: int
    data: str
    origin: str

    @property
    def cursor(self) -> tuple[int, int]:
        return self.epoch, self.seq


class Reading(msgspec.Struct, frozen=True):
    """What one reader got of one VM's stream. `since`: where it asked to begin, None for "from now on"."""

    reader: str
    vm: str
    since: tuple[int, int] | None
    events: list[Told]
    error: str = ""  # what ended it before its time
    until: tuple[int, int] | None = None  # the VM's newest event when it began to read; None: it read to the end of all


class Emission(msgspec.Struct, frozen=True):
    """An event as its VM says that it emitted it."""

    event: str
    time: int
    data: str


class Life(msgspec.Struct, frozen=True):
    """One QEMU process. `born` and `gone`: seen at; `epoch` 0 if not known.

    `seen`: when it was last seen alive; between that and `gone` it has ended. None: just then.
    """

    vm: str
    pid: int
    epoch: int
    born: float
    gone: float | None = None
    seen: float | None = None

    def surely_lived(self, at: float) -> bool:
        """Whether its end, if it has come, is later."""
        return self.gone is None or (self.gone if self.seen is None else self.seen) > at


class Account(msgspec.Struct, frozen=True):
    """What one run of a VM says of itself. `whole`: from its first event on; else only the span of its emissions is told.

    `asked`: `marks` are all that this run has been given; else they are not known.
    """

    vm: str
    pid: int
    emissions: list[Emission]
    marks: list[str]
    whole: bool = True
    asked: bool = True


class Claim(msgspec.Struct, frozen=True):
    """What `list` said of a VM: asked and answered when."""

    vm: str
    state: str
    epoch: int
    asked: float
    answered: float


class Recording(msgspec.Struct):
    """Everything of one run."""

    seed: int
    vms: list[str] = []
    began: float = 0.0
    ended: float = 0.0
    epoch: float = 0.0  # time.time() when time.monotonic() was 0: what an event's time is counted from
    faults: list[Injected] = []
    missed: int = 0  # faults whose victim was not there
    commands: list[Command] = []
    readings: list[Reading] = []
    accounts: list[Account] = []
    lives: list[Life] = []
    claims: list[Claim] = []
    zygotes: list[Life] = []  # `vm` is empty
    reopened: int = 0  # streams that ended with an error, and were opened again at their cursor
    leftovers: list[str] = []  # what was found after the end
    broken: list[str] = []  # what ended or raised without being told to: a broker, a thread of the test
