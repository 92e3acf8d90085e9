# SPDX-License-Identifier: Apache-2.0
"""`broker`, `shutdown` and `restart-workers`: the beginning and end of vmloop's own processes."""

from __future__ import annotations

import os
from pathlib import Path

import click
import msgspec

from .base import Exit, Invocation, verb, vms_argument


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


@verb("restart-workers")
@vms_argument
def restart_workers(invocation: Invocation, names: tuple[str, ...]) -> int:
    """Replace the VMs' workers, one after the other; the VMs run on.

    After an upgrade: the new workers have the new code.
    """
    output = invocation.output()
    with invocation.host() as host:
        count = len(names) or sum(vm.worker != "absent" for vm in host.list())
        with output.progress(f"restarting the workers of {count} VMs", count) as progress:
            done = host.restart_workers(*names, on_part=lambda _: progress.advance())
    output.result(msgspec.to_builtins(done), lambda: output.line(f"{done.restarted} workers restarted"))
    for failure in done.failed:
        click.echo(f"vmloop: {failure.error}", err=True)
    return Exit.FAILED if done.failed else Exit.DONE


COMMANDS = {"broker": broker, "shutdown": shutdown, "restart-workers": restart_workers}
