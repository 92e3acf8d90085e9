# SPDX-License-Identifier: Apache-2.0
"""The worker's link to a real ROUTER: hello before everything else, an outbox while nobody is there, and bursts without a lost wake-up."""

from __future__ import annotations

import asyncio
import logging
import select
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import zmq

from vmloop.common.sockets import WORKER_QUEUE, bind_router, edge_fd, ipc
from vmloop.common.wire import Kind, Message, encode
from vmloop.worker.link import BATCH, Link

from ..fakes.raw_qmp import DEADLINE, LOOK_AGAIN

BURST = 3 * WORKER_QUEUE  # more than both ends and the kernel between them hold


class Broker:
    """A ROUTER that the test reads when it wants to."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], path: Path) -> None:
        self.got: list[bytes] = []
        self.peer = b""
        self._router = bind_router(context, path, WORKER_QUEUE)

    def read(self, most: int = 1 << 30) -> int:
        """Take what has come; how many frames."""
        count = 0
        while count < most:
            try:
                self.peer, frame = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            self.got.append(frame)
            count += 1
        return count

    def send(self, frame: bytes) -> bool:
        """Send to the last one that has sent; False if its queue is full."""
        try:
            self._router.send_multipart([self.peer, frame], zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        self._router.close(linger=0)


class Bench:
    """A link, and the broker's place that is empty at first."""

    def __init__(self, directory: Path, outbox: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.path = directory / "worker.sock"
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.got: list[bytes] = []
        self.on_frame: Callable[[bytes], None] = self.got.append
        self.hellos = 0
        self.broker: Broker | None = None
        self.link = Link(self.loop, self.context, ipc(self.path), self._on_frame, self._hello, outbox)

    def _on_frame(self, frame: bytes) -> None:
        self.on_frame(frame)

    def _hello(self) -> bytes:
        self.hellos += 1
        return b"hello %d" % self.hellos

    def start_broker(self) -> Broker:
        self.broker = Broker(self.context, self.path)
        return self.broker

    def stop_broker(self) -> None:
        if self.broker is not None:
            self.broker.close()
            self.broker = None

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE):
            while not condition():
                if self.broker is not None:
                    self.broker.read()
                await asyncio.sleep(LOOK_AGAIN / 10)

    async def connected(self) -> Broker:
        broker = self.start_broker()
        await self.until(lambda: len(broker.got) > 0)
        return broker


def run(directory: Path, test: Callable[[Bench], Coroutine[Any, Any, None]], outbox: int = 2 * BURST) -> None:
    async def main() -> None:
        bench = Bench(directory, outbox)
        try:
            await test(bench)
        finally:
            bench.link.close()
            bench.stop_broker()
            bench.context.term()

    asyncio.run(main())


def numbered(count: int, first: int = 0) -> list[bytes]:
    return [b"%d" % number for number in range(first, first + count)]


