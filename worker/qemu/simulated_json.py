# SPDX-License-Identifier: Apache-2.0
"""JSON as QEMU reads and writes it: objects back to back without newlines, QEMU's error texts, 0xFF as a reset.

Called by the simulated monitor and agent (simulated_monitor, simulated_agent). QEMU's parser tells apart what Python's do not (where
an input goes wrong, and where the next one starts), and a client that relies on that must be able to find out here. Well-formed ASCII
objects, which is nearly all that clients send, take a fast way through msgspec.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, NamedTuple

import msgspec

# QEMU allows 1024 levels; a quarter of that keeps clear of Python's own limit for recursion: reading takes two frames a level.
MAX_NESTING: Final = 256

# An object that is bigger than this so far is not looked at again before the end of its line, or a chunk that ends like an object, has
# come: reading a long string anew with each chunk takes a time that grows with the square of its length.
_PATIENCE: Final = 16384

_INT64_MIN: Final = -(2**63)
_UINT64_MAX: Final = 2**64 - 1

# A string may hold any byte but control characters and the two that never occur in UTF-8; what an escape means is checked later.
_TOKEN: Final = re.compile(
    rb"""(?P<space>[ \t\r\n]+)
    |(?P<mark>[{}\[\],:])
    |(?P<string>"(?:[^"\\\x00-\x1f\xfe\xff]|\\[\x20-\xfd])*"|'(?:[^'\\\x00-\x1f\xfe\xff]|\\[\x20-\xfd])*')
    |(?P<number>-?(?:0(?:\.[0-9]+(?:[eE][+-]?[0-9]+)?)?|[1-9][0-9]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?))
    |(?P<word>[a-z]+)""",
    re.VERBOSE,
)
# The beginning of a token whose end is not there yet, or never comes: the byte after it is the stray one.
_BEGUN: Final = re.compile(
    rb"""(?:"(?:[^"\\\x00-\x1f\xfe\xff]|\\[\x20-\xfd])*\\?
    |'(?:[^'\\\x00-\x1f\xfe\xff]|\\[\x20-\xfd])*\\?
    |-?(?:(?:0\.[0-9]+|[1-9][0-9]*(?:\.[0-9]+)?)[eE][+-]?[0-9]*|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)?)""",
    re.VERBOSE,
)
# After a stray byte everything is skipped up to a control character, 0xFE, 0xFF or a mark.
_RESTART: Final = re.compile(rb"[\x00-\x1f\xfe\xff{}\[\],:]")
_ESCAPE: Final = re.compile(r"\\(u.{0,4}|.)", re.DOTALL)
_HEX: Final = re.compile(r"u[0-9a-fA-F]{4}")
_LONE_SURROGATE: Final = re.compile("[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]")
_PLAIN_ESCAPES: Final = {
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    '"': '"',
    "'": "'",
    "\\": "\\",
    "/": "/",
}
_WORDS: Final = {b"null": None, b"true": True, b"false": False}
_PRINTED_ESCAPE: Final = re.compile(
    r"\\(?:u[0-9a-f]{4}|.)"
)  # in what the encoder wrote: a printed backslash is one too

# The standard encoder, for it separates with ", " and ": " as QEMU does; msgspec's writes no blanks.
_ENCODER: Final = json.JSONEncoder(check_circular=False)


class Input(NamedTuple):
    """One complete input: a value, or why it is none, in QEMU's words."""

    value: Any
    error: str | None = None


class _BadTokensError(Exception):
    """The tokens are no JSON value; the text is QEMU's."""


