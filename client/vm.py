# SPDX-License-Identifier: Apache-2.0
"""One VM, as the blocking client shows it. Made by `Host.vm`.

What only the guest's calls need is imported when they are made: every command of the command line imports this file.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from ..common.capabilities import Capabilities
from ..common.cursor import Cursor
from ..common.errors import VmloopError
from ..common.names import VmName, vm_service
from . import requests
from .requests import Request
from .results import VmChanged, VmDetails, VmStarted

if TYPE_CHECKING:
    from .guest_exec import GuestExit
    from .guest_files import GuestCopy, Progress
    from .session import Host
    from .subscription import Events

T = TypeVar("T")

log = logging.getLogger(__name__)


class Vm:
    """A handle; nothing is asked until a method is called."""

    def __init__(self, host: Host, name: VmName) -> None:
        self.name = name
        # The VM's newest event when the last answer through this handle was made: `vm.events(since=vm.last_cursor)` misses
        # nothing that the operation caused. Of threads that share a handle each overwrites it; use a handle per thread.
        self.last_cursor: Cursor | None = None
        self._host = host
        self._service = vm_service(name)

    def __repr__(self) -> str:
        return f"Vm({str(self.name)!r})"

    def start(self, paused: bool = False) -> VmStarted:
        return self._ask(requests.start(self.name, paused))

    def stop(self, timeout: float = 60.0, force: bool = False) -> VmChanged:
        """Ask the guest to power down and wait until QEMU is gone; with `force` kill it at the timeout."""
        return self._ask(requests.stop(self._service, timeout, force))

    def kill(self) -> VmChanged:
        return self._ask(requests.change(self._service, "kill"))

    def reset(self) -> VmChanged:
        return self._ask(requests.change(self._service, "reset"))

    def pause(self) -> VmChanged:
        return self._ask(requests.change(self._service, "pause"))

    def resume(self) -> VmChanged:
        return self._ask(requests.change(self._service, "resume"))

    def detach(self) -> None:
        """Let go of the VM, which runs on."""
        self._ask(requests.detach(self._service))

    def show(self) -> VmDetails:
        return self._ask(requests.show(self._service))

    def wait(self, state: str, timeout: float | None = None) -> VmChanged:
        """Return when the VM is in a state; `DeadlineExceeded` if it is not by then."""
        return self._ask(requests.wait(self._service, state, timeout))

    def qmp(
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
        return self._ask(requests.qmp(self._service, command, arguments, oob, wait_frozen, timeout, reading))

    def capabilities(self, command: str | None = None, *, timeout: float | None = None) -> Capabilities:
        """What this VM's QEMU can do, as it was when the run began. `command`: only what is needed to check this one."""
        return self._ask(requests.vm_capabilities(self._service, command, timeout))

    def hmp(self, line: str, timeout: float | None = None) -> str:
        """A line for the human monitor; the text it printed."""
        return self._ask(requests.hmp(self._service, line, timeout))

    # -- the guest, through its agent --------------------------------------------------------------------------------------

    def agent(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        reading: bool | None = None,
    ) -> Any:
        """A command for the guest agent; what it returned.

        `reading`: it changes nothing, so it may be sent twice; None: as its name says. Raises `AgentAbsent`, `AgentUnresponsive`,
        `AgentError` (fields `class`, `desc` and `kind`: "disabled", "unknown", "refused" or "damaged"), `DeadlineExceeded`, `Busy`,
        `TooLarge`, `OutcomeUnknown`.
        """
        return self._ask(requests.agent(self._service, command, arguments, timeout, reading))

    def guest_exec(
        self,
        path: str,
        args: Sequence[str] = (),
        *,
        env: Mapping[str, str] | None = None,
        input: bytes | None = None,  # noqa: A002 -- as subprocess.run calls it
        capture: bool = True,
        timeout: float = requests.EXEC_TIMEOUT,
    ) -> GuestExit:
        """Run a program in the guest and wait for its end, `timeout` seconds at most.

        `env` replaces the agent's environment. With `capture` its output is returned, as far as one message holds it (some 12 MB; more
        is refused by vmloop and lost: let the program write a file). Raises what `agent` does; `DeadlineExceeded` (field `pid`): it runs
        on; `OutcomeUnknown`: nobody can tell how it ended.
        """
        from . import guest_exec

        arguments = guest_exec.start_arguments(path, args, env, input, capture)
        pid = self._ask(guest_exec.start_request(self._service, arguments))
        return guest_exec.follow(self._ask, self._service, pid, timeout)

    def read_guest_file(self, path: str, into: BinaryIO, progress: Progress | None = None) -> GuestCopy:
        """Copy a file out of the guest. `progress` gets the bytes so far and in all (None: not known). Raises what `agent` does."""
        from . import guest_files, steps

        return steps.drive(self._ask, guest_files.read_file(self._service, path, into, progress))

    def write_guest_file(
        self, path: str, source: BinaryIO, progress: Progress | None = None, *, total: int | None = None
    ) -> GuestCopy:
        """Copy a file into the guest, over what is there. `total`: its bytes, for `progress`.

        Raises what `agent` does; the field `written` says how many bytes of an incomplete file are there.
        """
        from . import guest_files, steps

        return steps.drive(self._ask, guest_files.write_file(self._service, path, source, progress, total))

    @contextlib.contextmanager
    def frozen(self, limit: float | None = None) -> Iterator[int]:
        """Keep the guest's file systems frozen for the length of a `with`; gives how many there are.

        They are thawed at its end, after `limit` seconds (None: as the definition says) and when this program dies. If they were thawed
        before its end: `DeadlineExceeded` (the limit) or `OutcomeUnknown` (by others). Raises what `agent` does if they cannot be frozen.
        """
        from . import guest_freeze

        asked = requests.freeze(self._service, limit)
        parts = self._host.call_streaming(
            asked.service, asked.op, asked.arguments, timeout=asked.timeout, key=asked.key
        )
        with contextlib.closing(parts):
            count = self._begin_freeze(parts)
            if count == 0:
                yield count
                return
            try:
                yield count
            except BaseException:
                self._thaw_after_failure()
                raise
            thawed = self._ask(requests.thaw(self._service))
            if thawed == 0:
                raise guest_freeze.thawed_early(self._service, guest_freeze.reason_of(_last(parts)))

    def _begin_freeze(self, parts: Generator[Any, None, Any]) -> int:
        from . import guest_freeze

        try:
            return guest_freeze.frozen_count(_next_or_last(parts), self._service)
        except BaseException as error:
            if guest_freeze.may_be_frozen(error):
                self._thaw_after_failure()
            raise

    def _thaw_after_failure(self) -> None:
        """The error that made it necessary is the one to tell; at the limit the guest is thawed anyway."""
        try:
            self._ask(requests.thaw(self._service))
        except VmloopError as error:
            log.warning("the file systems of %s may stay frozen until their limit: %s", self.name, error)

    # -- events ----------------------------------------------------------------------------------------------------------

    def cursor(self) -> Cursor:
        """The VM's newest event now."""
        answer = self._host.answer(requests.show(self._service))
        self.last_cursor = cursor = requests.newest(answer.cursor, answer.value)
        return cursor

    def events(self, since: Cursor | str | None = None) -> Events:
        """The VM's events after a cursor, or from now on, without a gap; see subscription.py."""
        return self._host.events(self.name, since=since)

    def _ask(self, request: Request[T]) -> T:
        answer = self._host.answer(request)
        self.last_cursor = answer.cursor
        return request.result(answer.value)


def _next_or_last(parts: Generator[Any, None, Any]) -> Any:
    """A part of an answer, or the reply that ends it."""
    try:
        return next(parts)
    except StopIteration as done:
        return done.value


def _last(parts: Generator[Any, None, Any]) -> Any:
    """The reply that ends an answer in parts."""
    while True:
        try:
            next(parts)
        except StopIteration as done:
            return done.value
