# SPDX-License-Identifier: Apache-2.0
"""Reading what QEMU says, where nothing can be taken for granted: any member may be missing, of another type, or far too long. Pure.

Used by the shipped handlers. What comes out can be packed, is bounded, and is safe to keep as a fact or to emit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

MAX_TEXT: Final = 1024  # characters of a name, a path or an error that are kept
MAX_ITEMS: Final = 256  # entries of a list or map that are kept; a VM has fewer devices and jobs
MAX_DEPTH: Final = 4  # of `plain`; QEMU's panic information has two
_U64: Final = 1 << 64


def mapping(value: object) -> Mapping[str, Any]:
    """The value if it is a map, else an empty one."""
    return value if isinstance(value, dict) else {}


def items(value: object) -> list[Mapping[str, Any]]:
    """The maps in a list, the first `MAX_ITEMS` of them; nothing for what is no list."""
    found = value if isinstance(value, list) else []
    return [item for item in found[:MAX_ITEMS] if isinstance(item, dict)]


def text(data: Mapping[str, Any], key: str) -> str:
    """A string member, cut; "" if there is none."""
    value = data.get(key)
    return _clean(value) if isinstance(value, str) else ""


def number(data: Mapping[str, Any], key: str) -> int | None:
    """A member that is a whole number of 0 to 2^64 - 1, as QEMU's sizes and counters are; None if there is none."""
    value = data.get(key)
    return value if type(value) is int and 0 <= value < _U64 else None


def flag(data: Mapping[str, Any], key: str) -> bool | None:
    """A boolean member; None if there is none."""
    value = data.get(key)
    return value if isinstance(value, bool) else None


def present(**members: Any) -> dict[str, Any]:
    """A map of the members that are there: None and "" are left out."""
    return {key.replace("_", "-"): value for key, value in members.items() if value is not None and value != ""}


def plain(value: object, depth: int = MAX_DEPTH) -> Any:
    """Any JSON value in bounds: what is too deep, too long or too large is cut, or becomes its text."""
    if isinstance(value, str):
        return _clean(value)
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if -(_U64 >> 1) <= value < _U64 else hex(value)[:MAX_TEXT]
    if depth == 0:
        return "…"
    if isinstance(value, dict):
        return {_clean(str(key)): plain(item, depth - 1) for key, item in list(value.items())[:MAX_ITEMS]}
    if isinstance(value, list):
        return [plain(item, depth - 1) for item in value[:MAX_ITEMS]]
    return _clean(str(value))


def _clean(value: str) -> str:
    # JSON may escape half of a surrogate pair, which no encoder takes.
    return value[:MAX_TEXT].encode("utf-8", "replace").decode()