def test_hello_is_first_and_then_what_waited_in_its_order(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        for frame in numbered(5):
            bench.link.send(frame)
        assert bench.hellos == 0
        broker = bench.start_broker()
        await bench.until(lambda: len(broker.got) == 6)
        assert broker.got == [b"hello 1", *numbered(5)]
        assert bench.link.connected
        bench.link.send(b"at once")
        await bench.until(lambda: len(broker.got) == 7)
        assert broker.got[-1] == b"at once"

    run(tmp_path, test)


def test_hello_is_first_on_every_connection_and_nothing_sent_meanwhile_is_lost(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        first = await bench.connected()
        assert first.got == [b"hello 1"]
        bench.stop_broker()
        await bench.until(lambda: not bench.link.connected)
        for frame in numbered(100):
            bench.link.send(frame)
        second = bench.start_broker()
        await bench.until(lambda: len(second.got) == 101)
        assert second.got == [b"hello 2", *numbered(100)]

    run(tmp_path, test)


def test_what_the_broker_sends_arrives_in_order(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        broker = await bench.connected()
        for frame in numbered(2 * BATCH + 1):  # over what one turn takes
            assert broker.send(frame)
        await bench.until(lambda: len(bench.got) == 2 * BATCH + 1)
        assert bench.got == numbered(2 * BATCH + 1)

    run(tmp_path, test)


def test_a_full_outbox_drops_the_oldest_counts_them_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(bench: Bench) -> None:
        for frame in numbered(25):
            bench.link.send(frame)
        assert bench.link.dropped == 15
        broker = bench.start_broker()
        await bench.until(lambda: len(broker.got) == 11)
        assert broker.got == [b"hello 1", *numbered(10, first=15)]

    with caplog.at_level(logging.WARNING):
        run(tmp_path, test, outbox=10)
    assert "outbox is full" in caplog.text


def test_of_a_full_outbox_events_go_first_because_the_journal_has_them(tmp_path: Path) -> None:
    def frame(kind: Kind, number: int) -> bytes:
        return encode(Message(kind, "vm/web1", id=number))

    async def test(bench: Bench) -> None:
        answers = [frame(Kind.REPLY, number) for number in range(8)]
        for number, answer in enumerate(answers):
            bench.link.send(answer)
            for event in range(5):
                bench.link.send(frame(Kind.EVENT, number * 10 + event))
        broker = bench.start_broker()
        await bench.until(lambda: broker.got[-1:] == [frame(Kind.EVENT, 74)])
        assert [got for got in broker.got if got[4] == Kind.REPLY] == answers
        events = [got for got in broker.got if got[4] == Kind.EVENT]
        assert events == [frame(Kind.EVENT, 70 + number) for number in range(5 - len(events), 5)]
        assert len(broker.got) <= 1 + 12
        assert bench.link.dropped == 40 - len(events)

    run(tmp_path, test, outbox=12)


def test_a_broker_that_does_not_read_blocks_nobody_and_gets_everything_once_it_does(tmp_path: Path) -> None:
    """With nothing coming the other way that could wake the link by chance."""

    async def test(bench: Bench) -> None:
        broker = await bench.connected()
        for frame in numbered(BURST):
            bench.link.send(frame)
        await bench.until(lambda: len(broker.got) == BURST + 1)
        assert broker.got[1:] == numbered(BURST)
        assert bench.link.dropped == 0

    run(tmp_path, test)


def test_it_goes_on_when_the_broker_reads_by_fits_and_starts(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        broker = await bench.connected()
        for frame in numbered(BURST):
            bench.link.send(frame)
        async with asyncio.timeout(DEADLINE):
            while len(broker.got) < BURST + 1:
                broker.read(most=97)
                await asyncio.sleep(0)
        assert broker.got[1:] == numbered(BURST)

    run(tmp_path, test)


def test_bursts_both_ways_at_once_lose_nothing(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        broker = await bench.connected()

        def answer(frame: bytes) -> None:
            bench.got.append(frame)
            bench.link.send(b"re " + frame)

        bench.on_frame = answer
        to_send = numbered(BURST)
        from_us = numbered(BURST)
        sent = 0
        async with asyncio.timeout(DEADLINE):
            while sent < BURST or from_us:
                while sent < BURST and broker.send(to_send[sent]):
                    sent += 1
                for frame in from_us[:500]:
                    bench.link.send(b"own " + frame)
                del from_us[:500]
                broker.read(most=300)
                await asyncio.sleep(0)
        await bench.until(lambda: len(broker.got) == 2 * BURST + 1)
        assert bench.got == to_send
        answers = [frame for frame in broker.got if frame.startswith(b"re ")]
        own = [frame for frame in broker.got if frame.startswith(b"own ")]
        assert answers == [b"re " + frame for frame in numbered(BURST)]
        assert own == [b"own " + frame for frame in numbered(BURST)]

    run(tmp_path, test)


def test_single_messages_to_and_fro_never_stall(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        broker = await bench.connected()
        for number in range(500):
            bench.link.send(b"out %d" % number)
            assert broker.send(b"in %d" % number)
            await bench.until(lambda: len(bench.got) > number and len(broker.got) > number + 1)  # noqa: B023
        assert bench.link.dropped == 0

    run(tmp_path, test)


def test_a_send_that_takes_the_news_of_a_frame_from_the_fd_does_not_lose_the_frame(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        broker = await bench.connected()
        fd = edge_fd(bench.link._socket)
        for number in range(1, 51):
            assert broker.send(b"in")
            assert select.select([fd], [], [], DEADLINE)[0]  # it is here, and the loop has not looked yet
            bench.link.send(b"out")
            await bench.until(lambda: len(bench.got) == number)  # noqa: B023

    run(tmp_path, test)


def test_a_frame_that_makes_its_taker_fail_does_not_hold_up_those_behind_it(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        broker = await bench.connected()
        failures: list[object] = []
        bench.loop.set_exception_handler(lambda _, context: failures.append(context.get("exception")))

        def take(frame: bytes) -> None:
            bench.got.append(frame)
            if frame == b"0":
                raise ZeroDivisionError

        bench.on_frame = take
        for frame in numbered(5):
            assert broker.send(frame)
        await bench.until(lambda: len(bench.got) == 5)
        assert bench.got == numbered(5)
        assert [type(failure) for failure in failures] == [ZeroDivisionError]

    run(tmp_path, test)


def test_what_was_sent_right_before_the_close_still_arrives(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        broker = await bench.connected()
        for frame in numbered(100):
            bench.link.send(frame)
        bench.link.send(b"bye")
        await asyncio.sleep(0)
        broker.read()
        bench.link.close()
        await bench.until(lambda: broker.got[-1] == b"bye")
        assert len(broker.got) == 102
        bench.link = Link(
            bench.loop, bench.context, ipc(bench.path), bench.got.append, lambda: b"", 1
        )  # for `run` to close

    run(tmp_path, test)


def test_what_waits_for_room_at_the_close_leaves_when_the_broker_makes_some(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        broker = await bench.connected()
        while not bench.link._outbox:
            bench.link.send(b"x" * 1000)
        bench.link.send(b"goodbye")
        reader = threading.Timer(0.05, lambda: broker.read(BURST))  # while the link closes
        reader.start()
        bench.link.close()
        reader.join()
        await bench.until(lambda: b"goodbye" in broker.got)
        bench.link = Link(
            bench.loop, bench.context, ipc(bench.path), bench.got.append, lambda: b"", 1
        )  # for `run` to close

    run(tmp_path, test)
