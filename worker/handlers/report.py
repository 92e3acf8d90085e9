# SPDX-License-Identifier: Apache-2.0
"""How failures of handlers are told: the event HANDLER_FAILED, its bounds, and its texts. Used by everything here that calls foreign code.

    {handler, event, seq, why, error, traceback or stack, …}

why: raised, limit, import, refused, overflow, exit, start, pending, "killed its worker". A failure while
handling a HANDLER_FAILED is logged and makes no further event, so that failing handlers cannot keep each other busy; and a handler that
fails all the time is told at a bounded rate, with the number of failures left out meanwhile (`untold`).
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, Final

from ..events import Event
from .context import VmContext

log = logging.getLogger(__name__)

HANDLER_FAILED: Final = "HANDLER_FAILED"

MAX_TRACE_BYTES: Final = 8 * 1024
MAX_ERROR_BYTES: Final = 1024

# A handler that fails for every event of a flood shall not double the flood.
TOLD_PER_SECOND: Final = 5.0
TOLD_AT_ONCE: Final = 100.0

_CUT: Final = "…\n"


class TokenBucket:
    """So many at once, so many per second. `clock`: seconds, never going back."""

    def __init__(self, per_second: float, at_once: float, clock: Callable[[], float]) -> None:
        self._per_second = per_second
        self._at_once = at_once
        self._clock = clock
        self._tokens = at_once
        self._filled = clock()

    def take(self) -> bool:
        """Take one; False if there is none now."""
        now = self._clock()
        self._tokens = min(self._at_once, self._tokens + (now - self._filled) * self._per_second)
        self._filled = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


class Reporter:
    """Tells failures of one VM's handlers. On the loop only; never raises."""

    def __init__(self, context: VmContext) -> None:
        self._context = context
        self._buckets: dict[str, TokenBucket] = {}
        self._untold: dict[str, int] = {}

    def failed(self, handler: str, event: Event | None, why: str, error: str, **more: Any) -> None:
        """Log a failure and emit HANDLER_FAILED. `event`: what was being handled; None if nothing was."""
        handler, error = _encodable(handler), _encodable(error)  # names of files may be any bytes
        name, seq = (event.event, event.seq) if event is not None else ("", 0)
        trace = more.get("traceback") or more.get("stack") or ""
        where = f"VM {self._context.name}: handler {handler}"
        log.warning("%s%s: %s: %s\n%s", where, f" on {name} {seq}" if name else "", why, error, trace)
        if name == HANDLER_FAILED:
            return
        if not self._may_tell(handler):
            self._untold[handler] = self._untold.get(handler, 0) + 1
            return
        if untold := self._untold.pop(handler, 0):
            more["untold"] = untold
        data = {"handler": handler, "event": name, "seq": seq, "why": why, "error": error, **more}
        try:
            self._context.emit(HANDLER_FAILED, data)
        except Exception:  # the edge: a failure that cannot be told must not cost the VM its worker
            log.exception("%s: HANDLER_FAILED could not be emitted", where)

    def _may_tell(self, handler: str) -> bool:
        bucket = self._buckets.get(handler)
        if bucket is None:
            bucket = self._buckets[handler] = TokenBucket(TOLD_PER_SECOND, TOLD_AT_ONCE, self._context.loop.time)
        return bucket.take()


# -- texts, bounded ---------------------------------------------------------------------------------------------------------


def error_text(error: BaseException) -> str:
    """Type and message of an exception, at most 1 KiB; whatever its `__str__` does."""
    try:
        said = str(error)
    except BaseException:  # noqa: BLE001 - the exception is the operator's, its __str__ as well
        said = "(its message cannot be made)"
    text = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return _encodable(text)


def trace_text(error: BaseException) -> str:
    """The traceback of an exception, its newest 8 KiB. Lets go of what the frames hold if memory ran out."""
    if isinstance(error, MemoryError):
        traceback.clear_frames(error.__traceback__)
    try:
        return newest("".join(traceback.format_exception(error)))
    except BaseException as second:  # noqa: BLE001 - out of memory still, or an exception that fights being shown
        return f"(no traceback: {type(second).__name__})"


def stack_text(frame: FrameType | None) -> str:
    """Where a thread is, outermost frame first, the newest 8 KiB."""
    return (
        newest("".join(traceback.format_stack(frame))) if frame is not None else "(the thread is in no Python code)\n"
    )


def frames_text(frames: Iterable[FrameType], end: str = "") -> str:
    """Where suspended coroutines stand, outermost frame first, then what the innermost waits for."""
    summary = traceback.StackSummary.extract(((frame, frame.f_lineno) for frame in frames), limit=1000)
    return newest("".join(summary.format()) + end)


def newest(text: str) -> str:
    """The end of a text, at most 8 KiB."""
    data = text.encode("utf-8", "replace")
    if len(data) <= MAX_TRACE_BYTES:
        return clean(data)
    return _CUT + clean(data[len(_CUT.encode()) - MAX_TRACE_BYTES :])


def _encodable(text: str) -> str:
    return clean(text.encode("utf-8", "replace")[:MAX_ERROR_BYTES])


def clean(data: bytes) -> str:
    """Text that every encoder takes, of bytes from anywhere."""
    return data.decode("utf-8", "ignore").replace("\0", "�")
