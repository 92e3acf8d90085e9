# SPDX-License-Identifier: Apache-2.0
"""What a worker uses while a test gives it trouble, how fast another VM answers meanwhile, what an agent owes. For tests of guests."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psutil

from vmloop.client.vm import Vm
from vmloop.common.names import vm_name
from vmloop.common.page import Page
from vmloop.worker.agent.ledger import AgentLedger, Part

from .site import Site

MIB: Final = 1 << 20


def agent_owes(site: Site, name: str) -> bool:
    """Whether the VM's page says that a command is on the wire to its guest agent."""
    with Page(site.paths.vm(vm_name(name)).page, writable=False) as page:
        return any(owed.part is Part.CURRENT for owed in AgentLedger(page))


class Usage:
    """Of one process, since this was made. The peak is the kernel's own: nothing that was taken for a moment escapes it."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._proc = Path(f"/proc/{pid}")
        (self._proc / "clear_refs").write_text("5")  # the peak begins anew
        self._resident = self._process.memory_info().rss
        self._unique = self._process.memory_full_info().uss
        self._cpu = self._cpu_now()

    def _cpu_now(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system

    @property
    def cpu(self) -> float:
        """Seconds of processor time."""
        return self._cpu_now() - self._cpu

    @property
    def peak(self) -> int:
        """Bytes by which the process has been larger at any time."""
        (line,) = (line for line in (self._proc / "status").read_text().splitlines() if line.startswith("VmHWM:"))
        return max(0, int(line.split()[1]) * 1024 - self._resident)

    @property
    def kept(self) -> int:
        """Bytes of its own that the process has now and had not then."""
        return int(self._process.memory_full_info().uss) - self._unique


def usage_of_worker(vm: Vm) -> Usage:
    """Of the worker that the VM has now."""
    pid = vm.show().worker_pid
    assert pid is not None
    return Usage(pid)


def answer_time(vm: Vm, count: int = 200) -> float:
    """Median of the seconds that a small command takes."""

    def one() -> float:
        began = time.perf_counter()
        vm.qmp("query-status")
        return time.perf_counter() - began

    return statistics.median(one() for _ in range(count))


@contextmanager
def answering_as_before(vm: Vm, factor: float, count: int = 200) -> Iterator[None]:
    """The VM answers as fast at the end of the `with`, when its neighbour is up to something, as before it: not `factor` times slower.

    Half a millisecond is granted besides: the neighbour's QEMU has a core of its own to burn, and there may be only two.
    """
    before = answer_time(vm, count)
    yield
    meanwhile = answer_time(vm, count)
    assert meanwhile < factor * before + 0.0005, (before, meanwhile)
