# SPDX-License-Identifier: Apache-2.0
"""Arguments of `vmloop qmp`, and text that is shown."""

from __future__ import annotations

from typing import Any

import click
import pytest

from vmloop.client.cli.monitor import parse_arguments
from vmloop.client.cli.output import Output, printable, to_json


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ((), {}),
        (("a=1", "b=text", "c=true", "d=null", "e=1.5"), {"a": 1, "b": "text", "c": True, "d": None, "e": 1.5}),
        (("a=[1, 2]", 'b={"x": 1}', 'c="1"'), {"a": [1, 2], "b": {"x": 1}, "c": "1"}),
        (("backend.type=file", "backend.data.out=/x"), {"backend": {"type": "file", "data": {"out": "/x"}}}),
        (("a=", "b=x=y", "c=NaN", "d=Infinity", "e=01"), {"a": "", "b": "x=y", "c": "NaN", "d": "Infinity", "e": "01"}),
        (("node-name=d0", "x_y=on"), {"node-name": "d0", "x_y": "on"}),
        (('{"a": {"b": [1]}}',), {"a": {"b": [1]}}),
        ((' {"a": 1}',), {"a": 1}),
    ],
)
def test_key_value_words_and_json(words: tuple[str, ...], arguments: dict[str, Any]) -> None:
    assert parse_arguments(words) == arguments


@pytest.mark.parametrize(
    "words",
    [("a",), ("=1",), ("a..b=1",), (".a=1",), ("a=1", "a=2"), ("a=1", "a.b=2"), ("a.b=2", "a=1"), ("{",), ("{} x",)],
)
def test_what_is_neither_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(click.UsageError):
        parse_arguments(words)


def test_control_characters_never_reach_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\x9b\ud800\tc\r\nd") == "a\\x1b[2Jb\\x07\\x9b\\xd800\tc\nd"
    assert printable("Grüße\n") == "Grüße\n"


def test_json_of_anything_from_the_wire() -> None:
    assert to_json({"b": b"\xffx", "u": "ü"}) == '{"b": "\\\\xffx", "u": "ü"}'


def test_plain_columns_are_aligned_and_without_tabs(capsys: pytest.CaptureFixture[str]) -> None:
    Output(False).table(("name", "state"), [("a", "running"), ("longer-name", ""), ("x\ty\x1b", "z")])
    assert capsys.readouterr().out == "NAME         STATE\na            running\nlonger-name  -\nx\\ty\\x1b     z\n"


def test_facts_of_several_lines_are_indented(capsys: pytest.CaptureFixture[str]) -> None:
    Output(False).facts({"a": "1", "text": "one\ntwo\n"})
    assert capsys.readouterr().out == "a: 1\ntext: one\n  two\n"
