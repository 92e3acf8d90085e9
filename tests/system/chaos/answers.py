# SPDX-License-Identifier: Apache-2.0
"""Rules about commands: each has one outcome, a definite one unless a fault excuses it, and it agrees with the marks that its VM has. Pure.

result                              the command left exactly one mark
an error that says "not done"       it left none
deadline, outcome-unknown           none or one, and only where a fault excuses that nobody knows
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Final

from .excuses import EDGE, Excuses
from .recording import NO_ANSWER, RESULT, Command, Life, Recording
from .violation import Violation

UNSURE: Final = frozenset({"deadline", "outcome-unknown", NO_ANSWER})
# Nothing that the clients of this test say can rightly be answered so.
NONSENSE: Final = frozenset({"bad-request", "no-such-vm", "vm-exists", "config-error", "internal", "too-large"})
# Of several steps: the next worker goes by the VM's state, and may have to leave the outcome open (design, section 7).
SEVERAL_STEPS: Final = frozenset({"start", "stop", "kill", "pause", "resume"})
# What a real QEMU answers to a mark that it has been given before.
ALREADY_THERE: Final = "attempt to add duplicate property"
# After the answer to `kill` or `stop` the test's own look at the process may be so much later.
SEEN_WITHIN: Final = 1.0  # seconds


def wrong_answers(recording: Recording, excuses: Excuses) -> Iterator[Violation]:
    lives: dict[str, list[Life]] = defaultdict(list)
    for life in recording.lives:
        lives[life.vm].append(life)
    for command in recording.commands:
        yield from _wrong_outcome(command, excuses, lives[command.vm])
        yield from _wrong_deed(command, lives[command.vm])
    yield from _wrong_marks(recording, lives)


def _wrong_outcome(command: Command, excuses: Excuses, lives: list[Life]) -> Iterator[Violation]:
    what = _describe(command)
    if command.answers > 1:
        yield Violation("answered twice", command.vm, f"{what}: {command.answers} answers")
    if command.outcome in NONSENSE or _refused(command):
        yield Violation("nonsense answer", command.vm, what)
    elif command.outcome in UNSURE and not _may_be_unsure(command, excuses):
        yield Violation("no definite outcome", command.vm, f"{what}, and no fault excuses it")
    elif command.outcome == "monitor-frozen" and not excuses.qemu_stopped(command.vm, command.began, command.ended):
        yield Violation("said frozen, was not", command.vm, what)
    elif command.outcome == "no-broker" and not excuses.broker_away(command.ended):
        yield Violation("said no broker, there is one", command.vm, what)
    elif command.outcome == "not-running" and _lived_through(lives, command):
        yield Violation("said gone, lives", command.vm, what)


def _refused(command: Command) -> bool:
    """QEMU refuses no mark and no question; and that it has not been negotiated with is nothing that a client should ever hear."""
    plain = command.op.startswith("qmp ") and ALREADY_THERE not in command.text
    return command.outcome == "qmp-error" and (plain or "capabilities negotiation" in command.text)


def _may_be_unsure(command: Command, excuses: Excuses) -> bool:
    during = command.began, command.ended
    if command.outcome == NO_ANSWER:  # a client that knows nothing of lost connections
        return not command.keyed and excuses.broker_died(*during)
    if excuses.qemu_touched(command.vm, *during):
        return command.outcome == "deadline" or not command.reading
    if command.op.startswith("agent") and excuses.guest_stood_still(command.vm, *during):
        return command.outcome == "deadline"
    if command.reading or command.outcome == "deadline":
        return False
    return (
        excuses.connection_lost(command.vm, *during)
        or (not command.keyed and excuses.broker_died(*during))
        or (command.op in SEVERAL_STEPS and excuses.worker_died(command.vm, *during))
    )


def _lived_through(lives: list[Life], command: Command) -> bool:
    return any(
        life.born < command.began - EDGE and (life.gone is None or life.gone > command.ended + EDGE) for life in lives
    )


def _wrong_deed(command: Command, lives: list[Life]) -> Iterator[Violation]:
    """What `kill`, `stop` and `start` say that they did is what the kernel saw."""
    if command.outcome != RESULT:
        return
    if command.op in ("kill", "stop"):
        for life in lives:
            stays = life.gone is None or life.gone > command.ended + SEEN_WITHIN
            if life.born < command.began and stays:
                yield Violation("said done, not done", command.vm, f"{_describe(command)}: process {life.pid} lives on")
    elif command.op == "start" and not any(
        command.began - EDGE < life.born < command.ended + SEEN_WITHIN for life in lives
    ):
        yield Violation("said done, not done", command.vm, f"{_describe(command)}: no process was seen")


def _wrong_marks(recording: Recording, lives: dict[str, list[Life]]) -> Iterator[Violation]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    partial = {account.vm for account in recording.accounts if not account.whole}
    for account in recording.accounts:
        counts[account.vm].update(account.marks)
    marked: dict[tuple[str, str], list[Command]] = defaultdict(list)
    for command in recording.commands:
        if command.mark:
            marked[command.vm, command.mark].append(command)
    for (vm, mark), commands in marked.items():
        # A real QEMU forgets its marks when it ends: only those that its newest process was given can be counted.
        known = vm not in partial or _within_newest(lives[vm], commands)
        yield from _wrong_count(vm, commands, counts[vm][mark] if known else None)


def _within_newest(lives: list[Life], commands: list[Command]) -> bool:
    newest = max(lives, key=lambda life: life.born, default=None)
    return newest is not None and newest.gone is None and all(command.began > newest.born for command in commands)


def _wrong_count(vm: str, commands: list[Command], count: int | None) -> Iterator[Violation]:
    what = " and ".join(map(_describe, commands))
    outcomes = {command.outcome for command in commands}
    if any(ALREADY_THERE in command.text for command in commands):
        yield Violation("done twice", vm, what)
    elif count is None:
        return
    elif count > 1:
        yield Violation("done twice", vm, f"{what}: {count} marks")
    elif RESULT in outcomes and count == 0:
        yield Violation("said done, not done", vm, f"{what}: no mark")
    elif count == 1 and not outcomes & {RESULT, *UNSURE}:
        yield Violation("said not done, done", vm, f"{what}: one mark")


def _describe(command: Command) -> str:
    key = "" if command.keyed or command.reading else ", no key"
    text = f" ({command.text[:160]})" if command.text else ""
    return f"{command.op} {command.mark} of {command.client}{key}, {command.began:.3f} to {command.ended:.3f}: {command.outcome}{text}"
