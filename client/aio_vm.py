# SPDX-License-Identifier: Apache-2.0
"""One VM, as the asyncio client shows it: vm.py, awaited. Made by `aio.Host.vm`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ..common.cursor import Cursor
from ..common.names import VmName, vm_service
from . import requests
from .requests import Request
from .results import VmChanged, VmDetails, VmStarted

if TYPE_CHECKING:
    from .aio import Host
    from .aio_events import Events

T = TypeVar("T")


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

    async def hmp(self, line: str, timeout: float | None = None) -> str:
        """A line for the human monitor; the text it printed."""
        return await self._ask(requests.hmp(self._service, line, timeout))

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
