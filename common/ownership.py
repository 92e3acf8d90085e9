# SPDX-License-Identifier: Apache-2.0
"""A private broker belongs to one process: what client/embedding.py tells it when it starts it, and what it reports back.

The owner is given as a pidfd: it becomes readable when that process has ended, however that came about, and only then. A pipe would stay
open in every child that the owner has forked.

The broker reports on a SOCK_SEQPACKET socket: first that it serves, or why not, and at its end whether all has ended that was to end. Its
exit status would not do for that: whoever ignores SIGCHLD, or reaps every child, has it taken from it. An owner that lives on and has
closed its end has let the broker go.
"""

from __future__ import annotations

import socket
from typing import Annotated, Any, Final, Literal

import msgspec

from .errors import BadRequest, ConfigError, VmloopError, error_from_wire
from .pack import pack, unpack_map

MAX_STOP_TIMEOUT: Final = 3600.0  # seconds; as of any `stop`
# Of the packet in which a private broker says that it serves, or why not: an error's message and a path or two.
MAX_REPORT_BYTES: Final = 64 * 1024

_ALL_ENDED: Final = "all_ended"  # the one key of the last packet

Ending = Literal["stop", "kill", "leave"]


class Ownership(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The argument `--owned` of `python -m vmloop.broker`, as JSON. Both fds are the broker's to close."""

    owner_fd: Annotated[int, msgspec.Meta(gt=2)]
    report_fd: Annotated[int, msgspec.Meta(gt=2)]
    vms: Ending  # what becomes of them when the owner has ended, or asks by SIGTERM
    stop_timeout: Annotated[float, msgspec.Meta(gt=0, le=MAX_STOP_TIMEOUT)]  # seconds that guests have to power down
    temporary: bool = False  # the whole root goes at the end


def ownership_from_argument(text: str) -> Ownership:
    """Raises `BadRequest`."""
    try:
        return msgspec.json.decode(text, type=Ownership)
    except (msgspec.MsgspecError, RecursionError, UnicodeEncodeError) as error:
        raise BadRequest(f"--owned: {error}") from error


def ownership_to_argument(ownership: Ownership) -> str:
    return msgspec.json.encode(ownership).decode()


def send_report(report: socket.socket, error: VmloopError | None) -> None:
    """Tell the owner that the broker serves, or why it does not. An owner that is gone need not be told."""
    body = pack(error.to_wire() if error is not None else {})
    if error is not None and len(body) > MAX_REPORT_BYTES:
        body = pack(type(error)(error.message[:1000]).to_wire())
    _send(report, body)


def send_farewell(report: socket.socket, *, all_ended: bool) -> None:
    """The broker's last word: whether all has ended that was to end; broker.log says what has not."""
    _send(report, pack({_ALL_ENDED: all_ended}))


def _send(report: socket.socket, body: bytes) -> None:
    try:
        report.send(body, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError:
        return


def read_report(body: bytes) -> VmloopError | None:
    """What the private broker has told: None if it serves. Raises `ConfigError` for what is no report."""
    said = _read(body)
    return error_from_wire(said) if said else None


def read_farewell(body: bytes) -> bool:
    """Whether all has ended. Raises `ConfigError` for what is no farewell."""
    all_ended = _read(body).get(_ALL_ENDED)
    if not isinstance(all_ended, bool):
        raise ConfigError("the private broker's last word is none")
    return all_ended


def _read(body: bytes) -> dict[str, Any]:
    try:
        return unpack_map(body)
    except VmloopError as error:
        raise ConfigError(f"the private broker reports nonsense: {error}") from error
