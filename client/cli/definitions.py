# SPDX-License-Identifier: Apache-2.0
"""`define` and `undefine`: making VMs known to vmloop."""

from __future__ import annotations

import sys

import click

from .base import Invocation, verb, vm_argument


@verb("define")
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True))
def define(invocation: Invocation, file: str) -> None:
    """Make a VM known from a FILE.

    FILE is its definition in TOML; - reads standard input.
    """
    import msgspec

    from ...common.definition import definition_from_toml

    definition = definition_from_toml(read_file(file), "standard input" if file == "-" else file)
    with invocation.host() as host:
        value = host.call("vmloop", "define", {"definition": msgspec.to_builtins(definition)})
    output = invocation.output()
    output.result(value, lambda: output.line(f"{definition.name}: defined"))


def read_file(file: str) -> bytes:
    """What is in a file of TOML, or on standard input; no more than is read of any. `ConfigError`."""
    from ...common.config import MAX_CONFIG_BYTES
    from ...common.errors import ConfigError

    if file == "-":
        return sys.stdin.buffer.read(MAX_CONFIG_BYTES + 1)
    try:
        with open(file, "rb") as stream:
            return stream.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error


@verb("undefine")
@vm_argument
def undefine(invocation: Invocation, name: str) -> None:
    """Forget a VM that does not run."""
    with invocation.host() as host:
        value = host.call("vmloop", "undefine", {"name": name})
    output = invocation.output()
    output.result(value, lambda: output.line(f"{name}: undefined"))


COMMANDS = {"define": define, "undefine": undefine}
