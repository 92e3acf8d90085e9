# SPDX-License-Identifier: Apache-2.0
"""What every command shares: the invocation (global options), the decorator that makes a command, the type of a VM's name.

Imported before any command runs, so nothing slow is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import wraps
from typing import TYPE_CHECKING, Any, Final

import click

from ...common.errors import BadRequest, VmloopError
from ...common.names import vm_name

if TYPE_CHECKING:
    from ..session import Host
    from .output import Output

# Seconds; the wire's limit, as calls.MAX_TIMEOUT, which is not imported for the sake of --help.
MAX_TIMEOUT: Final = 3600.0
# How long the shell's completion may wait for a broker.
COMPLETION_SECONDS: Final = 0.5


class Exit(IntEnum):
    """The exit codes; scripts rely on them."""

    DONE = 0
    FAILED = 1  # the operation failed; standard error has the code and the reason
    USAGE = 2  # the command line is wrong; nothing was asked of the broker
    NO_BROKER = 3  # nobody answers at the socket
    DEADLINE = 4  # the time was over; what was sent to QEMU lives on
    INTERRUPTED = 130  # SIGINT, as shells report it


@dataclass(slots=True)
class Invocation:
    """The global options. `--json` after the command sets it here too."""

    root: str | None
    connect: str | None
    json: bool
    timeout: float | None

    def host(self) -> Host:
        """A connection to the broker; the caller closes it."""
        from ..calls import DEFAULT_TIMEOUT
        from ..session import connect

        return connect(self.connect, root=self.root, timeout=self.timeout or DEFAULT_TIMEOUT)

    def output(self) -> Output:
        from .output import make_output

        return make_output(self.json)


def verb(name: str, cls: type[click.Command] = click.Command) -> Callable[[Callable[..., Any]], click.Command]:
    """A command called `name` whose function gets the Invocation first. It accepts `--json` too."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        @click.pass_context
        @wraps(function)
        def run(context: click.Context, /, **parameters: Any) -> Any:
            return function(context.obj, **parameters)

        json_option = click.option(
            "--json", is_flag=True, expose_value=False, callback=_set_json, help="Print the result alone, as JSON."
        )
        return click.command(name, cls=cls)(json_option(run))

    return decorate


def _set_json(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    del parameter
    if value and isinstance(context.obj, Invocation):
        context.obj.json = True


class Seconds(click.FloatRange):
    """A time over 0 and up to a limit."""

    def __init__(self, limit: float) -> None:
        super().__init__(0, limit, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):  # in no order with anything, so in every range
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        return seconds


class Name(click.ParamType[str]):
    """A VM's name: checked here, completed by asking the broker."""

    name = "name"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return vm_name(value)
        except BadRequest as error:
            self.fail(str(error), param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        del param
        from click.shell_completion import CompletionItem

        from ..session import connect

        options = ctx.find_root().params
        try:
            with connect(options.get("connect"), root=options.get("root"), timeout=COMPLETION_SECONDS) as host:
                names = [vm.name for vm in host.list()]
        except VmloopError:
            return []
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


NAME: Final = Name()

vm_argument = click.argument("name", type=NAME)
vms_argument = click.argument("names", type=NAME, nargs=-1, metavar="[NAME]...")
