# SPDX-License-Identifier: Apache-2.0
"""A program in the guest: started with guest-exec, followed with guest-exec-status until it has ended.

The agent tells the end of a process once and forgets it, with its output. So nothing here asks twice for the same answer. Used by vm.py,
aio_vm.py and `vmloop agent`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ..common.errors import (
    AgentAbsent,
    AgentError,
    AgentUnresponsive,
    Busy,
    DeadlineExceeded,
    OutcomeUnknown,
    WorkerLost,
)
from . import requests
from .guest_answers import DAMAGED, fitting, from_base64, to_base64, vm_of
from .requests import Request

if TYPE_CHECKING:
    from tenacity import RetryCallState, RetryError

EXEC: Final = "guest-exec"

# Between questions whether it has ended: soon at first, for most programs are short.
FIRST_PAUSE: Final = 0.02
MAX_PAUSE: Final = 1.0
# Seconds for one such question, whatever is left for the program: an answer that came after its deadline would be lost.
STATUS_SECONDS: Final = 10.0


class GuestExit(msgspec.Struct, frozen=True):
    """How a program in the guest ended. `exitcode` is None if a signal ended it, then `signal` has its number.

    The agent captures so much output and no more (16 MiB); what is cut off says so in `out_truncated` and `err_truncated`.
    """

    exitcode: int | None
    signal: int | None
    out: bytes = b""
    err: bytes = b""
    out_truncated: bool = False
    err_truncated: bool = False


class _Started(msgspec.Struct, frozen=True):
    """Answer of guest-exec."""

    pid: int


class _Status(msgspec.Struct, frozen=True, rename="kebab"):
    """Answer of guest-exec-status; what does not apply is left out."""

    exited: bool
    exitcode: int | None = None
    signal: int | None = None
    out_data: str = ""
    err_data: str = ""
    out_truncated: bool = False
    err_truncated: bool = False


# -- what is asked, and what it means ------------------------------------------------------------------------------------


def start_arguments(
    path: str, args: Sequence[str], env: Mapping[str, str] | None, given: bytes | None, capture: bool
) -> dict[str, Any]:
    """The arguments of guest-exec. With `env` None the program has the agent's environment; `given` is its standard input."""
    arguments: dict[str, Any] = {"path": path}
    if args:
        arguments["arg"] = list(args)
    if env is not None:
        arguments["env"] = [f"{name}={value}" for name, value in env.items()]
    if given is not None:
        arguments["input-data"] = to_base64(given)
    if capture:
        arguments["capture-output"] = True
    return arguments


def start_request(service: str, arguments: Mapping[str, Any]) -> Request[int]:
    """Start a program; the answer is its process id in the guest."""
    request = requests.agent(service, EXEC, arguments)
    return msgspec.structs.replace(request, result=lambda value: fitting(value, _Started, service, EXEC).pid)


def status_request(service: str, pid: int) -> Request[GuestExit | None]:
    """How the program ended; None while it runs."""
    request = requests.agent(service, requests.TELLS_ONCE, {"pid": pid}, STATUS_SECONDS)
    return msgspec.structs.replace(request, result=lambda value: _exit_in(value, service))


def _exit_in(value: Any, service: str) -> GuestExit | None:
    status = fitting(value, _Status, service, requests.TELLS_ONCE)
    if not status.exited:
        return None
    out, err = (from_base64(text, service, requests.TELLS_ONCE) for text in (status.out_data, status.err_data))
    return GuestExit(status.exitcode, status.signal, out, err, status.out_truncated, status.err_truncated)


# -- following it --------------------------------------------------------------------------------------------------------


def follow(ask: Callable[[Request[Any]], Any], service: str, pid: int, timeout: float) -> GuestExit:
    """Ask until the program has ended. `DeadlineExceeded` (field `pid`) after `timeout` seconds: it runs on, the agent cannot end it."""
    from tenacity import RetryError, Retrying

    request = status_request(service, pid)
    try:
        found: GuestExit = Retrying(**_pauses(timeout))(lambda: ask(request))
        return found
    except RetryError as late:
        raise _not_ended(late, service, pid, timeout) from None
    except AgentError as error:
        raise _forgotten(error, service, pid) from error


async def follow_async(
    ask: Callable[[Request[Any]], Awaitable[Any]], service: str, pid: int, timeout: float
) -> GuestExit:
    """The same on an event loop."""
    from tenacity import AsyncRetrying, RetryError

    request = status_request(service, pid)

    async def look() -> Any:
        return await ask(request)

    try:
        found: GuestExit = await AsyncRetrying(**_pauses(timeout))(look)
        return found
    except RetryError as late:
        raise _not_ended(late, service, pid, timeout) from None
    except AgentError as error:
        raise _forgotten(error, service, pid) from error


def _pauses(timeout: float) -> dict[str, Any]:
    """How to ask again: with growing pauses, for the last time when the time is over.

    Busy and a lost worker mean that nobody was asked. An agent that did not answer, for the guest is paused or slow, or that the next
    worker has not found yet, may do so next time.
    """
    from tenacity import retry_if_exception_type, retry_if_result, stop_after_delay, wait_exponential

    growing = wait_exponential(multiplier=FIRST_PAUSE, max=MAX_PAUSE)
    end = time.monotonic() + timeout

    def pause(state: RetryCallState) -> float:
        return min(growing(state), max(end - time.monotonic(), 0.0))

    return {
        "retry": retry_if_result(lambda found: found is None)
        | retry_if_exception_type((AgentAbsent, AgentUnresponsive, Busy, WorkerLost)),
        "stop": stop_after_delay(timeout),
        "wait": pause,
        "reraise": False,
    }


def _not_ended(late: RetryError, service: str, pid: int, timeout: float) -> DeadlineExceeded:
    last = late.last_attempt.exception()
    why = "it runs on" if last is None else f"nobody could be asked at last ({last})"
    return DeadlineExceeded(
        f"process {pid} in {vm_of(service)} has not ended within {timeout:g} s; {why}; ask for its end with: "
        f"vmloop agent {vm_of(service)} {requests.TELLS_ONCE} pid={pid}",
        pid=pid,
    )


def _forgotten(error: AgentError, service: str, pid: int) -> AgentError | OutcomeUnknown:
    """The agent knew the process when it started it. If it knows it no longer, it has told somebody else how it ended."""
    if error.fields.get("kind") in (DAMAGED, "disabled", "unknown"):
        return error
    return OutcomeUnknown(
        f"process {pid} in {vm_of(service)} has ended or the agent was started anew: nobody can tell how it ended, "
        f"for the agent tells that once ({error.message})",
        pid=pid,
    )
