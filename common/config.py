# SPDX-License-Identifier: Apache-2.0
"""Reading TOML into typed models: unknown keys are refused with a suggestion, wrong types with the key's full name.

Used for etc/vmloop.toml (settings) and vm.toml (definition). Models are frozen msgspec structs.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import msgspec

from .errors import ConfigError

Model = TypeVar("Model", bound=msgspec.Struct)

# No settings file or definition of a sane person comes near this; it keeps a hostile one from filling memory.
MAX_CONFIG_BYTES = 1024 * 1024

# The deepest key that means anything has two. tomllib takes a time that grows with the square of their number: a minute for 64 KiB of dots.
MAX_KEY_PARTS = 32

# Looks for keys where they begin: at a line's start, in a table's head, in an inline table. Never goes over a byte twice (possessive).
_KEY_PART = rb"""(?:[A-Za-z0-9_-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+"""
_LONG_KEY = re.compile(rb"(?:^|[\[{,])[ \t]*+(?:%b\.[ \t]*+){%d}" % (_KEY_PART, MAX_KEY_PARTS), re.MULTILINE)

# So much of an unknown key is compared and shown; over the wire it may be megabytes long.
_SHOWN = 64


def read_toml(path: Path, model: type[Model]) -> Model:
    """The model in a file. `ConfigError` naming the file, the key and, for an unknown one, the nearest known key."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    return parse_toml(text, model, str(path))


def parse_toml(text: bytes, model: type[Model], origin: str) -> Model:
    """The model in TOML text; `origin` names the text in errors."""
    return from_mapping(toml_values(text, origin), model, origin)


def toml_values(text: bytes, origin: str) -> dict[str, Any]:
    """The plain values of TOML text. `ConfigError`."""
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{origin}: over {MAX_CONFIG_BYTES} bytes")
    if _LONG_KEY.search(text):
        raise ConfigError(f"{origin}: a key of more than {MAX_KEY_PARTS} parts")
    try:
        return tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:  # ValueError: no TOML, no UTF-8, or an integer of thousands of digits
        raise ConfigError(f"{origin}: not TOML: {error}") from error


def from_mapping(data: object, model: type[Model], origin: str) -> Model:
    """The model in plain values, as they come from TOML or over the wire."""
    if not isinstance(data, dict):
        raise ConfigError(f"{origin}: a table is expected")
    _refuse_unknown(data, model, origin, "")
    try:
        return msgspec.convert(data, model)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ConfigError(f"{origin}: {error}") from error


def _refuse_unknown(data: dict[str, Any], model: type[msgspec.Struct], origin: str, prefix: str) -> None:
    hints = get_type_hints(model)
    for key, value in data.items():
        if key not in model.__struct_fields__:
            text = str(key)[:_SHOWN]
            near = difflib.get_close_matches(text, model.__struct_fields__, n=1, cutoff=0.5)
            hint = f"; did you mean '{prefix}{near[0]}'?" if near else f"; known: {', '.join(model.__struct_fields__)}"
            raise ConfigError(f"{origin}: unknown key '{prefix}{text}'{hint}")
        inner = hints[key]
        if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            _refuse_unknown(value, inner, origin, f"{prefix}{key}.")
