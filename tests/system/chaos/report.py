# SPDX-License-Identifier: Apache-2.0
"""The figures of a run, as lines and as JSON. Pure; printed by test_chaos.py and __main__.py."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

from .recording import NO_ANSWER, Recording
from .streams import LOST, is_marker, stream_of
from .violation import Violation

SHOWN: Final = 4  # violations of each rule that are told in full


def figures(recording: Recording, violations: list[Violation]) -> dict[str, Any]:
    """What is published of a run."""
    streams = [stream_of([reading for reading in recording.readings if reading.vm == vm])[0] for vm in recording.vms]
    events = [told for stream in streams for told in stream.values()]
    rules = Counter(violation.rule for violation in violations)
    answered = [command for command in recording.commands if command.outcome != NO_ANSWER]
    slowest = max(answered, key=lambda command: command.ended - command.began, default=None)
    return {
        "seed": recording.seed,
        "seconds": round(recording.ended - recording.began, 1),
        "vms": len(recording.vms),
        "faults": dict(sorted(Counter(f"{fault.what} {fault.whom}" for fault in recording.faults).items())),
        "faults_missed": recording.missed,
        "commands": dict(sorted(Counter(command.outcome for command in recording.commands).items())),
        "marks": sum(len(account.marks) for account in recording.accounts),
        "events": len(events),
        "events_read": sum(len(reading.events) for reading in recording.readings),
        "readers": len(recording.readings),
        "streams_reopened": recording.reopened,
        "marks_asked_of_real": sum(account.asked for account in recording.accounts if not account.whole),
        "emitted": sum(len(account.emissions) for account in recording.accounts),
        "gaps_told": sum(is_marker(told) for reading in recording.readings for told in reading.events),
        "events_lost_allowed": sum(told.event == LOST for told in events) - rules["events lost"],
        "lost": sum(rules[rule] for rule in ("emitted, never told", "events lost", "hole in the stream")),
        "doubled": sum(
            rules[rule] for rule in ("done twice", "told twice", "emitted once, told twice", "answered twice")
        ),
        "processes": len(recording.lives),
        "claims": len(recording.claims),
        "longest_without_answer": round(slowest.ended - slowest.began, 3) if slowest is not None else None,
        "longest_command": f"{slowest.op} of {slowest.vm}: {slowest.outcome}" if slowest is not None else None,
        "violations": dict(sorted(rules.items())),
    }


def lines(recording: Recording, violations: list[Violation]) -> list[str]:
    """One line for each figure, then what is wrong: the first few of each rule, the rarest rule first, for it is often the cause."""
    told = [f"{name.replace('_', ' ')}: {_shown(value)}" for name, value in figures(recording, violations).items()]
    for rule, count in reversed(Counter(violation.rule for violation in violations).most_common()):
        told += [f"  {violation}" for violation in violations if violation.rule == rule][:SHOWN]
        if count > SHOWN:
            told.append(f"  {rule}: … {count - SHOWN} more")
    return told


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items()) or "none"
    return str(value)
