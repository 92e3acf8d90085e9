# SPDX-License-Identifier: Apache-2.0
"""The line of mutating operations against a plain queue, on a loop whose clock the test moves: taken, waited for, given up, cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vmloop.common.errors import DeadlineExceeded
from vmloop.worker.order import Order


class Loop(asyncio.SelectorEventLoop):
    """Time passes when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0
        super().__init__()

    def time(self) -> float:
        return self.now

    def settle(self) -> None:
        """Let everything happen that can happen now. No step of it starts more than a few others."""
        for _ in range(12):
            self.call_soon(self.stop)
            self.run_forever()


class Operation:
    """One that holds the turn until it is let go."""

    def __init__(self, loop: Loop, order: Order, number: int, deadline: float, on_turn: Callable[[int], None]) -> None:
        self.number = number
        self.deadline = deadline
        self.gate = asyncio.Event()
        self.inside = False
        self.task = loop.create_task(self._run(order, on_turn))

    async def _run(self, order: Order, on_turn: Callable[[int], None]) -> None:
        async with order.turn(f"operation {self.number}", self.deadline):
            self.inside = True
            on_turn(self.number)
            try:
                await self.gate.wait()
            finally:
                self.inside = False


class Model(RuleBasedStateMachine):
    """`line` is who waits, in the order they came; `holder` who should have the turn: an operation, "direct" or nobody."""

    @initialize()
    def begin(self) -> None:
        self.loop = Loop()
        self.order = Order(self.loop)
        self.line: list[Operation] = []
        self.holder: Operation | str | None = None
        self.turns: list[int] = []
        self.expected: list[int] = []
        self.count = 0

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        while self.holder is not None:
            self.let_go()
        assert self.order.try_take("free in the end")
        self.loop.close()

    def pass_on(self) -> None:
        self.holder = self.line.pop(0) if self.line else None
        if isinstance(self.holder, Operation):
            self.expected.append(self.holder.number)

    def is_over(self, operation: Operation, error: type[BaseException] | None) -> None:
        assert operation.task.done()
        if operation.task.cancelled():
            assert error is asyncio.CancelledError
        else:
            assert type(operation.task.exception()) is (error or type(None))

    @rule(patience=st.sampled_from([0.0, 1.0, 1.0, 5.0, 60.0]))
    def start(self, patience: float) -> None:
        self.count += 1
        operation = Operation(self.loop, self.order, self.count, self.loop.now + patience, self.turns.append)
        self.line.append(operation)
        if self.holder is None:
            self.pass_on()
        self.loop.settle()
        if operation in self.line and patience == 0.0:
            self.line.remove(operation)
            self.is_over(operation, DeadlineExceeded)

    @rule()
    def take_directly(self) -> None:
        free = self.holder is None
        assert self.order.try_take("direct") is free
        if free:
            self.holder = "direct"

    @rule()
    def let_go(self) -> None:
        holder = self.holder
        if holder is None:
            return
        if isinstance(holder, Operation):
            holder.gate.set()
        else:
            self.order.release()
        self.pass_on()
        self.loop.settle()
        if isinstance(holder, Operation):
            self.is_over(holder, None)

    @rule(choice=st.integers(0, 20))
    def cancel_one_in_line(self, choice: int) -> None:
        if self.line:
            operation = self.line.pop(choice % len(self.line))
            operation.task.cancel()
            self.loop.settle()
            self.is_over(operation, asyncio.CancelledError)

    @rule()
    def cancel_the_holder(self) -> None:
        if isinstance(self.holder, Operation):
            operation = self.holder
            operation.task.cancel()
            self.pass_on()
            self.loop.settle()
            self.is_over(operation, asyncio.CancelledError)

    @rule()
    def the_turn_comes_to_one_that_is_cancelled_and_does_not_know(self) -> None:
        if isinstance(self.holder, str) and self.line:
            next_one = self.line.pop(0)
            next_one.task.cancel()
            self.order.release()
            self.pass_on()
            self.loop.settle()
            self.is_over(next_one, asyncio.CancelledError)

    @rule()
    def cancel_the_next_just_as_its_turn_comes(self) -> None:
        if isinstance(self.holder, str) and self.line:
            next_one = self.line.pop(0)
            self.order.release()
            next_one.task.cancel()
            self.pass_on()
            self.loop.settle()
            self.is_over(next_one, asyncio.CancelledError)

    @rule()
    def the_deadline_comes_with_the_turn(self) -> None:
        """Either of the two may win; the turn is not lost."""
        if isinstance(self.holder, str) and self.line:
            next_one = self.line.pop(0)
            self.loop.now = max(self.loop.now, next_one.deadline + 0.1)
            self.order.release()
            self.loop.settle()
            late = [operation for operation in self.line if operation.deadline <= self.loop.now]
            if next_one.inside:
                self.holder = next_one
                self.expected.append(next_one.number)
            else:
                self.is_over(next_one, DeadlineExceeded)
                self.line = [operation for operation in self.line if operation not in late or operation.inside]
                self.pass_on()
            self.drop(late)

    @rule(ahead=st.sampled_from([0.5, 1.5, 10.0]))
    def time_passes(self, ahead: float) -> None:
        self.loop.now += ahead
        self.loop.settle()
        self.drop([operation for operation in self.line if operation.deadline <= self.loop.now])

    def drop(self, late: list[Operation]) -> None:
        for operation in late:
            if not operation.inside:
                if operation in self.line:
                    self.line.remove(operation)
                self.is_over(operation, DeadlineExceeded)

    @invariant()
    def the_turn_is_where_it_should_be(self) -> None:
        everybody: list[Any] = [*self.line, self.holder]
        inside = [operation for operation in everybody if isinstance(operation, Operation) and operation.inside]
        assert inside == ([self.holder] if isinstance(self.holder, Operation) else [])
        assert self.turns == self.expected
        assert not any(operation.task.done() for operation in self.line)


TestOrder = Model.TestCase
TestOrder.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
