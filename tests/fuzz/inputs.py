# SPDX-License-Identifier: Apache-2.0
"""Where a target's inputs come from: its seeds, what was kept of earlier finds, and hypothesis' mutations of both.

Used by tests/unit/test_fuzz.py and, where atheris is not installed, by one.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from hypothesis import strategies as st

from .table import Target

KEPT: Final = Path(__file__).parents[1] / "data" / "fuzz"  # TARGET/NAME: one input each, as it was found
MAX_EDITS: Final = 6  # of one seed

# What tells apart where a parser looks for structure.
_TOKENS: Final = (
    b"\xff",
    b"\0",
    b"\n",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b".",
    b",",
    b":",
    b"\x7f",
    b"\x80",
    b"\xc1",
    b"\xdd",
)


def known_inputs(target: Target) -> list[bytes]:
    """Every input that is known to be worth a try."""
    return [*target.seeds(), *(path.read_bytes() for path in sorted((KEPT / target.name).glob("*")))]


def any_input(target: Target) -> st.SearchStrategy[bytes]:
    """Any bytes, or a known input with some of it changed, doubled, cut out or put in."""
    position = st.integers(0, target.max_bytes)
    edit = st.tuples(
        st.sampled_from("xdci"), position, st.integers(0, 64), st.sampled_from(_TOKENS) | st.binary(max_size=16)
    )
    mutated = st.builds(_edited, st.sampled_from(known_inputs(target)), st.lists(edit, max_size=MAX_EDITS))
    return st.binary(max_size=min(target.max_bytes, 512)) | mutated


def _edited(data: bytes, edits: list[tuple[str, int, int, bytes]]) -> bytes:
    for what, place, length, fresh in edits:
        at = place % (len(data) + 1)
        if what == "x":  # in the place of as much
            data = data[:at] + fresh + data[at + len(fresh) :]
        elif what == "d":
            data = data[: at + length] + data[at:]
        elif what == "c":
            data = data[:at] + data[at + length :]
        else:
            data = data[:at] + fresh + data[at:]
    return data
