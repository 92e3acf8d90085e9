# SPDX-License-Identifier: Apache-2.0
"""msgpack bodies: the one place that sets the packer's and the unpacker's limits.

Everything inside the native frame after its header, Majordomo headers and payloads, and published events are packed here.
"""

from __future__ import annotations

import math
from typing import Any, Final

import msgpack

from .errors import BadRequest

# A message of the wire is at most this long; a longer one is refused, never cut (design, section 5).
MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024


def pack(value: object) -> bytes:
    """msgpack of plain values: None, bool, int, float, str, bytes, list, dict.

    Integers beyond 64 bits, which JSON from a hostile peer may hold, are packed as floats rather than failing the message.
    """
    packed: bytes = msgpack.packb(value, default=_as_float)
    return packed


def unpack(body: bytes | memoryview) -> Any:
    """The value of a body; None for an empty one. `BadRequest` for bytes that are no single msgpack value, or nested too deeply."""
    if not body:
        return None
    try:
        return msgpack.unpackb(body)
    except (ValueError, TypeError, RecursionError, UnicodeError, MemoryError) as error:
        raise BadRequest(f"the body is not one msgpack value: {type(error).__name__} {error}".strip()) from error


def unpack_map(body: bytes | memoryview) -> dict[str, Any]:
    """The map of a body, empty for an empty body; `BadRequest` for anything but a map with text keys."""
    value = unpack(body)
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise BadRequest("the body must be a msgpack map with text keys")
    return value


def _as_float(value: object) -> float:
    """Called by the packer, wherever it is in the value, for what it cannot pack."""
    if not isinstance(value, int):
        raise TypeError(f"can not serialize {type(value).__name__!r} object")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
