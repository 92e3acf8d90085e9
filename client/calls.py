# SPDX-License-Identifier: Apache-2.0
"""What one connection has in flight: numbers, deadlines, what to repeat after a lost broker. No sockets here.

lane.py (blocking) and aio.py feed it with frames and with losses of the connection, and send what it says. A call is

    unsent ──frame_of──► sent ──reply, error, deadline──► finished
       ▲                  │
       └──── lost() ──────┘   reading requests and those with a key; the others finish as outcome-unknown
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections import deque
from typing import Any, Final

import msgspec

from ..common.cursor import Cursor
from ..common.errors import (
    BadRequest,
    Busy,
    DeadlineExceeded,
    Internal,
    NoBroker,
    OutcomeUnknown,
    TooLarge,
    VmloopError,
    error_from_wire,
)
from ..common.pack import MAX_MESSAGE_BYTES, pack, unpack
from ..common.wire import (
    FLAG_READING,
    FLAG_REPEATED,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    BadFrame,
    Kind,
    Message,
    decode,
    encode,
)
from .requests import Request

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT: Final = 30.0  # seconds; the wire's own default
MAX_TIMEOUT: Final = 3600.0  # seconds; the wire's limit
# The broker answers at the deadline; the client gives up so much later, when nobody did.
GRACE: Final = 0.5
KEY_BYTES: Final = 16
# Parts of an answer that wait for their reader. The lane reads on demand; only the asyncio client can come near this.
MAX_PARTS: Final = 10_000
EVENTS: Final = "events"  # the operation whose parts are events, in their order


class Answer(msgspec.Struct, frozen=True):
    """A reply: its value, the VM's newest event when it was made, and the seconds it took the other side."""

    value: Any
    cursor: Cursor
    seconds: float


class Call:
    """One request and what has become of it."""

    __slots__ = (
        "answer",
        "asked",
        "due",
        "error",
        "finished",
        "got_parts",
        "message",
        "number",
        "parts",
        "reached",
        "was_sent",
    )

    def __init__(self, message: Message, now: float, streaming: bool) -> None:
        self.message = message
        self.asked = now
        self.due = now + message.seconds + GRACE
        self.number = 0  # 0: not on its way
        self.was_sent = False
        self.finished = False
        self.answer: Answer | None = None
        self.error: VmloopError | None = None
        self.parts: deque[Any] | None = deque() if streaming else None
        self.got_parts = False
        self.reached = (0, 0)  # epoch and seq of the newest part, if they are events

    def has_had(self, part: Any) -> bool:
        """Whether a part is an event that came already: if a worker dies in the midst of its answer, the next one begins it anew."""
        if self.message.op != EVENTS or not isinstance(part, dict):
            return False
        epoch, seq = part.get("epoch"), part.get("seq")
        if not (isinstance(epoch, int) and isinstance(seq, int)):
            return False
        if (epoch, seq) <= self.reached:
            return True
        self.reached = (epoch, seq)
        return False

    def result(self) -> Answer:
        """The answer of a finished call; raises its error."""
        if self.error is not None:
            raise self.error
        if self.answer is None:
            raise Internal(f"{self.describe()} has no answer yet")
        return self.answer

    @property
    def repeatable(self) -> bool:
        """Safe to send again: it changes nothing, or its key makes the other side answer once."""
        return self.message.reading or bool(self.message.key)

    def describe(self) -> str:
        return f"{self.message.op} ({self.message.service})"

    def finish(self, answer: Answer | None, error: VmloopError | None) -> None:
        self.answer = answer
        self.error = error
        self.finished = True


def new_call(request: Request[Any], timeout: float, streaming: bool = False) -> Call:
    """The call for a request. `BadRequest` or `TooLarge` for what could not be sent; nothing is in flight then."""
    seconds = timeout if request.timeout is None else request.timeout
    if not 0 < seconds <= MAX_TIMEOUT:
        raise BadRequest(f"a timeout is over 0 and at most {MAX_TIMEOUT:.0f} seconds, not {seconds}")
    key = request.key
    if key is None:
        key = b"" if request.reading else os.urandom(KEY_BYTES)
    try:
        body = pack(request.arguments) if request.arguments else b""
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRequest(f"the arguments of {request.op} cannot be packed: {error}") from error
    if HEADER_BYTES + len(request.service) + len(request.op) + len(key) + len(body) > MAX_MESSAGE_BYTES:
        raise TooLarge(
            f"the request {request.op} has {len(body)} bytes of arguments; a message is at most {MAX_MESSAGE_BYTES}",
            limit=MAX_MESSAGE_BYTES,
        )
    message = Message(
        kind=Kind.REQUEST,
        service=request.service,
        op=request.op,
        body=body,
        key=key,
        # Who brings his own key may have asked before, with another client.
        flags=(FLAG_READING if request.reading else 0) | (FLAG_REPEATED if request.key else 0),
        seconds=seconds,
    )
    return Call(message, time.monotonic(), streaming)


