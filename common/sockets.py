# SPDX-License-Identifier: Apache-2.0
"""The one place that makes ZeroMQ sockets and sets their options. Nobody else calls `Context.socket`.

Every socket has: LINGER bounded (a process never hangs in exit), high-water marks (a peer that does not read costs bounded memory),
MAXMSGSIZE (a huge message costs its sender the connection), and on both ends ZMTP heartbeats (a dead peer is noticed). ROUTERs are
MANDATORY: a message that cannot be delivered is an error here, not silence. All sends are non-blocking.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import zmq

from .errors import Busy

# libzmq drops the connection of a peer that sends more in one frame. Twice the wire's limit, so that a message somewhat over
# the limit still gets its coded `too-large` answer instead of a cut connection.
TRANSPORT_MAX_BYTES: Final = 2 * 16 * 1024 * 1024

CLIENT_QUEUE: Final = 2048  # messages; twice the requests one client may have in flight
WORKER_QUEUE: Final = 4096  # messages; covers the requests of one VM and their answers
EVENT_QUEUE: Final = 10_000  # messages a subscriber may lag behind before PUB drops for it

# ZMTP heartbeats: they vouch for the process and its link, not for its Python loop (that is what the status page is for). On a unix
# socket the kernel tells of a peer's end at once; a faster beat would only wake a thousand idle workers for nothing.
HEARTBEAT_MS: Final = 30_000
HEARTBEAT_TIMEOUT_MS: Final = 60_000

LINGER_MS: Final = 500  # time for the last answers to leave when a process ends
# Plain integers: combining and testing pyzmq's enum flags costs more than the call they are for.
POLLIN: Final = int(zmq.POLLIN)
POLLOUT: Final = int(zmq.POLLOUT)
SEND: Final = int(zmq.NOBLOCK)
SEND_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
RECEIVE: Final = int(zmq.NOBLOCK)

RECONNECT_MS: Final = 20
RECONNECT_MAX_MS: Final = 500


class ClientContext(zmq.Context[zmq.Socket[bytes]]):
    """A context that may be lost without having been ended, by a program that forgets a connection.

    The garbage collector ends a cycle of objects in any order, and pyzmq's context waits for sockets that it does not find any more, though
    they are about to be closed by the very same pass: for ever. So here a thread of its own does the waiting, for LINGER at most.
    """

    _made_by = 0  # pyzmq takes an attribute that the class does not have for an option of libzmq's

    def __init__(self) -> None:
        super().__init__()
        self._made_by = os.getpid()

    def __del__(self) -> None:
        if self.closed or os.getpid() != self._made_by or sys.is_finalizing():
            return
        warnings.warn("a connection to a vmloop broker was not closed", ResourceWarning, source=self, stacklevel=2)
        threading.Thread(target=self.term, name="end of a lost connection", daemon=True).start()


def ipc(path: Path) -> str:
    """The ZeroMQ endpoint of a unix socket's path."""
    return f"ipc://{path}"


def bind_router(context: zmq.Context[zmq.Socket[bytes]], path: Path, queue: int) -> zmq.Socket[bytes]:
    """A bound ROUTER for many peers. The caller holds a lock on the path: an ipc bind silently steals it from a running owner."""
    socket = _socket(context, zmq.ROUTER, queue)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.bind(ipc(path))
    return socket


def bind_publisher(context: zmq.Context[zmq.Socket[bytes]], path: Path) -> zmq.Socket[bytes]:
    """A bound PUB; it drops for subscribers that lag, and never blocks."""
    socket = _socket(context, zmq.PUB, EVENT_QUEUE)
    socket.bind(ipc(path))
    return socket


def connect_dealer(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str, queue: int
) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    """A DEALER that connects, reconnects by itself, and queues nothing for a peer that is not there (IMMEDIATE).

    With it comes a PAIR that tells when it has shaken hands with its peer or lost it; that is watched from before the first connection,
    or a quick first handshake would go unseen. Raises `Busy` if there is no room for another socket; then nothing of them is left.
    """
    with ExitStack() as on_failure:
        socket = _socket(context, zmq.DEALER, queue)
        on_failure.callback(socket.close)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        watch = watch_connection(socket)
        on_failure.callback(watch.close)
        socket.connect(endpoint)
        on_failure.pop_all()
    return socket, watch


def connect_subscriber(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str, topics: list[bytes]
) -> zmq.Socket[bytes]:
    """A SUB on some topics. Raises `Busy` if there is no room for another socket."""
    socket = _socket(context, zmq.SUB, EVENT_QUEUE)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    for topic in topics:
        socket.setsockopt(zmq.SUBSCRIBE, topic)
    socket.connect(endpoint)
    return socket


def watch_connection(socket: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    """A PAIR that tells when `socket` has shaken hands with its peer or lost it (zmq_socket_monitor). Ask for it before `connect`."""
    with _room():
        pair = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
    pair.setsockopt(zmq.LINGER, 0)
    return pair


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int, queue: int) -> zmq.Socket[bytes]:
    with _room():
        socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.SNDHWM, queue)
    socket.setsockopt(zmq.RCVHWM, queue)
    socket.setsockopt(zmq.MAXMSGSIZE, TRANSPORT_MAX_BYTES)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    return socket


@contextmanager
def _room() -> Iterator[None]:
    """Each socket takes an fd, and a context has so many sockets at most."""
    try:
        yield
    except zmq.ZMQError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        text = f"no further connection can be made ({error.strerror}): close some of this process, or raise its limit of open files"
        raise Busy(text) from error


def ready_events(socket: zmq.Socket[bytes]) -> int:
    """What can be done now without blocking: POLLIN, POLLOUT. Reading it also re-arms the socket's edge-triggered FD."""
    return socket.getsockopt(zmq.EVENTS)  # type: ignore[return-value]


def readable(sockets: list[tuple[zmq.Socket[bytes], int]]) -> list[tuple[zmq.Socket[bytes], int]]:
    """Those of some (socket, POLLIN) pairs that have a message now. Re-arms their FDs like `ready_events`, at half its price."""
    return zmq.zmq_poll(sockets, 0)  # type: ignore[return-value]


def edge_fd(socket: zmq.Socket[bytes]) -> int:
    """The FD that turns readable when `ready_events` may have changed."""
    return socket.getsockopt(zmq.FD)  # type: ignore[return-value]
