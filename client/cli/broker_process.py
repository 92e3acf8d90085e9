# SPDX-License-Identifier: Apache-2.0
"""`broker` and `shutdown`: the broker's beginning and end."""

from __future__ import annotations

import os
from pathlib import Path

import click

from .base import Invocation, verb


@verb("broker")
def broker(invocation: Invocation) -> int:
    """Run the broker in the foreground.

    It ends with SIGTERM, SIGINT or `vmloop shutdown`; the VMs run on.
    """
    from ...broker.__main__ import serve
    from ...common.paths import default_paths, paths_under

    if invocation.connect is not None:
        raise click.UsageError("broker takes --root; --connect is for the commands that ask a broker")
    root = invocation.root
    return serve(paths_under(Path(root)) if root else default_paths(os.environ, os.getuid()))


@verb("shutdown")
@click.option("--kill", is_flag=True, help="End the VMs too; else they run on.")
def shutdown(invocation: Invocation, kill: bool) -> None:
    """End the broker; the VMs run on."""
    with invocation.host() as host:
        value = host.call("vmloop", "shutdown", {"vms": "kill" if kill else "leave"})
    output = invocation.output()
    count = value.get("count", 0) if isinstance(value, dict) else 0
    end = "killed" if kill else "left running"
    output.result(value, lambda: output.line(f"broker ends, {count} VMs {end}"))


COMMANDS = {"broker": broker, "shutdown": shutdown}
