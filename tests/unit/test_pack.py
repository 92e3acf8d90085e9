# SPDX-License-Identifier: Apache-2.0
"""msgpack bodies: plain values survive, and no bytes raise anything but BadRequest."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.common.errors import BadRequest
from vmloop.common.pack import pack, unpack, unpack_map

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | TEXT
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


def nested(depth: int, innermost: Any = None) -> Any:
    value = innermost
    for _ in range(depth):
        value = [value]
    return value


@given(PLAIN)
def test_plain_values_come_back(value: Any) -> None:
    assert unpack(pack(value)) == value


@given(st.binary(max_size=200))
def test_garbage_is_a_value_or_a_bad_request(body: bytes) -> None:
    for read in (unpack, unpack_map):
        try:
            read(body)
        except BadRequest as error:
            assert "msgpack" in str(error)


@given(PLAIN, st.data())
def test_a_body_cut_short_or_with_more_behind_it_is_refused(value: Any, data: st.DataObject) -> None:
    body = pack(value)
    cut = data.draw(st.integers(0, len(body) - 1))
    if cut:
        with pytest.raises(BadRequest):
            unpack(body[:cut])
    with pytest.raises(BadRequest):
        unpack(body + b"\xc0")


def test_no_body_is_nothing() -> None:
    assert unpack(b"") is None
    assert unpack_map(b"") == {}
    assert unpack_map(pack(None)) == {}


def test_a_memoryview_will_do() -> None:
    assert unpack(memoryview(pack([1, 2]))) == [1, 2]


@pytest.mark.parametrize("value", [[], 7, "text", b"bytes", True, {b"op": 1}])
def test_a_map_has_text_keys(value: object) -> None:
    with pytest.raises(BadRequest, match="map with text keys"):
        unpack_map(msgpack.packb(value))


@pytest.mark.parametrize("body", [b"\x81\x90\x01", b"\x81\xd6\xff\x00\x00\x00\x01\x01"], ids=["list", "timestamp"])
def test_a_map_with_a_key_that_cannot_be_one_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest):
        unpack(body)


@pytest.mark.parametrize(
    "body",
    [
        b"\xc1",  # never used
        b"\xdd\xff\xff\xff\xff",  # an array of four thousand million, and nothing in it
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xa1\xff",  # text that is no UTF-8
        b"\xc7\x03\xffabc",  # a timestamp of three bytes
        b"\xc7\x0c\xff" + b"\xff" * 12,  # a timestamp with too many nanoseconds
    ],
)
def test_known_traps_are_bad_requests(body: bytes) -> None:
    with pytest.raises(BadRequest):
        unpack(body)


@pytest.mark.parametrize("depth", [2_000, 100_000])
@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1k"], ids=["list", "map"])
def test_deep_nesting_is_refused(depth: int, opening: bytes) -> None:
    with pytest.raises(BadRequest):
        unpack(opening * depth + b"\xc0")


def test_reasonable_nesting_goes_both_ways() -> None:
    assert unpack(pack(nested(400))) == nested(400)


def test_integers_of_64_bits_stay_integers() -> None:
    for value in (-(1 << 63), (1 << 64) - 1):
        assert unpack(pack(value)) == value
        assert isinstance(unpack(pack(value)), int)


@pytest.mark.parametrize(
    ("value", "becomes"),
    [
        (1 << 64, float(1 << 64)),
        (-(1 << 63) - 1, float(-(1 << 63))),
        (10**400, math.inf),
        (-(10**400), -math.inf),
        (10**5000, math.inf),  # str() refuses so many digits
    ],
    ids=["just over", "just under", "400 digits", "minus 400 digits", "5000 digits"],
)
def test_integers_beyond_64_bits_become_floats_wherever_they_are(value: int, becomes: float) -> None:
    assert unpack(pack(value)) == becomes
    assert unpack(pack({"a": [1, {"b": value}], "c": (value, "x"), "d": True})) == {
        "a": [1, {"b": becomes}],
        "c": [becomes, "x"],
        "d": True,
    }
