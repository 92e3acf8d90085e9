# SPDX-License-Identifier: Apache-2.0
"""Writes a dialogue with a monitor down as it happens (format: worker/qemu/recording.py). Made by record.

Bytes go in as they were read; whole requests and lines come out, with secrets hidden, each with one write(2): what was passed on stands in
the file, whatever kills the recorder.
"""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import msgspec
from msgspec import UNSET

from ..common.errors import ConfigError, TooLarge
from ..worker.qemu.recording import FORMAT, MAX_RECORDING_BYTES, Entry, Header, encode_end, encode_line
from ..worker.qemu.redaction import answers_with_secret, redacted_command, redacted_message
from ..worker.qemu.simulated_json import JsonStream

MAX_LINE_BYTES: Final = 64 << 20  # of QEMU's, as vmloop's own `worker.max_reply`; a longer one ends the recording
MAX_REQUEST_BYTES: Final = 16 << 20  # of a client's that is not whole yet
MAX_UNANSWERED: Final = 1024  # requests; QEMU itself takes up a handful before it stops reading


class _Asked(NamedTuple):
    """A request whose reply has not come."""

    id: Any  # UNSET if it has none
    secret: bool  # the reply is


class RecordingFile:
    """One recording. Close it; only then is it whole."""

    def __init__(self, path: Path) -> None:
        """Makes the file, for its owner alone. Raises `ConfigError` if it cannot, or if there is one already."""
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise ConfigError(f"{path} is there already; a recording overwrites nothing: choose another file") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
        self._path = path
        self._began = time.monotonic()
        self._bytes = 0
        self._header = False
        self._count = 0
        self._asked: list[_Asked] = []  # of this session, oldest first
        self._owed: list[Any] = []  # ids of questions for a secret whose client went before the answer
        self._fresh_session()

    def _fresh_session(self) -> None:
        self._from_client = JsonStream()
        self._unfinished_request = 0  # bytes
        self._from_qemu: list[bytes] = []  # pieces of a line that is not whole yet
        self._from_qemu_bytes = 0
        self._fds = 0  # that came with the bytes of a request that is not whole yet
        # QEMU may give the reply to a client that has gone to the next one.
        self._owed = [*self._owed, *(asked.id for asked in self._asked if asked.secret)][-MAX_UNANSWERED:]
        self._asked = []

    # -- what was read --

    def client(self, data: bytes, fds: int = 0) -> None:
        """Bytes of the client's, with so many file descriptors. Raises `TooLarge`, and OSError if the disk takes nothing."""
        self._from_client.feed(data)
        self._unfinished_request += len(data)
        self._fds = fds or self._fds  # QEMU too keeps those of the last piece that had any
        while (item := self._from_client.take()) is not None:
            self._unfinished_request = 0
            request = item.value if isinstance(item.value, dict) else None
            self._note_asked(request)
            self._entry(
                Entry(self._now(), client=None if request is None else redacted_command(request), fds=self._fds)
            )
            self._fds = 0
        if self._unfinished_request > MAX_REQUEST_BYTES:
            raise TooLarge(
                f"{self._path}: the client sends a request of over {MAX_REQUEST_BYTES} bytes", limit=MAX_REQUEST_BYTES
            )

    def _note_asked(self, request: dict[str, Any] | None) -> None:
        if len(self._asked) >= MAX_UNANSWERED:
            raise TooLarge(f"{self._path}: {MAX_UNANSWERED} requests are unanswered", limit=MAX_UNANSWERED)
        secret = request is not None and answers_with_secret(request)
        self._asked.append(_Asked(UNSET if request is None else request.get("id", UNSET), secret))

    def _is_secret(self, message: dict[str, Any]) -> bool:
        """Whether a line is, or may be, the reply to a request that asked for a secret. Each reply strikes out its request."""
        if "return" not in message and "error" not in message:
            return False
        name = message.get("id", UNSET)
        if isinstance(message.get("return"), str) and name in self._owed:
            return True  # or the answer to a later question: which of the two cannot be told, so nothing is struck out
        for asked in self._asked:
            if asked.id == name:
                self._asked.remove(asked)
                return asked.secret
        return False

    def qemu(self, data: bytes) -> None:
        """Bytes of QEMU's. Raises `TooLarge`, `ConfigError` for a line that is no JSON object, and OSError."""
        *lines, rest = data.split(b"\n")
        for line in lines:
            whole = b"".join((*self._from_qemu, line))
            self._from_qemu.clear()
            self._from_qemu_bytes = 0
            if whole.strip():
                self._line(whole)
        if rest:
            self._from_qemu.append(rest)
            self._from_qemu_bytes += len(rest)
        if self._from_qemu_bytes > MAX_LINE_BYTES:
            raise TooLarge(f"{self._path}: QEMU sends a line of over {MAX_LINE_BYTES} bytes", limit=MAX_LINE_BYTES)

    def closed(self, who: Literal["qemu", "client"]) -> None:
        """The connection has ended; the next bytes are of another one."""
        if self._header:
            self._entry(Entry(self._now(), closed=who))
        self._fresh_session()

    def close(self) -> None:
        """The recording is whole. Raises `ConfigError` if nobody was recorded: then there is no file."""
        try:
            if self._header:
                os.write(self._fd, encode_end(self._count))
            else:
                self._path.unlink(missing_ok=True)
                raise ConfigError(
                    f"{self._path}: nothing was recorded: no client got QEMU's greeting; no file was made"
                )
        finally:
            os.close(self._fd)

    # -- lines --

    def _line(self, line: bytes) -> None:
        try:
            message = msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(
                f"{self._path}: what QEMU says is no JSON object ({error}): {line[:80]!r}; is it a QMP socket?"
            ) from error
        if not self._header:
            self._begin(message)
        self._entry(Entry(self._now(), qemu=redacted_message(message, secret=self._is_secret(message))))

    def _begin(self, greeting: dict[str, Any]) -> None:
        try:
            version = greeting["QMP"]["version"]
            number = ".".join(str(version["qemu"][part]) for part in ("major", "minor", "micro"))
            package = str(version.get("package", ""))
        except (KeyError, TypeError, AttributeError):
            raise ConfigError(f"{self._path}: the other end does not greet as QEMU does; is it a QMP socket?") from None
        made = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        self._write(encode_line(Header(FORMAT, made, number, package)))
        self._header = True

    def _entry(self, entry: Entry) -> None:
        self._write(encode_line(entry))
        self._count += 1

    def _write(self, line: bytes) -> None:
        if self._bytes + len(line) > MAX_RECORDING_BYTES:
            raise TooLarge(
                f"{self._path}: over {MAX_RECORDING_BYTES} bytes; record less at a time", limit=MAX_RECORDING_BYTES
            )
        left = memoryview(line)
        while left:
            left = left[os.write(self._fd, left) :]
        self._bytes += len(line)

    def _now(self) -> float:
        return round(time.monotonic() - self._began, 6)
