# SPDX-License-Identifier: Apache-2.0
"""The VMs of a chaos run: real QEMUs, launched simulated ones, and attached simulated ones that share a process. Made by storm.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec

from vmloop.client.session import Host

from ..site import REAL_ARGS, Site

REAL: Final = "real"
LAUNCHED: Final = "launched"
ATTACHED: Final = "attached"

STARTS_AT_ONCE: Final = 4  # of QEMUs; more only make each other slow


class Actor(msgspec.Struct, frozen=True):
    """One VM. `account`: the file of what it emitted (simulated), or the socket of a monitor of the test's own (real)."""

    name: str
    kind: str
    account: Path

    @property
    def own_process(self) -> bool:
        """Whether it has a process that can be killed without others."""
        return self.kind != ATTACHED


def choose(site: Site, vms: int, real: bool) -> list[Actor]:
    """A tenth real QEMUs (if there is one here), a third attached, the rest launched; those with a process of their own come first."""
    directory = site.root / "told"
    directory.mkdir()
    reals = max(1, vms // 10) if real else 0
    attached = vms // 3
    actors = [Actor(f"real-{number:03}", REAL, directory / f"real-{number:03}.sock") for number in range(reals)]
    actors += [
        Actor(f"own-{number:03}", LAUNCHED, directory / f"own-{number:03}.jsonl")
        for number in range(vms - reals - attached)
    ]
    actors += [Actor(f"att-{number:03}", ATTACHED, directory / f"att-{number:03}.jsonl") for number in range(attached)]
    return actors


def start(site: Site, host: Host, actors: list[Actor]) -> None:
    """Define and start all; attached ones in one process. Returns when all run."""
    attached = [actor for actor in actors if actor.kind == ATTACHED]
    if attached:
        directory, _ = site.simulate(len(attached), "att", "--emitted", str(attached[0].account.parent))
        for actor in attached:
            host.attach(actor.name, directory / f"{actor.name}.qmp", directory / f"{actor.name}.qga")

    def one(actor: Actor) -> None:
        if actor.kind == REAL:
            own_monitor = ("-qmp", f"unix:{actor.account},server=on,wait=off")
            site.define(host, actor.name, *REAL_ARGS, *own_monitor, binary="qemu-system-x86_64")
        else:
            site.define(host, actor.name, "-emitted", str(actor.account), agent={"enabled": True})
        host.start(actor.name)

    with ThreadPoolExecutor(STARTS_AT_ONCE) as pool:
        for _ in pool.map(one, (actor for actor in actors if actor.own_process)):
            pass
