# SPDX-License-Identifier: Apache-2.0
"""`probe`: what a QEMU binary can do. Asked of the broker; where none runs, probed here, in this process's own children."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ...common.errors import NoBroker
from .base import Invocation, verb

if TYPE_CHECKING:
    from pathlib import Path

    from ...common.capabilities import Capabilities


@verb("probe")
@click.argument("binary", required=False)
@click.option("--refresh", is_flag=True, help="Probe anew, whatever is in the cache.")
def probe(invocation: Invocation, binary: str | None, refresh: bool) -> None:
    """What a QEMU BINARY can do: machines, CPUs, devices, commands (qemu-system-x86_64 if none is named).

    A throw-away QEMU without a machine is started and asked, and the answers are kept until the binary or the host changes. Works without
    a broker, too.
    """
    from ...common.capabilities import to_plain

    output = invocation.output()
    with output.busy(f"probing {binary or 'QEMU'}"):
        found = _probe(invocation, binary, refresh)
    output.result(to_plain(found), lambda: output.facts(_summary(found)))


def _probe(invocation: Invocation, binary: str | None, refresh: bool) -> Capabilities:
    try:
        with invocation.host() as host:
            return host.capabilities(binary, refresh=refresh)
    except NoBroker:
        if invocation.connect is not None:  # that one is meant, and no other way
            raise
    return _probe_here(invocation, binary, refresh)


def _probe_here(invocation: Invocation, binary: str | None, refresh: bool) -> Capabilities:
    import asyncio
    import os
    from pathlib import Path

    from ...common.definition import DEFAULT_BINARY
    from ...common.paths import default_paths, paths_under
    from ...worker.probe.asking import ASK_SECONDS, Asking
    from ...worker.probe.cache import Cache

    paths = paths_under(Path(invocation.root)) if invocation.root else default_paths(os.environ, os.getuid())
    name = binary or DEFAULT_BINARY
    seconds = invocation.timeout or ASK_SECONDS

    async def ask() -> Capabilities:
        asking = Asking(Cache(_usable(paths.capabilities)))
        try:
            path = os.path.abspath(name) if "/" in name else name
            return (await asking.known(path, seconds=seconds, refresh=refresh)).capabilities
        finally:
            await asking.close()

    return asyncio.run(ask())


def _usable(directory: Path) -> Path | None:
    """Where documents are kept; None where this user may not keep any."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    return directory


def _summary(found: Capabilities) -> dict[str, str]:
    """What a person wants to see first; --json has everything."""
    kvm = "usable" if found.kvm.enabled else "not usable here" if found.kvm.present else "not in this binary"
    default = [name for name, entry in found.machine_details.items() if entry.get("is-default") is True]
    facts: dict[str, str] = {
        "binary": found.binary,
        "version": ".".join(map(str, found.version)) + (f" ({found.package})" if found.package else ""),
        "target": found.target or "unknown",
        "accelerators": ", ".join(found.accelerators) or "unknown",
        "kvm": kvm,
        "machines": _count(found.machines, f"default {default[0]}" if default else ""),
        "cpus": _count(found.cpus, _usable_cpus(found.cpu_details)),
        "device types": _count(found.device_types, f"{len(found.device_aliases)} aliases"),
        "commands": _count(found.commands, f"out of band: {', '.join(found.oob)}" if found.oob else ""),
        "events": _count(found.events, ""),
        "options": _count(found.options, ""),
        "migration": ", ".join(found.migration),
        "features": ", ".join(found.features),
        "expansion": ", ".join(f"{model} ({_kind(entry)})" for model, entry in found.expansion.items()),
        "not there": ", ".join(found.missing),
    }
    return {name: text for name, text in facts.items() if text}


def _count(names: list[str], more: str) -> str:
    return f"{len(names)}" + (f" ({more})" if more and names else "")


def _usable_cpus(details: dict[str, dict[str, Any]]) -> str:
    usable = sum(entry.get("unavailable-features") == [] for entry in details.values())
    return f"{usable} with all their features here" if usable else ""


def _kind(entry: Any) -> str:
    props = entry.get("props") if isinstance(entry, dict) else None
    return f"{len(props)} properties" if isinstance(props, dict) else "?"


COMMANDS = {"probe": probe}
