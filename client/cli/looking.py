# SPDX-License-Identifier: Apache-2.0
"""`list show stats wait`: what is known of VMs. The first three never touch QEMU."""

from __future__ import annotations

import shlex
import time
from typing import Any, Final

import click

from ...common.names import vm_name, vm_service
from ...common.states import VmState
from ..results import ProcessFigures, VmStats, VmSummary, typed
from .base import MAX_TIMEOUT, Invocation, Seconds, verb, vm_argument, vms_argument
from .output import to_json

_TIMES: Final = frozenset({"since", "started", "worker_started"})


@verb("list")
def list_vms(invocation: Invocation) -> None:
    """All VMs that vmloop knows."""
    with invocation.host() as host:
        value = host.call("vmloop", "list", reading=True)
    output = invocation.output()
    columns = ("name", "state", "reason", "monitor", "agent", "pid", "worker", "blocked", "age")
    output.result(value, lambda: output.table(columns, [_summary(vm) for vm in typed(value, list[VmSummary])]))


def _summary(vm: VmSummary) -> tuple[str, ...]:
    return (
        vm.name,
        vm.state,
        vm.reason,
        vm.monitor,
        vm.agent,
        _number(vm.pid),
        vm.worker,
        _seconds(vm.blocked) if vm.blocked else "",
        _seconds(vm.age),
    )


@verb("stats")
@vms_argument
def stats(invocation: Invocation, names: tuple[str, ...]) -> None:
    """Figures of some VMs, or of all."""
    with invocation.host() as host:
        value = host.call("vmloop", "stats", {"names": list(names)} if names else None, reading=True)
    output = invocation.output()
    columns = (
        "name",
        "state",
        "in flight",
        "requests",
        "restarts",
        "qemu cpu",
        "qemu rss",
        "worker cpu",
        "worker rss",
        "age",
    )
    output.result(value, lambda: output.table(columns, [_figures(vm) for vm in typed(value, list[VmStats])]))


def _figures(vm: VmStats) -> tuple[str, ...]:
    counts = (str(vm.in_flight), str(vm.requests), str(vm.restarts))
    return (vm.name, vm.state, *counts, *_process(vm.qemu), *_process(vm.worker), _seconds(vm.age))


def _process(figures: ProcessFigures | None) -> tuple[str, str]:
    if figures is None:
        return "", ""
    return _seconds(figures.cpu_seconds), f"{figures.rss_bytes / (1 << 20):.1f}M"


@verb("show")
@vm_argument
def show(invocation: Invocation, name: str) -> None:
    """Everything that is known of one VM."""
    with invocation.host() as host:
        value = host.call(vm_service(vm_name(name)), "show", reading=True)
    output = invocation.output()
    output.result(value, lambda: output.facts(_facts(value)))


def _facts(value: Any, prefix: str = "") -> dict[str, str]:
    """A nested answer as flat `name: value`; what is not known is left out."""
    facts: dict[str, str] = {}
    for key, item in value.items() if isinstance(value, dict) else (("answer", value),):
        name = f"{prefix}{key}"
        if item is None:
            continue
        if isinstance(item, dict):
            facts |= _facts(item, f"{name}.")
        elif isinstance(item, list):
            nested = any(isinstance(part, dict | list) for part in item)
            facts[name] = to_json(item) if nested else shlex.join(map(str, item))
        elif key in _TIMES and isinstance(item, int | float):
            facts[name] = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(item))
        else:
            facts[name] = str(item).lower() if isinstance(item, bool) else str(item)
    return facts


@verb("wait")
@vm_argument
@click.option(
    "--for",
    "state",
    required=True,
    type=click.Choice([state.value for state in VmState]),
    help="The state to wait for.",
)
@click.option("--timeout", type=Seconds(MAX_TIMEOUT), metavar="S", help="How long to wait.")
def wait(invocation: Invocation, name: str, state: str, timeout: float | None) -> None:
    """Wait until a VM is in a state.

    Without --timeout the global one (30 s) holds.
    """
    output = invocation.output()
    with invocation.host() as host, output.busy(f"waiting for {name} to be {state}"):
        value = host.call(vm_service(vm_name(name)), "wait", {"for": state}, timeout=timeout, reading=True)
    reason = value.get("reason") if isinstance(value, dict) else None
    output.result(value, lambda: output.line(f"{name}: {state}" + (f" ({reason})" if reason else "")))


def _number(number: int | None) -> str:
    return "" if number is None else str(number)


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f}s"


COMMANDS = {"list": list_vms, "show": show, "stats": stats, "wait": wait}
