# SPDX-License-Identifier: Apache-2.0
"""TOML into models: unknown keys with a suggestion, wrong types by the key's full name, and nothing but ConfigError."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.common.config import MAX_CONFIG_BYTES, MAX_KEY_PARTS, from_mapping, parse_toml, read_toml
from vmloop.common.definition import definition_from_toml
from vmloop.common.errors import ConfigError


class Inner(msgspec.Struct, frozen=True):
    height: int = 1


class Outer(msgspec.Struct, frozen=True):
    name: str
    width: float = 2.0
    inner: Inner = Inner()


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_toml(text.encode(), Outer, "x.toml")
    assert str(caught.value).startswith("x.toml: ")
    return str(caught.value)


def test_values_and_defaults() -> None:
    assert parse_toml(b'name = "a"\n[inner]\nheight = 3\n', Outer, "x") == Outer("a", 2.0, Inner(3))


def test_an_unknown_key_brings_the_nearest_known_one() -> None:
    assert refused('name = "a"\nwidht = 1.0') == "x.toml: unknown key 'widht'; did you mean 'width'?"


def test_an_unknown_key_in_a_section_is_named_in_full() -> None:
    assert "unknown key 'inner.heigth'; did you mean 'inner.height'?" in refused('name = "a"\n[inner]\nheigth = 1')


def test_an_unknown_key_like_none_brings_the_list() -> None:
    assert refused('name = "a"\nzzz = 1').endswith("unknown key 'zzz'; known: name, width, inner")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("name = 7", "$.name"),
        ('name = "a"\nwidth = "2"', "$.width"),
        ('name = "a"\nwidth = true', "$.width"),
        ('name = "a"\ninner = 1', "$.inner"),
        ('name = "a"\n[inner]\nheight = 1.5', "$.inner.height"),
        ("width = 1.0", "name"),
    ],
)
def test_a_wrong_type_or_a_missing_key_is_named(text: str, place: str) -> None:
    assert place in refused(text)


def test_a_whole_number_will_do_for_a_float() -> None:
    assert parse_toml(b'name = "a"\nwidth = 3', Outer, "x").width == 3.0


@pytest.mark.parametrize("text", ["name", 'name = "a', 'name = "a"\nname = "b"', "a = " + "[" * 5000])
def test_what_is_no_toml_is_said_to_be_none(text: str) -> None:
    assert "not TOML" in refused(text)


@given(st.binary(max_size=100))
def test_no_bytes_raise_anything_but_config_error(text: bytes) -> None:
    with pytest.raises(ConfigError):
        parse_toml(b"\xff" + text, Outer, "x")
    try:
        parse_toml(text, Outer, "x")
    except ConfigError:
        return


@given(st.recursive(st.none() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)))
def test_no_mapping_from_the_wire_raises_anything_but_config_error(data: object) -> None:
    for value in (data, {"name": "a", "inner": data}):
        try:
            from_mapping(value, Outer, "x")
        except ConfigError:
            continue


@pytest.mark.parametrize("data", [None, [], "text", 7])
def test_a_table_is_expected(data: object) -> None:
    with pytest.raises(ConfigError, match="table"):
        from_mapping(data, Outer, "x")


def test_an_unknown_key_of_any_type_or_length_is_refused_shortly() -> None:
    for key in (b"name", 7, "k" * 5_000_000):
        with pytest.raises(ConfigError, match="unknown key") as caught:
            from_mapping({"name": "a", key: 1}, Outer, "x")
        assert len(str(caught.value)) < 300


def test_a_file_is_read_and_named_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('name = "a"')
    assert read_toml(path, Outer) == Outer("a")
    path.write_text("nmae = 1")
    with pytest.raises(ConfigError, match=str(path)):
        read_toml(path, Outer)


def test_a_file_that_is_missing_or_a_directory_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match=f"cannot read {path}"):
            read_toml(path, Outer)


def test_a_huge_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(b"#" * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(ConfigError, match="over"):
        read_toml(path, Outer)


@pytest.mark.parametrize(
    "key", [b"a." * 400_000 + b"a = 1", b"[" + b"a . " * 200_000 + b"a]", b"x = {" + b'"a".' * 200_000 + b"a = 1}"]
)
def test_a_key_of_thousands_of_parts_is_refused_before_it_takes_minutes_to_read(key: bytes) -> None:
    with pytest.raises(ConfigError, match=f"more than {MAX_KEY_PARTS} parts"):
        definition_from_toml(b'name = "web1"\n' + key, "here")


def test_a_text_with_many_dots_is_no_key() -> None:
    text = "a." * 1000
    definition = definition_from_toml(f'name = "web1"\n[qemu]\nargs = ["{text}"]\n'.encode(), "here")
    assert definition.qemu.args == [text]


def test_a_number_of_thousands_of_digits_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="not TOML"):
        definition_from_toml(b"name = " + b"9" * 5000, "here")
