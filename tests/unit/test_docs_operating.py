# SPDX-License-Identifier: Apache-2.0
"""docs/operating.md against the code: settings, states, exit codes, error codes."""

from __future__ import annotations

import json
import re
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec
import pytest

import vmloop
from vmloop.broker.roster import WorkerState
from vmloop.client.cli.base import Exit
from vmloop.client.cli.main import FAMILY
from vmloop.client.cli.run import RunExit
from vmloop.common.definition import Definition
from vmloop.common.errors import type_of_code
from vmloop.common.paths import VmPaths
from vmloop.common.settings import Settings
from vmloop.common.states import AgentState, MonitorState, VmState
from vmloop.worker.handlers.migration import REASONS
from vmloop.worker.transitions import _OF_STATUS

ROOT = Path(vmloop.__file__).parent
OPERATING = (ROOT / "docs" / "operating.md").read_text()
CLI = (ROOT / "docs" / "cli.md").read_text()


def between(start: str, end: str) -> str:
    _, found, rest = OPERATING.partition(start)
    assert found, start
    return rest.partition(end)[0]


def rows(text: str) -> list[list[str]]:
    """The rows of a table without its heading, the first cell without its backquotes."""
    lines = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip().strip("`") for cell in line] for line in lines]


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def test_every_setting_is_documented_with_its_default_and_no_other() -> None:
    _, *table = rows(between("## Settings", "## Definitions"))
    documented = {key: json.loads(default) for key, default, _ in table}
    assert documented == flat(msgspec.to_builtins(Settings()))
    assert len(table) == len(documented)


def test_every_key_of_a_definition_is_documented_with_its_default_and_no_other() -> None:
    _, *table = rows(between("## Definitions", "## Handlers and hooks"))
    documented = {key: json.loads(default) for key, default, _ in table if default != "required"}
    keys = flat(msgspec.to_builtins(Definition("any")))
    assert [row[0] for row in table] == list(keys)
    assert documented == {key: value for key, value in keys.items() if key != "name"}


def test_every_file_of_a_vm_is_in_the_table() -> None:
    paths = VmPaths(Path("run"), Path("state"))
    files = [value for name in vars(VmPaths) if isinstance(value := getattr(paths, name), Path) and value.parent.name]
    named = between("## Directories and files", "## Settings")
    missing = {
        file.name
        for file in (*files, paths.carry(0), paths.carry(1), paths.agent_carry(0), paths.agent_carry(1))
        if f"{file.name}`" not in named
    }
    assert missing == set()


@pytest.mark.parametrize(
    ("start", "end", "states"),
    [
        ("**STATE** of the VM:", "**MONITOR**:", VmState),
        ("**MONITOR**:", "**AGENT**,", MonitorState),
        ("**AGENT**,", "**WORKER**:", AgentState),
        ("**WORKER**:", "## The logs", WorkerState),
    ],
    ids=["VM", "monitor", "agent", "worker"],
)
def test_every_state_is_documented_and_no_other(start: str, end: str, states: type[Enum]) -> None:
    _, *table = rows(between(start, end))
    assert [row[0] for row in table] == [state.value for state in states]


def test_the_reasons_of_query_status_and_of_migrations_are_documented() -> None:
    _, *table = rows(between("**STATE** of the VM:", "**MONITOR**:"))
    documented = {row[0]: set(row[1].split(", ")) for row in table}
    for move in _OF_STATUS.values():
        assert move.reason in documented[move.state.value]
    for reasons in REASONS.values():
        for state, reason in reasons.items():
            assert reason in documented[state.value]


def test_every_exit_code_is_documented_and_no_other() -> None:
    _, *table = rows(between("## Exit codes", "## Shell completion"))
    assert [int(row[0]) for row in table] == [int(code) for code in Exit]


def test_every_exit_code_of_run_is_documented_and_no_other() -> None:
    table = rows(CLI.partition("| exit code | the VM |")[2].partition("Where it is not 0")[0])
    assert [int(row[0]) for row in table] == [Exit.DONE, Exit.FAILED, *RunExit]
    named = between("`run` exits as its VM ended", "([cli.md]")
    assert [int(code) for code in re.findall(r"\b\d+\b", named)] == [Exit.DONE, Exit.FAILED, *RunExit]


def test_every_error_code_has_a_hint_and_no_other() -> None:
    _, *table = rows(between("## Troubleshooting by error code", "## Figures"))
    assert [row[0] for row in table] == list(type_of_code)


def test_every_command_in_the_text_is_one() -> None:
    named = set(
        re.findall(
            r"\bvmloop (?:--root \S+ )?([a-z][a-z-]*)",
            " ".join(re.findall(r"`[^`]+`|^    .*$", OPERATING, re.MULTILINE)),
        )
    )
    assert named <= set(FAMILY)


@pytest.mark.parametrize("command", list(FAMILY))
def test_every_command_is_in_the_reference(command: str) -> None:
    assert re.search(rf"`{command}[ `]", CLI), command
