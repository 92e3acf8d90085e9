# SPDX-License-Identifier: Apache-2.0
"""QEMU's command line as text: shell quoting, options and their values, properties as key=value and as JSON."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.client.libvirt.argv import Option, Properties, options_of, parse_command_line, properties_of
from vmloop.common.errors import ConfigError

words = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
keys = st.from_regex(r"[a-z][a-z0-9.-]{0,9}", fullmatch=True)


@given(st.lists(words.filter(lambda word: not word.startswith("-")), max_size=8))
def test_whatever_the_shell_would_quote_comes_back_as_it_was(values: list[str]) -> None:
    argv = ["/usr/bin/qemu", *(word for value in values for word in ("-append", value))]
    line = parse_command_line(f"LC_ALL=C X={shlex.quote('a b')} {shlex.join(argv)}")
    assert line.environment == {"LC_ALL": "C", "X": "a b"}
    assert line.binary == "/usr/bin/qemu"
    assert line.options == [Option("-append", value) for value in values]


@given(st.dictionaries(keys, words | st.none(), min_size=1), st.booleans())
def test_key_values_come_back_as_they_were_with_any_commas(values: dict[str, str | None], implied: bool) -> None:
    first = next(iter(values))
    if (
        implied
        and values[first] is not None
        and "=" not in str(values[first])
        and not str(values[first]).startswith("{")
    ):
        values = {
            "driver": values[first],
            **{key: value for key, value in values.items() if key not in (first, "driver")},
        }
        properties = Properties(values, implied=True)
    else:
        values = {first: "v", **{key: value for key, value in values.items() if key != first}}
        properties = Properties(values)
    assert properties_of(Option("-device", properties.render())) == properties


@given(st.dictionaries(keys, st.recursive(st.none() | st.booleans() | words | st.integers(0, 2**63), st.lists)))
def test_properties_in_json_come_back_as_they_were(values: dict[str, object]) -> None:
    properties = Properties(values, is_json=True)
    assert properties_of(Option("-device", properties.render())) == properties


def test_an_options_value_may_begin_with_a_dash_and_a_flag_has_none() -> None:
    found = options_of(["-S", "-append", "-v quiet", "--nodefaults", "-m", "64", "disk.img"])
    assert found == [
        Option("-S"),
        Option("-append", "-v quiet"),
        Option("-nodefaults"),
        Option("-m", "64"),
        Option("disk.img"),
    ]


@pytest.mark.parametrize("text", ["", "A=b", "-m 64", "hello world", "qemu -m 64", "'unclosed", "  \n"])
def test_what_is_no_command_line_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="libvirt"):
        parse_command_line(text)


@pytest.mark.parametrize("value", ["{", '{"a":}', "{" + '"a":{' * 100_000])
def test_broken_json_in_an_option_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="not JSON"):
        properties_of(Option("-device", value))
