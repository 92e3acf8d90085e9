# SPDX-License-Identifier: Apache-2.0
"""One chaos run from start to stop: what happened in it, recorded. Called by test_chaos.py and __main__.py."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec

from vmloop.client.results import VmSummary
from vmloop.client.session import Host
from vmloop.client.vm import Vm
from vmloop.common.errors import NotRunning, VmloopError

from ..site import Site, wait_for
from .cast import ATTACHED, LAUNCHED, REAL, Actor, choose, start
from .claims import Claims
from .commands import Stage, asynchronous, blocking, in_thread
from .faults import Faults
from .followers import Followers, look
from .plan import Strike, plan
from .power import carry_out, power
from .raw import raw
from .recording import RESULT, THE_END, Recording
from .truth import Census, accounts_of, left_files, zygotes_of
from .witness import Witness

# Workers that the plan kills many times are not to be waited for longer and longer.
SETTINGS: Final = "[restart]\nfirst_delay = 0.05\nmax_delay = 0.5\n"

CLIENT_SECONDS: Final = 40.0  # for commands under way: each has a deadline, the longest is that of a start
SETTLE_SECONDS: Final = 20.0  # until every VM has a ready worker and a known state again
READ_SECONDS: Final = 15.0  # for all readers to come to the end
FILES_SECONDS: Final = 10.0  # for the broker and the zygote to let go of what they hold for VMs that are gone
FILES_OF_A_WORKER: Final = 3  # in the broker: its pidfd, its page, its connection
FILES_OF_LOGS: Final = 1  # the zygote opens its log at its first line
AT_ONCE: Final = 8  # VMs that are stopped or read at the same time


class Scenario(msgspec.Struct, frozen=True):
    """What is to happen. The same values give the same plan of faults and the same commands."""

    seed: int
    seconds: float
    vms: int = 30


def strikes_of(scenario: Scenario) -> list[Strike]:
    """The plan."""
    return plan(scenario.seed, scenario.seconds, scenario.vms, scenario.vms - scenario.vms // 3)


def storm(scenario: Scenario, keep: Path | None = None) -> Recording:
    """Run it, and end everything. Raises nothing for what vmloop does wrong: that is recorded. `keep`: where logs and accounts go."""
    recording = Recording(scenario.seed, began=time.monotonic(), epoch=time.time() - time.monotonic())
    site = Site(SETTINGS)
    try:
        site.start_broker()
        run = _Run(site, scenario, recording)
        try:
            run.run()
        except Exception as error:  # noqa: BLE001 - what keeps a run from its end is a finding, told with what was recorded until then
            recording.broken.append(f"the run came to no end: {error!r}")
            run.give_up()
    finally:
        if keep is not None:
            _keep(site, keep)
        try:
            site.close()
        except (AssertionError, VmloopError, OSError) as error:
            recording.leftovers.append(f"at the end: {error}")
    recording.ended = time.monotonic()
    return recording


def _keep(site: Site, directory: Path) -> None:
    """Copy what tells how it came: the logs of all processes, and what the VMs wrote down."""
    for pattern in ("*.log", "*.log.1", "*.jsonl", "run.json"):
        for path in site.root.rglob(pattern):
            target = directory / path.relative_to(site.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


class _Run:
    """The parts of one run."""

    def __init__(self, site: Site, scenario: Scenario, recording: Recording) -> None:
        self._site = site
        self._scenario = scenario
        self._recording = recording
        self._host: Host = site.host()
        self._actors = choose(site, scenario.vms, shutil.which("qemu-system-x86_64") is not None)
        recording.vms = [actor.name for actor in self._actors]
        self._stage = Stage(
            site.root, self._actors, scenario.seed, threading.Event(), recording.commands, recording.broken
        )
        self._census = Census(site, self._actors)
        self._claims = Claims(site.root, recording.broken)
        self._witnesses = [Witness(actor) for actor in self._actors if actor.kind == REAL]
        self._followers = Followers(self._stage, scenario.seconds / 2)

    def run(self) -> None:
        self._census.start()
        wait_for(lambda: self._census.zygote() is not None)
        files = self._open_files()
        self._claims.start()
        for witness in self._witnesses:
            witness.start()
        self._followers.start_everything()
        start(self._site, self._host, self._actors)
        self._followers.start()
        self._strike()
        self._settle()
        self._end(files)

    def give_up(self) -> None:
        """Tell all threads to end."""
        self._stage.stop.set()
        self._claims.give_up()
        self._census.give_up()
        for witness in self._witnesses:
            witness.give_up()
        self._followers.finish({}, 0.0)

    def _strike(self) -> None:
        clients = [in_thread(self._stage, name, blocking) for name in ("blocking0", "blocking1")]
        clients.append(in_thread(self._stage, "aio", asynchronous))
        clients.append(in_thread(self._stage, "raw", raw))
        clients += [in_thread(self._stage, name, power) for name in ("power0", "power1")]
        faults = Faults(self._site, self._actors, self._census, self._claims, self._recording.broken)
        faults.run(strikes_of(self._scenario), self._scenario.seconds)
        self._stage.stop.set()
        until = time.monotonic() + CLIENT_SECONDS
        for client in clients:
            client.join(max(0.0, until - time.monotonic()))
            if client.is_alive():
                self._recording.broken.append(
                    f"client {client.name} does not end: a command of its is past its deadline"
                )
        self._recording.faults = faults.injected
        self._recording.missed = faults.missed

    # -- the end ------------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Everything is in its place again; what was said while the VMs still run."""
        unsettled = wait_for(lambda: self._unsettled() or True, SETTLE_SECONDS)
        if unsettled is not True:
            self._recording.broken.append(f"not settled {SETTLE_SECONDS:g} s after the last fault: {unsettled}")
        self._recording.claims = self._claims.stop()
        self._look("look while they run", self._actors)
        for witness in self._witnesses:
            self._recording.accounts += witness.stop()

    def _unsettled(self) -> dict[str, str]:
        return {
            vm.name: f"{vm.state}, worker {vm.worker}"
            for vm in self._list()
            if vm.state in ("unknown", "starting") or (vm.worker != "ready" and vm.state != "shutoff")
        }

    def _end(self, files: Counter[str]) -> None:
        """Stop the VMs; everybody reads to the end; nothing is left."""
        own = [actor for actor in self._actors if actor.own_process]
        ends = {vm.name: (vm.epoch, vm.seq) for vm in self._list()}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(self._kill, own))
        ends |= {vm.name: (vm.epoch, vm.seq) for vm in self._list()}
        self._recording.readings += self._followers.finish(ends, READ_SECONDS)
        self._recording.reopened = self._followers.reopened
        self._look("look when they are gone", own)
        self._recording.lives = self._census.stop()
        self._recording.zygotes = self._census.zygotes
        for actor in self._actors:
            if actor.kind in (LAUNCHED, ATTACHED):
                self._recording.accounts += accounts_of(actor)
        self._detach([actor for actor in self._actors if not actor.own_process])
        self._look_for_leftovers(files)

    def _kill(self, actor: Actor) -> None:
        command = carry_out(THE_END, self._host.vm(actor.name), "kill", Vm.kill)
        self._recording.commands.append(command)
        if command.outcome not in (RESULT, NotRunning.code):  # a client or a fault was first
            self._recording.broken.append(f"kill of {actor.name} at the end: {command.outcome}: {command.text}")

    def _detach(self, actors: list[Actor]) -> None:
        for actor in actors:
            try:
                self._host.vm(actor.name).detach()
            except VmloopError as error:
                self._recording.broken.append(f"detach of {actor.name} at the end: {error.code}: {error}")

    def _look(self, reader: str, actors: list[Actor]) -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            self._recording.readings += pool.map(lambda actor: look(self._host, reader, actor.name), actors)

    def _list(self) -> list[VmSummary]:
        return self._host.list()

    # -- leftovers ----------------------------------------------------------------------------------------------------------

    def _open_files(self) -> Counter[str]:
        """Of broker and zygote, by kind; a client is connected, no VM is there."""
        pids = {"broker": self._host.version().pid, "zygote": next(zygotes_of(self._site.root), None)}
        found: Counter[str] = Counter()
        for name, pid in pids.items():
            for link in Path(f"/proc/{pid}/fd").iterdir() if pid is not None else ():
                with contextlib.suppress(FileNotFoundError):  # the one that was open for looking at them
                    found[f"{name} {link.readlink().name.split(':')[0]}"] += 1
        return found

    def _too_many(self, files: Counter[str]) -> str:
        """What broker and zygote have open beyond what they began with and what belongs to workers that are there; empty if nothing."""
        workers = sum(vm.worker_pid is not None for vm in self._list())  # that looked for events, and idle a while yet
        now = self._open_files()
        if now.total() <= files.total() + workers * FILES_OF_A_WORKER + FILES_OF_LOGS:
            return ""
        return f"broker and zygote have files open that nobody needs, beside those of {workers} workers: {dict(now - files)}"

    def _look_for_leftovers(self, files: Counter[str]) -> None:
        left = self._recording.leftovers
        self._host.close()  # with all the connections of its threads
        self._host = self._site.host()
        if wait_for(lambda: self._too_many(files) == "", FILES_SECONDS) is not True:
            left.append(self._too_many(files))
        left += left_files(self._site.root, [self._site.paths.vms_run / actor.name for actor in self._actors])
