# SPDX-License-Identifier: Apache-2.0
"""At most once: which mutating requests were begun and how they were answered, kept in run/vms/NAME/answers across workers. Used by app.py.

A request that comes again, by its number (the broker gives it to the next worker) or by its key (the client repeats it), gets the first
one's answer instead of being carried out twice. Written before the act:

    begun      number, key, op, cursor           before an operation of several steps does anything
    adopted    number, begun                     before another worker goes on with it for a request of another number
    step       number, name                      before one of its commands goes to QEMU; the number that it was begun under
    stepped    number, name, error               that command is answered, before the answer is settled
    answered   number, key, kind, body           before the answer goes out

A single QMP command needs no `begun`: the ledger on the status page says that it was sent, and whom its answer belongs to. The file is a
row of frames (journal/frames.py); it is written anew when most of it is of no use any more. A disk that takes nothing costs the memory
across workers, never the operation.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final

import msgspec

from ..common.cursor import Cursor
from .journal.frames import frame, frames

log = logging.getLogger(__name__)

MAX_ANSWERS: Final = 1024  # design, section 5; also the begun ones
MAX_BYTES: Final = 8 * 1024 * 1024  # of remembered answers; one larger answer replaces all others
SLACK_BYTES: Final = 1024 * 1024  # of the file beyond twice what is remembered: then it is written anew


NOWHERE: Final = Cursor(0, 0)


class Answered(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The answer of a request: `kind` and `body` as in common/wire.py; `epoch`, `seq`: the newest event when it was made."""

    number: int
    key: bytes
    kind: int
    body: bytes
    epoch: int = 0
    seq: int = 0

    @property
    def cursor(self) -> Cursor | None:
        """None: it is of a vmloop that did not write it down."""
        return Cursor(self.epoch, self.seq) if self.epoch else None


