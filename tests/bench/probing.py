# SPDX-License-Identifier: Apache-2.0
"""What it costs to know what a QEMU can do: the first time, from the disk, and from memory. A row of measures.py each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from vmloop.client.session import Host
from vmloop.common.errors import VmloopError
from vmloop.tests.bench.row import Row, times_text
from vmloop.tests.system.site import Site, kill_process, wait_for

COLD = 5
WARM = 100


def probing(site: Site, host: Host) -> list[Row]:
    """`capabilities` of the installed QEMU, through broker and prober."""
    cold = [_time(lambda: host.capabilities(refresh=True)) for _ in range(COLD)]
    from_disk = []
    for _ in range(COLD):
        _end_probers(site)
        from_disk.append(_time(host.capabilities))
    known = [_time(lambda: host.call("vmloop", "capabilities", reading=True)) for _ in range(WARM)]
    typed = [_time(host.capabilities) for _ in range(WARM)]
    return [
        Row(f"probe of qemu-system-x86_64, cold, median of {COLD} / worst", _seconds(cold), "1 s"),
        Row(f"the same from the disk, by a new prober, median of {COLD} / worst", _seconds(from_disk)),
        Row("the same known, round trip, p50 / p99", f"{times_text(known)} us", "5 ms"),
        Row("the same known, as a typed document, p50 / p99", f"{times_text(typed)} us"),
    ]


def _end_probers(site: Site) -> None:
    for pid in _probers(site):
        kill_process(pid)
    wait_for(lambda: not _probers(site))


def _probers(site: Site) -> list[int]:
    found = []
    for pid in site.processes():
        try:
            with open(f"/proc/{pid}/comm") as file:
                if file.read().strip() == "vml-probe":
                    found.append(pid)
        except OSError:
            continue  # it has just ended
    return found


def _time(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    try:
        call()
    except VmloopError as error:
        raise SystemExit(f"the probe failed: {error}") from error
    return time.perf_counter() - begin


def _seconds(times: list[float]) -> str:
    return f"{statistics.median(times):.3f} / {max(times):.3f} s"
