# SPDX-License-Identifier: Apache-2.0
"""The asyncio client against a scripted broker on real sockets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vmloop.client import aio
from vmloop.client import vm as blocking_vm
from vmloop.client.aio_events import Events
from vmloop.client.aio_vm import Vm
from vmloop.client.session import Host as BlockingHost
from vmloop.client.stream import EVENTS_LOST, MAX_CHECK
from vmloop.common.cursor import Cursor
from vmloop.common.errors import BadRequest, DeadlineExceeded, Internal, NoBroker, NoSuchVm, OutcomeUnknown

from ..fakes.native_broker import NativeBroker, event_map, partial, reply

SOON = 10.0


def run(main: Coroutine[Any, Any, Any]) -> Any:
    async def in_time() -> Any:
        async with asyncio.timeout(3 * SOON):
            return await main

    return asyncio.run(in_time(), debug=True)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[NativeBroker]:
    with NativeBroker(tmp_path) as broker:
        broker.answer_with("vmloop", "ping", {"time": 2.0})
        yield broker


async def asked(broker: NativeBroker) -> Any:
    return await asyncio.to_thread(broker.requests.get, timeout=SOON)


def test_the_names_are_those_of_the_blocking_client() -> None:
    def names(of: type) -> set[str]:
        return {name for name in vars(of) if not name.startswith("_")}

    assert names(BlockingHost) - names(aio.Host) == {"call_many"}  # asyncio.gather does that
    assert names(aio.Host) <= names(BlockingHost)
    assert names(blocking_vm.Vm) == names(Vm)


def test_operations_and_cursors(broker: NativeBroker) -> None:
    async def main() -> None:
        async with aio.connect(broker.endpoint) as host:
            assert await host.ping() == 2.0
            vm = host.vm("web1")
            for service in ("vmloop", "vm/web1"):
                broker.answer_with(service, "capabilities", {"format": 1, "commands": ["stop"]})
            assert (await host.capabilities()).commands == (await vm.capabilities("stop")).commands == ["stop"]
            broker.answer_with("vm/web1", "qmp", {"running": True}, epoch=2, seq=3)
            assert await vm.qmp("query-status") == {"running": True}
            assert vm.last_cursor == Cursor(2, 3)
            broker.answer_with("vm/web1", "stop", {"state": "shutoff", "reason": "shutdown"})
            assert (await vm.stop()).state == "shutoff"
            broker.refuse("vm/web1", "pause", NoSuchVm("x"))
            with pytest.raises(NoSuchVm):
                await vm.pause()

    run(main())


def test_without_a_broker(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(NoBroker):
            await aio.connect(root=tmp_path)
        with pytest.raises(NoBroker):
            await aio.connect(root=tmp_path, wait=0.05)
        with pytest.raises(BadRequest):
            aio.connect("tcp://x")

    run(main())


def test_many_requests_at_once_on_one_connection(broker: NativeBroker) -> None:
    async def main() -> None:
        broker.answer("vm/a", "qmp", lambda request: [reply(request, request.id)])
        async with aio.connect(broker.endpoint) as host:
            assert len(set(await asyncio.gather(*(host.vm("a").qmp("query-x") for _ in range(500))))) == 500

    run(main())


def test_deadlines_cancellation_and_late_answers(broker: NativeBroker) -> None:
    async def main() -> None:
        async with aio.connect(broker.endpoint, timeout=SOON) as host:
            broker.answer("vmloop", "version", lambda request: [])
            with pytest.raises(DeadlineExceeded):
                await host.call("vmloop", "version", timeout=0.01, reading=True)
            waiting = asyncio.create_task(host.version())
            for _ in range(2):
                request = await asked(broker)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            broker.send_to(len(broker.seen) - 1, reply(request, {"version": "late"}))
            assert await host.ping() == 2.0

    run(main())


def test_streaming(broker: NativeBroker) -> None:
    async def main() -> None:
        broker.answer("vm/a", "events", lambda request: [*(partial(request, n) for n in range(3)), reply(request)])
        async with aio.connect(broker.endpoint) as host:
            assert [part async for part in host.call_streaming("vm/a", "events", reading=True)] == [0, 1, 2]

    run(main())


def test_malformed_answers(broker: NativeBroker) -> None:
    async def main() -> None:
        async with aio.connect(broker.endpoint) as host:
            broker.answer("vmloop", "ping", lambda request: [b"", b"rubbish", reply(request, None)])
            with pytest.raises(Internal):
                await host.ping()

    run(main())


def test_a_lost_broker(tmp_path: Path) -> None:
    async def main() -> None:
        first = NativeBroker(tmp_path)
        first.answer("vm/a", "qmp", lambda request: [])
        async with aio.connect(first.endpoint, timeout=SOON) as host:
            bare = asyncio.create_task(host.call("vm/a", "qmp", {"command": "cont"}, key=b""))
            keyed = asyncio.create_task(host.vm("a").qmp("cont"))
            for _ in range(2):
                await asked(first)
            first.stop()
            with pytest.raises(OutcomeUnknown):
                await bare
            with NativeBroker(tmp_path) as second:
                second.answer_with("vm/a", "qmp", "once")
                assert await keyed == "once"

    run(main())


def test_closing_ends_what_is_in_flight(broker: NativeBroker) -> None:
    async def main() -> None:
        broker.answer("vm/a", "qmp", lambda request: [])
        host = await aio.connect(broker.endpoint, timeout=SOON)
        waiting = asyncio.create_task(host.vm("a").qmp("cont"))
        await asked(broker)
        await host.close()
        await host.close()
        with pytest.raises(OutcomeUnknown):
            await waiting
        with pytest.raises(BadRequest, match="closed"):
            await host.ping()

    run(main())


def test_events_fill_gaps_and_mark_losses(broker: NativeBroker) -> None:
    async def main() -> None:
        kept = [event_map("web1", 1, seq) for seq in range(1, 4)]
        broker.serve_events("web1", kept)
        async with aio.connect(broker.endpoint, timeout=SOON) as host:
            async with host.vm("web1").events(since="1.1") as events:
                kept += [event_map("web1", 1, 4), event_map("web1", 1, 5)]
                broker.publish(kept[-1])
                assert [(await anext(events)).seq for _ in range(4)] == [2, 3, 4, 5]
                kept[:] = []
                broker.publish(event_map("web1", 1, 8, "STOP"))
                assert (await anext(events)).event == EVENTS_LOST
                assert (await events.wait_for("STOP", SOON)).seq == 8
                assert await events.get(0.01) is None
            with pytest.raises(StopAsyncIteration):
                await anext(events)

    run(main())


def test_the_recent_events_end_and_a_dropped_last_one_is_found(broker: NativeBroker) -> None:
    async def main() -> None:
        kept = [event_map("web1", 1, seq) for seq in range(1, 4)]
        broker.serve_events("web1", kept)
        async with aio.connect(broker.endpoint, timeout=SOON) as host:
            assert [event.seq async for event in host.events(follow=False)] == [1, 2, 3]
            async with host.events() as events:
                kept.append(event_map("web1", 1, 4))  # never published
                event = await events.get(SOON)
                assert event is not None
                assert event.seq == 4

    run(main())


def test_closing_the_host_ends_a_stream_at_once(broker: NativeBroker) -> None:
    async def main() -> None:
        broker.serve_events("web1", [])
        host = await aio.connect(broker.endpoint, timeout=SOON)
        events = host.events("web1")
        await events.get(0.01)
        waiting = asyncio.create_task(events.get(SOON))
        await asyncio.sleep(0)
        await host.close()
        assert await waiting is None

    run(main())


def test_no_thread_is_left(broker: NativeBroker) -> None:
    async def main() -> None:
        async with aio.connect(broker.endpoint) as host:
            await host.ping()

    before = threading.active_count()
    run(main())
    assert threading.active_count() <= before


def test_a_cancelled_close_goes_on_and_can_be_repeated(broker: NativeBroker) -> None:
    async def main() -> None:
        host = await aio.connect(broker.endpoint)
        await host.ping()
        go_on = threading.Event()
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as pool:  # its one thread is taken: the close has to wait
            loop.set_default_executor(pool)
            taken = loop.run_in_executor(None, go_on.wait, SOON)
            closing = asyncio.ensure_future(host.close())
            await asyncio.sleep(0)
            closing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing
            go_on.set()
            await taken
            await asyncio.gather(host.close(), host.close())
        assert host._context.closed

    run(main())


def test_a_connection_belongs_to_one_loop_and_may_be_closed_on_another_when_that_is_closed(
    broker: NativeBroker,
) -> None:
    broker.serve_events("web1", [])
    first = asyncio.new_event_loop()

    async def begin() -> tuple[aio.Host, Events]:
        host = await aio.connect(broker.endpoint)
        await host.ping()
        events = host.vm("web1").events()
        await events.__aenter__()
        return host, events

    host, events = first.run_until_complete(begin())

    async def elsewhere() -> None:
        for use in (host.ping(), host.vm("web1").events().get(0.1), host.close()):
            with pytest.raises(BadRequest, match="another event loop"):
                await use

    run(elsewhere())
    assert first.run_until_complete(host.ping()) == 2.0

    async def wait() -> None:
        await events.get(SOON)

    waiting = first.create_task(wait())
    first.run_until_complete(asyncio.sleep(0))
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]  # a task that its loop has left behind
    first.close()
    run(host.close())
    assert host._context.closed
    with pytest.raises(BadRequest, match="closed"):
        run(host.ping())


def test_a_check_that_was_cancelled_is_made_by_the_next_who_waits(broker: NativeBroker) -> None:
    async def main() -> None:
        kept = [event_map("web1", 1, 1)]
        broker.serve_events("web1", kept)
        async with aio.connect(broker.endpoint) as host, host.vm("web1").events() as events:
            kept.append(event_map("web1", 1, 2))  # which nobody publishes
            broker.answer("vmloop", "stats", lambda request: [])
            events._stream.check_wanted, events._check_delay = True, MAX_CHECK
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await anext(events)
            broker.serve_events("web1", kept)
            event = await events.get(MAX_CHECK / 2)
            assert event is not None, "it is not left to the check of a quiet stream"
            assert event.cursor == Cursor(1, 2)

    run(main())


def test_nothing_is_left_of_a_call_whose_time_is_over_or_whose_task_is_cancelled(broker: NativeBroker) -> None:
    async def main() -> None:
        broker.answer("vm/web1", "qmp", lambda request: [])
        async with aio.connect(broker.endpoint) as host:
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await host.vm("web1").qmp("stop")
                streaming = asyncio.ensure_future(anext(host.call_streaming("vm/web1", "qmp")))
                await asyncio.sleep(0)
                streaming.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await streaming
            assert (host._wakers, bool(host._calls)) == ({}, False)
            assert await host.ping() == 2.0

    run(main())
