# SPDX-License-Identifier: Apache-2.0
"""What is really so, without asking vmloop: which QEMUs the kernel has, what the simulated ones wrote. Used by storm, faults."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from vmloop.common.names import vm_name
from vmloop.common.process import ProcessGone, identify
from vmloop.worker.qemu.launch import VM_VARIABLE
from vmloop.worker.runfile import read_run

from ..site import Site
from .cast import REAL, Actor
from .recording import Account, Emission, Life
from .streams import canonical

LOOK_EVERY: Final = 0.05  # seconds between two looks for new processes; ends are seen at once
ZYGOTES_EVERY: Final = 5  # looks; all of /proc is read for it
ZYGOTE: Final = "vml-zygote"


class Census:
    """A thread that holds a pidfd of every QEMU of the run from its birth to its end."""

    def __init__(self, site: Site, actors: list[Actor]) -> None:
        self._site = site
        self._actors = actors
        self._seen: dict[str, int] = {}  # bytes of an account that were read for headers
        self._known: set[tuple[str, int, int]] = set()  # VM, pid, started
        self._alive: dict[int, Life] = {}  # by pidfd
        self._lock = threading.Lock()  # a pidfd is not closed while it is used to send a signal
        self._poll = select.poll()
        self._stop = threading.Event()
        self._candidates: set[int] = set()
        self.lives: list[Life] = []  # of those that are gone
        self.zygotes: list[Life] = []
        self._thread = threading.Thread(target=self._run, name="census", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def give_up(self) -> None:
        """End soon; nobody waits for it."""
        self._stop.set()

    def stop(self) -> list[Life]:
        """All that lived; those that still do have no `gone`."""
        self._stop.set()
        self._thread.join()
        found = [*self.lives, *self._alive.values()]
        for pidfd in self._alive:
            os.close(pidfd)
        return found

    def signal(self, vm: str, number: int) -> int | None:
        """Send the VM's newest QEMU a signal; its pid, None if it has none."""
        with self._lock:
            alive = [(life.born, life.pid, pidfd) for pidfd, life in self._alive.items() if life.vm == vm]
            if not alive:
                return None
            _, pid, pidfd = max(alive)
            try:
                signal.pidfd_send_signal(pidfd, number)
            except ProcessLookupError:  # it ended in this instant
                return None
            return pid

    def zygote(self) -> int | None:
        """The pid of the zygote that lives now."""
        return next((life.pid for life in reversed(self.zygotes) if life.gone is None), None)

    def _run(self) -> None:
        looks, seen = 0, time.monotonic()
        while not self._stop.is_set():
            for actor in self._actors:
                for pid, started, born in self._births(actor):
                    self._enter(actor.name, pid, started, born)
            if looks % ZYGOTES_EVERY == 0:
                self._look_for_zygotes()
            looks += 1
            looked = time.monotonic()
            for pidfd, _ in self._poll.poll(LOOK_EVERY * 1000):
                with self._lock:
                    self._poll.unregister(pidfd)
                    life = self._alive.pop(pidfd)
                    self.lives.append(msgspec.structs.replace(life, gone=time.monotonic(), seen=max(seen, life.born)))
                    os.close(pidfd)
            seen = looked  # whoever was not among them lived then
            self._stop.wait(LOOK_EVERY / 5)  # those that end in a row are taken together

    def _births(self, actor: Actor) -> Iterator[tuple[int, int, float]]:
        if actor.kind == REAL:
            run = read_run(self._site.paths.vm(vm_name(actor.name)).run_file)
            if run is not None and run.process is not None:
                yield run.process.pid, run.process.started, _on_our_clock(run.process.started)
            return
        content = _from(actor.account, self._seen.get(actor.name, 0))
        whole = content[: content.rfind(b"\n") + 1]
        self._seen[actor.name] = self._seen.get(actor.name, 0) + len(whole)
        for line in whole.splitlines():
            if line.startswith(b'{"pid"'):
                head = json.loads(line)
                yield head["pid"], head["started"], head["at"]

    def _enter(self, vm: str, pid: int, started: int, born: float) -> None:
        if (vm, pid, started) in self._known:
            return
        self._known.add((vm, pid, started))
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self.lives.append(Life(vm, pid, 0, born, time.monotonic()))
            return
        try:
            same = identify(pid).started == started
        except ProcessGone:
            same = False
        if not same:
            os.close(pidfd)
            self.lives.append(Life(vm, pid, 0, born, time.monotonic()))
            return
        with self._lock:
            self._alive[pidfd] = Life(vm, pid, _epoch(pid), born)
            self._poll.register(pidfd, select.POLLIN)

    def _look_for_zygotes(self) -> None:
        found = set(zygotes_of(self._site.root))
        now = time.monotonic()  # afterwards: what is missing ended before this, and not before the last look
        for place, life in enumerate(self.zygotes):
            if life.gone is None and life.pid not in found:
                self.zygotes[place] = msgspec.structs.replace(life, gone=now)
        known = {life.pid for life in self.zygotes if life.gone is None}
        # A worker has this name too in its first instants.
        for pid in sorted((found & self._candidates) - known):
            self.zygotes.append(Life("", pid, 0, now))
        self._candidates = found


def _on_our_clock(ticks: int) -> float:
    """When a process was started, as the kernel has it: clock ticks after boot."""
    ahead = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
    return ticks / os.sysconf("SC_CLK_TCK") - ahead


def _from(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read()
    except FileNotFoundError:
        return b""


def _epoch(pid: int) -> int:
    """Of a launched QEMU, from its environment; 0 of an attached one."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return 0
    for entry in environment:
        if entry.startswith(VM_VARIABLE.encode() + b"="):
            return int(entry.rpartition(b":")[2])
    return 0


def zygotes_of(root: Path) -> Iterator[int]:
    """The zygotes of a root, by the name that they give themselves and their command line."""
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            command = (directory / "cmdline").read_bytes()
            if (directory / "comm").read_text().strip() == ZYGOTE and os.fsencode(root) in command:
                yield int(directory.name)


# Of a VM's run, and of files that are written whole: under a name of their own, then renamed.
OF_A_RUN: Final = ("*.sock", "*carry.*")
HALF_WRITTEN: Final = ("*.damaged-*", "*.tmp*", "*.new", ".*.new")


def left_files(root: Path, run_directories: list[Path]) -> list[str]:
    """What ought to be gone when all VMs are."""
    found = {path for run in run_directories for name in OF_A_RUN for path in run.glob(name)}
    found |= {path for name in HALF_WRITTEN for path in root.rglob(name)}
    return [str(path.relative_to(root)) for path in sorted(found)]


def accounts_of(actor: Actor) -> list[Account]:
    """What a simulated VM wrote down, run by run."""
    runs: list[Account] = []
    for line in _from(actor.account, 0).splitlines():
        entry: dict[str, Any] = json.loads(line)
        if "pid" in entry:
            runs.append(Account(actor.name, entry["pid"], [], []))
        elif "event" in entry:
            runs[-1].emissions.append(Emission(entry["event"], entry["time"], canonical(entry["data"])))
        elif "mark" in entry:
            runs[-1].marks.append(entry["mark"])
    return runs
