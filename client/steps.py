# SPDX-License-Identifier: Apache-2.0
"""Conversations of several requests, written once for both clients. No sockets here.

A conversation is a generator that yields requests and is sent their answers; an error is thrown in where its request was yielded. vm.py and
aio_vm.py drive it, each with its own way to ask. Whatever ends a conversation early, Ctrl-C and a cancelled task too, is thrown in as well,
so that it can still ask for what must not be left behind, for instance that a file be closed in the guest.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from functools import partial
from typing import Any, Final, TypeVar

import msgspec

from ..common.errors import VmloopError
from .requests import Request

T = TypeVar("T")

# Seconds between attempts of what is asked patiently.
FIRST_PAUSE: Final = 0.05
MAX_PAUSE: Final = 0.5


class Patiently(msgspec.Struct, frozen=True):
    """A request that is asked again for `seconds` while it ends with one of some errors, after which it was not carried out."""

    request: Request[Any]
    errors: tuple[type[VmloopError], ...]
    seconds: float


Steps = Generator[Request[Any] | Patiently, Any, T]


def drive(ask: Callable[[Request[Any]], Any], steps: Steps[T]) -> T:
    """Ask one request after the other; what the conversation returns."""
    move: Callable[[], Request[Any] | Patiently] = partial(next, steps)
    while True:
        try:
            step = move()
        except StopIteration as done:
            result: T = done.value
            return result
        try:
            move = partial(steps.send, ask(step) if isinstance(step, Request) else _patient(ask, step))
        except BaseException as error:  # noqa: BLE001 -- raised again by the conversation, when it has cleaned up
            move = partial(steps.throw, error)


async def drive_async(ask: Callable[[Request[Any]], Awaitable[Any]], steps: Steps[T]) -> T:
    """The same on an event loop."""
    move: Callable[[], Request[Any] | Patiently] = partial(next, steps)
    while True:
        try:
            step = move()
        except StopIteration as done:
            result: T = done.value
            return result
        try:
            move = partial(steps.send, await (ask(step) if isinstance(step, Request) else _patient_async(ask, step)))
        except BaseException as error:  # noqa: BLE001 -- as in `drive`
            move = partial(steps.throw, error)


def _patient(ask: Callable[[Request[Any]], Any], step: Patiently) -> Any:
    from tenacity import Retrying

    return Retrying(**_attempts(step))(ask, step.request)


async def _patient_async(ask: Callable[[Request[Any]], Awaitable[Any]], step: Patiently) -> Any:
    from tenacity import AsyncRetrying

    async def once() -> Any:
        return await ask(step.request)

    return await AsyncRetrying(**_attempts(step))(once)


def _attempts(step: Patiently) -> dict[str, Any]:
    from tenacity import retry_if_exception_type, stop_after_delay, wait_exponential

    return {
        "retry": retry_if_exception_type(step.errors),
        "stop": stop_after_delay(step.seconds),
        "wait": wait_exponential(multiplier=FIRST_PAUSE, max=MAX_PAUSE),
        "reraise": True,
    }
