# SPDX-License-Identifier: Apache-2.0
"""What `make bench` measures, one function each: it takes a Site with a broker and returns rows for the table.

Absolute times move from machine to machine; where a row has a ratio, both sides were measured in turns, in the same run.
"""

from __future__ import annotations

import contextlib
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vmloop.client import requests
from vmloop.client.requests import Request
from vmloop.client.results import VmStarted
from vmloop.client.session import Host
from vmloop.common.errors import VmloopError
from vmloop.common.names import vm_name, vm_service
from vmloop.tests.bench.beside_libvirt import beside_libvirt
from vmloop.tests.bench.containment import agent_beside_frozen, contained_real, contained_simulated
from vmloop.tests.bench.load import BareMonitor, commands_per_second
from vmloop.tests.bench.probing import probing
from vmloop.tests.bench.row import Row
from vmloop.tests.system.site import Site, signal_process, wait_for

ROUNDS = 20  # turns of raw and vmloop
PER_ROUND = 150  # commands in each


def round_trip(site: Site, host: Host) -> list[Row]:
    """`query-status` on a second monitor of the same QEMU without vmloop, and through client, broker and worker."""
    path = site.root / "raw.qmp"
    site.define_real(host, "rt", "-qmp", f"unix:{path},server=on,wait=off")
    host.vm("rt").start(paused=True)
    vm = host.vm("rt")
    raw = BareMonitor(path)
    direct: list[float] = []
    through: list[float] = []
    ratios: list[float] = []
    for _ in range(ROUNDS):
        one = _times(raw.query_status, PER_ROUND)
        two = _times(lambda: vm.qmp("query-status"), PER_ROUND)
        direct += one
        through += two
        ratios.append(statistics.median(two) / statistics.median(one))
    raw.close()
    vm.kill()
    ratio = statistics.median(ratios)
    return [
        Row("raw QMP round trip, no vmloop, p50 / p99", f"{_us(direct, 50)} / {_us(direct, 99)} us"),
        Row("the same through the broker, p50 / p99", f"{_us(through, 50)} / {_us(through, 99)} us"),
        Row("ratio through broker / raw, p50 (median of 20 turns)", f"{ratio:.2f}", "3.0"),
    ]


def throughput(site: Site, host: Host) -> list[Row]:
    """7 VMs; raw: one client process on each monitor; vmloop: 14 client processes, two on each VM. One command in flight each."""
    names = [f"t{number}" for number in range(7)]
    paths = {name: site.root / f"{name}.qmp" for name in names}
    for name in names:
        site.define_real(host, name, "-qmp", f"unix:{paths[name]},server=on,wait=off")
        host.vm(name).start(paused=True)
    raw = commands_per_second([["raw", str(paths[name])] for name in names])
    through = commands_per_second([["vmloop", str(site.root), name] for name in names * 2])
    for name in names:
        host.vm(name).kill()
    return [
        Row("commands/s raw, 7 clients on 7 VMs", f"{raw:.0f}"),
        Row("commands/s through the broker, 14 clients on 7 VMs", f"{through:.0f}"),
        Row("ratio through broker / raw, commands/s", f"{through / raw:.2f}", "0.45 at least"),
    ]


def start_paused(site: Site, host: Host) -> list[Row]:
    """From the call to a negotiated monitor and a known state; 64 MiB, no devices."""
    site.define_real(host, "st")
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        host.vm("st").start(paused=True)
        times.append(time.perf_counter() - begin)
        host.vm("st").kill()
    return [Row("start --paused of a 64 MiB VM, median of 7", f"{statistics.median(times):.3f} s", "0.25 s")]


def frozen_neighbour(site: Site, host: Host) -> list[Row]:
    """Looking and killing while one VM is frozen."""
    for name in ("cold", "warm"):
        site.define_real(host, name)
    pid = host.vm("cold").start().pid
    host.vm("warm").start()
    assert pid is not None
    calm = _times(lambda: host.vm("warm").qmp("query-status"), 1000)
    signal_process(pid, signal.SIGSTOP)
    stuck = threading.Thread(target=_ask_in_vain, args=(site,))
    stuck.start()
    wait_for(lambda: host.vm("cold").show().monitor == "frozen")
    beside = _times(lambda: host.vm("warm").qmp("query-status"), 1000)
    stats = _times(host.stats, 20)
    begin = time.perf_counter()
    host.vm("cold").kill()
    killed = time.perf_counter() - begin
    stuck.join()
    host.vm("warm").kill()
    return [
        Row("another VM's p99 while one QEMU is frozen / without", f"{_us(beside, 99)} / {_us(calm, 99)} us", "1.2 x"),
        Row("stats of all VMs with one frozen, p50", f"{statistics.median(stats) * 1000:.1f} ms", "50 ms"),
        Row("kill of a frozen VM until it is shut off", f"{killed:.3f} s", "0.5 s"),
    ]


