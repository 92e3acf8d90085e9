# SPDX-License-Identifier: Apache-2.0
"""A recorded dialogue as something that can be played: each command with what QEMU said to it and after it. Pure; used by simulated_replay.

An event belongs to the oldest command that was unanswered when it came, and is said before its reply; one that came while nothing was
unanswered is said after the last reply before it. So who gives the same commands in the same order sees the same lines in the same order.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final

import msgspec
from msgspec import UNSET

from ...common.errors import ConfigError
from .recording import Entry, Recording
from .redaction import redacted_command

NEGOTIATION: Final = "qmp_capabilities"  # answered whatever its arguments: clients differ in what they enable

_SHOWN: Final = 20  # commands that a refusal names
_SHOWN_BYTES: Final = 200  # of arguments in a refusal


class Said(msgspec.Struct, frozen=True):
    """A line of QEMU's, and how many seconds after its command, or after the reply before it, it came."""

    after: float
    message: dict[str, Any]


class Exchange(msgspec.Struct):
    """A command, and what was said to it."""

    command: str  # "" for an input that was no request
    arguments: dict[str, Any]
    id: Any
    at: float
    before: list[Said] = []  # events until the reply
    reply: Said | None = None  # None: it was never answered
    after: list[Said] = []  # events until the next command
    ends: bool = False  # then QEMU closed the connection


class Script:
    """What is left to be played of a recording. Not pure in this: `take` uses exchanges up."""

    def __init__(self, recording: Recording) -> None:
        """Raises `ConfigError` if the lines are no dialogue: without a greeting, or with a reply before every command."""
        self.origin = recording.origin
        self.greeting, self.opening, exchanges = _read(recording)
        self._left: dict[str, deque[Exchange]] = {}
        self._last: dict[str, Exchange] = {}
        self._recorded: list[str] = list(dict.fromkeys(exchange.command for exchange in exchanges if exchange.command))
        for exchange in exchanges:
            if exchange.command:
                self._left.setdefault(_key(exchange.command, exchange.arguments), deque()).append(exchange)

    def take(self, request: dict[str, Any]) -> Exchange | str:
        """What was said to a command with these arguments, the first time, the second … ; or why there is nothing.

        A command that only looks is answered as the last time when it is given more often than it was recorded.
        """
        shown = redacted_command(request)
        command = str(shown.get("execute", shown.get("exec-oob", "")))
        arguments = shown.get("arguments", {})
        key = _key(command, arguments if isinstance(arguments, dict) else {})
        if left := self._left.get(key):
            self._last[key] = exchange = left.popleft()
            return exchange
        last = self._last.get(key)
        if last is None:
            return self._refusal(command, arguments)
        if command.startswith("query-") or command == NEGOTIATION:
            return msgspec.structs.replace(last, before=[], after=[], ends=False)
        return f"{self.origin}: {command} was given more often than in the recording"

    def unplayed(self) -> list[str]:
        """The commands that were recorded and have not been given, as often as that is so."""
        return [exchange.command for left in self._left.values() for exchange in left]

    def _refusal(self, command: str, arguments: object) -> str:
        if command in self._recorded:
            given = msgspec.json.encode(arguments).decode()[:_SHOWN_BYTES]
            return f"{self.origin}: {command} was not recorded with the arguments {given}"
        names = ", ".join(self._recorded[:_SHOWN]) + (" …" if len(self._recorded) > _SHOWN else "")
        return f"{self.origin}: {command} was not recorded; recorded were {names or 'no commands'}"


def reply_to(request: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """A recorded reply with the id of the live request, where QEMU puts it."""
    reply = {key: value for key, value in recorded.items() if key != "id"}
    if "id" not in request:
        return reply
    return {"id": request["id"], **reply} if "error" in reply else {**reply, "id": request["id"]}


def _key(command: str, arguments: dict[str, Any]) -> str:
    if command == NEGOTIATION:
        return command
    return f"{command} {msgspec.json.encode(arguments, order='deterministic').decode()}"


def _read(recording: Recording) -> tuple[dict[str, Any], list[Said], list[Exchange]]:
    reader = _Reader(recording.origin)
    for number, entry in enumerate(recording.entries, 2):
        reader.entry(entry, number)
    if reader.greeting is None:
        raise ConfigError(f"{recording.origin}: QEMU's greeting is not in it: nobody connected while it was recorded")
    return reader.greeting, reader.opening, reader.exchanges


class _Reader:
    """Goes through the lines of a recording once."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self.greeting: dict[str, Any] | None = None
        self.opening: list[Said] = []  # events before any command
        self.exchanges: list[Exchange] = []
        self._open: list[Exchange] = []  # not answered yet, oldest first
        self._answered: Exchange | None = None
        self._greeted_at = 0.0

    def entry(self, entry: Entry, number: int) -> None:
        if entry.closed is not UNSET:
            self._closed(entry.closed)
        elif isinstance(entry.qemu, dict):
            self._qemu(entry.at, entry.qemu, number)
        else:
            self._client(entry.at, entry.client if isinstance(entry.client, dict) else {})

    def _client(self, at: float, request: dict[str, Any]) -> None:
        request = redacted_command(request)  # as a live one will be: somebody may have written a password into the file
        name = request.get("execute", request.get("exec-oob", ""))
        arguments = request.get("arguments", {})
        command = name if isinstance(name, str) else ""
        exchange = Exchange(command, arguments if isinstance(arguments, dict) else {}, request.get("id", UNSET), at)
        self.exchanges.append(exchange)
        self._open.append(exchange)

    def _qemu(self, at: float, message: dict[str, Any], number: int) -> None:
        if "QMP" in message:
            self.greeting = self.greeting or message
            self._greeted_at = at
        elif "event" in message:
            self._aside(at, message)
        elif "return" in message or "error" in message:
            self._reply(at, message, number)
        else:
            raise ConfigError(f"{self._origin}: line {number}: neither a greeting nor a reply nor an event")

    def _aside(self, at: float, message: dict[str, Any]) -> None:
        if self._open:
            self._open[0].before.append(_said(at, self._open[0].at, message))
        elif self._answered is not None and self._answered.reply is not None:
            done = self._answered
            done.after.append(_said(at, done.at + self._answered.reply.after, message))
        else:
            self.opening.append(_said(at, self._greeted_at, message))

    def _reply(self, at: float, message: dict[str, Any], number: int) -> None:
        found = next((exchange for exchange in self._open if exchange.id == message.get("id", UNSET)), None)
        if found is None:
            if not self.exchanges:
                raise ConfigError(f"{self._origin}: line {number}: a reply before any command")
            self._aside(at, message)  # to a client that had gone: QEMU gives it to the next one
            return
        self._open.remove(found)
        found.reply = _said(at, found.at, message)
        self._answered = found

    def _closed(self, who: str) -> None:
        last = self._open[0] if self._open else self._answered
        if who == "qemu" and last is not None:
            last.ends = True
        self._open.clear()


def _said(at: float, since: float, message: dict[str, Any]) -> Said:
    return Said(max(0.0, at - since), message)
