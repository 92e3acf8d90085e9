# SPDX-License-Identifier: Apache-2.0
"""Answers by key: a repeat gets the first answer, a repeat of what still runs is answered with it, and the memory is bounded."""

from __future__ import annotations

from vmloop.common.wire import Kind
from vmloop.worker.answers import MAX_BYTES, MAX_KEYS, Answers


def key(number: int) -> bytes:
    return b"key %d" % number


def answered(answers: Answers, *numbers: int, body: bytes = b"body") -> None:
    for number in numbers:
        assert answers.begin(key(number), number)
        assert answers.finish(key(number), Kind.REPLY, body) == [number]


def test_a_key_that_never_came_is_not_known() -> None:
    assert Answers().known(b"new") is None


def test_a_repeat_gets_the_first_answer() -> None:
    answers = Answers()
    assert answers.begin(b"k", 1)
    assert answers.known(b"k") is None  # it runs still
    assert answers.finish(b"k", Kind.REPLY, b"first") == [1]
    assert answers.known(b"k") == (Kind.REPLY, b"first")
    assert answers.known(b"k") == (Kind.REPLY, b"first")


def test_an_error_is_an_answer_too() -> None:
    answers = Answers()
    answers.begin(b"k", 1)
    answers.finish(b"k", Kind.ERROR, b"denied")
    assert answers.known(b"k") == (Kind.ERROR, b"denied")


def test_a_repeat_of_what_still_runs_is_answered_together_with_it() -> None:
    answers = Answers()
    assert answers.begin(b"k", 1)
    assert not answers.begin(b"k", 2)
    assert answers.begin(b"other", 3)
    assert not answers.begin(b"k", 4)
    assert answers.finish(b"k", Kind.REPLY, b"x") == [1, 2, 4]
    assert answers.finish(b"other", Kind.REPLY, b"y") == [3]


def test_nobody_is_told_twice() -> None:
    answers = Answers()
    answers.begin(b"k", 1)
    assert answers.finish(b"k", Kind.REPLY, b"x") == [1]
    assert answers.finish(b"k", Kind.REPLY, b"x") == []


def test_the_oldest_key_is_forgotten_first() -> None:
    answers = Answers()
    answered(answers, *range(MAX_KEYS + 2))
    assert answers.known(key(0)) is None
    assert answers.known(key(1)) is None
    assert answers.known(key(2)) == (Kind.REPLY, b"body")
    assert answers.known(key(MAX_KEYS + 1)) == (Kind.REPLY, b"body")


def test_the_answers_together_are_bounded_in_bytes() -> None:
    answers = Answers()
    quarter = bytes(MAX_BYTES // 4)
    answered(answers, 1, 2, 3, 4, body=quarter)
    assert all(answers.known(key(number)) for number in (1, 2, 3, 4))
    answered(answers, 5, body=b"x")
    assert answers.known(key(1)) is None
    assert all(answers.known(key(number)) for number in (2, 3, 4, 5))


def test_one_answer_over_the_bound_is_remembered_alone() -> None:
    answers = Answers()
    answered(answers, 1, 2)
    answered(answers, 3, body=bytes(MAX_BYTES + 1))
    assert [answers.known(key(number)) is not None for number in (1, 2, 3)] == [False, False, True]
    answered(answers, 4)
    assert [answers.known(key(number)) is not None for number in (3, 4)] == [False, True]


def test_an_answer_that_replaces_one_of_its_key_does_not_count_twice() -> None:
    answers = Answers()
    half = bytes(MAX_BYTES // 2)
    for _ in range(5):
        answered(answers, 1, body=half)
    answered(answers, 2, body=half)
    assert answers.known(key(1)) is not None
    assert answers.known(key(2)) is not None
