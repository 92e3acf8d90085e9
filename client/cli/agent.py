# SPDX-License-Identifier: Apache-2.0
"""`agent`: commands for the guest agent; a program in the guest followed to its end; file systems held frozen."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import click

from ...common.errors import VmloopError
from ...common.names import vm_name, vm_service
from .. import requests
from .base import MAX_TIMEOUT, Exit, Invocation, Seconds, verb, vm_argument
from .monitor import parse_arguments
from .output import Output, printable

if TYPE_CHECKING:
    from ..guest_exec import GuestExit

# Seconds; what the wire allows, with time to freeze and to thaw.
MAX_HOLD: Final = requests.MAX_HOLD - requests.FREEZE_MARGIN

# As shells report what a signal ended.
SIGNALLED: Final = 128


@verb("agent")
@vm_argument
@click.argument("command")
@click.argument("arguments", nargs=-1, metavar="[KEY=VALUE... | JSON]")
@click.option("--wait", is_flag=True, help="guest-exec: follow the program, print its output, exit as it did.")
@click.option("--hold", is_flag=True, help="guest-fsfreeze-freeze: keep frozen until Ctrl-C or the limit.")
@click.option("--limit", type=Seconds(MAX_HOLD), metavar="S", help="Thaw after so long (the definition's).")
@click.option("--timeout", type=Seconds(MAX_TIMEOUT), metavar="S", help="How long it may take (30 s; --wait 60 s).")
def agent(
    invocation: Invocation,
    name: str,
    command: str,
    arguments: tuple[str, ...],
    wait: bool,
    hold: bool,
    limit: float | None,
    timeout: float | None,
) -> int:
    """Run a command of the guest agent and print what it returns.

    A VALUE that is JSON is taken as such, else as text; dotted keys nest:

      vmloop agent web1 guest-exec path=/bin/ls 'arg=["-l"]' --wait
    """
    given = parse_arguments(arguments)
    _require_fitting(command, given, wait, hold, limit)
    if hold and timeout is not None:
        raise click.UsageError("a hold ends at its --limit, not at a --timeout")
    timeout = timeout or invocation.timeout
    if wait:
        return _exec(invocation, name, given, timeout or requests.EXEC_TIMEOUT)
    if hold:
        return _hold(invocation, name, limit)
    output = invocation.output()
    with invocation.host() as host, output.busy(f"{command} in {name}"):
        value = host.ask(requests.agent(_service(name), command, given, timeout, limit=limit))
    output.result(value, lambda: output.value(value))
    return Exit.DONE


def _require_fitting(command: str, given: dict[str, Any], wait: bool, hold: bool, limit: float | None) -> None:
    if wait and command != "guest-exec":
        raise click.UsageError("--wait follows a program: it goes with guest-exec")
    if hold and command != "guest-fsfreeze-freeze":
        raise click.UsageError("--hold keeps file systems frozen: it goes with guest-fsfreeze-freeze")
    if hold and given:
        raise click.UsageError("guest-fsfreeze-freeze takes no arguments; --limit is vmloop's own")
    if limit is not None and not command.startswith("guest-fsfreeze-freeze"):
        raise click.UsageError("--limit is for how long file systems stay frozen: it goes with guest-fsfreeze-freeze")


# -- a program in the guest ----------------------------------------------------------------------------------------------


def _exec(invocation: Invocation, name: str, given: dict[str, Any], timeout: float) -> int:
    """Start it and follow it. Its output is ours, as it came in a pipe; its exit code is ours too, but with --json that is 0 or 1."""
    from ..guest_exec import follow, start_request

    output = invocation.output()
    service = _service(name)
    with invocation.host() as host:
        pid = host.ask(start_request(service, {"capture-output": True, **given}))
        try:
            with output.busy(f"process {pid} in {name}"):
                ended = follow(host.ask, service, pid, timeout)
        except KeyboardInterrupt:
            output.aside(f"process {pid} runs on in {name}: the agent cannot end it")
            raise
    if output.as_json:
        output.json_line(_as_map(pid, ended))
        return Exit.DONE if ended.exitcode == 0 else Exit.FAILED
    _write_through(sys.stdout, ended.out)
    _write_through(sys.stderr, ended.err)
    for what, cut in (("standard output", ended.out_truncated), ("standard error", ended.err_truncated)):
        if cut:
            output.aside(f"{what} was cut off by the agent; let the program write a file and use: vmloop cp")
    if ended.signal is not None:
        output.aside(f"process {pid} in {name} was ended by signal {ended.signal}")
    return _exit_code(ended)


def _as_map(pid: int, ended: GuestExit) -> dict[str, Any]:
    from msgspec.structs import asdict

    return {"pid": pid, **asdict(ended)}


def _exit_code(ended: GuestExit) -> int:
    if ended.signal is not None:
        return SIGNALLED + (ended.signal & 0x7F)
    return Exit.FAILED if ended.exitcode is None else ended.exitcode & 0xFF


def _write_through(stream: Any, data: bytes) -> None:
    """Bytes as they are into a pipe or a file; on a terminal nothing that could rewrite the screen."""
    if not data:
        return
    if stream.isatty():
        stream.write(printable(data.decode(errors="backslashreplace")))
    else:
        stream.flush()
        stream.buffer.write(data)
    stream.flush()


# -- frozen file systems -------------------------------------------------------------------------------------------------


def _hold(invocation: Invocation, name: str, limit: float | None) -> int:
    """Keep the guest frozen until we are told to end (0) or its limit has passed (4). Should we die, the worker thaws it."""
    from ..guest_freeze import at_the_limit, may_be_frozen, reason_of, thawed_early

    output = invocation.output()
    service = _service(name)
    with invocation.host() as host, _ended_by_signals(), output.live(f"freezing {name}") as show:
        parts = _Parts(output, name, show)
        try:
            end = host.answer_in_parts(requests.freeze(service, limit), parts.tell).value
        except KeyboardInterrupt:
            thawed = host.ask(requests.thaw(service))
            if thawed == 0 and parts.frozen:
                raise thawed_early(service, "before the interruption") from None
            end = {"thawed": "interrupted"}
        except BaseException as error:
            if may_be_frozen(error):
                with contextlib.suppress(VmloopError):  # the first error is the one to tell
                    host.ask(requests.thaw(service))
            raise
    output.result(end, lambda: output.line(f"{name}: thawed ({reason_of(end)})"))
    return Exit.DEADLINE if at_the_limit(reason_of(end)) else Exit.DONE


class _Parts:
    """What is told of each part: a line of JSON; or a line when the guest is frozen, and then the seconds that are left."""

    def __init__(self, output: Output, name: str, show: Callable[[str], None]) -> None:
        self.frozen = False  # some file system is, or was
        self._output = output
        self._name = name
        self._show = show

    def tell(self, part: Any) -> None:
        told = part if isinstance(part, dict) else {}
        self.frozen = self.frozen or bool(told.get("return"))
        if self._output.as_json:
            self._output.json_line(part)
        elif "return" in told:
            self._output.line(f"{self._name}: {told['return']} file systems frozen")
        elif isinstance(left := told.get("left"), int | float):
            self._show(f"{self._name} is frozen for {left:.0f} s more; Ctrl-C thaws it")
        sys.stdout.flush()


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM both ask for the end: a shell's background job gets only the latter."""

    def handler(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _service(name: str) -> str:
    return vm_service(vm_name(name))


COMMANDS = {"agent": agent}
