# SPDX-License-Identifier: Apache-2.0
"""The native frame: one ZeroMQ frame for a whole message, the same between client, broker and worker.

    offset  size  field
         0     4  magic "VML1"
         4     1  kind (class Kind)
         5     1  flags (1: reading, safe to repeat; broker → worker: 2: an earlier worker may have it, 4: do not begin it)
         6     1  length of service
         7     1  length of op
         8     8  id        chosen by the client; the broker puts its own number here on the way to the worker, and the client's back
        16     8  seconds   f64; request: timeout; reply: time taken
        24     4  epoch     with seq: the VM's newest event when the message was made
        28     4  length of key
        32     8  seq
        40        service, op, key, then a msgpack body to the end

All numbers are little-endian. Kinds 1 to 4 cross the client door; the others only run between worker and broker. Encoding and decoding are
pure; `decode` raises `BadFrame`, which keeps the bytes. The broker's hot path uses `HEADER` and `with_id` and never unpacks a body.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

import msgspec

from .errors import BadRequest
from .pack import MAX_MESSAGE_BYTES

MAGIC: Final = b"VML1"
HEADER: Final = struct.Struct("<4sBBBBQdIIQ")
HEADER_BYTES: Final = HEADER.size
_ID: Final = struct.Struct("<Q")
_ID_AND_SECONDS: Final = struct.Struct("<Qd")
_F64: Final = struct.Struct("<d")
_ID_AT: Final = 8
KIND_AT: Final = 4
_FLAGS_AT: Final = 5
_SECONDS_AT: Final = 16

FLAG_READING: Final = 1
# From a client, beside a key: it has sent the request before, and has no answer.
# From the broker to a worker of protocol 2: a worker of the VM was given the request before, and may have begun or
# answered it. Asking: only tell what became of it; the frame is not the whole request.
FLAG_REPEATED: Final = 2
FLAG_ASKING: Final = 4
MAX_KEY_BYTES: Final = 64


class Kind(IntEnum):
    """What a message is."""

    REQUEST = 1  # client → broker → worker
    REPLY = 2  # the last or only answer
    PARTIAL = 3  # one part of an answer in several parts
    ERROR = 4  # the answer is an error: body {code, message, …}
    EVENT = 5  # worker → broker: publish the body under "service/op"
    HELLO = 6  # worker → broker: an incarnation presents itself; body: see docs/protocol.md
    STATUS = 7  # worker → broker: what is known of the VM has changed
    BYE = 8  # worker → broker: nothing left to do, the worker ends; body as STATUS
    CONTROL = 9  # broker → worker: op `keep` (hand your fds to a new zygote) or `leave` (end; the VM runs on)


CLIENT_KINDS: Final = frozenset({Kind.REQUEST, Kind.REPLY, Kind.PARTIAL, Kind.ERROR})


class Message(msgspec.Struct, frozen=True):
    """One decoded native frame; the body stays packed."""

    kind: Kind
    service: str = ""
    op: str = ""
    id: int = 0
    body: bytes = b""
    key: bytes = b""
    flags: int = 0
    seconds: float = 0.0
    epoch: int = 0
    seq: int = 0

    @property
    def reading(self) -> bool:
        """True if the request changes nothing and may be sent twice."""
        return bool(self.flags & FLAG_READING)

    @property
    def repeated(self) -> bool:
        """True if an earlier worker of this VM may have begun or answered this request."""
        return bool(self.flags & FLAG_REPEATED)

    @property
    def asking(self) -> bool:
        """True if the request is not to be begun: only what became of it is asked."""
        return bool(self.flags & FLAG_ASKING)


class BadFrame(BadRequest):
    """Bytes that are no native frame; `raw` keeps the first of them."""

    def __init__(self, message: str, raw: bytes = b"") -> None:
        super().__init__(message)
        self.raw = raw[:256]


def encode(message: Message) -> bytes:
    """The frame of a message. `BadFrame` if a part is no text or longer than its length field, or a key over its limit."""
    try:
        service = message.service.encode()
        op = message.op.encode()
    except UnicodeEncodeError:  # lone surrogates, as arguments of a command line may hold
        raise BadFrame("service and op must be UTF-8") from None
    if len(service) > 255 or len(op) > 255 or len(message.key) > MAX_KEY_BYTES:
        raise BadFrame("service and op are at most 255 bytes, a key at most 64")
    head = HEADER.pack(
        MAGIC,
        message.kind,
        message.flags,
        len(service),
        len(op),
        message.id,
        message.seconds,
        message.epoch,
        len(message.key),
        message.seq,
    )
    return b"".join((head, service, op, message.key, message.body))


def decode(frame: bytes) -> Message:
    """The message of a frame; `BadFrame` for anything that is not exactly one well-formed frame within the size limit."""
    if len(frame) < HEADER_BYTES:
        raise BadFrame(f"a native frame has at least {HEADER_BYTES} bytes, this one {len(frame)}", frame)
    if len(frame) > MAX_MESSAGE_BYTES:
        raise BadFrame(f"a message is at most {MAX_MESSAGE_BYTES} bytes, this one has {len(frame)}", frame)
    magic, kind, flags, service_len, op_len, number, seconds, epoch, key_len, seq = HEADER.unpack_from(frame)
    if magic != MAGIC:
        raise BadFrame("a native frame starts with VML1", frame)
    op_at = HEADER_BYTES + service_len
    key_at = op_at + op_len
    body_at = key_at + key_len
    if key_len > MAX_KEY_BYTES or body_at > len(frame):
        raise BadFrame("the lengths in the header do not fit the frame", frame)
    try:
        return Message(
            kind=_KINDS[kind],
            service=frame[HEADER_BYTES:op_at].decode(),
            op=frame[op_at:key_at].decode(),
            id=number,
            body=frame[body_at:],
            key=frame[key_at:body_at],
            flags=flags,
            seconds=seconds,
            epoch=epoch,
            seq=seq,
        )
    except KeyError:
        raise BadFrame(f"there is no message kind {kind}", frame) from None
    except UnicodeDecodeError:
        raise BadFrame("service and op must be UTF-8", frame) from None


def with_id(frame: bytes, number: int) -> bytes:
    """The same frame with another id: all that the broker changes on a message's way through."""
    return b"".join((frame[:_ID_AT], _ID.pack(number), frame[_ID_AT + 8 :]))


def forwarded(frame: bytes, number: int, seconds: float) -> bytes:
    """A client's request as it goes on to the worker: the broker's number for the client's id, and the timeout that holds.

    Of the flags only the client's own goes through.
    """
    if frame[_FLAGS_AT] & ~FLAG_READING:
        frame = _with_flags(frame, frame[_FLAGS_AT] & FLAG_READING)
    return b"".join((frame[:_ID_AT], _ID_AND_SECONDS.pack(number, seconds), frame[_ID_AT + 16 :]))


def repeated(frame: bytes, seconds: float) -> bytes:
    """A request as it goes to a VM's next worker: marked, with the time that is left."""
    marked = _with_flags(frame, frame[_FLAGS_AT] & FLAG_READING | FLAG_REPEATED)
    return b"".join((marked[:_SECONDS_AT], _F64.pack(seconds), marked[_SECONDS_AT + 8 :]))


def _with_flags(frame: bytes, flags: int) -> bytes:
    return b"".join((frame[:_FLAGS_AT], bytes((flags,)), frame[_FLAGS_AT + 1 :]))


_KINDS: Final = {int(kind): kind for kind in Kind}
