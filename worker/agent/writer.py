# SPDX-License-Identifier: Apache-2.0
"""Commands onto the agent's socket, one at a time, as far as the guest takes them. Used by session.py.

The page says which command is being written: a worker killed just then leaves half of it in the agent's parser, and its successor sends
a sync, whose 0xFF ends that.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from .ledger import AgentLedger


class AgentWriter:
    """The sending half of one connection. Never blocks."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: socket.socket,
        ledger: AgentLedger,
        on_broken: Callable[[str], None],
    ) -> None:
        """`on_broken` is called with the reason, later on the loop, when the socket takes no more."""
        self._loop = loop
        self._socket = connection
        self._ledger = ledger
        self._on_broken = on_broken
        self._rest = b""
        self._number = 0

    @property
    def unfinished(self) -> bool:
        """What was written last has not left whole."""
        return bool(self._rest)

    def write(self, text: bytes, number: int = 0) -> None:
        """Send; what is left of an unfinished command is dropped for it (only a sync can come then, and it starts with 0xFF).

        number: of the command; 0 for a sync, which a successor sends anew anyway: what the page says of a cut command stays.
        """
        self._loop.remove_writer(self._socket)
        self._rest = text
        self._number = number
        if number:
            self._ledger.sending = number
        self._flush()

    def close(self) -> None:
        """Send no more. What was not sent whole stays on the page."""
        self._loop.remove_writer(self._socket)

    def _flush(self) -> None:
        try:
            sent = self._socket.send(self._rest)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            # Not from inside a caller's submit: whoever asks is told on the loop.
            self._loop.remove_writer(self._socket)
            self._loop.call_soon(self._on_broken, f"the agent's socket takes no more: {error.strerror}")
            return
        self._rest = self._rest[sent:]
        if self._rest:
            self._loop.add_writer(self._socket, self._flush)
        else:
            self._loop.remove_writer(self._socket)
            if self._number:
                self._ledger.sending = 0
