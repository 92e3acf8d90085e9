# SPDX-License-Identifier: Apache-2.0
"""Packets on run/zygote.sock: a SOCK_SEQPACKET unix socket, one msgpack map a packet, fds beside it (SCM_RIGHTS).

    broker → zygote    Hello, Fork, Tell, Quit, Retire; Keep (with an fd), Drop and Exited of another zygote or an earlier life
    zygote → broker    Hello, Forked (with the worker's pidfd), NotForked, Exited; after Tell: Kept (with the fd), Dropped, Told
    worker → zygote    Keep (with the fd), Drop, Watch                        zygote → worker    Exited, after Watch

Used by broker/spawner.py, broker/handover.py, broker/zygote.py, worker/keeper.py and worker/orphan.py.
"""

from __future__ import annotations

import array
import socket
from typing import Final

import msgspec

from .errors import BadRequest
from .settings import Settings

MAX_PACKET_BYTES: Final = 256 * 1024  # a Fork carries the settings; still far below the socket's buffer
MAX_FDS: Final = 4


class FdsLost(BadRequest):
    """A packet came whole, but not the fds beside it. The connection is as good as before."""

    packet: Packet


class WorkerSpec(msgspec.Struct, frozen=True):
    """What the broker tells a worker at its birth."""

    name: str
    run: str
    state: str
    etc: str
    settings: Settings


class Fork(msgspec.Struct, frozen=True, tag=True):
    """Make a worker for a VM; it inherits the fds that are kept for it."""

    vm: str
    spec: bytes  # msgpack of WorkerSpec


class Forked(msgspec.Struct, frozen=True, tag=True):
    """The worker runs; its pidfd comes beside the packet."""

    vm: str
    pid: int


class NotForked(msgspec.Struct, frozen=True, tag=True):
    """No worker was made."""

    vm: str
    error: str


class Exited(msgspec.Struct, frozen=True, tag=True):
    """A child has ended: a worker (`vm` is set), or a QEMU that its worker left as an orphan. `status`: negative is a signal.

    To a worker that sent `Watch`: its QEMU has ended. From a broker: an orphan of a zygote that has retired has ended.
    """

    pid: int
    status: int
    vm: str = ""


class Keep(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Hold this connection of a VM, in a slot (`monitor` or `agent`). `spare`: only if the slot is empty."""

    vm: str
    slot: str
    spare: bool = False


class Drop(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Close what is kept for a VM: all of it, or in one slot."""

    vm: str
    slot: str = ""


class Quit(msgspec.Struct, frozen=True, tag=True):
    """End, once the last worker has ended."""


class Hello(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Who speaks: the version of vmloop; of a zygote also its process (`started` as in common/process.py). The zygote answers."""

    version: str
    pid: int = 0
    started: int = 0


class Tell(msgspec.Struct, frozen=True, tag=True):
    """Tell me of everything that you keep, then `Told`, and from then on of every change."""


class Kept(msgspec.Struct, frozen=True, tag=True):
    """This is kept; a duplicate comes beside the packet."""

    vm: str
    slot: str


class Dropped(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """This is not kept any more; `slot` empty: nothing of that VM."""

    vm: str
    slot: str = ""


class Told(msgspec.Struct, frozen=True, tag=True):
    """That was all."""


class Retire(msgspec.Struct, frozen=True, tag=True):
    """Another zygote has everything: let go of what you keep, and end with your last child, orphans among them."""


class Watch(msgspec.Struct, frozen=True, tag=True):
    """This process is the VM's QEMU: should it become yours, remember how it ended, and tell me while I am connected."""

    vm: str
    pid: int


Packet = Fork | Forked | NotForked | Exited | Keep | Drop | Quit | Hello | Tell | Kept | Dropped | Told | Retire | Watch

_decoder = msgspec.msgpack.Decoder(Packet)


def send_packet(connection: socket.socket, packet: Packet, fds: list[int] | None = None) -> None:
    """Send one packet. Raises OSError, BlockingIOError included when the socket is non-blocking and full."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    connection.sendmsg([msgspec.msgpack.encode(packet)], rights)


def receive_packet(connection: socket.socket) -> tuple[Packet | None, list[int]]:
    """One packet and the fds beside it, which are the caller's to close; (None, []) at the end of the connection.

    Raises `BadRequest` for a packet that cannot be read (its fds are closed), `FdsLost` where only these are missing, OSError for the
    socket's own errors.
    """
    data, fds, flags, _ = socket.recv_fds(connection, MAX_PACKET_BYTES, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
    if not data:
        _close(fds)
        return None, []
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        _close(fds)
        if flags & socket.MSG_TRUNC:
            raise BadRequest("a packet on the zygote's socket is too large")
        # The kernel had no fd of ours to put it into, and dropped it.
        lost = FdsLost("no fd is free for what came beside a packet on the zygote's socket")
        lost.packet = _packet_in(data)
        raise lost
    try:
        return _packet_in(data), list(fds)
    except BadRequest:
        _close(fds)
        raise


def _packet_in(data: bytes) -> Packet:
    try:
        packet: Packet = _decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise BadRequest(f"a packet on the zygote's socket makes no sense: {error}") from error
    return packet


def _close(fds: list[int]) -> None:
    for fd in fds:
        socket.close(fd)
