# SPDX-License-Identifier: Apache-2.0
"""Majordomo frames, so that clients written in other languages work unchanged (ZeroMQ RFC 7, 8 and 18).

Request, after the ROUTER's identity frame:
    MDP/0.1   ['', 'MDPC01', service, header, payload]                    reply: ['', 'MDPC01', service, header, payload]
    MDP/0.2   ['MDPC02', 0x01, service, header, payload]                  reply: ['MDPC02', 0x02 or 0x03, service, header, payload]
A leading empty frame (a REQ socket adds one by itself) is accepted in both and repeated in the answer. The payload may be left out.

    header    request: msgpack map {op, id?, timeout?, key?, reading?}    reply: {ok, id?, cursor?, ms}
    payload   request: msgpack map of arguments                           reply: the result, or {code, message, …fields}

`mmi.service` (RFC 8) takes the service's name as the only body frame and answers `200` or `404` as its own. Used by the broker; all
functions are pure.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Final

import msgspec

from .errors import BadRequest
from .pack import pack, unpack_map
from .wire import MAX_KEY_BYTES

MDP_CLIENT_01: Final = b"MDPC01"
MDP_CLIENT_02: Final = b"MDPC02"
MMI_SERVICE: Final = "mmi.service"

REQUEST: Final = b"\x01"
PARTIAL: Final = b"\x02"
FINAL: Final = b"\x03"

_HEADER_FIELDS: Final = frozenset({"op", "id", "timeout", "key", "reading"})


class Dialect(Enum):
    """How the asker framed its request, and so how it is answered."""

    V01 = MDP_CLIENT_01
    V02 = MDP_CLIENT_02


class Envelope(msgspec.Struct, frozen=True):
    """What must be known to answer a Majordomo client in its own frames."""

    dialect: Dialect
    delimited: bool  # an empty frame came first
    service: str


class MajordomoRequest(msgspec.Struct, frozen=True):
    """A request as it came; `body` is the packed payload, not looked into."""

    envelope: Envelope
    op: str
    body: bytes
    client_id: Any = None
    timeout: float | None = None
    key: bytes = b""
    reading: bool = False


class MmiRequest(msgspec.Struct, frozen=True):
    """A question to `mmi.NAME`: whether a service is there."""

    envelope: Envelope
    asked: str


class BadMajordomo(BadRequest):
    """Frames that are no Majordomo request. `envelope` is set when they can still be answered."""

    def __init__(self, message: str, envelope: Envelope | None = None, client_id: Any = None) -> None:
        super().__init__(message)
        self.envelope = envelope
        self.client_id = client_id


def is_majordomo(parts: list[bytes]) -> bool:
    """Whether the frames after the identity look like Majordomo's: the first, or the one after an empty one, names it."""
    first = 1 if parts and not parts[0] else 0
    return len(parts) > first and parts[first] in (MDP_CLIENT_01, MDP_CLIENT_02)


def parse_request(parts: list[bytes]) -> MajordomoRequest | MmiRequest:
    """The request in the frames after the identity; `BadMajordomo` for anything else."""
    delimited = bool(parts) and not parts[0]
    rest = parts[1:] if delimited else parts
    if not rest or rest[0] not in (MDP_CLIENT_01, MDP_CLIENT_02):
        raise BadMajordomo("the protocol frame must be MDPC01 or MDPC02")
    dialect = Dialect(rest[0])
    rest = rest[1:]
    if dialect is Dialect.V02:
        if not rest or rest[0] != REQUEST:
            raise BadMajordomo("an MDP/0.2 client sends the command 0x01 (REQUEST) after MDPC02")
        rest = rest[1:]
    if not rest:
        raise BadMajordomo("the service frame is missing")
    try:
        service = rest[0].decode()
    except UnicodeDecodeError:
        raise BadMajordomo("the service must be UTF-8") from None
    envelope = Envelope(dialect, delimited, service)
    if service.startswith("mmi."):
        return MmiRequest(envelope, rest[1].decode("utf-8", "replace") if len(rest) > 1 else "")
    if len(rest) not in (2, 3):
        raise BadMajordomo(
            f"after the service come a header and, if wanted, a payload; there are {len(rest) - 1} frames", envelope
        )
    return _with_header(envelope, rest[1], rest[2] if len(rest) == 3 else b"")


def _with_header(envelope: Envelope, packed: bytes, payload: bytes) -> MajordomoRequest:
    try:
        header = unpack_map(packed)
    except BadRequest as error:
        raise BadMajordomo(f"header: {error}", envelope) from error
    client_id = header.get("id")
    unknown = sorted(set(header) - _HEADER_FIELDS)
    if unknown:
        raise BadMajordomo(f"unknown header field {unknown[0]!r:.60}", envelope, client_id)
    op = header.get("op")
    timeout = header.get("timeout")
    key = header.get("key", b"")
    reading = header.get("reading", False)
    if isinstance(key, str):
        key = key.encode()
    if not isinstance(op, str) or not op or len(op.encode()) > 255:
        raise BadMajordomo("header: 'op' must be the operation's name", envelope, client_id)
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, (int, float))):
        raise BadMajordomo("header: 'timeout' must be a number of seconds", envelope, client_id)
    if not isinstance(key, bytes) or len(key) > MAX_KEY_BYTES:
        raise BadMajordomo(f"header: 'key' must be at most {MAX_KEY_BYTES} bytes", envelope, client_id)
    if not isinstance(reading, bool):
        raise BadMajordomo("header: 'reading' must be true or false", envelope, client_id)
    return MajordomoRequest(
        envelope=envelope,
        op=op,
        body=payload,
        client_id=client_id,
        timeout=None if timeout is None else float(timeout),
        key=key,
        reading=reading,
    )


def build_request(envelope: Envelope, header: dict[str, Any], payload: bytes | None = None) -> list[bytes]:
    """The frames of a request, as a client sends them; used by tests and by the protocol's examples."""
    body = [pack(header)] if payload is None else [pack(header), payload]
    command = [REQUEST] if envelope.dialect is Dialect.V02 else []
    return _framed(envelope, command, body)


def build_reply(
    envelope: Envelope,
    *,
    ok: bool,
    body: bytes,
    client_id: Any = None,
    cursor: str | None = None,
    seconds: float = 0.0,
    final: bool = True,
) -> list[bytes]:
    """The frames of an answer, without the identity. A part that is not final can only be told to an MDP/0.2 client."""
    header: dict[str, Any] = {"ok": ok, "ms": round(seconds * 1000, 3)}
    if client_id is not None:
        header["id"] = client_id
    if cursor is not None:
        header["cursor"] = cursor
    command = [] if envelope.dialect is Dialect.V01 else [FINAL if final else PARTIAL]
    return _framed(envelope, command, [pack(header), body])


def build_mmi_reply(envelope: Envelope, status: str) -> list[bytes]:
    """The answer to an `mmi.` question: the status code in text as the only body frame (RFC 8)."""
    command = [] if envelope.dialect is Dialect.V01 else [FINAL]
    return _framed(envelope, command, [status.encode()])


def _framed(envelope: Envelope, command: list[bytes], body: list[bytes]) -> list[bytes]:
    delimiter = [b""] if envelope.delimited else []
    return [*delimiter, envelope.dialect.value, *command, envelope.service.encode(), *body]