class JsonStream:
    """Cuts what a client sends into inputs, whatever the chunks it arrives in."""

    __slots__ = ("_braces", "_brackets", "_buffer", "_position", "_recovering", "_tokens")

    def __init__(self) -> None:
        self._buffer = b""
        self._position = 0
        self._tokens: list[tuple[str, bytes]] = []
        self._braces = 0
        self._brackets = 0
        self._recovering = False

    def feed(self, data: bytes) -> None:
        """Add what was read from the socket."""
        rest = self._buffer[self._position :]
        self._buffer = rest + data if rest else data
        self._position = 0

    def take(self) -> Input | None:
        """The next complete input; None if more bytes are needed for it."""
        if not self._tokens and not self._recovering:
            quick = self._take_object()
            if quick is not None:
                return quick
            if self._is_long_and_unfinished():
                return None
        while True:
            if self._recovering and not self._recover():
                return None
            token = self._next_token()
            if token is None:
                return None
            kind, text = token
            if kind == "stray":
                self._restart()
                self._recovering = True
                return Input(None, f"JSON parse error, stray '{text.decode(errors='replace')}'")
            if self._counts_as_complete(kind, text):
                tokens = self._tokens
                self._restart()
                return _parse(tokens)
            if self._braces + self._brackets > MAX_NESTING:
                self._restart()
                return Input(None, "JSON nesting depth limit exceeded")

    def _take_object(self) -> Input | None:
        """The fast way: a plain object up to the end of the line or of what there is."""
        buffer, start = self._buffer, self._position
        if not buffer.startswith(b"{", start):
            return None
        newline = buffer.find(b"\n", start)
        if newline < 0 and not buffer.endswith(b"}"):
            return None
        end = len(buffer) if newline < 0 else newline + 1
        line = buffer[start:end]
        if not line.isascii():
            return None
        try:
            value = msgspec.json.decode(line, type=dict[str, Any])
            if line.count(b":") != _keys(value):  # a key given twice, which QEMU refuses; or just a colon in a string
                return None
        except (msgspec.DecodeError, RecursionError):
            return None
        self._position = end
        return Input(value)

    def _is_long_and_unfinished(self) -> bool:
        buffer, start = self._buffer, self._position
        long = len(buffer) - start > _PATIENCE and buffer.startswith(b"{", start)
        return long and not buffer.endswith((b"}", b"\xff")) and buffer.find(b"\n", start) < 0

    def _recover(self) -> bool:
        found = _RESTART.search(self._buffer, self._position)
        if found is None:
            self._position = len(self._buffer)
            return False
        self._position = found.start()
        self._recovering = False
        return True

    def _next_token(self) -> tuple[str, bytes] | None:
        buffer = self._buffer
        while self._position < len(buffer):
            match = _TOKEN.match(buffer, self._position)
            if match is None:
                return self._unmatched()
            kind, end = match.lastgroup or "", match.end()
            if kind in ("number", "word") and end == len(buffer):
                return None  # it may go on in the next chunk
            if kind == "number" and _goes_on(match.group(), buffer[end]):
                return self._unmatched()
            self._position = end
            if kind != "space":
                return kind, match.group()
        return None

    def _unmatched(self) -> tuple[str, bytes] | None:
        begun = _BEGUN.match(self._buffer, self._position)
        end = begun.end() if begun is not None else self._position
        if end >= len(self._buffer):
            return None
        stray = self._buffer[self._position : end + 1]
        self._position = end + 1
        return "stray", stray

    def _counts_as_complete(self, kind: str, text: bytes) -> bool:
        self._tokens.append((kind, text))
        if kind == "mark":
            self._braces += (text == b"{") - (text == b"}")
            self._brackets += (text == b"[") - (text == b"]")
        # Braces and brackets are counted apart, so "[}" goes on until the bracket is closed too, as in QEMU.
        return self._braces < 0 or self._brackets < 0 or (self._braces == 0 and self._brackets == 0)

    def _restart(self) -> None:
        self._tokens = []
        self._braces = self._brackets = 0


def to_line(value: object, end: bytes = b"\r\n") -> bytes:
    """A value as QEMU prints it: blanks after the separators, ASCII only, upper-case escapes."""
    text = _ENCODER.encode(value)
    if "\\u" in text:
        text = _PRINTED_ESCAPE.sub(_upper_case, text)
    return text.encode() + end


def _upper_case(match: re.Match[str]) -> str:
    escape = match.group()
    return "\\u" + escape[2:].upper() if len(escape) > 2 else escape


def _keys(value: object) -> int:
    """How many keys there are in all objects of a value."""
    if isinstance(value, dict):
        return len(value) + sum(_keys(item) for item in value.values() if isinstance(item, dict | list))
    if isinstance(value, list):
        return sum(_keys(item) for item in value if isinstance(item, dict | list))
    return 0


