# SPDX-License-Identifier: Apache-2.0
"""One VM, as the asyncio client shows it: vm.py, awaited. Made by `aio.Host.vm`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from ..common.capabilities import Capabilities
from ..common.cursor import Cursor
from ..common.errors import VmloopError
from ..common.names import VmName, vm_service
from . import requests
from .calls import Answer
from .requests import Request
from .results import VmChanged, VmDetails, VmStarted

if TYPE_CHECKING:
    from .aio import Host
    from .aio_events import Events
    from .guest_exec import GuestExit
    from .guest_files import GuestCopy, Progress

T = TypeVar("T")

log = logging.getLogger(__name__)


class Vm:
    """One VM; as vm.Vm, awaited."""

    def __init__(self, host: Host, name: VmName) -> None:
        self.name = name
        self.last_cursor: Cursor | None = None  # as vm.Vm's; of tasks that share a handle each overwrites it
        self._host = host
        self._service = vm_service(name)

    def __repr__(self) -> str:
        return f"Vm({str(self.name)!r})"

    async def start(self, paused: bool = False) -> VmStarted:
        return await self._ask(requests.start(self.name, paused))

    async def stop(self, timeout: float = 60.0, force: bool = False) -> VmChanged:
        """Ask the guest to power down and wait until QEMU is gone; with `force` kill it at the timeout."""
        return await self._ask(requests.stop(self._service, timeout, force))

    async def kill(self) -> VmChanged:
        return await self._ask(requests.change(self._service, "kill"))

    async def reset(self) -> VmChanged:
        return await self._ask(requests.change(self._service, "reset"))

    async def pause(self) -> VmChanged:
        return await self._ask(requests.change(self._service, "pause"))

    async def resume(self) -> VmChanged:
        return await self._ask(requests.change(self._service, "resume"))

    async def detach(self) -> None:
        """Let go of the VM, which runs on."""
        await self._ask(requests.detach(self._service))

    async def show(self) -> VmDetails:
        return await self._ask(requests.show(self._service))

    async def wait(self, state: str, timeout: float | None = None) -> VmChanged:
        """Return when the VM is in a state; `DeadlineExceeded` if it is not by then."""
        return await self._ask(requests.wait(self._service, state, timeout))

    async def qmp(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        oob: bool = False,
        wait_frozen: bool = False,
        timeout: float | None = None,
        reading: bool | None = None,
    ) -> Any:
        """A QMP command; what QEMU returned. `wait_frozen`: wait for a frozen QEMU rather than fail at once."""
        return await self._ask(requests.qmp(self._service, command, arguments, oob, wait_frozen, timeout, reading))

    async def capabilities(self, command: str | None = None, *, timeout: float | None = None) -> Capabilities:
        """What this VM's QEMU can do, as it was when the run began. `command`: only what is needed to check this one."""
        return await self._ask(requests.vm_capabilities(self._service, command, timeout))

    async def hmp(self, line: str, timeout: float | None = None) -> str:
        """A line for the human monitor; the text it printed."""
        return await self._ask(requests.hmp(self._service, line, timeout))

    # -- the guest, through its agent --------------------------------------------------------------------------------------

    async def agent(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        reading: bool | None = None,
    ) -> Any:
        """A command for the guest agent; what it returned. Raises what vm.Vm.agent does."""
        return await self._ask(requests.agent(self._service, command, arguments, timeout, reading))

    async def guest_exec(
        self,
        path: str,
        args: Sequence[str] = (),
        *,
        env: Mapping[str, str] | None = None,
        input: bytes | None = None,  # noqa: A002 -- as subprocess.run calls it
        capture: bool = True,
        timeout: float = requests.EXEC_TIMEOUT,
    ) -> GuestExit:
        """Run a program in the guest and wait for its end, `timeout` seconds at most. As vm.Vm.guest_exec."""
        from . import guest_exec

        arguments = guest_exec.start_arguments(path, args, env, input, capture)
        pid = await self._ask(guest_exec.start_request(self._service, arguments))
        return await guest_exec.follow_async(self._ask, self._service, pid, timeout)

    async def read_guest_file(self, path: str, into: BinaryIO, progress: Progress | None = None) -> GuestCopy:
        """Copy a file out of the guest. As vm.Vm.read_guest_file; `into` is written to on the loop, a piece of 256 KiB at a time."""
        from . import guest_files, steps

        return await steps.drive_async(self._ask, guest_files.read_file(self._service, path, into, progress))

    async def write_guest_file(
        self, path: str, source: BinaryIO, progress: Progress | None = None, *, total: int | None = None
    ) -> GuestCopy:
        """Copy a file into the guest, over what is there. As vm.Vm.write_guest_file; `source` is read on the loop."""
        from . import guest_files, steps

        return await steps.drive_async(self._ask, guest_files.write_file(self._service, path, source, progress, total))

    @contextlib.asynccontextmanager
    async def frozen(self, limit: float | None = None) -> AsyncIterator[int]:
        """Keep the guest's file systems frozen for the length of an `async with`; gives how many there are. As vm.Vm.frozen."""
        from . import guest_freeze

        first: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def on_part(part: Any) -> None:
            if not first.done():
                first.set_result(part)

        asked = requests.freeze(self._service, limit)
        hold = asyncio.create_task(self._host.answer_in_parts(asked, on_part), name=f"hold {self.name}")
        try:
            count = await self._begin_freeze(hold, first)
            if count == 0:
                yield count
                return
            try:
                yield count
            except BaseException:
                await self._thaw_after_failure()
                raise
            early = hold.done()
            thawed = await self._ask(requests.thaw(self._service))
            if early or thawed == 0:
                raise guest_freeze.thawed_early(self._service, guest_freeze.reason_of((await hold).value))
        finally:
            hold.cancel()
            await asyncio.gather(hold, return_exceptions=True)

    async def _begin_freeze(self, hold: asyncio.Task[Answer], first: asyncio.Future[Any]) -> int:
        from . import guest_freeze

        try:
            await asyncio.wait((hold, first), return_when=asyncio.FIRST_COMPLETED)
            part = first.result() if first.done() else (await hold).value
            return guest_freeze.frozen_count(part, self._service)
        except BaseException as error:
            if guest_freeze.may_be_frozen(error):
                await self._thaw_after_failure()
            raise

    async def _thaw_after_failure(self) -> None:
        try:
            await self._ask(requests.thaw(self._service))
        except VmloopError as error:
            log.warning("the file systems of %s may stay frozen until their limit: %s", self.name, error)

    # -- events ----------------------------------------------------------------------------------------------------------

    async def cursor(self) -> Cursor:
        """The VM's newest event now."""
        answer = await self._host.answer(requests.show(self._service))
        self.last_cursor = cursor = requests.newest(answer.cursor, answer.value)
        return cursor

    def events(self, since: Cursor | str | None = None) -> Events:
        """The VM's events after a cursor, or from now on, without a gap."""
        return self._host.events(self.name, since=since)

    async def _ask(self, request: Request[T]) -> T:
        answer = await self._host.answer(request)
        self.last_cursor = answer.cursor
        return request.result(answer.value)
