# SPDX-License-Identifier: Apache-2.0
"""Rules about commands: each has one outcome, which a fault excuses unless it is a result, and which agrees with its VM's marks. Pure.

result                              the command left exactly one mark
an error that says "not done"       it left none
deadline, outcome-unknown           none or one, and only where a fault excuses that nobody knows
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Final

import msgspec

from .excuses import EDGE, Excuses
from .recording import NO_ANSWER, RESULT, Account, Command, Life, Recording
from .violation import Violation

UNSURE: Final = frozenset({"deadline", "outcome-unknown", NO_ANSWER})
# Nothing that the clients of this test say can rightly be answered so.
NONSENSE: Final = frozenset(
    {"bad-request", "no-such-vm", "vm-exists", "config-error", "internal", "too-large", "denied", "agent-error"}
)
# Whoever is asked for its agent in this test has been defined with one.
NO_PORT: Final = "has no port for a guest agent"
# Of one with a key: its time was over while there was nobody to ask.
WENT_AWAY: Final = "the broker went away before it answered"
# A broker that ends in order says so to who still asks; the bounds of requests are far above what this test sends.
GOING_DOWN: Final = "the broker is going down"
# What a real QEMU answers to a mark that it has been given before.
ALREADY_THERE: Final = "attempt to add duplicate property"
# After the answer to `kill` or `stop` the test's own look at the process may be so much later.
SEEN_WITHIN: Final = 1.0  # seconds


def wrong_answers(recording: Recording, excuses: Excuses) -> Iterator[Violation]:
    lives: dict[str, list[Life]] = defaultdict(list)
    for life in recording.lives:
        lives[life.vm].append(life)
    first: dict[str, float] = {}
    for command in recording.commands:
        first[command.mark] = min(command.began, first.get(command.mark, command.began))
    for command in recording.commands:
        # One that is sent again with its key gets the first one's answer, and what excused that.
        since = first[command.mark] if command.mark else command.began
        yield from _wrong_outcome(msgspec.structs.replace(command, began=since), excuses, lives[command.vm])
        yield from _wrong_deed(command, lives[command.vm])
    yield from _lost_with_no_worker(recording, excuses)
    yield from _refused_for_what_it_did(recording, lives, excuses)
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
    elif not _has_cause(command, excuses):
        yield Violation("error without a cause", command.vm, f"{what}, and no fault excuses it")


def _refused(command: Command) -> bool:
    """QEMU refuses no mark and no question; that it was not negotiated with, or has no agent, is nothing that a client should ever hear."""
    plain = command.op.startswith("qmp ") and ALREADY_THERE not in command.text
    refused = command.outcome == "qmp-error" and (plain or "capabilities negotiation" in command.text)
    return refused or NO_PORT in command.text


def _may_be_unsure(command: Command, excuses: Excuses) -> bool:
    during = command.began, command.ended
    if command.outcome == NO_ANSWER:  # a client that knows nothing of lost connections
        return not command.keyed and excuses.broker_died(*during)
    if command.outcome == "deadline":
        stood_still = command.op.startswith("agent") and excuses.guest_stood_still(command.vm, *during)
        return stood_still or excuses.qemu_touched(command.vm, *during)
    return not command.reading and (
        excuses.qemu_ended(command.vm, *during)
        or excuses.connection_lost(command.vm, *during)
        or (not command.keyed and excuses.broker_died(*during))
        or (WENT_AWAY in command.text and excuses.broker_away(command.ended))
    )


def _has_cause(command: Command, excuses: Excuses) -> bool:
    """Whether what an error says was brought about by something that really happened."""
    vm, during = command.vm, (command.began, command.ended)
    match command.outcome:
        case "worker-lost":
            return excuses.worker_died(vm, *during)
        case "monitor-lost":
            return excuses.qemu_touched(vm, *during) or excuses.unconnected(vm, *during)
        case "agent-absent" | "agent-unresponsive":
            return command.op.startswith("agent") and excuses.agent_not_there(vm, *during)
        case "launch-failed":
            cut_short = excuses.worker_died(vm, *during) or excuses.qemu_ended(vm, *during)
            return command.op == "start" and cut_short
        case "busy":
            return GOING_DOWN in command.text
        case "already-running":
            return command.op == "start"
        case _:
            return True


def _lost_with_no_worker(recording: Recording, excuses: Excuses) -> Iterator[Violation]:
    """`worker-lost` is for the one command of which a dying worker had sent a part: one on the monitor's wire, one on the agent's."""
    lost: dict[tuple[str, bool], dict[str, Command]] = defaultdict(dict)
    for number, command in enumerate(recording.commands):
        if command.outcome == "worker-lost":  # one that is sent again with its key gets the first one's answer again
            wire = lost[command.vm, command.op.startswith("agent")]
            wire.setdefault(command.mark or str(number), command)
    for (vm, _), commands in lost.items():
        used: set[float] = set()
        for command in sorted(commands.values(), key=lambda command: command.ended):
            deaths = excuses.worker_deaths(vm, command.began, command.ended)
            death = next((at for at in deaths if at not in used), None)
            if death is not None:
                used.add(death)
            elif deaths:
                yield Violation(
                    "lost more than was cut", vm, f"{_describe(command)}: another one was lost with that worker"
                )


def _refused_for_what_it_did(
    recording: Recording, lives: dict[str, list[Life]], excuses: Excuses
) -> Iterator[Violation]:
    """A `start` is told that the VM runs already, a `stop` or `kill` that it does not, and nobody else has brought that about."""
    starts = [command for command in recording.commands if command.op == "start"]
    ends = [command for command in recording.commands if command.op in ("stop", "kill")]
    for vm, of_vm in lives.items():
        for life in of_vm:
            yield from _nobodys(vm, [one for one in starts if one.vm == vm and _about(one, life.born)], life)
            if life.gone is not None and not excuses.fault_killed(life):
                yield from _nobodys(vm, [one for one in ends if one.vm == vm and _about(one, life.gone)], life)
    for command in starts:
        if command.outcome == "already-running" and not any(_alive_in(life, command) for life in lives[command.vm]):
            yield Violation("error without a cause", command.vm, f"{_describe(command)}, but nothing ran")


def _nobodys(vm: str, commands: list[Command], life: Life) -> Iterator[Violation]:
    """Of those that may have begun or ended a process one must have been told that it did, or that nobody knows."""
    if commands and all(command.outcome in ("already-running", "not-running") for command in commands):
        what = " and ".join(map(_describe, commands))
        yield Violation(
            "said not done, done", vm, f"{what}, but process {life.pid} lived from {life.born:.3f} to {life.gone}"
        )


def _about(command: Command, at: float) -> bool:
    """The command may have brought about what was seen then."""
    return command.began <= at <= command.ended + EDGE


def _alive_in(life: Life, command: Command) -> bool:
    return life.born <= command.ended + EDGE and (life.gone is None or life.gone >= command.began - EDGE)


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
    partial: dict[str, list[Account]] = defaultdict(list)
    for account in recording.accounts:
        counts[account.vm].update(account.marks)
        if not account.whole:
            partial[account.vm].append(account)
    marked: dict[tuple[str, str], list[Command]] = defaultdict(list)
    for command in recording.commands:
        if command.mark:
            marked[command.vm, command.mark].append(command)
    for (vm, mark), commands in marked.items():
        # A real QEMU forgets its marks when it ends: only those that a process was given whose marks were read can be counted.
        known = vm not in partial or _asked_for(partial[vm], lives[vm], commands)
        yield from _wrong_count(vm, commands, counts[vm][mark] if known else None)


def _asked_for(accounts: list[Account], lives: list[Life], commands: list[Command]) -> bool:
    """All of the commands were given to the newest process, and its marks have been read after them."""
    newest = max(lives, key=lambda life: life.born, default=None)
    return newest is not None and any(
        account.asked and account.pid == newest.pid and all(command.began > newest.born for command in commands)
        for account in accounts
    )


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
    elif count == 1 and not any(map(_may_have_been_done, commands)):
        yield Violation("said not done, done", vm, f"{what}: one mark")


def _may_have_been_done(command: Command) -> bool:
    """A silent agent may have been given the command before: the error says whether."""
    return command.outcome in {RESULT, *UNSURE} or (command.outcome == "agent-unresponsive" and command.sent is True)


def _describe(command: Command) -> str:
    key = "" if command.keyed or command.reading else ", no key"
    text = f" ({command.text[:160]})" if command.text else ""
    return f"{command.op} {command.mark} of {command.client}{key}, {command.began:.3f} to {command.ended:.3f}: {command.outcome}{text}"
