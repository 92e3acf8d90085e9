# SPDX-License-Identifier: Apache-2.0
"""docs/capabilities.md against the code: every field of the document, and the figures in the text."""

from __future__ import annotations

import re
from pathlib import Path

import vmloop
from vmloop.common.capabilities import FORMAT, Capabilities, Shape
from vmloop.worker.probe import conversation, probing
from vmloop.worker.run_capabilities import EXPLAIN_SECONDS

TEXT = (Path(vmloop.__file__).parent / "docs" / "capabilities.md").read_text()


def test_every_field_of_the_document_is_described_and_no_other() -> None:
    cells = re.findall(r"^\| (`[^|]+`) \|", TEXT, re.MULTILINE)
    described = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(described) == sorted(set(Capabilities.__struct_fields__) - {"more"})


def test_every_field_of_a_shape_is_described() -> None:
    _, found, shape = TEXT.partition("A **shape** has")
    assert found
    assert [name for name in Shape.__struct_fields__ if f"`{name}`" not in shape.partition("\n\n")[0]] == []


def test_the_figures_are_those_of_the_code() -> None:
    assert f"| `format` | int | {FORMAT}. " in TEXT
    figures = (probing.PROBE_SECONDS, conversation.GREETING_SECONDS, conversation.COMMAND_SECONDS)
    assert "All of it has {:g} s, the greeting {:g} s, each answer {:g} s.".format(*figures) in TEXT
    assert f"for {EXPLAIN_SECONDS:g} s at most" in TEXT