def worker_killed(site: Site, host: Host) -> list[Row]:
    """Kill -9 of a worker until the next one answers; with pauses so that each is a first death."""
    site.define_real(host, "wk")
    host.vm("wk").start()
    pid = host.vm("wk").show().worker_pid
    assert pid is not None
    begin = time.perf_counter()
    signal_process(pid, signal.SIGKILL)
    host.vm("wk").qmp("query-status")
    took = time.perf_counter() - begin
    host.vm("wk").kill()
    return [Row("worker killed (-9) until the next one answers", f"{took:.3f} s", "0.1 s")]


def many(site: Site, host: Host) -> list[Row]:
    """200 simulated VMs: attach all, list, memory."""
    directory, names = site.simulate(200, "b")
    begin = time.perf_counter()
    attaches = [_attach(name, directory / f"{name}.qmp") for name in names]
    for _, answer in host.call_many(attaches, in_flight=64):
        if isinstance(answer, VmloopError):
            raise answer
    attached = time.perf_counter() - begin
    lists = _times(host.list, 20)
    workers = [stats.worker.pid for stats in host.stats() if stats.worker is not None and stats.name in names]
    unique = [_unique_kib(pid) for pid in workers]
    assert site.broker is not None
    begin = time.perf_counter()
    for _, answer in host.call_many([_detach(name) for name in names], in_flight=64):
        if isinstance(answer, VmloopError):
            raise answer
    detached = time.perf_counter() - begin
    return [
        Row("200 simulated VMs: attach all / detach all", f"{attached:.1f} s / {detached:.1f} s"),
        Row("200 simulated VMs: list, p50", f"{statistics.median(lists) * 1000:.1f} ms"),
        Row(
            "unique memory of a worker (Private_*), median of 200",
            f"{statistics.median(unique) / 1024:.1f} MiB",
            "3.5 MB",
        ),
        Row("broker memory (RSS) with 200 VMs", f"{_rss_mib(site.broker.pid):.0f} MiB"),
    ]


def broker_restarted(site: Site, host: Host) -> list[Row]:
    """The broker killed under 200 simulated VMs and started again: from its taking connections until each VM has answered."""
    directory, names = site.simulate(200, "r")
    for _, answer in host.call_many([_attach(name, directory / f"{name}.qmp") for name in names], in_flight=64):
        if isinstance(answer, VmloopError):
            raise answer
    site.kill_broker()
    site.start_broker()
    again = site.host()
    begin = time.perf_counter()
    asked = [requests.qmp(vm_service(vm_name(name)), "query-name", None, False, False, None, None) for name in names]
    for _, answer in again.call_many(asked, in_flight=200):
        if isinstance(answer, VmloopError):
            raise answer
    served = time.perf_counter() - begin
    for _, answer in again.call_many([_detach(name) for name in names], in_flight=64):
        if isinstance(answer, VmloopError):
            raise answer
    return [Row("broker killed and restarted under 200 VMs: all served after it is up", f"{served:.2f} s", "3 s")]


def list_command(site: Site, host: Host) -> list[Row]:
    """`vmloop list` as a whole process."""
    del host
    program = str(Path(sys.executable).with_name("vmloop"))

    def run() -> None:
        subprocess.run([program, "--root", str(site.root), "list"], stdout=subprocess.DEVNULL, check=True)

    return [Row("`vmloop list`, wall clock, p50 of 15", f"{statistics.median(_times(run, 15)):.3f} s", "0.25 s")]


ALL: list[Callable[[Site, Host], list[Row]]] = [
    round_trip,
    throughput,
    start_paused,
    frozen_neighbour,
    worker_killed,
    many,
    broker_restarted,
    list_command,
    contained_real,
    contained_simulated,
    agent_beside_frozen,
    probing,
    beside_libvirt,
]


# -- how ------------------------------------------------------------------------------------------------------------------


def _times(call: Callable[[], object], count: int) -> list[float]:
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times


def _ask_in_vain(site: Site) -> None:
    """Give the frozen VM something that it does not answer, so that its monitor's state shows."""
    with contextlib.suppress(VmloopError):
        site.host().vm("cold").qmp("query-status", timeout=5.0)


def _attach(name: str, path: Path) -> Request[VmStarted]:
    return requests.attach(name, path, None, None)


def _detach(name: str) -> Request[None]:
    return requests.detach(vm_service(vm_name(name)))


def _unique_kib(pid: int) -> int:
    """What would be freed if the process ended: its private pages."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


def _rss_mib(pid: int) -> float:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * 4096 / 2**20


def _us(times: list[float], percent: int) -> str:
    ordered = sorted(times)
    return f"{ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] * 1e6:.0f}"