class Begun(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """An operation of several steps that was begun. `epoch`, `seq`: the newest event just before."""

    number: int
    key: bytes
    op: str
    epoch: int
    seq: int

    @property
    def cursor(self) -> Cursor:
        return Cursor(self.epoch, self.seq)


class Adopted(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The operation that was begun under one number is that of another request, too: its key came again."""

    number: int
    begun: int


class Step(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A command of such an operation that went, or was about to go, to QEMU."""

    number: int
    name: str


class Stepped(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """QEMU's answer to such a command: `error` as it goes over the wire, None if it was carried out."""

    number: int
    name: str
    error: dict[str, Any] | None


class Left(msgspec.Struct):
    """What an operation has done so far: the commands that it was about to send, and how they were answered."""

    begun: Begun
    steps: list[str]
    answers: dict[str, dict[str, Any] | None]

    def copy(self) -> Left:
        """As it is now."""
        return Left(self.begun, list(self.steps), dict(self.answers))


_Entry = Answered | Begun | Adopted | Step | Stepped
_decoder: Final = msgspec.msgpack.Decoder(_Entry)
_encode: Final = msgspec.msgpack.Encoder().encode


class Answers:
    """The remembered answers of one VM, the oldest forgotten first."""

    def __init__(self, path: Path | None = None) -> None:
        """`path`: where they outlive the worker; None keeps them in memory. Damage at the file's end is cut off and logged."""
        self._path = path
        self._fd: int | None = None
        self._file_bytes = 0
        self._trouble = ""
        self._answers: OrderedDict[int, Answered] = OrderedDict()
        self._number_of: dict[bytes, int] = {}
        self._bytes = 0
        self._running: dict[bytes, list[int]] = {}
        self._begun: OrderedDict[int, Left] = OrderedDict()
        self._adopted: dict[int, int] = {}  # request → what its operation was begun under, if that is another number
        self.own: set[int] = set()  # operations that this worker carries out: nothing to take over
        if path is not None:
            self._load(path)

    # -- asked when a request comes -------------------------------------------------------------------------------------------

    def known(self, number: int, key: bytes = b"") -> Answered | None:
        """The first answer to a request of this number, or of this key."""
        if key:
            number = self._number_of.get(key, number)
        return self._answers.get(number)

    def begin(self, key: bytes, number: int) -> bool:
        """Note that a request with a key is being carried out. False if one with this key runs already: both get its answer."""
        if key in self._running:
            self._running[key].append(number)
            return False
        self._running[key] = [number]
        return True

    def left_by_predecessor(self, number: int, key: bytes = b"") -> Left | None:
        """An operation that an earlier worker had begun and not answered, and how far it had come."""
        number = self._adopted.get(number, number)
        for left in self.left():
            if left.begun.number == number or (key and left.begun.key == key):
                return left.copy()
        return None

    def left(self) -> list[Left]:
        """All operations that an earlier worker had begun and not answered."""
        return [left for number, left in self._begun.items() if number not in self.own]

    # -- told when it is carried out ------------------------------------------------------------------------------------------

    def begun(self, number: int, key: bytes, op: str, cursor: Cursor) -> None:
        """Write down that an operation begins."""
        self._note_begun(Begun(number, key, op, cursor.epoch, cursor.seq))
        self.own.add(number)
        self._write(self._begun[number].begun)

    def adopt(self, begun: Begun, number: int) -> None:
        """This worker goes on with what an earlier one had begun. `number`: that the request has now."""
        self.own.add(begun.number)
        if number not in (begun.number, *self._adopted):
            self._adopted[number] = begun.number
            self._write(Adopted(number, begun.number))

    def step(self, number: int, name: str) -> None:
        """Write down that an operation is about to send a command."""
        number = self._adopted.get(number, number)
        left = self._begun.get(number)
        if left is not None and name not in left.steps:
            left.steps.append(name)
            self._write(Step(number, name))

    def stepped(self, number: int, name: str, error: dict[str, Any] | None) -> None:
        """Write down how QEMU has answered it; `error`: as it goes over the wire, None if it was carried out."""
        number = self._adopted.get(number, number)
        left = self._begun.get(number)
        if left is not None:
            left.answers[name] = error
            self._write(Stepped(number, name, error))

    def finish(
        self,
        number: int,
        key: bytes,
        kind: int,
        body: bytes,
        cursor: Cursor = NOWHERE,
        *,
        lasting: bool = True,
        again: bool = False,
    ) -> list[int]:
        """Remember the answer; the numbers of all requests that wait for it. `lasting`: the next worker must know it too.

        `again`: nothing was done. It is the answer of these requests, and the next one with their key is carried out.
        """
        lasting = self._end(number) or lasting
        # One that was refused before it began ends nothing: another request with its key may be running.
        numbers = self._running.pop(key) if number in self._running.get(key, ()) else [number]
        key = b"" if again else key
        if lasting or key:
            answer = Answered(number, key, kind, body, cursor.epoch, cursor.seq)
            self._remember(answer)
            if lasting:
                self._write(answer)
        return numbers

    def fileno(self) -> int:
        """The file's fd; -1 while there is none."""
        return -1 if self._fd is None else self._fd

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    # -- memory ---------------------------------------------------------------------------------------------------------------

    def _remember(self, answer: Answered) -> None:
        self._forget(answer.number)
        if answer.key:
            self._forget(self._number_of.get(answer.key, 0))
            self._number_of[answer.key] = answer.number
        self._answers[answer.number] = answer
        self._bytes += len(answer.body)
        while len(self._answers) > MAX_ANSWERS or (self._bytes > MAX_BYTES and len(self._answers) > 1):
            self._forget(next(iter(self._answers)))

    def _forget(self, number: int) -> None:
        answer = self._answers.pop(number, None)
        if answer is not None:
            self._bytes -= len(answer.body)
            if self._number_of.get(answer.key) == number:
                del self._number_of[answer.key]

    def _note_begun(self, begun: Begun) -> None:
        self._begun[begun.number] = Left(begun, [], {})
        while len(self._begun) > MAX_ANSWERS:
            self._end(next(iter(self._begun)))

    def _end(self, number: int) -> bool:
        """The operation of a request is over, or forgotten. False if none was begun for it."""
        begun = self._adopted.get(number, number)
        if self._begun.pop(begun, None) is None:
            return False
        self.own.discard(begun)
        for request in [request for request, adopted in self._adopted.items() if adopted == begun]:
            del self._adopted[request]
        return True

    # -- the file -------------------------------------------------------------------------------------------------------------

    def _load(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            self._note_trouble(error)
            return
        good = 0
        for payload, end in frames(content):
            try:
                self._take(_decoder.decode(payload))
            except (msgspec.MsgspecError, RecursionError) as error:
                log.warning("%s: an entry makes no sense (%s); it and what follows is not used", path, error)
                break
            good = end
        self._file_bytes = good
        if good < len(content):
            log.warning("%s: %d bytes at its end are damaged or torn; they are cut off", path, len(content) - good)
            self._rewrite()

    def _take(self, entry: _Entry) -> None:
        if isinstance(entry, Answered):
            self._end(entry.number)
            self._remember(entry)
        elif isinstance(entry, Begun):
            self._note_begun(entry)
        elif isinstance(entry, Adopted):
            if entry.begun in self._begun:
                self._adopted[entry.number] = entry.begun
        elif (left := self._begun.get(entry.number)) is None:
            return
        elif isinstance(entry, Step):
            left.steps.append(entry.name)
        else:
            left.answers[entry.name] = entry.error

    def _write(self, entry: _Entry) -> None:
        if self._path is None:
            return
        data = frame(_encode(entry))
        try:
            if self._fd is None:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            written = os.write(self._fd, data)
        except OSError as error:
            self._note_trouble(error)
            return
        if written < len(data):
            self._cut()
            return
        self._trouble = ""
        self._file_bytes += written
        if self._file_bytes > 2 * self._bytes + SLACK_BYTES:
            self._rewrite()

    def _cut(self) -> None:
        """The disk took a part: what is written behind that would not be found any more."""
        assert self._fd is not None
        try:
            os.ftruncate(self._fd, self._file_bytes)
        except OSError as error:
            self._note_trouble(error)
        else:
            self._note_trouble(OSError(0, "the disk is full"))

    def _rewrite(self) -> None:
        """Write the file anew with what is remembered. It lives as long as the boot, so it is not synced."""
        assert self._path is not None
        fresh = self._path.with_name(f".{self._path.name}.new")
        content = b"".join(frame(_encode(entry)) for entry in self._entries())
        try:
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            self._note_trouble(error)
            return
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.rename(fresh, self._path)
        except OSError as error:
            self._note_trouble(error)
            os.close(fd)
            with contextlib.suppress(OSError):  # the first error is the one to tell
                os.unlink(fresh)
            return
        self.close()
        self._fd = fd
        self._file_bytes = len(content)

    def _entries(self) -> list[_Entry]:
        entries: list[_Entry] = list(self._answers.values())
        for number, left in self._begun.items():
            entries.append(left.begun)
            entries += [Step(number, name) for name in left.steps]
            entries += [Stepped(number, name, error) for name, error in left.answers.items()]
        entries += [Adopted(number, begun) for number, begun in self._adopted.items()]
        return entries

    def _note_trouble(self, error: OSError) -> None:
        if self._trouble != str(error):  # once for a disk that stays full
            self._trouble = str(error)
            log.error("%s: answers would not outlive this worker: %s", self._path, error)
