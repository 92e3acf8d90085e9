# SPDX-License-Identifier: Apache-2.0
"""Settings: defaults, the shipped sample, limits."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec
import pytest

import vmloop
from vmloop.common.config import parse_toml
from vmloop.common.errors import ConfigError
from vmloop.common.settings import Settings, read_settings

SAMPLE = Path(vmloop.__file__).parent / "deploy" / "vmloop.toml"


def keys(table: dict[str, object], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for key, value in table.items():
        found |= keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
    return found


def test_no_file_means_the_defaults(tmp_path: Path) -> None:
    assert read_settings(tmp_path / "vmloop.toml") == Settings()
    assert read_settings(tmp_path / "no-such-directory" / "vmloop.toml") == Settings()


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "vmloop.toml").touch()
    assert read_settings(tmp_path / "vmloop.toml") == Settings()


@pytest.mark.parametrize("name", [".", "x" * 300], ids=["a directory", "a name too long"])
def test_a_file_that_cannot_be_read_is_an_error_and_not_the_defaults(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_settings(tmp_path / name)


def test_the_shipped_sample_is_the_defaults() -> None:
    assert read_settings(SAMPLE) == Settings()


def test_the_shipped_sample_covers_every_field() -> None:
    shipped = keys(tomllib.loads(SAMPLE.read_text()))
    assert shipped == keys(msgspec.to_builtins(Settings()))


def test_every_key_of_the_sample_has_a_comment_above_or_above_its_group() -> None:
    lines = SAMPLE.read_text().splitlines()
    for number, line in enumerate(lines):
        if " = " in line and not line.startswith("#"):
            block = lines[: number + 1]
            start = max((at for at, text in enumerate(block) if not text), default=0)
            assert any(text.startswith("#") for text in block[start:]), f"{line} has no comment"


@pytest.mark.parametrize(
    "text",
    [
        "[broker]\ndrain = 0",
        "[broker]\ndrain = -1.0",
        "[broker]\ndrain = nan",
        "[broker]\ndrain = inf",
        "[broker]\ndrain = 86401",
        "[broker]\nrequests_per_vm = 0",
        "[broker]\nrequests_per_vm = 1.5",
        "[worker]\nmax_reply = 1",
        "[worker]\nmax_reply = 2000000000",
        '[log]\nlevel = "INFO"',
        '[log]\nlevel = "infos"',
        "[brokr]\ndrain = 1",
    ],
)
def test_values_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_toml(text.encode(), Settings, "x")


def test_settings_cannot_be_changed_once_read() -> None:
    with pytest.raises(AttributeError):
        Settings().broker.drain = 1.0  # type: ignore[misc]
