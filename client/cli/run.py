# SPDX-License-Identifier: Apache-2.0
"""`run`: one VM in the foreground, with a private broker of its own; nothing else need run. The VM's end is the command's."""

from __future__ import annotations

import os
import sys
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ...common.errors import BadRequest, ConfigError, Denied
from .base import NAME, Exit, Invocation, Seconds, verb

if TYPE_CHECKING:
    from ...common.definition import Definition
    from ..embedding import EmbeddedHost
    from ..stream import Event
    from .console import Console
    from .foreground import End
    from .output import Output

DEFAULT_NAME: Final = "vm"  # of a VM that is given by QEMU's arguments alone
STOP_TIMEOUT: Final = 60.0
MAX_STOP_TIMEOUT: Final = 3595.0  # the wire's limit, less what a stop is given beyond it
_ARGS: Final = "vmloop.qemu-arguments"


class RunExit(IntEnum):
    """How the VM ended, beside the codes of every command (0: its guest powered off)."""

    CRASHED = 10  # QEMU ended by itself
    PANICKED = 11  # its guest had panicked
    KILLED = 12  # by a second Ctrl-C, at the end of its time after SIGTERM, or by somebody else through vmloop
    UNKNOWN = 13  # it was let go, or nobody knows


class RunCommand(click.Command):
    """Everything after `--` is QEMU's, which click would mix with the words before it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            place = args.index("--")
            ctx.meta[_ARGS] = args[place + 1 :]
            args = args[:place]
        return super().parse_args(ctx, args)


@verb("run", cls=RunCommand)
@click.argument("file", required=False, type=click.Path(dir_okay=False, allow_dash=True), metavar="FILE | -- ARGS")
@click.option(
    "--set", "changes", multiple=True, metavar="K=V", help="Change a key of the definition; K+=V adds to a list."
)
@click.option("--binary", metavar="BINARY", help="The QEMU to run (qemu-system-x86_64).")
@click.option("--name", type=NAME, help=f"The VM's name; with ARGS it is {DEFAULT_NAME} without it.")
@click.option("--console", is_flag=True, help="Connect a serial port of the guest's; Ctrl-] leaves it.")
@click.option("--guest-interrupt", is_flag=True, help="On a console Ctrl-C is for the guest.")
@click.option("--events", "shows_events", is_flag=True, help="Print the VM's events to standard error.")
@click.option("--paused", is_flag=True, help="Leave the guest's CPUs stopped.")
@click.option(
    "--stop-timeout",
    type=Seconds(MAX_STOP_TIMEOUT),
    default=STOP_TIMEOUT,
    show_default=True,
    metavar="S",
    help="How long the guest may take to power down after SIGTERM.",
)
def run(
    invocation: Invocation,
    file: str | None,
    changes: tuple[str, ...],
    binary: str | None,
    name: str | None,
    console: bool,
    guest_interrupt: bool,
    shows_events: bool,
    paused: bool,
    stop_timeout: float,
) -> int:
    """Run one VM in the foreground, from a definition in FILE or from QEMU's own ARGS.

    Ctrl-C asks the guest to power down, a second one kills the VM. Everything is under a temporary directory that goes with it; --root DIR
    before `run` keeps it.

    Exit codes: 0 the guest powered off, 1 it did not start, 10 QEMU ended by itself, 11 the guest panicked, 12 it was killed.
    """
    arguments: list[str] | None = click.get_current_context().meta.get(_ARGS)
    if (file is None) == (arguments is None):
        raise click.UsageError("give a FILE, or QEMU's arguments after --")
    if invocation.connect is not None:
        raise click.UsageError("run has a broker of its own; --connect is for the commands that ask one")
    if console and invocation.json:
        raise click.UsageError("the console and --json cannot both have standard output")
    values = _of_file(file) if file is not None else _of_arguments(arguments or [])
    own = {key: value for key, value in (("name", name), ("qemu.binary", binary)) if value is not None}
    from .overrides import override

    override(values, (*(f"{key}={_quoted(value)}" for key, value in own.items()), *changes))
    return _run(
        invocation, values, file or "the command line", console, guest_interrupt, shows_events, paused, stop_timeout
    )


def _of_file(file: str) -> dict[str, Any]:
    from ...common.config import toml_values
    from .definitions import read_file

    return toml_values(read_file(file), "standard input" if file == "-" else file)


def _of_arguments(arguments: list[str]) -> dict[str, Any]:
    return {"name": DEFAULT_NAME, "qemu": {"args": arguments}}


def _quoted(text: str) -> str:
    import json

    return json.dumps(text)


def _run(
    invocation: Invocation,
    values: dict[str, Any],
    origin: str,
    with_console: bool,
    guest_interrupt: bool,
    shows_events: bool,
    paused: bool,
    stop_timeout: float,
) -> int:
    from ...common.systemd import Notifier
    from .console import Console
    from .foreground import Doorbell, Foreground

    output = invocation.output()
    notifier = Notifier(os.environ)  # out of the environment, before anything is started
    # Signals are caught for as long as there is a VM to be told of them: Ctrl-C ends a start or an end that takes too long.
    with _private_host(invocation.root, stop_timeout) as host, Doorbell() as bell:
        definition = _definition(values, origin, host.root if with_console else None)
        host.define(definition)
        console: Console | None = None
        if with_console:
            words = f"console left; Ctrl-C powers the guest down, vmloop --root {host.root} is for the rest"
            console = Console(guest_interrupt=guest_interrupt, on_left=lambda: say(words))

        def say(text: str) -> None:
            _say(text, console)

        def on_event(event: Event) -> None:
            if event.event == "VM_STATE":
                notifier.status(f"{event.data.get('new')} ({event.data.get('reason')})")
                if event.data.get("new") == "crashed" and definition.handlers.on_crash in ("preserve", "dump"):
                    kept = f'on_crash = "{definition.handlers.on_crash}" keeps the VM'
                    say(f"the guest has panicked, and {kept}; Ctrl-C twice kills it")
            if shows_events:
                _say_line(_event_line(event, invocation.json), console)

        foreground = Foreground(
            host,
            host.vm(definition.name),
            bell,
            (console, _console_path(host.root, definition.name)) if console is not None else None,
            paused=paused or bool({"-S", "-incoming"} & set(definition.qemu.args)),
            stop_timeout=stop_timeout,
            say=say,
            on_event=on_event,
            on_running=lambda: notifier.ready(f"{definition.name} runs"),
            on_stopping=lambda: notifier.stopping(f"{definition.name} is ending"),
        )
        try:
            end = foreground.run()
        finally:
            if console is not None:
                _console_path(host.root, definition.name).unlink(
                    missing_ok=True
                )  # QEMU removes it, unless it was killed
    return _tell(output, definition.name, end)


def _private_host(root: str | None, stop_timeout: float) -> EmbeddedHost:
    from ..embedding import embedded

    try:
        return embedded(root, stop_timeout=stop_timeout)
    except Denied as error:
        text = (
            f"a broker (pid {error.fields.get('pid')}) serves {root} already: have it run the VM, with define and start"
        )
        raise Denied(text, **error.fields) from None


def _definition(values: dict[str, Any], origin: str, console_root: Path | None) -> Definition:
    """The definition, checked, with a console if one is wanted."""
    from ...common.definition import SIMULATED, definition_from_mapping
    from .console import CONSOLE_ID, console_arguments

    handlers = values.setdefault("handlers", {})
    if isinstance(handlers, dict):
        # Unless it is asked for, a guest that has panicked is not kept: nobody would look at it, and the command would never end.
        handlers.setdefault("on_crash", "destroy")
    qemu = values.setdefault("qemu", {})
    if isinstance(qemu, dict):
        qemu.setdefault("directory", os.getcwd())  # relative paths mean what they mean in the shell
        binary = qemu.get("binary")
        if isinstance(binary, str) and "/" in binary:
            qemu["binary"] = os.path.abspath(binary)
    definition = definition_from_mapping(values, origin)
    if console_root is None:
        return definition
    args = definition.qemu.args
    taken = next((arg for arg in args if arg.lstrip("-") == "serial" or f"id={CONSOLE_ID}" in arg.split(",")), None)
    if taken is not None:
        raise ConfigError(
            f"{origin}: --console adds a serial port, and the arguments have {taken} already: leave one out"
        )
    if definition.qemu.binary == SIMULATED:
        raise BadRequest("a simulated VM has no console")
    qemu["args"] = [*args, *console_arguments(_console_path(console_root, definition.name))]
    return definition_from_mapping(values, origin)


def _console_path(root: Path, name: str) -> Path:
    from ...common.names import vm_name
    from ...common.paths import paths_under, require_socket_path

    return require_socket_path(paths_under(root).vm(vm_name(name)).run / "console.sock")


# -- what is told ---------------------------------------------------------------------------------------------------------


def _tell(output: Output, name: str, end: End) -> int:
    code = exit_code(end)
    told = {"name": name, "state": end.state, "reason": end.reason, "panicked": end.panicked, "detail": end.detail}
    detail = f": {end.detail}" if end.detail and code not in (Exit.DONE, RunExit.KILLED) else ""
    if output.as_json:
        output.json_line({**told, "exit": int(code)})
    elif code != Exit.DONE:
        panicked = "; its guest had panicked" if end.panicked else ""
        output.aside(f"{name}: {end.state} ({end.reason}){detail}{panicked}")
    return code


def exit_code(end: End) -> int:
    """What `run` exits with."""
    if end.panicked:
        return RunExit.PANICKED
    codes: dict[str, int] = {
        "shutdown": Exit.DONE,
        "failed": Exit.FAILED,
        "crashed": RunExit.CRASHED,
        "destroyed": RunExit.KILLED,
    }
    return codes.get(end.reason, RunExit.UNKNOWN)


def _event_line(event: Event, as_json: bool) -> str:
    import msgspec

    from .event_stream import time_of
    from .output import one_line, to_json

    if as_json:
        return to_json(msgspec.to_builtins(event))
    data = to_json(event.data) if event.data else ""
    return one_line(f"{time_of(event)} {event.vm} {event.cursor} {event.event} {data}".rstrip())


def _say(text: str, console: Console | None) -> None:
    from .output import printable

    _say_line(printable(f"vmloop: {text}"), console)


def _say_line(line: str, console: Console | None) -> None:
    """A line on standard error; on a raw terminal it needs its own carriage return. Who does not read it any more does not stop the VM."""
    raw = console is not None and console.raw
    try:
        click.echo(f"\r{line}\r" if raw else line, err=True)
    except OSError:  # a closed pipe, a terminal that is gone: what is still to be said goes nowhere
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stderr.fileno())


COMMANDS = {"run": run}
