# SPDX-License-Identifier: Apache-2.0
"""What the faults make of a reply: garbled in one of many ways, or padded. Called by simulated_monitor and simulated_agent."""

from __future__ import annotations

from typing import Any, Final

from .simulated_faults import GarbledKind
from .simulated_json import to_line

_DEEP: Final = 100_000  # brackets in a garbled line of the kind "deep"; more than any parser recurses
_NESTED: Final = 10_000  # lists around nothing in the kind "nested", which is well-formed


def garbled(line: bytes, message: dict[str, Any], kind: GarbledKind, end: bytes) -> bytes:
    """What a client gets instead of a line."""
    middle = len(line) // 2
    match kind:
        case "twice":
            return line + line
        case "truncated":
            return line[:middle] + end
        case "stray-ff":
            return line[:middle] + b"\xff" + line[middle:]
        case "unknown-id":
            return to_line({**message, "id": "nobody asked"}, end)
        case "no-id":
            return to_line({name: value for name, value in message.items() if name != "id"}, end)
        case "nested":
            ids = b', "id": ' + to_line(message["id"], b"") if "id" in message else b""
            return b'{"return": ' + b"[" * _NESTED + b"]" * _NESTED + ids + b"}" + end
        case "not-json" | "not-an-object" | "neither" | "nameless-event" | "binary" | "deep":
            return _FIXED[kind] + end


_FIXED: Final[dict[GarbledKind, bytes]] = {
    "not-json": b"%%% this is no JSON",
    "not-an-object": b"[1, 2, 3]",
    "neither": b'{"neither": "reply nor event"}',
    "nameless-event": b'{"event": null, "timestamp": "never"}',
    "binary": b'{"return": "\xff\xfe\x00\xc3\x28"}',
    "deep": b"[" * _DEEP,
}


def padded(value: Any, size: int) -> Any:
    """A value with so many bytes more, of its own type where that can be."""
    padding = "x" * size
    if isinstance(value, dict):
        return {**value, "x-padding": padding}
    if isinstance(value, list):
        return [*value, {"x-padding": padding}]
    return str(value) + padding
