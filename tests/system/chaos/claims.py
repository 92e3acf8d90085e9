# SPDX-License-Identifier: Apache-2.0
"""What `list` says, asked all the time: each claim with its time. Judged by liveness.py; faults.py finds workers by it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Final

from vmloop.client import connect
from vmloop.common.errors import VmloopError

from .recording import Claim

EVERY: Final = 0.2  # seconds
PATIENCE: Final = 5.0  # seconds that one list may take; a dead broker is back before


class Claims:
    """A thread with a client of its own."""

    def __init__(self, root: Path, broken: list[str]) -> None:
        self._root = root
        self._broken = broken
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="claims", daemon=True)
        self.claims: list[Claim] = []
        self.workers: dict[str, int | None] = {}  # VM → the pid of its worker, as last told

    def start(self) -> None:
        self._thread.start()

    def give_up(self) -> None:
        """End soon; nobody waits for it."""
        self._stop.set()

    def stop(self) -> list[Claim]:
        self._stop.set()
        self._thread.join()
        return self.claims

    def _run(self) -> None:
        with connect(root=self._root, wait=PATIENCE, timeout=PATIENCE) as host:
            while not self._stop.is_set():
                asked = time.monotonic()
                try:
                    vms = host.list()
                except VmloopError as error:
                    self._broken.append(f"list at {asked:.3f}: {error.code}: {error}")
                    continue
                answered = time.monotonic()
                self.claims += [Claim(vm.name, vm.state, vm.epoch, asked, answered) for vm in vms]
                self.workers = {vm.name: vm.worker_pid for vm in vms}
                self._stop.wait(EVERY)
