# SPDX-License-Identifier: Apache-2.0
"""`completion`: what a shell needs to complete vmloop's command lines, VM names included."""

from __future__ import annotations

import click

from .base import Invocation, verb


@verb("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(invocation: Invocation, shell: str) -> None:
    """Print a shell's completion script.

    bash: vmloop completion bash > ~/.local/share/bash-completion/completions/vmloop
    """
    from click.shell_completion import get_completion_class

    from .main import COMPLETION_VARIABLE, PROGRAM, vmloop

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}")
    script = kind(vmloop, {}, PROGRAM, COMPLETION_VARIABLE).source()
    output = invocation.output()
    output.result({"shell": shell, "script": script}, lambda: click.echo(script))


COMMANDS = {"completion": completion}
