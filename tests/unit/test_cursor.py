# SPDX-License-Identifier: Apache-2.0
"""Cursors: written and read back, ordered as pairs, and nothing else accepted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.common.cursor import Cursor, parse_cursor
from vmloop.common.errors import BadRequest

CURSORS = st.builds(Cursor, st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1))


@given(CURSORS)
def test_a_cursor_reads_back(cursor: Cursor) -> None:
    assert parse_cursor(str(cursor)) == cursor


def test_it_is_written_epoch_dot_seq() -> None:
    assert str(Cursor(3, 17)) == "3.17"
    assert parse_cursor("3.17") == Cursor(epoch=3, seq=17)


def test_a_later_run_comes_after_every_event_of_an_earlier_one() -> None:
    assert Cursor(3, 0) < Cursor(3, 1) < Cursor(3, 10) < Cursor(4, 0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "3",
        "3.",
        ".17",
        "3.17.1",
        "-3.1",
        "3.-1",
        "3,17",
        " 3.17",
        "3.17\n",
        "+3.1",
        "3.1e2",
        "٣.١",
        "0x3.1",
        None,
        3.17,
        3,
        b"3.17",
        (3, 17),
        f"{1 << 32}.0",
        f"0.{1 << 64}",
        "99999999999.1",
        "1." + "9" * 21,
    ],
)
def test_anything_else_is_refused(text: object) -> None:
    with pytest.raises(BadRequest):
        parse_cursor(text)


@given(st.text(max_size=20) | st.integers() | st.binary(max_size=5))
def test_no_value_raises_anything_but_bad_request(text: object) -> None:
    try:
        parse_cursor(text)
    except BadRequest:
        return


def test_the_largest_of_the_header_is_the_largest_cursor() -> None:
    assert parse_cursor(f"{(1 << 32) - 1}.{(1 << 64) - 1}") == Cursor((1 << 32) - 1, (1 << 64) - 1)
