# SPDX-License-Identifier: Apache-2.0
"""Values that have broken decoders before, as bytes: nesting up to and over the limits, integers without end, text that is none."""

from __future__ import annotations

from typing import Final

# Of msgpack: nested as deeply as its reader allows, and more; lengths without what they announce; keys that are no text; odd extensions.
HOSTILE_MSGPACK: Final = (
    b"\x91" * 1000 + b"\xc0",
    b"\x91" * 1023 + b"\xc0",
    b"\x91" * 5000 + b"\xc0",
    b"\x81\xa1a" * 1000 + b"\xc0",
    b"\x81" * 1000 + b"\xc0",
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\x81\x01\x02",
    b"\x81\xc4\x01a\x02",
    b"\x81\xa1\xff\x02",
    b"\xa3\xed\xa0\x80",
    b"\xc7\x0c\xff\xff\xff\xff\xff\x00\x00\x00\x00\x00\x00\x00\x00",
    b"\xd6\xff\x00\x00\x00\x00",
    b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",
    b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff",
)

# Of JSON.
HOSTILE_JSON: Final = (
    b"[" * 900 + b"]" * 900,
    b"[" * 100_000,
    b'{"a":' * 900 + b"1" + b"}" * 900,
    b"9" * 5000,
    b"1e999",
    b"-0",
    b"18446744073709551616",
    b'"\\ud800"',
    b'"\\ud83d\\ude00\\u0000"',
    b'"\xff"',
    b'"\xed\xa0\x80"',
    b'{"a":1,"a":2}',
    b"NaN",
    b"\xef\xbb\xbf{}",
    b"",
)


def huge_integer(depth: int) -> bytes:
    """JSON of an integer over 64 bits, as deep as asked."""
    return b"[" * depth + b"1" + b"0" * 25 + b"]" * depth
