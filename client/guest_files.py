# SPDX-License-Identifier: Apache-2.0
"""Files in the guest through guest-file-*: read and written in pieces, as conversations (steps.py). Used by vm.py and aio_vm.py.

A handle that the agent has given is closed however the copy ends: handles outlive us. A piece whose outcome nobody knows, because its
worker was lost, is asked for again at its own offset, which comes to the same for reading and for writing.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Final

import msgspec

from ..common.errors import AgentAbsent, AgentError, AgentUnresponsive, Busy, OutcomeUnknown, VmloopError, WorkerLost
from . import requests
from .guest_answers import fitting, from_base64, nonsense, to_base64, vm_of
from .requests import Request
from .steps import Patiently, Steps

log = logging.getLogger(__name__)

# Bytes a message, before base64 makes them a third more: far below the limits of the wire and the agent; and the agent, which does one
# thing at a time, is soon free for others. Larger pieces are no faster (tried with qemu-ga 7.2).
PIECE: Final = 256 << 10
# Seconds for the agent to close a file after something else went wrong.
CLOSE_SECONDS: Final = 5.0

# What is said until a new worker has found the agent, and how long that may take.
_NOT_BACK_YET: Final = (AgentAbsent, AgentUnresponsive, Busy, WorkerLost)
NEW_WORKER_SECONDS: Final = 10.0

# Numbers rather than words: every agent takes them.
_FROM_START: Final = 0
_FROM_END: Final = 2

# Called after each piece with the bytes so far and the bytes in all, None if that is not known.
Progress = Callable[[int, int | None], None]


class GuestCopy(msgspec.Struct, frozen=True):
    """A file that has passed: its bytes and their SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


class _Read(msgspec.Struct, frozen=True, rename={"data": "buf-b64"}):
    """Answer of guest-file-read."""

    count: int
    data: str
    eof: bool


class _Written(msgspec.Struct, frozen=True):
    """Answer of guest-file-write."""

    count: int


class _Place(msgspec.Struct, frozen=True):
    """Answer of guest-file-seek."""

    position: int


def read_file(service: str, path: str, into: BinaryIO, progress: Progress | None) -> Steps[GuestCopy]:
    """Copy a file of the guest into `into`, which must take all that it is given (a buffered file does)."""
    handle = yield from _open(service, path, "rb")
    digest = hashlib.sha256()
    offset = 0
    try:
        total = (yield from _size(service, handle)) if progress is not None else None
        eof = False
        while not eof:
            data, eof = yield from _read(service, handle, offset)
            digest.update(data)
            into.write(data)
            offset += len(data)
            if progress is not None:
                progress(offset, total)
    except GeneratorExit:
        raise
    except BaseException:
        yield from _close_after_failure(service, handle)
        raise
    yield _command(service, "guest-file-close", handle)
    return GuestCopy(offset, digest.hexdigest())


def write_file(
    service: str, path: str, source: BinaryIO, progress: Progress | None, total: int | None
) -> Steps[GuestCopy]:
    """Copy `source`, to its end, into a file of the guest. What it held is gone at once; an error says how much of the new is there."""
    handle = yield from _open(service, path, "wb")
    digest = hashlib.sha256()
    offset = 0
    try:
        while data := source.read(PIECE):
            yield from _write(service, handle, offset, data)
            digest.update(data)
            offset += len(data)
            if progress is not None:
                progress(offset, total)
        # What the agent has buffered shows its errors here, while the handle is still ours to close.
        yield _command(service, "guest-file-flush", handle)
    except GeneratorExit:
        raise
    except BaseException as error:
        yield from _close_after_failure(service, handle)
        if isinstance(error, VmloopError):
            raise _incomplete(error, service, path, offset) from error
        raise
    yield _command(service, "guest-file-close", handle)
    return GuestCopy(offset, digest.hexdigest())


# -- pieces --------------------------------------------------------------------------------------------------------------


def _read(service: str, handle: int, offset: int) -> Steps[tuple[bytes, bool]]:
    """The piece at an offset, and whether it is the last one."""
    command = "guest-file-read"
    answer = fitting((yield from _at(service, handle, offset, command, {"count": PIECE})), _Read, service, command)
    data = from_base64(answer.data, service, command)
    if len(data) != answer.count or len(data) > PIECE:
        raise nonsense(service, command, f"{len(data)} bytes said to be {answer.count} of {PIECE}")
    if not data and not answer.eof:
        raise nonsense(service, command, "nothing, and yet not the end of the file")
    return data, answer.eof


def _write(service: str, handle: int, offset: int, data: bytes) -> Steps[None]:
    """A piece to its offset; the agent may take less of it at once."""
    command = "guest-file-write"
    while data:
        answer = yield from _at(service, handle, offset, command, {"buf-b64": to_base64(data)})
        count = fitting(answer, _Written, service, command).count
        if not 0 < count <= len(data):
            raise nonsense(service, command, f"{count} of {len(data)} bytes written")
        data = data[count:]
        offset += count


def _at(service: str, handle: int, offset: int, command: str, arguments: Mapping[str, Any]) -> Steps[Any]:
    """Ask for a piece where the handle stands, at `offset`; if nobody can know whether it was done, go back there and ask again, once."""
    try:
        return (yield _command(service, command, handle, arguments))
    except (OutcomeUnknown, WorkerLost) as error:
        log.info("%s of %s at %d is asked for again: %s", command, vm_of(service), offset, error)
    back = _command(service, "guest-file-seek", handle, {"offset": offset, "whence": _FROM_START})
    yield Patiently(back, _NOT_BACK_YET, NEW_WORKER_SECONDS)
    return (yield _command(service, command, handle, arguments))


# -- handles -------------------------------------------------------------------------------------------------------------


def _open(service: str, path: str, mode: str) -> Steps[int]:
    """A handle on a file. If we are interrupted meanwhile, it is found out and closed: the same key brings the first answer again."""
    command = "guest-file-open"
    arguments = {"path": path, "mode": mode}
    opening = requests.agent(service, command, arguments, key=os.urandom(16))
    try:
        answer = yield opening
    except (VmloopError, GeneratorExit):
        raise
    except BaseException:
        handle = fitting((yield opening), int, service, command)
        yield from _close_after_failure(service, handle)
        raise
    return fitting(answer, int, service, command)


def _size(service: str, handle: int) -> Steps[int | None]:
    """The size of an open file; None for what has none: a pipe, a file of the kernel's."""
    command = "guest-file-seek"
    try:
        end = yield _command(service, command, handle, {"offset": 0, "whence": _FROM_END})
    except AgentError:
        return None
    yield _command(service, command, handle, {"offset": 0, "whence": _FROM_START})
    return max(fitting(end, _Place, service, command).position, 0) or None


def _close_after_failure(service: str, handle: int) -> Steps[None]:
    """Close a handle; the error that made it necessary is the one to tell."""
    closing = msgspec.structs.replace(_command(service, "guest-file-close", handle), timeout=CLOSE_SECONDS)
    try:
        yield closing
    except VmloopError as error:
        log.warning("a file stays open in the guest %s (handle %d): %s", vm_of(service), handle, error)


def _command(service: str, command: str, handle: int, arguments: Mapping[str, Any] | None = None) -> Request[Any]:
    return requests.agent(service, command, {"handle": handle, **(arguments or {})})


def _incomplete(error: VmloopError, service: str, path: str, written: int) -> VmloopError:
    message = f"{error.message}; {path} in {vm_of(service)} is incomplete: {written} bytes of it were written"
    return type(error)(message, **{**error.fields, "written": written})
