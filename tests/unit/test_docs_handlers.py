# SPDX-License-Identifier: Apache-2.0
"""docs/handlers-shipped.md against the code: every row of the table, what QEMU is told, and the figures in the text."""

from __future__ import annotations

from pathlib import Path

import vmloop
from vmloop.common.definition import Definition, HandlersSection
from vmloop.worker.handlers import crash, dump, power
from vmloop.worker.handlers.shipped import ELSEWHERE, TABLE

TEXT = (Path(vmloop.__file__).parent / "docs" / "handlers-shipped.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The rows of the table under a heading, without their backquotes in the first two cells."""
    _, found, rest = TEXT.partition(f"\n## {heading}\n")
    assert found, heading
    lines = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def test_every_event_is_documented_with_its_handler_and_no_other() -> None:
    documented = [(event.strip("`"), handler.strip("`")) for event, handler, _, _ in rows("What each event leads to")]
    assert documented == [(event, function.__name__) for event, function in TABLE] + list(ELSEWHERE.items())


def test_every_action_is_documented_and_no_other() -> None:
    documented = {action.strip("`") for action, _ in rows("What QEMU is told before the guest starts")}
    wanted = power.wanted_actions(Definition("x", handlers=HandlersSection(on_poweroff="restart", on_watchdog="dump")))
    assert documented == {f"{action}={value}" for action, value in wanted.items()}


def test_the_figures_are_those_of_the_code() -> None:
    assert f"restarted {power.MAX_RESTARTS} times within {power.RESTART_SPAN:g} seconds" in TEXT
    assert f"The newest {dump.KEEP} are kept" in TEXT
    assert f"for {crash.DUMP_SECONDS / 3600:g} hours at most" in TEXT
