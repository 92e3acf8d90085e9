# SPDX-License-Identifier: Apache-2.0
"""A recorded dialogue with a monitor, as a file: one JSON object a line. Pure but for `read_recording`. docs/testing.md is the guide.

    {"vmloop-recording": 1, "made": "2026-11-26T01:20:00Z", "qemu": "7.2.22", "package": "Debian 1:7.2+dfsg-7"}
    {"at": 0.0, "qemu": {"QMP": …}}                            a line of QEMU's: greeting, reply or event
    {"at": 0.0021, "client": {"execute": …}}                   a request of the client's; `client` null: something that is none
    {"at": 0.0031, "client": {"execute": …}, "fds": 1}         it came with file descriptors
    {"at": 1.5, "closed": "qemu"}                              who ended the connection; the next greeting begins another one
    {"end": 4}                                                 how many lines there are between the first and this one

`at`: seconds since the recording began. Secrets are hidden before a line is written (redaction). Written by
testing/recording_file.py, read by simulated_replay. Lines come from a file, so they are hostile until checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from ...common.errors import ConfigError
from .redaction import MAX_DEPTH

FORMAT: Final = 1
MAX_NESTING: Final = (
    MAX_DEPTH + 8
)  # levels of a line; a recorder hides what lies deeper, with some levels of its own around it
MAX_RECORDING_BYTES: Final = (
    256 << 20
)  # of a file; one dialogue with every reply of query-qmp-schema in it has a few MiB

Model = TypeVar("Model")

_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"version": "vmloop-recording"}):
    """The first line."""

    version: int
    made: str  # ISO 8601, UTC
    qemu: str  # its version: "7.2.22"
    package: str = ""


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A line between the first and the last; one of `qemu`, `client`, `closed` is set."""

    at: _Seconds
    qemu: dict[str, Any] | UnsetType = UNSET
    client: dict[str, Any] | UnsetType | None = UNSET
    closed: Literal["qemu", "client"] | UnsetType = UNSET
    fds: Annotated[int, msgspec.Meta(ge=0, le=16)] = 0


class _End(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    end: Annotated[int, msgspec.Meta(ge=0)]


class Recording(msgspec.Struct, frozen=True):
    """A whole recording."""

    origin: str  # the file, for messages
    header: Header
    entries: tuple[Entry, ...]


def encode_line(line: Header | Entry) -> bytes:
    """A line with its end."""
    return msgspec.json.encode(line) + b"\n"


def encode_end(count: int) -> bytes:
    """The last line, after so many between it and the first."""
    return msgspec.json.encode(_End(count)) + b"\n"


def read_recording(path: Path) -> Recording:
    """The recording in a file. Raises `ConfigError` if it cannot be read, is torn, or is something else."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RECORDING_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the recording {path}: {error.strerror}") from error
    return decode_recording(data, str(path))


def decode_recording(data: bytes, origin: str) -> Recording:
    """The recording in a file's content. Raises `ConfigError` naming the line that is wrong; `origin` names the file."""
    if len(data) > MAX_RECORDING_BYTES:
        raise ConfigError(f"{origin}: over {MAX_RECORDING_BYTES} bytes; record less at a time")
    lines = data.split(b"\n")
    unfinished = lines.pop()
    header = _header(lines[0] if lines else unfinished, origin)
    if unfinished:
        raise ConfigError(
            f"{origin}: line {len(lines) + 1} is cut off: the recorder was killed, or the file copied only in part"
        )
    if len(lines) < 2 or not lines[-1].startswith(b'{"end"'):
        raise ConfigError(
            f"{origin}: the last line is not the end of a recording: it was killed; to use what there is, add the line"
            f' {{"end": {len(lines) - 1}}}'
        )
    entries = tuple(_entry(line, number, origin) for number, line in enumerate(lines[1:-1], 2))
    end = _decoded(lines[-1], _End, len(lines), origin).end
    if end != len(entries):
        raise ConfigError(f"{origin}: its last line speaks of {end} lines, there are {len(entries)}: some were lost")
    return Recording(origin, header, entries)


def _header(line: bytes, origin: str) -> Header:
    if b'"vmloop-recording"' not in line:
        raise ConfigError(f"{origin} is no recording of a monitor; make one with python -m vmloop.testing.record")
    header = _decoded(line, Header, 1, origin)
    if header.version != FORMAT:
        raise ConfigError(
            f"{origin}: a recording of format {header.version}, this vmloop reads {FORMAT}: record it again"
        )
    return header


def _entry(line: bytes, number: int, origin: str) -> Entry:
    entry = _decoded(line, Entry, number, origin)
    if sum(part is not UNSET for part in (entry.qemu, entry.client, entry.closed)) != 1:
        raise ConfigError(f"{origin}: line {number}: one of qemu, client and closed is expected")
    if _is_deeper((entry.qemu, entry.client), MAX_NESTING):
        raise ConfigError(f"{origin}: line {number}: over {MAX_NESTING} levels of nesting")
    return entry


def _is_deeper(value: object, levels: int) -> bool:
    """Whether a value is nested deeper. Not by recursion, of which Python has not enough."""
    level: list[Any] = [value]
    for _ in range(levels):
        level = [item for one in level for item in _items_of(one)]
        if not level:
            return False
    return True


def _items_of(value: object) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def _decoded(line: bytes, model: type[Model], number: int, origin: str) -> Model:
    try:
        return msgspec.json.decode(line, type=model)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{origin}: line {number}: {error}") from error
