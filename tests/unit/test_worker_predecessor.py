# SPDX-License-Identifier: Apache-2.0
"""What is said of the worker before this one."""

from __future__ import annotations

import signal

import pytest

from vmloop.worker.predecessor import Predecessor

KILLED = Predecessor(
    incarnation=3, in_order=False, task="handler mail.send on STOP 7", stack="File …", exit=-signal.SIGSEGV
)


def test_a_worker_that_died_is_told_with_how_and_where() -> None:
    assert KILLED.died
    assert KILLED.to_event() == {
        "incarnation": 3,
        "how": "it was killed by SIGSEGV",
        "task": "handler mail.send on STOP 7",
        "stack": "File …",
    }


@pytest.mark.parametrize(("incarnation", "in_order"), [(0, False), (0, True), (3, True)])
def test_none_and_one_that_left_by_itself_did_not_die(incarnation: int, in_order: bool) -> None:
    assert not Predecessor(incarnation, in_order, "", "", None).died


@pytest.mark.parametrize(
    ("code", "how"),
    [
        (None, "it ended, nobody knows how"),
        (1, "it ended with exit code 1"),
        (-9, "it was killed by SIGKILL"),
        (-99, "it was killed by signal 99"),
    ],
)
def test_how_it_ended_in_words(code: int | None, how: str) -> None:
    assert Predecessor(1, False, "", "", code).to_event() == {"incarnation": 1, "how": how}
