# SPDX-License-Identifier: Apache-2.0
"""The entry of the command `vmloop`: global options, commands loaded by name, errors and exit codes.

Start-up time is a feature here: a command's file is imported when it is called (or for the list of commands in --help), and every command
imports what it needs when it runs.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Final

import click
from click.exceptions import Exit as ClickExit

from ... import __version__
from ...common.errors import DeadlineExceeded, NoBroker, VmloopError
from .base import MAX_TIMEOUT, Exit, Invocation, Seconds

PROGRAM: Final = "vmloop"
COMPLETION_VARIABLE: Final = "_VMLOOP_COMPLETE"

# Command → the file it lives in, in the order of --help.
FAMILY: Final = {
    "run": "run",
    "broker": "broker_process",
    "shutdown": "broker_process",
    "restart-workers": "broker_process",
    "define": "definitions",
    "undefine": "definitions",
    "import": "import_domain",
    "start": "power",
    "stop": "power",
    "kill": "power",
    "pause": "power",
    "resume": "power",
    "reset": "power",
    "attach": "power",
    "detach": "power",
    "list": "looking",
    "show": "looking",
    "stats": "looking",
    "wait": "looking",
    "events": "event_stream",
    "qmp": "monitor",
    "hmp": "monitor",
    "probe": "probe",
    "agent": "agent",
    "cp": "cp",
    "simulate": "simulation",
    "completion": "shells",
}


class Commands(click.Group):
    """Loads a command's file when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(FAMILY)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        family = FAMILY.get(cmd_name)
        if family is None:
            return None
        command = import_module(f".{family}", __package__).COMMANDS[cmd_name]
        return command if isinstance(command, click.Command) else None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--root", metavar="DIR", help="Everything lives under DIR rather than in the host's own places.")
@click.option("--connect", metavar="ENDPOINT", help="The broker's client socket: ipc:///PATH/client.sock.")
@click.option("--json", is_flag=True, help="Print the result alone, as JSON.")
@click.option("--timeout", type=Seconds(MAX_TIMEOUT), metavar="S", help="Deadline of a request (30 s).")
@click.version_option(__version__, prog_name=PROGRAM)
@click.pass_context
def vmloop(context: click.Context, root: str | None, connect: str | None, json: bool, timeout: float | None) -> None:
    """One process and one event loop for every virtual machine.

    Start a broker with `vmloop broker`; every other command asks it. `vmloop run` needs none.

    Exit codes: 0 done, 1 the operation failed, 2 usage, 3 no broker, 4 deadline.
    """
    if root is not None and connect is not None:
        raise click.UsageError("give --root or --connect, not both")
    context.obj = Invocation(root, connect, json, timeout)


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; the process's exit code."""
    instruction = os.environ.get(COMPLETION_VARIABLE)
    if instruction:
        from click.shell_completion import shell_complete

        return shell_complete(vmloop, {}, PROGRAM, COMPLETION_VARIABLE, instruction)
    try:
        code = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who read our output has enough, as in `vmloop events --follow | head`. What is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.DONE
    return code


def _run(arguments: list[str]) -> int:
    try:
        with vmloop.make_context(PROGRAM, arguments) as context:
            code = vmloop.invoke(context)
        return code if isinstance(code, int) else Exit.DONE
    except ClickExit as done:
        return done.exit_code
    except click.UsageError as error:
        _complain("bad-request", error.format_message())
        if error.ctx is not None:
            _say(f"usage: see {error.ctx.command_path} --help")
        return Exit.USAGE
    except click.ClickException as error:
        _complain("bad-request", error.format_message())
        return Exit.USAGE
    except VmloopError as error:
        return _report(error)
    except (KeyboardInterrupt, click.Abort):
        return Exit.INTERRUPTED


def _report(error: VmloopError) -> int:
    _complain(error.code, error.message)
    for line in _further_facts(error):
        _say(line)
    if isinstance(error, NoBroker):
        return Exit.NO_BROKER
    return Exit.DEADLINE if isinstance(error, DeadlineExceeded) else Exit.FAILED


def _further_facts(error: VmloopError) -> list[str]:
    """What QEMU said, and the end of its log, where that helps and the message does not say it already."""
    lines = [
        f"  {field}: {error.fields[field]}"
        for field in ("class", "desc")
        if field in error.fields and str(error.fields[field]) not in error.message
    ]
    log = error.fields.get("log")
    if log:
        text = log.decode(errors="replace") if isinstance(log, bytes) else str(log)
        lines += ["  the end of qemu.log:", *(f"  | {line}" for line in text.splitlines())]
    return lines


def _complain(code: str, message: str) -> None:
    _say(f"{PROGRAM}: {code}: {message}")


def _say(line: str) -> None:
    from .output import printable

    click.echo(printable(line), err=True)


if __name__ == "__main__":
    sys.exit(main())
