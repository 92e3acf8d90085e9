# SPDX-License-Identifier: Apache-2.0
"""Where the broker listens, and whether it does. Used by session.py and aio.py when they connect."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..common.errors import BadRequest, NoBroker
from ..common.paths import default_paths, paths_under, require_socket_path
from ..common.sockets import ipc

_IPC: Final = "ipc://"

# Between attempts to reach a broker that is not up yet: soon at first, because it is often just starting.
FIRST_WAIT: Final = 0.02
MAX_WAIT: Final = 0.5


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The two sockets of a broker that clients use."""

    client: Path
    events: Path

    @property
    def client_address(self) -> str:
        return ipc(self.client)

    @property
    def events_address(self) -> str:
        return ipc(self.events)


def find_endpoint(address: str | None, root: str | Path | None) -> Endpoint:
    """The broker at `ipc://…/client.sock`, or the one under a root, or the host's own."""
    if address is not None and root is not None:
        raise BadRequest("give an endpoint or a root, not both")
    if address is not None:
        if not address.startswith(_IPC + "/"):
            raise BadRequest(f"{address!r:.200} is no endpoint: it is written ipc:///PATH/client.sock")
        client = require_socket_path(Path(address[len(_IPC) :]))
        return Endpoint(client, client.with_name("events.sock"))
    paths = paths_under(Path(root)) if root is not None else default_paths(os.environ, os.getuid())
    return Endpoint(require_socket_path(paths.client_socket), require_socket_path(paths.events_socket))


def require_listening(endpoint: Endpoint) -> None:
    """`NoBroker` unless somebody listens on the client socket. Asks the kernel, not the broker: takes microseconds and never blocks."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(endpoint.client))
        except BlockingIOError:
            return  # its backlog is full: somebody is there
        except OSError as error:
            raise NoBroker(
                f"nobody listens at {endpoint.client} ({error.strerror}); start a broker there with: vmloop broker",
                socket=str(endpoint.client),
            ) from None


def wait_until_listening(endpoint: Endpoint, wait: float) -> None:
    """`require_listening`, tried again for `wait` seconds."""
    if wait <= 0:
        require_listening(endpoint)
        return
    from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

    attempts = Retrying(
        reraise=True,
        retry=retry_if_exception_type(NoBroker),
        stop=stop_after_delay(wait),
        wait=wait_exponential(multiplier=FIRST_WAIT, max=MAX_WAIT),
    )
    attempts(require_listening, endpoint)


async def wait_until_listening_async(endpoint: Endpoint, wait: float) -> None:
    """The same on an event loop."""
    if wait <= 0:
        require_listening(endpoint)
        return
    from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_exponential

    async for attempt in AsyncRetrying(
        reraise=True,
        retry=retry_if_exception_type(NoBroker),
        stop=stop_after_delay(wait),
        wait=wait_exponential(multiplier=FIRST_WAIT, max=MAX_WAIT),
    ):
        with attempt:
            require_listening(endpoint)
