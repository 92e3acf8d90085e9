# SPDX-License-Identifier: Apache-2.0
"""What was recorded → what is wrong. Pure: no clock, no file, no process; tests/unit/test_chaos_*.py break each rule.

The rules stand in answers.py, streams.py and liveness.py; those about leftovers are here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from .answers import wrong_answers
from .excuses import Excuses
from .liveness import wrong_claims
from .plan import BROKER, KILL, ZYGOTE
from .recording import RESULT, THE_END, Recording
from .streams import STARTED, stream_of, wrong_streams
from .violation import Violation

# All of /proc is read to see that a zygote has ended, a few times a second.
SEEN_WITHIN: Final = 3.0  # seconds
WORKER_LOST: Final = "WORKER_LOST"


def judge(recording: Recording) -> list[Violation]:
    """Everything that is wrong, none if all promises were kept."""
    excuses = Excuses(recording)
    return [
        *_worthless(recording),
        *wrong_answers(recording, excuses),
        *wrong_streams(recording, excuses),
        *wrong_claims(recording),
        *_unasked_ends(recording),
        *_unasked_ends_of_workers(recording, excuses),
        *(Violation("left over", "", text) for text in recording.leftovers),
        *(Violation("broken", "", text) for text in recording.broken),
    ]


def _unasked_ends(recording: Recording) -> Iterator[Violation]:
    """A zygote that ended although no fault was meant for it. One whose broker is killed as soon as it has made it has nobody, and ends."""
    killed = [fault.at for fault in recording.faults if (fault.what, fault.whom) == (KILL, ZYGOTE)]
    brokers = [fault.at for fault in recording.faults if (fault.what, fault.whom) == (KILL, BROKER)]
    for life in recording.zygotes:
        if life.gone is None:
            continue
        began = life.gone - SEEN_WITHIN
        alone = life.born >= began and any(life.born - SEEN_WITHIN <= at <= life.gone for at in brokers)
        if not alone and not any(began <= at <= life.gone for at in killed):
            near = [fault for fault in recording.faults if life.gone - SEEN_WITHIN <= fault.at <= life.gone]
            told = ", ".join(f"{fault.what} {fault.whom} {fault.vm}".strip() for fault in near) or "nothing"
            text = f"zygote {life.pid} ended at {life.gone:.3f}; in the {SEEN_WITHIN:g} s before: {told}"
            yield Violation("died unasked", "", text)


def _unasked_ends_of_workers(recording: Recording, excuses: Excuses) -> Iterator[Violation]:
    """A worker that was lost although no fault was meant for it since it, or one before it, began."""
    for vm in recording.vms:
        stream, _ = stream_of([reading for reading in recording.readings if reading.vm == vm])
        since = recording.began
        for told in stream.values():
            at = excuses.on_our_clock(told.time)
            if told.event == WORKER_LOST and not excuses.worker_touched(vm, since, at):
                yield Violation("died unasked", vm, f"a worker between {since:.3f} and {at:.3f}: {told.data}")
            if told.event == STARTED:
                since = at


def _worthless(recording: Recording) -> Iterator[Violation]:
    """A run in which nothing happened proves nothing."""
    for what, count in (
        ("fault", len(recording.faults)),
        ("command with a result", sum(command.outcome == "result" for command in recording.commands)),
        ("event", sum(len(reading.events) for reading in recording.readings)),
        ("claim of list", len(recording.claims)),
        ("QEMU", len(recording.lives)),
        ("account of a VM", len(recording.accounts)),
    ):
        if not count:
            yield Violation("worthless", "", f"not one {what} was recorded")
    yield from _unread_marks(recording)


def _unread_marks(recording: Recording) -> Iterator[Violation]:
    """A real QEMU that lived until the end of the run, and that was not asked for its marks: none of them is counted."""
    real = {account.vm for account in recording.accounts if not account.whole}
    asked = {(account.vm, account.pid) for account in recording.accounts if account.asked}
    killed = {command.vm for command in recording.commands if command.client == THE_END and command.outcome == RESULT}
    for vm in sorted(real & killed):
        newest = max((life for life in recording.lives if life.vm == vm), key=lambda life: life.born, default=None)
        if newest is not None and (vm, newest.pid) not in asked:
            yield Violation("worthless", vm, f"nobody read the marks of process {newest.pid}")
