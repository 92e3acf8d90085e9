# SPDX-License-Identifier: Apache-2.0
"""`--set KEY=VALUE` and `--set KEY+=VALUE`: changes to the plain values of a definition, before it is checked. Used by run.py. Pure."""

from __future__ import annotations

import tomllib
from typing import Any

from ...common.config import MAX_KEY_PARTS, toml_values
from ...common.errors import ConfigError


def override(values: dict[str, Any], changes: tuple[str, ...]) -> None:
    """Make the changes in their order. `ConfigError` for what is none; whether a key means anything is checked with the definition.

    A value that is TOML is taken as such (`true`, `5`, `["-m", "1G"]`, `"5"`), anything else as text. `+=` adds to a list: a list its
    members, anything else itself.
    """
    for change in changes:
        key, equals, text = change.partition("=")
        adds = key.endswith("+")
        parts = key.removesuffix("+").strip().split(".")
        if not equals or not all(parts) or len(parts) > MAX_KEY_PARTS:
            raise ConfigError(f"--set {change!r:.80}: written KEY=VALUE or KEY+=VALUE, as in agent.enabled=true")
        _set(values, parts, _value(text), adds, f"--set {key}")


def _set(values: dict[str, Any], parts: list[str], value: Any, adds: bool, origin: str) -> None:
    table: Any = values
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{origin}: {part} is no table")
    if not adds:
        table[parts[-1]] = value
        return
    before = table.setdefault(parts[-1], [])
    if not isinstance(before, list):
        raise ConfigError(f"{origin}: {parts[-1]} is no list, so nothing can be added to it")
    table[parts[-1]] = [*before, *(value if isinstance(value, list) else [value])]


def _value(text: str) -> Any:
    try:
        return toml_values(b"value = " + text.encode(errors="surrogateescape"), "--set")["value"]
    except ConfigError as error:
        if not isinstance(error.__cause__, (tomllib.TOMLDecodeError, UnicodeDecodeError)):
            raise
        return text
