# SPDX-License-Identifier: Apache-2.0
"""Remembered answers: by number and by key, once each, in bounds, across workers, on disks that are full and files that are torn."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmloop.common.cursor import Cursor
from vmloop.common.errors import Busy, Denied, OutcomeUnknown, VmloopError, WorkerLost
from vmloop.common.wire import Kind
from vmloop.worker.answers import MAX_ANSWERS, MAX_BYTES, SLACK_BYTES, Answers
from vmloop.worker.requests import Requests
from vmloop.worker.verbs.request import Request

if TYPE_CHECKING:
    from vmloop.worker.app import App

REPLY, ERROR = Kind.REPLY, Kind.ERROR
HERE = Cursor(3, 17)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "answers"


def key(number: int) -> bytes:
    return f"key {number}".encode()


def answered(answers: Answers, *numbers: int, body: bytes = b"body") -> None:
    for number in numbers:
        answers.begin(key(number), number)
        answers.finish(number, key(number), REPLY, body)


def body_of(answers: Answers, number: int, key: bytes = b"") -> bytes | None:
    known = answers.known(number, key)
    return None if known is None else known.body


def test_a_repeat_gets_the_first_answer() -> None:
    answers = Answers()
    assert answers.begin(b"k", 1)
    assert answers.known(1, b"k") is None  # it runs still
    assert answers.finish(1, b"k", REPLY, b"first") == [1]
    for number in (1, 2):  # by its number, and under another one by its key
        known = answers.known(number, b"k")
        assert known is not None
        assert (known.kind, known.body) == (REPLY, b"first")
    assert answers.known(2) is None


def test_an_error_is_an_answer_too() -> None:
    answers = Answers()
    answers.finish(1, b"", ERROR, b"denied")
    known = answers.known(1)
    assert known is not None
    assert known.kind == ERROR


def test_a_repeat_of_what_still_runs_is_answered_together_with_it() -> None:
    answers = Answers()
    assert answers.begin(b"k", 1)
    assert not answers.begin(b"k", 2)
    assert answers.begin(b"other", 3)
    assert not answers.begin(b"k", 4)
    assert answers.finish(1, b"k", REPLY, b"x") == [1, 2, 4]
    assert answers.finish(3, b"other", REPLY, b"y") == [3]


def test_what_only_reads_and_has_no_key_is_not_remembered() -> None:
    answers = Answers()
    assert answers.finish(1, b"", REPLY, b"x", lasting=False) == [1]
    assert answers.known(1) is None


def test_the_oldest_answer_is_forgotten_first() -> None:
    answers = Answers()
    answered(answers, *range(1, MAX_ANSWERS + 3))
    assert [body_of(answers, 0, key(number)) for number in (1, 2, 3, MAX_ANSWERS + 2)] == [None, None, b"body", b"body"]


def test_the_answers_together_are_bounded_in_bytes() -> None:
    answers = Answers()
    quarter = bytes(MAX_BYTES // 4)
    answered(answers, 1, 2, 3, 4, body=quarter)
    assert all(answers.known(number) for number in (1, 2, 3, 4))
    answered(answers, 5, body=b"x")
    assert answers.known(1) is None
    assert all(answers.known(number) for number in (2, 3, 4, 5))


def test_one_answer_over_the_bound_is_remembered_alone() -> None:
    answers = Answers()
    answered(answers, 1, 2)
    answered(answers, 3, body=bytes(MAX_BYTES + 1))
    assert [answers.known(number) is not None for number in (1, 2, 3)] == [False, False, True]
    answered(answers, 4)
    assert [answers.known(number) is not None for number in (3, 4)] == [False, True]


def test_an_answer_that_replaces_one_of_its_key_does_not_count_twice() -> None:
    answers = Answers()
    half = bytes(MAX_BYTES // 2)
    for number in range(1, 6):
        answers.finish(number, b"same", REPLY, half)
    answers.finish(9, b"other", REPLY, half)
    assert body_of(answers, 0, b"same") == body_of(answers, 0, b"other") == half
    assert answers.known(1) is None


# -- across workers -------------------------------------------------------------------------------------------------------


def test_the_next_worker_knows_what_was_answered(path: Path) -> None:
    first = Answers(path)
    first.finish(1, b"k", REPLY, b"done")
    first.finish(2, b"", ERROR, b"not so")
    first.finish(3, b"", REPLY, b"read", lasting=False)
    first.close()
    second = Answers(path)
    assert body_of(second, 7, b"k") == b"done"
    assert body_of(second, 2) == b"not so"
    assert second.known(3) is None
    second.close()


def test_the_next_worker_knows_what_was_begun_and_how_far_it_came(path: Path) -> None:
    first = Answers(path)
    first.begun(1, b"k", "stop", HERE)
    assert first.left_by_predecessor(1) is None  # it is its own
    first.step(1, "system_powerdown")
    first.begun(2, b"", "pause", HERE)
    first.finish(2, b"", REPLY, b"paused")
    first.close()
    second = Answers(path)
    for number, by_key in ((1, b""), (9, b"k")):
        left = second.left_by_predecessor(number, by_key)
        assert left is not None
        assert (left.begun.op, left.begun.cursor, left.steps) == ("stop", HERE, ["system_powerdown"])
        assert left.answers == {}
    assert second.left_by_predecessor(2) is None
    assert second.left_by_predecessor(9, b"another") is None
    second.close()


def test_what_is_adopted_is_left_to_the_one_after_under_its_new_number(path: Path) -> None:
    first = Answers(path)
    first.begun(1, b"k", "stop", HERE)
    first.step(1, "system_powerdown")
    first.close()
    second = Answers(path)
    left = second.left_by_predecessor(5, b"k")
    assert left is not None
    second.adopt(left.begun, 5)
    second.stepped(1, "system_powerdown", None)
    assert second.left_by_predecessor(5, b"k") is None
    second.step(5, "quit")
    second.close()
    third = Answers(path)
    for number, by_key in ((5, b""), (1, b""), (8, b"k")):
        left = third.left_by_predecessor(number, by_key)
        assert left is not None
        assert left.steps == ["system_powerdown", "quit"]
        assert left.answers == {"system_powerdown": None}
        assert left.begun.number == 1  # whoever is owed the reply to a step, under either number
    assert third.left_by_predecessor(8) is None
    third.adopt(left.begun, 8)
    third.finish(8, b"k", REPLY, b"off")
    third.close()
    fourth = Answers(path)
    assert [fourth.left_by_predecessor(number) for number in (1, 5, 8)] == [None, None, None]
    assert body_of(fourth, 0, b"k") == b"off"
    fourth.close()


def test_an_operation_that_was_adopted_and_answered_is_over_also_when_its_answer_is_forgotten(path: Path) -> None:
    first = Answers(path)
    first.begun(1, b"k", "stop", HERE)
    first.step(1, "system_powerdown")
    first.close()
    second = Answers(path)
    left = second.left_by_predecessor(5, b"k")
    assert left is not None
    second.adopt(left.begun, 5)
    second.finish(5, b"k", REPLY, b"off")
    answered(second, *range(100, 101 + MAX_ANSWERS))
    second.close()
    third = Answers(path)
    assert third.known(0, b"k") is None  # so a repetition begins anew,
    assert third.left_by_predecessor(9, b"k") is None  # and not behind the steps of then
    third.close()


def test_a_worker_that_dies_while_it_adopts_leaves_every_step_known(path: Path) -> None:
    first = Answers(path)
    first.begun(1, b"k", "stop", HERE)
    first.step(1, "system_powerdown")
    first.step(1, "quit")
    first.close()
    before = path.read_bytes()
    for number in (1, 5):
        path.write_bytes(before)
        second = Answers(path)
        left = second.left_by_predecessor(number, b"k")
        assert left is not None
        second.adopt(left.begun, number)
        second.close()
        whole = path.read_bytes()
        assert whole.startswith(before)
        for cut in range(len(before), len(whole) + 1):
            path.write_bytes(whole[:cut])
            third = Answers(path)
            left = third.left_by_predecessor(number, b"k")
            assert left is not None
            assert left.steps == ["system_powerdown", "quit"]
            third.close()


# -- not done, try again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [False, True])
def test_after_an_answer_that_nothing_was_done_the_next_request_with_its_key_is_carried_out(
    path: Path, begun: bool
) -> None:
    first = Answers(path)
    assert first.begin(b"k", 1)
    if begun:
        first.begun(1, b"k", "stop", HERE)
    assert not first.begin(b"k", 2)
    assert first.finish(1, b"k", ERROR, b"busy", again=True) == [1, 2]
    for answers in (first, Answers(path)):
        assert answers.known(3, b"k") is None
        assert answers.left_by_predecessor(3, b"k") is None
        assert body_of(answers, 1) == b"busy"  # the broker may ask what became of that one
        assert answers.begin(b"k", 3)
        assert answers.finish(3, b"k", REPLY, b"done") == [3]
        assert body_of(answers, 9, b"k") == b"done"
        answers.close()


def test_a_request_that_is_refused_does_not_answer_for_the_one_with_its_key_that_runs() -> None:
    answers = Answers()
    assert answers.begin(b"k", 1)
    assert answers.finish(2, b"k", ERROR, b"bad request") == [2]
    assert not answers.begin(b"k", 3)
    assert answers.finish(1, b"k", REPLY, b"done") == [1, 3]
    assert body_of(answers, 9, b"k") == b"done"


def test_nothing_is_written_for_those_who_only_read(path: Path) -> None:
    answers = Answers(path)
    answers.finish(1, b"k", REPLY, b"x", lasting=False)
    assert not path.exists()
    assert answers.fileno() == -1


def test_a_file_that_has_grown_is_written_anew_with_what_is_remembered(path: Path) -> None:
    answers = Answers(path)
    for number in range(1, 400):
        answers.finish(number, b"k", REPLY, bytes(10_000))
    answers.begun(900, b"", "stop", HERE)
    answers.step(900, "quit")
    answers.stepped(900, "quit", {"code": "qmp-error", "message": "no"})
    for number in range(400, 600):
        answers.finish(number, b"k", REPLY, bytes(10_000))
    assert path.stat().st_size < 2 * 10_000 + SLACK_BYTES + 20_000
    answers.close()
    second = Answers(path)
    assert body_of(second, 0, b"k") == bytes(10_000)
    left = second.left_by_predecessor(900)
    assert left is not None
    assert left.steps == ["quit"]
    assert left.answers == {"quit": {"code": "qmp-error", "message": "no"}}
    second.close()
    assert os.listdir(path.parent) == ["answers"]


@settings(max_examples=200)
@given(cut=st.integers(0, 200), junk=st.binary(max_size=60))
def test_of_a_torn_or_damaged_file_the_good_beginning_is_used(
    tmp_path_factory: pytest.TempPathFactory, cut: int, junk: bytes
) -> None:
    path = tmp_path_factory.mktemp("a") / "answers"
    first = Answers(path)
    sizes = []
    for number in (1, 2, 3):
        first.finish(number, b"", REPLY, b"x" * 20)
        sizes.append(path.stat().st_size)
    first.close()
    path.write_bytes(path.read_bytes()[:cut] + junk)
    second = Answers(path)
    for number, size in zip((1, 2, 3), sizes, strict=True):
        if size <= cut:
            assert body_of(second, number) == b"x" * 20
    second.finish(4, b"", REPLY, b"later")  # and it can be written on
    second.close()
    third = Answers(path)
    assert body_of(third, 4) == b"later"
    third.close()


def test_a_disk_that_takes_nothing_costs_the_memory_across_workers_only(tmp_path: Path) -> None:
    answers = Answers(tmp_path / "missing" / "answers")
    answers.begun(1, b"", "stop", HERE)
    answers.step(1, "quit")
    assert answers.finish(1, b"", REPLY, b"done") == [1]
    assert body_of(answers, 1) == b"done"


def test_a_write_that_the_disk_takes_in_part_does_not_hide_what_comes_after(path: Path) -> None:
    import resource
    import signal

    answers = Answers(path)
    answers.finish(1, b"", REPLY, b"x" * 100)
    size = path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, hard))
        answers.finish(2, b"", REPLY, b"y" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert path.stat().st_size == size
    answers.finish(3, b"", REPLY, b"z" * 100)
    answers.close()
    second = Answers(path)
    assert [body_of(second, number) is not None for number in (1, 2, 3)] == [True, False, True]
    second.close()


class Desk:
    """As much of a worker as `Requests.finish` needs: what is answered."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.replies: list[int] = []

    @property
    def events(self) -> SimpleNamespace:
        return SimpleNamespace(cursor=HERE)

    def send_status_if_due(self) -> None:
        pass

    def reply(self, number: int, kind: Kind, body: bytes, received: float) -> None:
        del kind, body, received
        self.replies.append(number)


@pytest.mark.parametrize(
    ("error", "again"),
    [(WorkerLost("x"), True), (Busy("x"), True), (Denied("x"), False), (OutcomeUnknown("x"), False), (None, False)],
    ids=lambda value: getattr(value, "code", str(value)),
)
def test_errors_that_say_try_again_are_not_remembered_under_a_key(error: VmloopError | None, again: bool) -> None:
    desk, answers = Desk(), Answers()
    try:
        requests = Requests(cast("App", desk), answers)
        requests.finish(Request(1, "stop", 9.0, 0.0, False, b"k", lambda part: None), {}, error)
    finally:
        desk.loop.close()
    assert desk.replies == [1]
    assert (answers.known(2, b"k") is None) is again


def test_an_answer_that_is_given_again_has_the_cursor_of_then(path: Path) -> None:
    first = Answers(path)
    first.finish(1, b"k", REPLY, b"shut off", HERE)
    first.close()
    for answers in (first, second := Answers(path)):
        known = answers.known(2, b"k")
        assert known is not None
        assert known.cursor == HERE
    second.close()
