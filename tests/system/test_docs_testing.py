# SPDX-License-Identifier: Apache-2.0
"""docs/testing.md against the code: its examples are run as they stand, its tables hold what there is."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

import vmloop
from vmloop.testing import plugin
from vmloop.testing.double import Double
from vmloop.testing.fake_vm import FakeVm
from vmloop.testing.handler_bench import HandlerBench

from ..contract.test_recorded_dialogue import QEMU_7_2

ROOT: Final = Path(vmloop.__file__).parent
DOCS: Final = (ROOT / "docs" / "testing.md").read_text()
EXAMPLES: Final = dict(re.findall(r"^```python file=(\S+)\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL))
RUN_SECONDS: Final = 100.0

TESTS: Final = [name for name in EXAMPLES if name.startswith("test_")]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, text in EXAMPLES.items():
        (tmp_path / name).write_text(text)
    shutil.copy(QEMU_7_2, tmp_path)
    return tmp_path


def run(directory: Path, *arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", TESTS)
def test_an_example_passes_as_it_stands(directory: Path, name: str) -> None:
    out = run(directory, "-m", "pytest", "-q", "-p", "no:cacheprovider", name)
    assert f"{EXAMPLES[name].count('def test_')} passed" in out


def test_the_example_without_pytest_says_what_happened(directory: Path) -> None:
    assert run(directory, "script.py") == "{'action': 'pause'}\n"


def test_every_block_of_python_is_an_example_that_is_run() -> None:
    assert DOCS.count("```python") == len(EXAMPLES)
    assert set(EXAMPLES) == {*TESTS, "mail.py", "script.py"}


def _public_of_bench() -> set[str]:
    with HandlerBench() as bench:
        return {name for name in dir(bench) if not name.startswith("_")} - {"close"}


def _has(kind: type, name: str) -> bool:
    return hasattr(kind, name) or f"self.{name}" in inspect.getsource(kind)


def test_every_fixture_and_every_method_is_in_the_tables() -> None:
    # What @pytest.fixture makes of a function: an object of a type of its own since pytest 8.4, before that a mark on it.
    fixtures = {
        name
        for name, value in vars(plugin).items()
        if type(value).__name__ == "FixtureFunctionDefinition" or hasattr(value, "_pytestfixturefunction")
    }
    assert set(re.findall(r"^\| `(\w+)` \|", DOCS, re.MULTILINE)) == fixtures
    public = {name for name in (*vars(Double), "vm") if not name.startswith("_")} - {"name", "finish", "close"}
    table = DOCS.partition("| of the bench |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`bench\.(\w+)", table)) == _public_of_bench()
    assert {name for name in re.findall(r"`bench\.vm\.(\w+)", table) if not _has(FakeVm, name)} == set()
    table = DOCS.partition("| of a simulated VM |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`vm\.(\w+)", table)) == public