def _parse(tokens: list[tuple[str, bytes]]) -> Input:
    try:
        value, _ = _value(tokens, 0)
    except _BadTokensError as error:
        return Input(None, f"JSON parse error, {error}")
    return Input(value)


def _value(tokens: list[tuple[str, bytes]], at: int) -> tuple[Any, int]:
    """The value that starts at a token, and the position after it. Two Python frames per level of nesting."""
    kind, text = _token(tokens, at)
    at += 1
    if kind == "string":
        return _string(text), at
    if kind == "number":
        return _number(text), at
    if kind == "word":
        if text not in _WORDS:
            raise _BadTokensError(f"invalid keyword '{text.decode()}'")
        return _WORDS[text], at
    if text == b"[":
        return _items(tokens, at)
    if text == b"{":
        return _members(tokens, at)
    raise _BadTokensError("expecting value")


def _items(tokens: list[tuple[str, bytes]], at: int) -> tuple[list[Any], int]:
    items: list[Any] = []
    if _token(tokens, at)[1] == b"]":
        return items, at + 1
    while True:
        item, at = _value(tokens, at)
        items.append(item)
        mark = _token(tokens, at)[1]
        at += 1
        if mark == b"]":
            return items, at
        if mark != b",":
            raise _BadTokensError("expected separator in list")


def _members(tokens: list[tuple[str, bytes]], at: int) -> tuple[dict[str, Any], int]:
    members: dict[str, Any] = {}
    if _token(tokens, at)[1] == b"}":
        return members, at + 1
    while True:
        key, at = _value(tokens, at)
        if not isinstance(key, str):
            raise _BadTokensError("key is not a string in object")
        if _token(tokens, at)[1] != b":":
            raise _BadTokensError("missing : in object pair")
        if key in members:
            raise _BadTokensError("duplicate key")
        members[key], at = _value(tokens, at + 1)
        mark = _token(tokens, at)[1]
        at += 1
        if mark == b"}":
            return members, at
        if mark != b",":
            raise _BadTokensError("expected separator in dict")


def _token(tokens: list[tuple[str, bytes]], at: int) -> tuple[str, bytes]:
    if at >= len(tokens):
        raise _BadTokensError("premature EOI")
    return tokens[at]


def _goes_on(number: bytes, byte: int) -> bool:
    """Whether a byte after a number belongs to it, and so makes it wrong. QEMU's zero has no exponent."""
    if b"e" in number or b"E" in number:
        return False
    if b"." in number:
        return byte in b"eE"
    return byte in (b".0123456789" if number in (b"0", b"-0") else b".eE")


def _number(text: bytes) -> int | float:
    if text.lstrip(b"-").isdigit():
        number = int(text) if len(text) <= len(str(_INT64_MIN)) else None
        if number is not None and _INT64_MIN <= number <= _UINT64_MAX:
            return number
    value = float(text)
    # QEMU prints with %.17g, so a whole number comes back without a point.
    return int(value) if value.is_integer() and abs(value) < 1e15 else value


def _string(text: bytes) -> str:
    try:
        plain = text[1:-1].replace(b"\xc0\x80", b"\0").decode()  # QEMU's UTF-8 is the modified one
    except UnicodeDecodeError:
        raise _BadTokensError("invalid UTF-8 sequence in string") from None
    if "\\" not in plain:
        return plain
    # With the closing quote, which QEMU shows where an escape is cut off by it.
    unescaped = _ESCAPE.sub(_unescape, plain + chr(text[-1]))[:-1]
    lone = _LONE_SURROGATE.search(unescaped)
    if lone is not None:
        raise _BadTokensError(f"\\u{ord(lone.group()):x} is not a valid Unicode character")
    return unescaped.encode("utf-16", "surrogatepass").decode("utf-16")


def _unescape(match: re.Match[str]) -> str:
    escape = match.group(1)
    if _HEX.fullmatch(escape):
        return chr(int(escape[1:], 16))
    if escape.startswith("u"):
        raise _BadTokensError(f"\\{escape} is not a valid Unicode character")
    if escape not in _PLAIN_ESCAPES:
        raise _BadTokensError("invalid escape sequence in string")
    return _PLAIN_ESCAPES[escape]
