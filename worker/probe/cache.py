# SPDX-License-Identifier: Apache-2.0
"""Documents on disk: state/capabilities/SHA256-of-the-path.json, each with the facts that it hangs on.

A file is written whole. One that is torn or foreign is set aside, one whose facts have changed is replaced by the next probe. Where the
disk takes no file, all works without one. Used by asking.py and worker/run_capabilities.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import tenacity

from ...common.capabilities import Capabilities, from_plain, to_plain
from ...common.durable import set_aside, write_whole
from ...common.errors import BadRequest
from .validity import Stamp

log = logging.getLogger(__name__)

MAX_BYTES: Final = 16 * 1024 * 1024  # of a file; a document has to fit in a message anyway
LOCK_POLL: Final = 0.02  # seconds between two looks at a lock that another process holds while it probes


class Cached(msgspec.Struct, frozen=True):
    """What a file holds. `stamp` is None where a running QEMU was asked."""

    stamp: Stamp | None
    capabilities: Capabilities


class _File(msgspec.Struct):
    stamp: Stamp | None
    capabilities: dict[str, Any]


class _Tcg(msgspec.Struct):
    cpus: list[str] = []


class _Names(msgspec.Struct):
    """The part of a document that a definition is checked with; what else is there is not even made into objects."""

    format: int
    binary: str = ""
    version: tuple[int, int, int] = (0, 0, 0)
    target: str = ""
    machines: list[str] = []
    cpus: list[str] = []
    device_types: list[str] = []
    accelerators: list[str] = []
    device_aliases: dict[str, str] = {}
    tcg: _Tcg | None = None


class _NamesFile(msgspec.Struct):
    stamp: Stamp | None
    capabilities: _Names


class Cache:
    """The files of one directory. `directory` None: there are none."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def path_of(self, binary: str) -> Path | None:
        """Where the document of a binary is, or would be."""
        if self._directory is None:
            return None
        return self._directory / f"{hashlib.sha256(os.fsencode(binary)).hexdigest()}.json"

    def read(self, stamp: Stamp) -> Capabilities | None:
        """The document that was made under these facts; None if there is none."""
        path = self.path_of(stamp.path)
        cached = read_document(path) if path is not None else None
        return cached.capabilities if cached is not None and cached.stamp == stamp else None

    def read_names(self, stamp: Stamp) -> Capabilities | None:
        """The same with nothing in it but the names that arguments are checked with: a worker's memory is counted."""
        path = self.path_of(stamp.path)
        cached = _read(path, _decode_names) if path is not None else None
        return cached.capabilities if cached is not None and cached.stamp == stamp else None

    def write(self, stamp: Stamp, capabilities: Capabilities) -> None:
        """Keep a document. A disk that takes no file is only told of."""
        path = self.path_of(stamp.path)
        if path is None:
            return
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(path, encode_document(Cached(stamp, capabilities)))
        except OSError as error:
            log.warning("%s cannot be written (%s): %s is probed again next time", path, error.strerror, stamp.path)

    @contextlib.asynccontextmanager
    async def lock(self, binary: str) -> AsyncIterator[None]:
        """Held around a probe: of several processes that want one, one makes it and the others find its file. The caller's deadline bounds
        the wait. Where there can be no lock there is none."""
        fd = self._open_lock(binary)
        if fd is None:
            yield
            return
        try:
            async for attempt in tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception_type(BlockingIOError), wait=tenacity.wait_fixed(LOCK_POLL)
            ):
                with attempt:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(fd)

    def _open_lock(self, binary: str) -> int | None:
        path = self.path_of(binary)
        if path is None:
            return None
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            return os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            log.info("no lock for the probe of %s: %s", binary, error)
            return None


def encode_document(cached: Cached) -> bytes:
    """The content of a file."""
    return msgspec.json.encode(_File(cached.stamp, to_plain(cached.capabilities)))


def decode_document(content: bytes) -> Cached:
    """What a file's content says. `BadRequest` if that makes no sense."""
    try:
        file = msgspec.json.decode(content, type=_File)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadRequest(str(error)) from error
    return Cached(file.stamp, from_plain(file.capabilities))


def _decode_names(content: bytes) -> Cached:
    try:
        file = msgspec.json.decode(content, type=_NamesFile)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadRequest(str(error)) from error
    return Cached(file.stamp, from_plain(msgspec.to_builtins(file.capabilities)))


def read_document(path: Path) -> Cached | None:
    """A file; None if there is none, or none that makes sense: then it is set aside and named in the log."""
    return _read(path, decode_document)


def _read(path: Path, decode: Callable[[bytes], Cached]) -> Cached | None:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise BadRequest(f"over {MAX_BYTES} bytes")
        return decode(content)
    except FileNotFoundError:
        return None
    except (BadRequest, IsADirectoryError) as error:
        try:
            log.warning("%s is damaged (%s); it was moved to %s", path, error, set_aside(path))
        except OSError as failure:
            log.warning("%s is damaged (%s), and cannot be moved: %s", path, error, failure.strerror)
    except OSError as error:
        log.warning("%s cannot be read: %s", path, error.strerror)
    return None
