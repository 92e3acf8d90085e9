# SPDX-License-Identifier: Apache-2.0
"""`qmp` and `hmp`: commands for a VM's monitor. `qmp` knows from the VM's capabilities what a command takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from ...common.errors import VmloopError
from ...common.names import vm_name, vm_service
from .. import requests
from .base import COMPLETION_SECONDS, Invocation, verb, vm_argument
from .output import printable

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from ...common.capabilities import Capabilities
    from ..session import Host

# How long a command waits to be checked: a QEMU that does not answer at once gets it unchecked.
CHECK_SECONDS: Final = 1.0


class Command(click.ParamType[str]):
    """The name of a QMP command, completed from the VM's capabilities."""

    name = "command"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        del param
        from click.shell_completion import CompletionItem

        found = _for_completion(ctx, None)
        names = found.commands if found is not None else []
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


class Argument(click.ParamType[str]):
    """`key=value` of a QMP command: the key completed from its arguments, the value where it is one of a few words."""

    name = "argument"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        del param
        from click.shell_completion import CompletionItem

        from ..command_check import argument_names, argument_values

        command = str(ctx.params.get("command"))
        found = _for_completion(ctx, command)
        if found is None:
            return []
        key, equals, _ = incomplete.partition("=")
        if equals:
            words = [f"{key}={value}" for value in argument_values(found, command, key)]
        else:
            given = {word.partition("=")[0] for word in ctx.params.get("arguments") or ()}
            words = [f"{name}=" for name in argument_names(found, command) if name not in given]
        return [CompletionItem(word) for word in words if word.startswith(incomplete)]


@verb("qmp")
@vm_argument
@click.argument("command", type=Command())
@click.argument("arguments", nargs=-1, metavar="[KEY=VALUE... | JSON]", type=Argument())
@click.option("--oob", is_flag=True, help="Out of band: QEMU answers even when its main loop is busy.")
@click.option("--no-check", is_flag=True, help="Send it even if the VM's QEMU is known not to take it so.")
def qmp(invocation: Invocation, name: str, command: str, arguments: tuple[str, ...], oob: bool, no_check: bool) -> None:
    """Run a QMP command and print what it returns.

    A VALUE that is JSON is taken as such, else as text; dotted keys nest:

      vmloop qmp web1 blockdev-add node-name=d0 driver=raw file.driver=file file.filename=/img/d0

    Arguments are checked against what the VM's QEMU is known to take, before anything is sent.
    """
    parsed = parse_arguments(arguments)
    request = requests.qmp(_service(name), command, parsed, oob, False, None, None)
    with invocation.host() as host:
        if not no_check:
            _check(host, name, command, parsed, oob)
        value = host.answer(request).value
    output = invocation.output()
    output.result(value, lambda: output.value(value))


def _check(host: Host, name: str, command: str, arguments: dict[str, Any], oob: bool) -> None:
    """Raises `UsageError` for arguments that are surely wrong. All else is QEMU's to refuse, with a hint of ours before."""
    from ..command_check import near, unfit_for_oob, wrong_arguments

    try:
        found = host.vm(name).capabilities(command, timeout=CHECK_SECONDS)
    except VmloopError:
        return  # the command itself tells what is wrong with the VM
    wrong = wrong_arguments(found, command, arguments)
    if wrong:
        raise click.UsageError(printable(f"{command}: {'; '.join(wrong)} (--no-check sends it all the same)"))
    if found.commands and command not in found.commands and (hint := near(command, found.commands)):
        click.echo(printable(f"vmloop: {command} is no command of this QEMU{hint}"), err=True)
    if oob and unfit_for_oob(found, command):
        those = ", ".join(found.oob) or "none"
        click.echo(printable(f"vmloop: {command} cannot be executed out of band; these can: {those}"), err=True)


def _for_completion(ctx: click.Context, command: str | None) -> Capabilities | None:
    from ..session import connect

    options = ctx.find_root().params
    name = ctx.params.get("name")
    if not isinstance(name, str):
        return None
    try:
        with connect(options.get("connect"), root=options.get("root"), timeout=COMPLETION_SECONDS) as host:
            return host.vm(name).capabilities(command or "qmp_capabilities")
    except VmloopError:
        return None


@verb("hmp")
@vm_argument
@click.argument("line", nargs=-1, required=True)
def hmp(invocation: Invocation, name: str, line: tuple[str, ...]) -> None:
    """Give a LINE to the human monitor and print its text."""
    with invocation.host() as host:
        text = host.ask(requests.hmp(_service(name), " ".join(line), None))
    output = invocation.output()
    output.result(text, lambda: click.echo(printable(text), nl=not text.endswith("\n")))


def parse_arguments(words: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of a command: one JSON object, or `key=value` words. `UsageError` for anything else."""
    if len(words) == 1 and words[0].lstrip().startswith("{"):
        value = _json_or_none(words[0])
        if not isinstance(value, dict):
            raise click.UsageError(f"{printable(words[0])!s:.100} is no JSON object")
        return value
    result: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not all(key.split(".")):
            raise click.UsageError(f"{word!r:.100} is not key=value; dotted keys nest, one JSON object works too")
        _put(result, key, _parsed(text))
    return result


def _put(result: dict[str, Any], key: str, value: Any) -> None:
    *outer, last = key.split(".")
    inner = result
    for part in outer:
        inner = inner.setdefault(part, {})
        if not isinstance(inner, dict):
            raise click.UsageError(f"{key}: {part} has a value already")
    if last in inner:
        raise click.UsageError(f"{key} is given twice")
    inner[last] = value


def _parsed(text: str) -> Any:
    """JSON if it is JSON; `null` too. Else the text itself."""
    value = _json_or_none(text)
    return text if value is None and text != "null" else value


def _json_or_none(text: str) -> Any:
    import json

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")  # Python's reader takes NaN and Infinity, QEMU does not

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


def _service(name: str) -> str:
    return vm_service(vm_name(name))


COMMANDS = {"qmp": qmp, "hmp": hmp}
