# SPDX-License-Identifier: Apache-2.0
"""Events whose handling the worker's death may cut off: written down before, struck out after, found by the next worker."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.common.names import VmName
from vmloop.worker.events import Event
from vmloop.worker.handlers.pending import FILE_NAME, MAX_PENDING, Pending


def event(name: str = "GUEST_PANICKED", seq: int = 1, epoch: int = 3) -> Event:
    return Event(VmName("web1"), epoch, seq, 0, name, {"action": "pause"}, "qmp")


def test_what_is_not_handled_to_its_end_is_found_by_the_next_worker(tmp_path: Path) -> None:
    first = Pending(tmp_path, 3)
    first.add(event(seq=1))
    first.add(event("SHUTDOWN", seq=2))
    first.done(event(seq=1))
    assert Pending(tmp_path, 3).events == [event("SHUTDOWN", seq=2)]


def test_when_all_is_done_nothing_is_left(tmp_path: Path) -> None:
    pending = Pending(tmp_path, 3)
    pending.add(event())
    pending.done(event())
    pending.done(event())
    assert not (tmp_path / FILE_NAME).exists()


def test_events_that_nobody_needs_to_repeat_cost_nothing(tmp_path: Path) -> None:
    pending = Pending(tmp_path, 3)
    pending.add(event("RTC_CHANGE"))
    assert pending.events == []
    assert not (tmp_path / FILE_NAME).exists()


def test_an_earlier_run_is_over(tmp_path: Path) -> None:
    Pending(tmp_path, 3).add(event())
    assert Pending(tmp_path, 4).events == []


def test_there_is_a_bound(tmp_path: Path) -> None:
    pending = Pending(tmp_path, 3)
    for seq in range(MAX_PENDING + 5):
        pending.add(event(seq=seq))
    assert len(Pending(tmp_path, 3).events) == MAX_PENDING


def test_a_place_that_cannot_be_written_to_does_not_keep_an_event_from_being_handled(tmp_path: Path) -> None:
    pending = Pending(tmp_path / "missing", 3)
    pending.add(event())
    assert pending.events == [event()]


@given(st.binary(max_size=200))
def test_any_file_is_survived(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    directory = tmp_path_factory.mktemp("run")
    (directory / FILE_NAME).write_bytes(content)
    assert Pending(directory, 3).events == []
