# SPDX-License-Identifier: Apache-2.0
"""docs/*.md against the code: figures in the tables of docs/architecture.md, and every file and note that a document names."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import msgspec
import pytest

import vmloop
from vmloop.common.definition import Definition
from vmloop.common.settings import Settings

ROOT = Path(vmloop.__file__).parent
DOCS = ROOT / "docs"
ARCHITECTURE = (DOCS / "architecture.md").read_text()

DOCUMENTS = sorted([*DOCS.glob("*.md"), *(DOCS / "decisions").glob("*.md")])
UNITS = {"": 1, "s": 1, "ms": 1, "KiB": 1 << 10, "MiB": 1 << 20}

# | `module.CONSTANT` | 16 MiB | …     or     | `[section] key` | 10 s | …
FIGURES = re.findall(r"^\| `([\w.]+\.[A-Z_]+|\[\w+\] \w+)` \| ([\d.]+) ?(s|ms|KiB|MiB|) \|", ARCHITECTURE, re.MULTILINE)

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)


def value_of(name: str) -> float:
    """What the code has under a name as it stands in the table; [section] key is of the settings, or of a definition."""
    if name.startswith("["):
        section, key = name[1:].split("] ")
        defaults = msgspec.to_builtins(Settings()) | msgspec.to_builtins(Definition("any"))
        return float(defaults[section][key])
    module, _, constant = name.rpartition(".")
    return float(getattr(importlib.import_module(f"vmloop.{module}"), constant))


@pytest.mark.parametrize(("name", "number", "unit"), FIGURES, ids=[name for name, _, _ in FIGURES])
def test_a_figure_in_the_architecture_is_the_codes(name: str, number: str, unit: str) -> None:
    assert value_of(name) == float(number) * UNITS[unit]


def test_every_row_of_the_tables_of_figures_is_read() -> None:
    tables = ARCHITECTURE.partition("## What is bounded")[2].partition("## What is not there yet")[0]
    assert len(re.findall(r"^\| `", tables, re.MULTILINE)) == len(FIGURES)


@every_document
def test_every_file_that_a_document_names_is_there(document: Path) -> None:
    named = re.findall(r"`((?:common|broker|worker|client|tests|deploy|docs)/[\w/.-]+\.\w+)`", document.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@every_document
def test_every_link_of_a_document_leads_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (document.parent / target).exists()] == []


def test_every_decision_is_in_the_list_and_numbered_once() -> None:
    notes = sorted(path.name for path in (DOCS / "decisions").glob("[0-9]*.md"))
    listed = re.findall(r"\]\((\d{4}-[\w-]+\.md)\)", (DOCS / "decisions" / "README.md").read_text())
    assert listed == notes
    numbers = [name[:4] for name in notes]
    assert len(numbers) == len(set(numbers))
