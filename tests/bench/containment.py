# SPDX-License-Identifier: Apache-2.0
"""Whether one VM can hold up others: their round trips while a victim's handler, QEMU or agent misbehaves, against none of it.

Calm and faulty turns alternate on the same VMs in the same run; the figures are pooled over all turns. Measures for `make bench`.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Final

from vmloop.client import requests
from vmloop.client.session import Host
from vmloop.client.vm import Vm
from vmloop.common.errors import VmloopError
from vmloop.tests.bench import faults
from vmloop.tests.bench.guests import fresh_agent
from vmloop.tests.bench.row import Row, times_text
from vmloop.tests.system.site import Site

TURNS: Final = 3
# A turn of measuring ends well before the fault does.
TURN_SECONDS: Final = 0.8 * faults.SECONDS
REAL_BYSTANDERS: Final = 3
SIMULATED_BYSTANDERS: Final = 50
GUESTS: Final = 3  # booted on each side

Fault = Callable[[], contextlib.AbstractContextManager[None]]


def contained_real(site: Site, host: Host) -> list[Row]:
    """Three bystanders and the victims are real QEMUs."""
    faults.install_handlers(site)
    names = [f"bystander{number}" for number in range(REAL_BYSTANDERS)]
    for name in names:
        site.define_real(host, name)
        host.vm(name).start(paused=True)
    vms = [host.vm(name) for name in names]
    rows = [_compare(vms, "nothing", contextlib.nullcontext, "real QEMU")]
    for victim in (*faults.IN_HANDLERS, "frozen"):
        site.define_real(host, victim)
        host.vm(victim).start(paused=True)
        rows.append(_compare(vms, victim, _fault(site, host, victim), "real QEMU"))
        host.vm(victim).kill()
    return rows


def contained_simulated(site: Site, host: Host) -> list[Row]:
    """50 simulated bystanders in one process; each victim is a process of its own."""
    faults.install_handlers(site)
    directory, names = site.simulate(SIMULATED_BYSTANDERS, "by")
    attaches = [requests.attach(name, directory / f"{name}.qmp", None, None) for name in names]
    for _, answer in host.call_many(attaches, in_flight=16):
        if isinstance(answer, VmloopError):
            raise answer
    vms = [host.vm(name) for name in names]
    rows = [_compare(vms, "nothing", contextlib.nullcontext, "50 simulated")]
    for victim in (*faults.IN_HANDLERS, "frozen", "agent-floods"):
        site.define(host, victim, agent={"enabled": True})
        host.vm(victim).start(paused=victim != "agent-floods")
        rows.append(_compare(vms, victim, _fault(site, host, victim), "50 simulated"))
        host.vm(victim).kill()
    return rows


def agent_beside_frozen(site: Site, host: Host) -> list[Row]:
    """The agent of a fresh real guest, alone, and while another VM hangs in what is done on its RESET with its QEMU frozen."""
    site.define_real(host, "bad")
    host.vm("bad").start()
    alone = statistics.median(fresh_agent(site, host) for _ in range(GUESTS))
    with faults.frozen_in_reset(host, "bad"):
        frozen = statistics.median(fresh_agent(site, host) for _ in range(GUESTS))
    host.vm("bad").kill()
    figure = f"{alone:.2f} s / {frozen:.2f} s"
    return [
        Row(f"agent of a fresh guest, alone / beside a VM frozen in a handler, median of {GUESTS}", figure, "the same")
    ]


def _fault(site: Site, host: Host, victim: str) -> Fault:
    if victim == "frozen":
        return lambda: faults.frozen(site, host, victim)
    if victim == "agent-floods":
        return lambda: faults.agent_floods(host, victim)
    return lambda: faults.in_handler(host, victim)


def _compare(vms: list[Vm], what: str, fault: Fault, on: str) -> Row:
    calm: list[float] = []
    beside: list[float] = []
    for _ in range(TURNS):
        calm += _measure(vms)
        with fault():
            beside += _measure(vms)
    calm.sort()
    beside.sort()
    worse = beside[len(beside) * 99 // 100] / calm[len(calm) * 99 // 100]
    figure = f"{times_text(calm)} → {times_text(beside)} us ({worse:.2f} x)"
    return Row(f"others on {on}, p50 / p99, victim: {WHAT[what]}", figure, "" if what == "nothing" else "1.2 x")


WHAT: Final = {
    "nothing": "none (how much it varies by itself)",
    "thread-sleeps": "`def` handler sleeps",
    "loop-sleeps": "`async def` handler blocks its loop, sleeping",
    "thread-spins": "`def` handler spins",
    "loop-spins": "`async def` handler spins",
    "thread-allocates": "handler allocates up to the limit",
    "frozen": "its QEMU is frozen",
    "agent-floods": "its agent sends 100 000 lines a second",
}


def _measure(vms: list[Vm]) -> list[float]:
    """Round trips of `query-status`, one after the other, over all VMs in turn."""
    times = []
    end = time.perf_counter() + TURN_SECONDS
    for vm in _turns(vms):
        begin = time.perf_counter()
        if begin >= end:
            break
        vm.qmp("query-status")
        times.append(time.perf_counter() - begin)
    return times


def _turns(vms: list[Vm]) -> Iterator[Vm]:
    return itertools.cycle(vms)
