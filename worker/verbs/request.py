# SPDX-License-Identifier: Apache-2.0
"""A request as a verb sees it. Made by app.py; verbs get it beside the VM and their own typed arguments."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Any, Final

import msgspec

from ...common.errors import BadRequest
from ...common.pack import unpack_map
from ..answers import Begun, Left
from ..qmp.commands import Done


class Request(msgspec.Struct, frozen=True):
    """One request. `number` is the broker's; `deadline` is loop time; `partial` sends one part of the answer."""

    number: int
    op: str
    deadline: float
    received: float
    reading: bool
    key: bytes
    partial: Callable[[Any], None]
    lasting: bool = False  # its answer must be known to the next worker
    left: Left | None = None  # what an earlier worker that had begun it had done

    @property
    def begun(self) -> Begun | None:
        """When an earlier worker had begun it; None if none had."""
        return self.left.begun if self.left is not None else None


class Lane(Enum):
    """How an operation stands to the others on the same VM."""

    READ = "read"  # beside everything
    TURN = "turn"  # one at a time, in order
    OWN = "own"  # takes turns itself for a part, or overtakes


class NoArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For operations that take none."""


EMPTY_MAP: Final = b"\x80"

# An ordinary verb: awaited, returns the result.
Run = Callable[[Any, Request, Any], Awaitable[Any]]
# A direct verb: called on the loop without a task, answers through `done`. For the path that must be short.
Direct = Callable[[Any, Request, Any, Done], None]


@functools.cache
def _decoder(model: type[msgspec.Struct]) -> msgspec.msgpack.Decoder[msgspec.Struct]:
    return msgspec.msgpack.Decoder(model)


class Verb(msgspec.Struct, frozen=True):
    """A row of the table: an operation, its arguments' type, and what carries it out (`run`, or `direct`)."""

    op: str
    arguments: type[msgspec.Struct]
    lane: Lane
    run: Run | None = None
    direct: Direct | None = None
    begins: bool = False  # it has several steps: written down when it begins, and carried on by the next worker

    @property
    def decoder(self) -> msgspec.msgpack.Decoder[msgspec.Struct]:
        """Decodes a body into the arguments' type."""
        return _decoder(self.arguments)


def parse_arguments(verb: Verb, body: bytes) -> msgspec.Struct:
    """The typed arguments in a request's body. `BadRequest` naming what is wrong."""
    try:
        # One step in C for what is right; why it is wrong is worth a second look.
        return verb.decoder.decode(body or EMPTY_MAP)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return _explain_arguments(verb, body)


def _explain_arguments(verb: Verb, body: bytes) -> msgspec.Struct:
    values = unpack_map(body)
    known = verb.arguments.__struct_fields__
    for name in values:
        if name not in known:
            takes = ", ".join(known) if known else "none"
            raise BadRequest(f"{verb.op}: unknown argument {name!r:.60}; it takes: {takes}")
    try:
        return msgspec.convert(values, verb.arguments)
    except (msgspec.ValidationError, RecursionError) as error:
        raise BadRequest(f"{verb.op}: {error}") from error
