# SPDX-License-Identifier: Apache-2.0
"""A real Vm on a loop, with its page, files and events; its QEMU is a process that only stays, and a monitor in the test's hands.

So a test says in which instant the process ends, what is still in the monitor's socket then, and who else holds it. Used by
tests/unit/test_worker_teardown.py.
"""

from __future__ import annotations

import asyncio
import select
import subprocess
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from vmloop.common.definition import AgentSection
from vmloop.common.names import VmName
from vmloop.common.page import Page
from vmloop.common.paths import VmPaths
from vmloop.common.process import boot_id, identify
from vmloop.common.settings import WorkerSettings
from vmloop.common.states import VmState
from vmloop.worker.events import Event, EventLog
from vmloop.worker.journal.store import EventStore
from vmloop.worker.keeper import Keeper
from vmloop.worker.qemu.process import QemuProcess
from vmloop.worker.runfile import Run
from vmloop.worker.vm import Vm

from .qmp_peer import QmpPeer
from .raw_qmp import DEADLINE, LOOK_AGAIN

NAME = VmName("web1")
STATUS = {"status": "running", "running": True}


class VmBench:
    """One worker's Vm. Made on the loop that it runs on; `run` does that."""

    def __init__(self, directory: Path) -> None:
        self.loop = asyncio.get_running_loop()
        self.paths = VmPaths(directory / "run", directory / "state")
        for path in (self.paths.run, self.paths.state):
            path.mkdir(exist_ok=True)
        self.page = Page(self.paths.page, writable=True)
        self.told: list[Event] = []
        self.frames: list[bytes] = []
        events = EventLog(NAME, self.page, self.frames.append, EventStore(self.paths.journal))
        events.listen(self.told.append)
        self.peer = QmpPeer()
        self.child: subprocess.Popen[bytes] | None = None
        self.vm = Vm(
            self.loop,
            NAME,
            self.paths,
            msgspec.structs.replace(WorkerSettings(), launch=DEADLINE),
            self.page,
            events,
            Keeper(directory / "no-zygote", NAME),
            lambda: None,
        )

    # -- a run ----------------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """As far as `start` is when QEMU has been launched and its monitor says nothing yet."""
        epoch = self.vm.begin_run("booted")
        self.child = subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL, start_new_session=True)
        process = QemuProcess(identify(self.child.pid), self.child)
        run = Run(
            epoch=epoch,
            boot_id=boot_id(),
            started=time.time(),
            process=process.identity,
            monitor=str(self.paths.monitor_socket),
            may_kill=True,
        )
        self.vm.save(run)
        self.vm.hold(process)
        self.vm.agent.begin(None, AgentSection(), None)

    async def up(self) -> None:
        """The same, and its monitor negotiated: `running`."""
        self.begin()
        coming = self.loop.create_task(self.bring_up())
        self.peer.greet()
        self.peer.answer(await self.peer.request())
        self.peer.answer(await self.peer.request(), STATUS)
        await coming
        assert self.vm.state.state is VmState.RUNNING

    async def bring_up(self) -> None:
        await self.vm.bring_up(self.peer.connection.dup(), self.loop.time() + DEADLINE)

    def end_process(self) -> None:
        """It is dead when this returns; its status is not asked for, and the loop has not heard."""
        assert self.child is not None
        self.child.kill()
        process = self.vm.process
        assert process is not None
        assert wait_readable(process.fileno())

    # -- what is to be seen -----------------------------------------------------------------------------------------------------

    async def gone(self) -> None:
        async with asyncio.timeout(DEADLINE):
            await self.vm.gone.wait()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE):
            while not condition():  # noqa: ASYNC110 - of anything, which nobody announces
                await asyncio.sleep(LOOK_AGAIN / 10)

    def names(self) -> list[str]:
        """The events so far; of states with the new one."""
        return [f"{e.event} {e.data['new']}" if "new" in e.data else e.event for e in self.told]

    def close(self) -> None:
        self.vm.let_go()
        self.vm.file.close()
        if self.child is not None:
            if self.child.returncode == 0:  # a `sleep` that was let go, of which Popen was told not to care
                self.child.returncode = None
            self.child.kill()
            self.child.wait(DEADLINE)
        self.peer.close()
        self.page.close()


def wait_readable(fd: int) -> bool:
    """Whether a pidfd tells of the end in time."""
    return bool(select.select([fd], [], [], DEADLINE)[0])


def run(directory: Path, live: Callable[[VmBench], Coroutine[Any, Any, None]]) -> None:
    """One worker's life on a loop of its own; nothing of it is left."""

    async def main() -> None:
        bench = VmBench(directory)
        try:
            await live(bench)
        finally:
            bench.close()

    asyncio.run(main())
