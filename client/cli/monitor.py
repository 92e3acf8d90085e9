# SPDX-License-Identifier: Apache-2.0
"""`qmp` and `hmp`: commands for a VM's monitor."""

from __future__ import annotations

from typing import Any

import click

from ...common.names import vm_name, vm_service
from .. import requests
from .base import Invocation, verb, vm_argument
from .output import printable


@verb("qmp")
@vm_argument
@click.argument("command")
@click.argument("arguments", nargs=-1, metavar="[KEY=VALUE... | JSON]")
@click.option("--oob", is_flag=True, help="Out of band: QEMU answers even when its main loop is busy.")
def qmp(invocation: Invocation, name: str, command: str, arguments: tuple[str, ...], oob: bool) -> None:
    """Run a QMP command and print what it returns.

    A VALUE that is JSON is taken as such, else as text; dotted keys nest:

      vmloop qmp web1 blockdev-add node-name=d0 driver=raw file.driver=file file.filename=/img/d0
    """
    request = requests.qmp(_service(name), command, parse_arguments(arguments), oob, False, None, None)
    with invocation.host() as host:
        value = host.answer(request).value
    output = invocation.output()
    output.result(value, lambda: output.value(value))


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