class Calls:
    """The calls of one connection."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._numbers = itertools.count(1)
        self._sent: dict[int, Call] = {}
        self._unsent: dict[Call, None] = {}

    def __bool__(self) -> bool:
        return bool(self._sent or self._unsent)

    @property
    def waits_to_send(self) -> bool:
        return bool(self._unsent)

    @property
    def unsent(self) -> tuple[Call, ...]:
        """What waits for a connection, oldest first."""
        return tuple(self._unsent)

    def frame_of(self, call: Call) -> bytes:
        """The frame to send now, entered under a fresh number: an answer to an earlier sending is then a stranger's.

        `BadFrame` for a service or op that no frame can carry; the call is not in flight then.
        """
        seconds = call.message.seconds
        if call.was_sent:
            seconds = max(call.due - GRACE - time.monotonic(), 0.001)
        number = next(self._numbers)
        flags = call.message.flags | (FLAG_REPEATED if call.was_sent and call.message.key else 0)
        frame = encode(msgspec.structs.replace(call.message, id=number, seconds=seconds, flags=flags))
        self._unsent.pop(call, None)
        self._sent[number] = call
        call.number = number
        call.was_sent = True
        return frame

    def put_back(self, call: Call, was_sent: bool) -> None:
        """It could not be sent: there is no connection, or its queue is full."""
        self._sent.pop(call.number, None)
        call.number = 0
        call.was_sent = was_sent
        self._unsent[call] = None

    def forget(self, call: Call) -> None:
        """Nobody waits for it any more."""
        self._sent.pop(call.number, None)
        self._unsent.pop(call, None)

    # -- what comes in ---------------------------------------------------------------------------------------------------

    def receive(self, frame: bytes) -> Call | None:
        """Take a frame in; the call that has moved, None if it was for nobody. Never raises, whatever the bytes."""
        try:
            message = decode(frame)
        except BadFrame as error:
            return self._malformed(frame, error)
        call = self._sent.get(message.id)
        if call is None:
            log.debug("dropped a %s for no call in flight (id %d)", message.kind.name, message.id)
            return None
        try:
            self._take(call, message)
        except BadRequest as error:
            self._finish(call, None, Internal(f"the reply to {call.describe()} is malformed: {error}"))
        return call

    def _take(self, call: Call, message: Message) -> None:
        kind = message.kind
        if kind is Kind.REPLY:
            answer = Answer(unpack(message.body), Cursor(message.epoch, message.seq), message.seconds)
            self._finish(call, answer, None)
        elif kind is Kind.PARTIAL:
            self._take_part(call, unpack(message.body))
        elif kind is Kind.ERROR:
            self._finish(call, None, error_from_wire(unpack(message.body)))
        else:
            log.warning("dropped a %s that came as the answer to %s", kind.name, call.describe())

    def _take_part(self, call: Call, part: Any) -> None:
        if call.parts is None:
            return  # somebody asked with `call` for what comes in parts and wants only its end
        if call.has_had(part):
            return
        if len(call.parts) >= MAX_PARTS:
            self._finish(
                call, None, Busy(f"{MAX_PARTS} parts of {call.describe()} wait unread; read faster or ask for less")
            )
            return
        call.got_parts = True
        call.parts.append(part)

    def _malformed(self, frame: bytes, error: BadFrame) -> Call | None:
        if len(frame) >= HEADER_BYTES and frame.startswith(MAGIC):
            call = self._sent.get(HEADER.unpack_from(frame)[5])
            if call is not None:
                self._finish(call, None, Internal(f"the reply to {call.describe()} is malformed: {error}"))
                return call
        log.warning("dropped a malformed frame of %d bytes: %s", len(frame), error)
        return None

    def _finish(self, call: Call, answer: Answer | None, error: VmloopError | None) -> None:
        self.forget(call)
        call.finish(answer, error)

    # -- what does not come ----------------------------------------------------------------------------------------------

    def lost(self) -> list[Call]:
        """The broker's connection is gone: what may be repeated is unsent again; the rest is finished, and returned."""
        finished = []
        in_flight = tuple(self._sent.values())
        for call in in_flight:
            if call.repeatable and not call.got_parts:
                self.put_back(call, was_sent=True)
                continue
            error: VmloopError = self._outcome_unknown(call)
            if call.message.reading:
                error = NoBroker(f"the broker went away in the middle of its answer to {call.describe()}; ask again")
            self._finish(call, None, error)
            finished.append(call)
        return finished

    def overdue(self, now: float) -> list[Call]:
        """Finish and return those whose time is over."""
        late = [call for call in (*self._sent.values(), *self._unsent) if call.due <= now]
        for call in late:
            self._finish(call, None, self._late_error(call, now))
        return late

    def _late_error(self, call: Call, now: float) -> VmloopError:
        waited = f"{now - call.asked:.1f} s"
        if call.number:
            return DeadlineExceeded(
                f"no answer to {call.describe()} after {waited}, not even that its time is over: the broker is held up or stopped"
            )
        if not call.was_sent or call.message.reading:
            return NoBroker(
                f"nobody answers at {self._endpoint}: {call.describe()} waited {waited} for the broker to come back"
            )
        return self._outcome_unknown(call)

    def _outcome_unknown(self, call: Call) -> OutcomeUnknown:
        return OutcomeUnknown(
            f"the broker went away before it answered {call.describe()}; look at the VM before you repeat it"
        )
