# SPDX-License-Identifier: Apache-2.0
"""What the broker can see of a VM without asking anybody: its status page, and /proc for its processes. Used by host.py through loop.py."""

from __future__ import annotations

from typing import Any

from ..common.names import VmName
from ..common.page import Page, PageDamaged, Word
from ..common.paths import Paths


class ProcLooker:
    """Pages are mapped at the first look and kept; nothing here waits."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._pages: dict[VmName, Page] = {}

    def blocked(self, name: VmName, pid: int | None) -> float:
        """Seconds for which the loop of this worker has been in one turn; 0.0 if it sleeps, has no page, or the page is not its own yet."""
        try:
            page = self._page(name)
            seconds = page.blocked_seconds() if page.words[Word.WORKER_PID] == pid else 0.0
        except (OSError, PageDamaged):
            return 0.0
        return seconds if seconds >= 0.1 else 0.0  # a loop at work is not held up

    def task(self, name: VmName) -> str:
        """What the worker's loop last said it does; "" if it said nothing."""
        try:
            return self._page(name).task()
        except (OSError, PageDamaged):
            return ""

    def stopped(self, pid: int | None) -> bool:
        """Whether a process is stopped by a signal or a debugger (proc(5), state T or t)."""
        if pid is None:
            return False
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                return file.read(512).rpartition(b")")[2].lstrip()[:1] in (b"T", b"t")
        except OSError:
            return False

    def went(self, name: VmName) -> bool:
        """Whether a worker that has ended did so by itself: it noted that, or has removed its VM's directory."""
        try:
            return bool(self._page(name).words[Word.LEFT])
        except FileNotFoundError:
            return True
        except (OSError, PageDamaged):
            return False

    def process(self, pid: int | None) -> dict[str, Any] | None:
        """CPU and memory of a process, None if it is gone."""
        if pid is None or pid < 1:
            return None
        import psutil  # late: the broker's start does not wait for it

        try:
            process = psutil.Process(pid)
            with process.oneshot():
                cpu = process.cpu_times()
                return {
                    "pid": pid,
                    "cpu_seconds": round(cpu.user + cpu.system, 2),
                    "rss_bytes": process.memory_info().rss,
                    "threads": process.num_threads(),
                }
        except psutil.Error:
            return None

    def _page(self, name: VmName) -> Page:
        page = self._pages.get(name)
        if page is None:
            page = self._pages[name] = Page(self._paths.vm(name).page, writable=False)
        return page

    def forget(self, name: VmName) -> None:
        """The VM is no more, or its worker is a new one with perhaps a new page."""
        page = self._pages.pop(name, None)
        if page is not None:
            page.close()

    def close(self) -> None:
        for name in tuple(self._pages):
            self.forget(name)
