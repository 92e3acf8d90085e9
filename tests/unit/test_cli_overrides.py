# SPDX-License-Identifier: Apache-2.0
"""`--set`: what a word of the command line makes of a definition's values."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.client.cli.overrides import override
from vmloop.common.errors import ConfigError


def changed(values: dict[str, Any], *changes: str) -> dict[str, Any]:
    override(values, changes)
    return values


@pytest.mark.parametrize(
    ("change", "result"),
    [
        ("agent.enabled=true", {"agent": {"enabled": True}}),
        ("agent.timeout=2.5", {"agent": {"timeout": 2.5}}),
        ("name=web2", {"name": "web2"}),
        ('name="web2"', {"name": "web2"}),
        ("name=5", {"name": 5}),
        ("name=", {"name": ""}),
        ("qemu.args+=-S", {"qemu": {"args": ["-S"]}}),
        ('qemu.args+=["-m", "1G"]', {"qemu": {"args": ["-m", "1G"]}}),
        ("qemu.binary=/opt/q=1", {"qemu": {"binary": "/opt/q=1"}}),
        ("qemu.args=[broken", {"qemu": {"args": "[broken"}}),
    ],
)
def test_a_value_is_toml_where_it_can_be_and_else_text(change: str, result: dict[str, Any]) -> None:
    assert changed({}, change) == result


def test_adding_keeps_what_is_there_and_changes_hold_in_their_order() -> None:
    values = {"qemu": {"args": ["-a"]}}
    assert changed(values, "qemu.args+=-b", 'qemu.args+=["-c"]')["qemu"]["args"] == ["-a", "-b", "-c"]
    assert changed(values, "qemu.args=[]", "qemu.args+=-d")["qemu"]["args"] == ["-d"]


@pytest.mark.parametrize("change", ["agent", "=1", ".a=1", "a..b=1", "name.x=1", "name+=x", "a." * 40 + "b=1"])
def test_what_cannot_be_set_is_refused(change: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        override({"name": "web1"}, (change,))


@given(st.text())
def test_any_word_is_a_change_or_a_config_error(change: str) -> None:
    try:
        override({"name": "web1", "qemu": {"args": []}}, (change,))
    except ConfigError:
        return
    assert "=" in change
