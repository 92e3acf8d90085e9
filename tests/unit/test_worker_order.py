# SPDX-License-Identifier: Apache-2.0
"""The line of mutating operations: one at a time, in the order they came, each no longer than its deadline, whatever is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.common.errors import Busy, DeadlineExceeded
from vmloop.worker.order import MAX_WAITING, Order

FAR = 60.0  # seconds; no test waits for it


def run(test: Callable[[Order], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        await test(Order(asyncio.get_running_loop()))

    asyncio.run(main())


def far() -> float:
    return asyncio.get_running_loop().time() + FAR


class Visits:
    """Operations that say when they hold the turn, and keep it until they are let go."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.said: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.inside = 0

    def start(self, name: str, deadline: float | None = None) -> asyncio.Task[None]:
        self.gates[name] = asyncio.Event()
        return asyncio.create_task(self._visit(name, far() if deadline is None else deadline))

    async def _visit(self, name: str, deadline: float) -> None:
        async with self.order.turn(name, deadline):
            self.inside += 1
            assert self.inside == 1, "two hold the turn"
            self.said.append(name)
            try:
                await self.gates[name].wait()
            finally:
                self.inside -= 1


async def turns_of_the_loop(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_operations_run_one_at_a_time_in_the_order_they_came() -> None:
    async def test(order: Order) -> None:
        visits = Visits(order)
        tasks = [visits.start(name) for name in "abc"]
        await turns_of_the_loop()
        assert visits.said == ["a"]
        for name, said in (("a", "ab"), ("b", "abc"), ("c", "abc")):
            visits.gates[name].set()
            await turns_of_the_loop()
            assert "".join(visits.said) == said
        await asyncio.gather(*tasks)
        assert order.try_take("free again")

    run(test)


def test_a_free_turn_is_taken_without_waiting() -> None:
    async def test(order: Order) -> None:
        assert order.try_take("qmp")
        assert not order.try_take("hmp")
        order.release()
        assert order.try_take("hmp")

    run(test)


def test_who_asks_at_once_does_not_overtake_the_line() -> None:
    async def test(order: Order) -> None:
        visits = Visits(order)
        first, second = visits.start("first"), visits.start("second")
        await turns_of_the_loop()
        visits.gates["first"].set()
        await first
        assert not order.try_take("overtaking")  # also in the moment in which the turn is handed over
        await turns_of_the_loop()
        assert not order.try_take("overtaking")
        visits.gates["second"].set()
        await second

    run(test)


def test_a_released_turn_goes_to_the_line() -> None:
    async def test(order: Order) -> None:
        visits = Visits(order)
        assert order.try_take("qmp")
        task = visits.start("stop")
        await turns_of_the_loop()
        assert visits.said == []
        order.release()
        await turns_of_the_loop()
        assert visits.said == ["stop"]
        visits.gates["stop"].set()
        await task

    run(test)


def test_an_operation_that_fails_gives_the_turn_back() -> None:
    async def test(order: Order) -> None:
        with pytest.raises(ZeroDivisionError):
            async with order.turn("bad", far()):
                raise ZeroDivisionError
        assert order.try_take("next")

    run(test)


def test_a_deadline_in_the_line_names_who_holds_the_turn() -> None:
    async def test(order: Order) -> None:
        visits = Visits(order)
        holder = visits.start("migrate")
        await turns_of_the_loop()
        with pytest.raises(DeadlineExceeded, match=r"pause: not begun: 'migrate' has held this VM's turn for \d"):
            async with order.turn("pause", asyncio.get_running_loop().time()):
                pytest.fail("it began")
        visits.gates["migrate"].set()
        await holder
        assert order.try_take("next")

    run(test)


def test_a_free_turn_is_given_even_after_the_deadline() -> None:
    async def test(order: Order) -> None:
        async with order.turn("late", 0.0):
            assert not order.try_take("other")

    run(test)


def test_who_gave_up_is_passed_over() -> None:
    async def test(order: Order) -> None:
        visits = Visits(order)
        first = visits.start("first")
        await turns_of_the_loop()
        gives_up = visits.start("gives up", asyncio.get_running_loop().time())
        last = visits.start("last")
        with pytest.raises(DeadlineExceeded):
            await gives_up
        for name in ("first", "last"):
            visits.gates[name].set()
        await asyncio.gather(first, last)
        assert visits.said == ["first", "last"]

    run(test)


def test_one_that_is_cancelled_in_line_leaves_it() -> None:
    async def test(order: Order) -> None:
        visits = Visits(order)
        tasks = {name: visits.start(name) for name in "abc"}
        await turns_of_the_loop()
        tasks["b"].cancel()
        await turns_of_the_loop()
        visits.gates["a"].set()
        visits.gates["c"].set()
        await asyncio.gather(tasks["a"], tasks["c"])
        assert visits.said == ["a", "c"]
        assert tasks["b"].cancelled()

    run(test)


def test_one_that_is_cancelled_just_as_its_turn_comes_hands_it_on() -> None:
    async def test(order: Order) -> None:
        visits = Visits(order)
        assert order.try_take("holder")
        doomed, last = visits.start("doomed"), visits.start("last")
        await turns_of_the_loop()
        order.release()  # the turn is doomed's
        doomed.cancel()  # before it has noticed
        await turns_of_the_loop()
        assert visits.said == ["last"]
        visits.gates["last"].set()
        await last
        assert doomed.cancelled()
        assert order.try_take("next")

    run(test)


def test_one_that_is_cancelled_while_it_holds_the_turn_hands_it_on() -> None:
    async def test(order: Order) -> None:
        visits = Visits(order)
        first, second = visits.start("first"), visits.start("second")
        await turns_of_the_loop()
        first.cancel()
        await turns_of_the_loop()
        assert visits.said == ["first", "second"]
        visits.gates["second"].set()
        await second

    run(test)


def test_a_full_line_refuses_and_those_in_it_stay() -> None:
    async def test(order: Order) -> None:
        visits = Visits(order)
        assert order.try_take("holder")
        tasks = [visits.start(str(number)) for number in range(MAX_WAITING)]
        await turns_of_the_loop()
        with pytest.raises(Busy, match=f"{MAX_WAITING} operations"):
            async with order.turn("one too many", far()):
                pytest.fail("it began")
        for gate in visits.gates.values():
            gate.set()
        order.release()
        await asyncio.gather(*tasks)
        assert visits.said == [str(number) for number in range(MAX_WAITING)]

    run(test)


def test_those_that_left_the_line_do_not_fill_it() -> None:
    async def test(order: Order) -> None:
        visits = Visits(order)
        assert order.try_take("holder")
        for _ in range(2):
            tasks = [visits.start(str(number)) for number in range(MAX_WAITING)]
            await turns_of_the_loop()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        order.release()
        assert order.try_take("next")

    run(test)


@given(st.lists(st.sampled_from(["start", "cancel oldest", "cancel newest", "let go", "turn"]), max_size=40))
def test_whatever_is_started_and_cancelled_the_turn_is_never_lost_nor_doubled(steps: list[str]) -> None:
    async def test(order: Order) -> None:
        visits = Visits(order)
        tasks: list[asyncio.Task[None]] = []
        for number, step in enumerate(steps):
            alive = [task for task in tasks if not task.done()]
            if step == "start":
                tasks.append(visits.start(str(number)))
            elif step == "turn":
                await asyncio.sleep(0)
            elif step == "let go" and visits.said:
                visits.gates[visits.said[-1]].set()
            elif step.startswith("cancel") and alive:
                alive[0 if step.endswith("oldest") else -1].cancel()
        for gate in visits.gates.values():
            gate.set()
        if tasks:
            await asyncio.wait(tasks, timeout=FAR)
        for task in tasks:
            assert task.cancelled() or task.exception() is None
        assert [int(name) for name in visits.said] == sorted(int(name) for name in visits.said)
        assert order.try_take("free in the end")

    run(test)
