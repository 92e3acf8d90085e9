# SPDX-License-Identifier: Apache-2.0
"""`start stop kill pause resume reset attach detach`: what changes a VM's run."""

from __future__ import annotations

from typing import Any

import click

from .. import requests
from ..requests import Request
from .base import MAX_TIMEOUT, Invocation, Seconds, verb, vm_argument


def _change(invocation: Invocation, name: str, request: Request[Any], doing: str, done: str = "") -> None:
    """Ask for a change, wait with a spinner, and say the state that came of it."""
    output = invocation.output()
    with invocation.host() as host, output.busy(f"{doing} {name}"):
        value = host.answer(request).value
    output.result(value, lambda: output.line(f"{name}: {done or _state(value)}"))


def _state(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    pid = f", pid {value['pid']}" if value.get("pid") else ""
    reason = f" ({value['reason']}{pid})" if value.get("reason") else pid.replace(", ", " (") + ")" * bool(pid)
    return f"{value.get('state', 'done')}{reason}"


@verb("start")
@vm_argument
@click.option("--paused", is_flag=True, help="Leave the guest's CPUs stopped.")
def start(invocation: Invocation, name: str, paused: bool) -> None:
    """Start a defined VM."""
    _change(invocation, name, requests.start(name, paused), "starting")


@verb("stop")
@vm_argument
@click.option(
    "--timeout",
    type=Seconds(MAX_TIMEOUT - requests.STOP_MARGIN),
    default=60.0,
    show_default=True,
    metavar="S",
    help="How long the guest may take.",
)
@click.option("--force", is_flag=True, help="Kill it when it takes longer.")
def stop(invocation: Invocation, name: str, timeout: float, force: bool) -> None:
    """Ask the guest to power down, and wait until QEMU is gone."""
    _change(invocation, name, requests.stop(_service(name), timeout, force), "stopping")


@verb("kill")
@vm_argument
def kill(invocation: Invocation, name: str) -> None:
    """End a VM at once, as if its power were cut."""
    _change(invocation, name, requests.change(_service(name), "kill"), "killing")


@verb("pause")
@vm_argument
def pause(invocation: Invocation, name: str) -> None:
    """Stop the guest's CPUs."""
    _change(invocation, name, requests.change(_service(name), "pause"), "pausing")


@verb("resume")
@vm_argument
def resume(invocation: Invocation, name: str) -> None:
    """Let the guest's CPUs run again."""
    _change(invocation, name, requests.change(_service(name), "resume"), "resuming")


@verb("reset")
@vm_argument
def reset(invocation: Invocation, name: str) -> None:
    """Reset a VM, as its reset button would."""
    _change(invocation, name, requests.change(_service(name), "reset"), "resetting")


@verb("attach")
@vm_argument
@click.option("--qmp", required=True, metavar="PATH", help="The QMP socket of the running QEMU.")
@click.option("--agent", metavar="PATH", help="The socket of its guest agent's port.")
@click.option("--pid", type=click.IntRange(min=1), metavar="N", help="Its process, if QEMU cannot be asked.")
def attach(invocation: Invocation, name: str, qmp: str, agent: str | None, pid: int | None) -> None:
    """Adopt a QEMU that already runs."""
    _change(invocation, name, requests.attach(name, qmp, agent, pid), "attaching")


@verb("detach")
@vm_argument
def detach(invocation: Invocation, name: str) -> None:
    """Let go of a VM, which runs on."""
    _change(invocation, name, requests.detach(_service(name)), "detaching", "detached")


def _service(name: str) -> str:
    from ...common.names import vm_name, vm_service

    return vm_service(vm_name(name))


COMMANDS = {
    "start": start,
    "stop": stop,
    "kill": kill,
    "pause": pause,
    "resume": resume,
    "reset": reset,
    "attach": attach,
    "detach": detach,
}
