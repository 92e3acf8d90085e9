# SPDX-License-Identifier: Apache-2.0
"""The steps of an operation across a death: what was sent is not sent again, what was not sent is, and a refusal stays one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmloop.common.cursor import Cursor
from vmloop.common.errors import OutcomeUnknown, QmpError, VmloopError, WorkerLost
from vmloop.common.names import VmName
from vmloop.worker.answers import Answers
from vmloop.worker.app import App
from vmloop.worker.qmp.ledger import Owed
from vmloop.worker.requests import Requests
from vmloop.worker.runfile import Run
from vmloop.worker.verbs.request import Request

NUMBER = 7
OWED = Owed(qmp_id=3, request=NUMBER, reading=False, oob=False, deadline=1e9, key=b"")


class Session:
    """Takes commands and answers them at once, unless it shall die with them."""

    def __init__(self, *, enters: bool = True, error: VmloopError | None = None, answers: bool = True) -> None:
        self.sent: list[str] = []
        self._enters = enters
        self._error = error
        self._answers = answers

    def submit(self, name: str, _: None, *, done: Any, entered: Any, **__: Any) -> None:
        if not self._enters:
            return
        entered()
        self.sent.append(name)
        if self._answers:
            done({} if self._error is None else None, self._error)


class Worker:
    """One worker's requests; the next one reads the same file."""

    def __init__(self, directory: Path, session: Session, *, page_lost: bool = False) -> None:
        self.session = session
        self.answers = Answers(directory / "answers")
        vm = SimpleNamespace(
            name=VmName("web1"), require_session=lambda: session, page_lost=page_lost, run=Run(epoch=5), alive=True
        )
        app = SimpleNamespace(
            loop=asyncio.get_running_loop(), name=vm.name, vm=vm, events=SimpleNamespace(cursor=Cursor(5, 10))
        )
        self.requests = Requests(cast(App, app), self.answers)
        self.left = self.answers.left_by_predecessor(NUMBER)
        now = asyncio.get_running_loop().time()
        self.request = Request(NUMBER, "pause", now + 5, now, False, b"", lambda _: None, left=self.left)
        if self.left is None:
            self.requests.begun(self.request)

    async def stop(self) -> None:
        """The broker has given it the request, and it comes to the step."""
        if self.left is not None:
            self.answers.adopt(self.left.begun, NUMBER)
        await self.requests.command(self.request, "stop", deadline=asyncio.get_running_loop().time() + 5)

    async def die_in_stop(self) -> None:
        task = asyncio.create_task(self.stop())
        await asyncio.sleep(0)
        task.cancel()
        self.answers.close()


def run(live: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(live())


def test_a_step_that_never_reached_the_ledger_is_sent_by_the_next_worker(tmp_path: Path) -> None:
    """It waited for a place on the wire when its worker was killed."""

    async def live() -> None:
        await Worker(tmp_path, Session(enters=False)).die_in_stop()
        second = Worker(tmp_path, Session())
        await second.stop()
        assert second.session.sent == ["stop"]
        second.answers.close()

    run(live)


def test_a_step_that_was_answered_is_not_sent_again(tmp_path: Path) -> None:
    async def live() -> None:
        first = Worker(tmp_path, Session())
        await first.stop()
        first.answers.close()
        second = Worker(tmp_path, Session())
        await second.stop()
        assert second.session.sent == []
        second.answers.close()

    run(live)


def test_a_refusal_is_one_under_the_next_worker_too(tmp_path: Path) -> None:
    async def live() -> None:
        no = QmpError("stop: not now", **{"class": "GenericError", "desc": "not now"})
        await Worker(tmp_path, Session(error=no)).die_in_stop()
        second = Worker(tmp_path, Session())
        with pytest.raises(QmpError, match="not now"):
            await second.stop()
        assert second.session.sent == []
        second.answers.close()

    run(live)


@pytest.mark.parametrize("refused", [False, True])
def test_a_step_that_is_owed_is_waited_for_and_written_down_for_the_one_after(tmp_path: Path, refused: bool) -> None:
    async def live() -> None:
        await Worker(tmp_path, Session(answers=False)).die_in_stop()
        second = Worker(tmp_path, Session())
        done = second.requests.inherit(OWED)
        assert done is not None
        done(None if refused else {}, QmpError("stop: no") if refused else None)
        second.answers.close()  # killed before the operation has seen it
        third = Worker(tmp_path, Session())
        if refused:
            with pytest.raises(QmpError, match="no"):
                await third.stop()
        else:
            await third.stop()
        assert third.session.sent == []
        third.answers.close()

    run(live)


def test_a_step_that_was_cut_off_inside_its_send_is_sent_again(tmp_path: Path) -> None:
    async def live() -> None:
        await Worker(tmp_path, Session(answers=False)).die_in_stop()
        second = Worker(tmp_path, Session(answers=False))
        done = second.requests.inherit(OWED)
        assert done is not None
        done(None, WorkerLost("stop: it was not carried out"))
        await second.die_in_stop()
        assert second.session.sent == ["stop"]
        third = Worker(tmp_path, Session())  # for which it is a step that was sent, and not one that was cut off
        done = third.requests.inherit(OWED)
        assert done is not None
        done({}, None)
        await third.stop()
        assert third.session.sent == []
        third.answers.close()

    run(live)


def test_without_the_page_nobody_knows_of_a_step_that_is_not_answered(tmp_path: Path) -> None:
    async def live() -> None:
        await Worker(tmp_path, Session(answers=False)).die_in_stop()
        second = Worker(tmp_path, Session(), page_lost=True)
        with pytest.raises(OutcomeUnknown, match="may have been sent"):
            await second.stop()
        second.answers.close()

    run(live)


def test_what_an_operation_brings_has_its_reason_before_the_next_worker_has_it(tmp_path: Path) -> None:
    async def live() -> None:
        await Worker(tmp_path, Session(answers=False)).die_in_stop()
        answers = Answers(tmp_path / "answers")
        second = Requests(cast(App, SimpleNamespace(loop=asyncio.get_running_loop())), answers)
        assert second.intent_left() == "user"
        left = answers.left_by_predecessor(NUMBER)
        assert left is not None
        answers.adopt(left.begun, NUMBER)
        assert second.intent_left() == ""
        answers.close()

    run(live)
