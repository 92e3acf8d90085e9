# SPDX-License-Identifier: Apache-2.0
"""A request as a verb sees it. Made by app.py; verbs get it beside the VM and their own typed arguments."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Any, TypeVar

import msgspec

from ...common.errors import BadRequest
from ...common.pack import unpack_map
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


class Lane(Enum):
    """How an operation stands to the others on the same VM."""

    READ = "read"  # beside everything
    TURN = "turn"  # one at a time, in order
    OWN = "own"  # takes turns itself for a part, or overtakes


class NoArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For operations that take none."""


A = TypeVar("A", bound=msgspec.Struct)

# An ordinary verb: awaited, returns the result.
Run = Callable[[Any, Request, Any], Awaitable[Any]]
# A direct verb: called on the loop without a task, answers through `done`. For the path that must be short.
Direct = Callable[[Any, Request, Any, Done], None]


class Verb(msgspec.Struct, frozen=True):
    """A row of the table: an operation, its arguments' type, and what carries it out (`run`, or `direct`)."""

    op: str
    arguments: type[msgspec.Struct]
    lane: Lane
    run: Run | None = None
    direct: Direct | None = None


def parse_arguments(op: str, model: type[A], body: bytes) -> A:
    """The typed arguments in a request's body. `BadRequest` naming what is wrong."""
    values = unpack_map(body)
    known = model.__struct_fields__
    for name in values:
        if name not in known:
            takes = ", ".join(known) if known else "none"
            raise BadRequest(f"{op}: unknown argument {name!r:.60}; it takes: {takes}")
    try:
        return msgspec.convert(values, model)
    except (msgspec.ValidationError, RecursionError) as error:
        raise BadRequest(f"{op}: {error}") from error
