# SPDX-License-Identifier: Apache-2.0
"""The questions on a monitor's connection: greeting, negotiation, each batch at once, each answer by its id. Used by probing.py.

A probe's QEMU dies with its probe, so there is nothing here that a successor would need: no page, no ledger, no journal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from ...common.errors import DeadlineExceeded, MonitorLost, QmpError
from ..qmp.commands import encode_command, qmp_error
from .questions import Question, Replies, Reply, due

# One line of the monitor: the schema has a quarter of a MiB, and a document must fit in a message.
MAX_LINE_BYTES: Final = 16 * 1024 * 1024
# Lines that answer nothing (events, noise) before a connection is no monitor's.
MAX_NOISE: Final = 1000
GREETING_SECONDS: Final = 10.0  # a QEMU that has just been started, on a host with much else to do
COMMAND_SECONDS: Final = 5.0  # the slowest takes some 30 ms


class Conversation:
    """One connection, from the greeting to the last answer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._noise = 0
        self._id = 0

    async def open(self) -> None:
        """Read the greeting and leave negotiation mode. Raises `MonitorLost` or `DeadlineExceeded`."""
        while "QMP" not in await self._line("a greeting", GREETING_SECONDS):
            self._count_noise()
        await self._ask([Question("qmp_capabilities", "qmp_capabilities")], {})

    async def ask_all(self, table: tuple[Question, ...]) -> dict[str, Reply]:
        """Every question of a table that makes sense; the answers by name. Raises `MonitorLost` or `DeadlineExceeded`."""
        replies: dict[str, Reply] = {}
        while questions := due(table, replies):
            await self._ask(questions, replies)
        return replies

    async def _ask(self, questions: list[Question], replies: dict[str, Reply]) -> None:
        """One batch. All of its text is a few KiB, which the socket takes at once, whether QEMU reads ahead or not."""
        waiting: dict[int, Question] = {}
        for question in questions:
            self._id += 1
            waiting[self._id] = question
            self._writer.write(encode_command(question.command, question.arguments, self._id, oob=False))
        while waiting:
            message = await self._line(next(iter(waiting.values())).name, COMMAND_SECONDS)
            number = message.get("id")
            answers = "return" in message or "error" in message
            if answers and type(number) is int and number in waiting:
                asked = waiting.pop(number)
                replies[asked.name] = _reply(asked, message)
            else:
                self._count_noise()

    async def _line(self, what: str, seconds: float) -> dict[str, Any]:
        """The next line that is a JSON object."""
        while True:
            try:
                async with asyncio.timeout(seconds):
                    line = await self._reader.readuntil(b"\n")
            except TimeoutError:
                raise DeadlineExceeded(f"{what} has not come within {seconds:g} s") from None
            except asyncio.LimitOverrunError as error:
                raise MonitorLost(f"a line of over {MAX_LINE_BYTES} bytes, before {what}") from error
            except (asyncio.IncompleteReadError, OSError) as error:
                raise MonitorLost(f"it hung up before {what}") from error
            try:
                message = msgspec.json.decode(line)
            except (msgspec.DecodeError, RecursionError, ValueError):
                message = None
            if isinstance(message, dict):
                return message
            self._count_noise()

    def _count_noise(self) -> None:
        self._noise += 1
        if self._noise > MAX_NOISE:
            raise MonitorLost(f"over {MAX_NOISE} lines that answer nothing")


def _reply(question: Question, message: dict[str, Any]) -> Reply:
    if "return" in message:
        return Reply(message["return"])
    error: QmpError = qmp_error(question.command, message["error"])
    return Reply(error=f"{error.fields['class']}: {error.fields['desc']}")


async def ask_running(
    table: tuple[Question, ...], execute: Callable[[str, dict[str, Any] | None], Awaitable[Any]]
) -> Replies:
    """The same on a session that is there already. `execute` gives a command's `return`; its errors are passed on, but for `QmpError`."""
    replies: dict[str, Reply] = {}
    while questions := due(table, replies):
        for question in questions:
            try:
                replies[question.name] = Reply(await execute(question.command, question.arguments))
            except QmpError as error:
                replies[question.name] = Reply(error=str(error))
    return replies
