# SPDX-License-Identifier: Apache-2.0
"""The guest's calls of the asyncio client; what it shares with the blocking one is tried there (test_client_agent.py)."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmloop.client import aio
from vmloop.client.aio_vm import Vm
from vmloop.client.guest_exec import GuestExit
from vmloop.client.guest_files import PIECE, GuestCopy
from vmloop.common.errors import AgentAbsent, AgentError, DeadlineExceeded, OutcomeUnknown, VmloopError
from vmloop.common.wire import Message

from ..fakes.guest_on_wire import Ended, GuestOnWire
from ..fakes.native_broker import NativeBroker, partial, reply

SOON = 10.0
CONTENT = bytes(range(256)) * (PIECE // 256) + b"the rest"


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[NativeBroker]:
    with NativeBroker(tmp_path) as broker:
        yield broker


@pytest.fixture
def guest(broker: NativeBroker) -> GuestOnWire:
    return GuestOnWire(broker)


Run = Callable[[Callable[[Vm], Coroutine[Any, Any, Any]]], Any]


@pytest.fixture
def run(broker: NativeBroker) -> Run:
    """Run a test's coroutine function on a loop of its own, with the VM's handle."""

    def run(main: Callable[[Vm], Coroutine[Any, Any, Any]]) -> Any:
        async def connected() -> Any:
            async with asyncio.timeout(3 * SOON), aio.connect(broker.endpoint, timeout=SOON) as host:
                return await main(host.vm("web1"))

        return asyncio.run(connected(), debug=True)

    return run


def test_commands_and_programs(run: Run, guest: GuestOnWire) -> None:
    guest.programs["x"] = lambda got: Ended(2, out=got.given, looks=2)

    async def main(vm: Vm) -> None:
        assert await vm.agent("guest-ping") == {}
        assert await vm.guest_exec("x", input=b"in") == GuestExit(2, None, b"in")
        with pytest.raises(AgentError, match="No such file"):
            await vm.guest_exec("y")

    run(main)


def test_a_program_that_does_not_end(run: Run, guest: GuestOnWire) -> None:
    guest.programs["x"] = lambda got: Ended(looks=1000)

    async def main(vm: Vm) -> None:
        with pytest.raises(DeadlineExceeded, match="it runs on"):
            await vm.guest_exec("x", timeout=0.1)
        guest._processes.clear()
        guest.before = lambda command, arguments: guest._processes.clear()
        with pytest.raises(OutcomeUnknown):
            await vm.guest_exec("x")

    run(main)


def test_files(run: Run, guest: GuestOnWire) -> None:
    expected = GuestCopy(len(CONTENT), hashlib.sha256(CONTENT).hexdigest())

    async def main(vm: Vm) -> None:
        into = io.BytesIO()
        assert await vm.write_guest_file("/f", io.BytesIO(CONTENT)) == expected
        assert await vm.read_guest_file("/f", into) == expected
        assert into.getvalue() == CONTENT

    run(main)
    assert not guest.handles


def test_a_copy_waits_for_the_new_worker_to_find_the_agent(run: Run, guest: GuestOnWire) -> None:
    guest.files["/in"] = CONTENT
    errors: dict[str, list[VmloopError]] = {
        "guest-file-read": [OutcomeUnknown("killed")],
        "guest-file-seek": [AgentAbsent("not found yet"), AgentAbsent("not found yet")],
    }

    def fail(command: str, arguments: dict[str, Any]) -> None:
        if errors.get(command):
            raise errors[command].pop(0)

    async def main(vm: Vm) -> None:
        guest.before = fail
        assert (await vm.read_guest_file("/in", io.BytesIO())).bytes == len(CONTENT)

    run(main)
    assert not any(errors.values())


def test_a_cancelled_copy_closes_its_file(run: Run, guest: GuestOnWire) -> None:
    guest.files["/f"] = CONTENT

    async def main(vm: Vm) -> None:
        def cancel(done: int, total: int | None) -> None:
            copying.cancel()

        copying = asyncio.create_task(vm.read_guest_file("/f", io.BytesIO(), cancel))
        with pytest.raises(asyncio.CancelledError):
            await copying

    run(main)
    assert guest.commands[-1] == "guest-file-close"
    assert not guest.handles


def test_frozen(run: Run, guest: GuestOnWire) -> None:
    async def main(vm: Vm) -> None:
        async with vm.frozen(limit=20.0) as count:
            assert count == 3
            assert await vm.agent("guest-fsfreeze-status") == "frozen"
        assert await vm.agent("guest-fsfreeze-status") == "thawed"
        with pytest.raises(ZeroDivisionError):
            async with vm.frozen():
                _ = 1 / 0
        assert guest.hold is None
        guest.file_systems = 0
        async with vm.frozen() as count:
            assert count == 0

    run(main)


@pytest.mark.parametrize(("why", "error"), [("limit", DeadlineExceeded), ("by another client", OutcomeUnknown)])
def test_a_hold_that_ended_before_its_with_is_an_error(
    run: Run, guest: GuestOnWire, why: str, error: type[VmloopError]
) -> None:
    async def main(vm: Vm) -> None:
        with pytest.raises(error, match=r"web1 were thawed .*before you were done"):
            async with vm.frozen():
                guest.end_hold(why)

    run(main)


def test_what_cannot_be_frozen_needs_no_thaw(run: Run, guest: GuestOnWire) -> None:
    guest.disabled.add("guest-fsfreeze-freeze")

    async def main(vm: Vm) -> None:
        with pytest.raises(AgentError, match="disabled"):
            async with vm.frozen():
                pytest.fail("not frozen")

    run(main)
    assert guest.commands == ["guest-fsfreeze-freeze"]


def answer_holds(broker: NativeBroker, parts: list[Any]) -> list[Message]:
    """Answer holds with some parts and no end; what is asked beside them, which is a thaw."""
    thaws: list[Message] = []

    def answer(request: Message) -> list[Message]:
        if not request.key:
            return [partial(request, part) for part in parts]
        thaws.append(request)
        return [reply(request, 0)]

    broker.answer("vm/web1", "agent", answer)
    return thaws


def test_a_cancelled_freeze_is_thawed(run: Run, broker: NativeBroker) -> None:
    thaws = answer_holds(broker, [])

    async def main(vm: Vm) -> None:
        async def freeze() -> None:
            async with vm.frozen():
                pytest.fail("not frozen")

        freezing = asyncio.create_task(freeze())
        await asyncio.to_thread(broker.requests.get, timeout=SOON)
        freezing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await freezing

    run(main)
    assert len(thaws) == 1


def test_a_hold_that_begins_with_nonsense_is_thawed(run: Run, broker: NativeBroker) -> None:
    thaws = answer_holds(broker, [{"return": "many"}])

    async def main(vm: Vm) -> None:
        with pytest.raises(AgentError, match="makes no sense"):
            async with vm.frozen():
                pytest.fail("not frozen")

    run(main)
    assert len(thaws) == 1
