# SPDX-License-Identifier: Apache-2.0
"""A site whose broker is started by a service manager (tests/fakes/service_manager.py), and the death of everything at once."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from pathlib import Path

from ..fakes.service_manager import ServiceManager
from .site import END_SECONDS, Site, wait_for


class ManagedSite(Site):
    """As Site; `manager` is there before the first broker."""

    def __init__(self, settings: str = "", store_max: int = 64) -> None:
        super().__init__(settings)
        self.manager = ServiceManager(self.root, store_max)

    def start_broker(self) -> None:
        argv = [sys.executable, "-m", "vmloop.broker", str(self.root)]
        self.broker = self.manager.start(argv, self._log.fileno())

    def close(self) -> None:
        # Before the root goes, in which its socket is; a broker that ends without it ends all the same.
        try:
            self._end_broker()
            self.broker = None
        finally:
            self.manager.close()
            super().close()


def comm(pid: int) -> str:
    """A process's name; vmloop's own begin with vml."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def zygote_of(site: Site) -> int:
    """The only one, soon: a zygote that has just been started has no name yet."""
    found = wait_for(lambda: [pid for pid in site.processes() if comm(pid) == "vml-zygote"], END_SECONDS)
    [pid] = found
    return int(pid)


def kill_everything(site: Site) -> None:
    """SIGKILL for broker, zygote and all workers; stopped first, so that none sees another one die."""
    assert site.broker is not None
    pids = [site.broker.pid, *(pid for pid in site.processes() if comm(pid).startswith("vml"))]
    pidfds = [os.pidfd_open(pid) for pid in dict.fromkeys(pids)]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pidfd in pidfds:
            signal.pidfd_send_signal(pidfd, number)
    for pidfd in pidfds:
        assert select.select([pidfd], [], [], END_SECONDS)[0]
        os.close(pidfd)
    site.broker.wait()
