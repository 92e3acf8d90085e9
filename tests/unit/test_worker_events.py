# SPDX-License-Identifier: Apache-2.0
"""The stream of a VM's events: numbers without gaps, across workers too; who listens; what is kept; and that no data can break it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.common.cursor import Cursor
from vmloop.common.names import VmName
from vmloop.common.pack import unpack_map
from vmloop.common.page import Page, Word
from vmloop.common.wire import Kind, Message, decode
from vmloop.worker.events import MAX_EVENT_BYTES, Event, EventLog

NAME = VmName("web1")
DONE_MASK = (1 << 24) - 1


class Bench:
    """A page, and the logs of one worker after another on it."""

    def __init__(self, path: Path) -> None:
        self.page = Page(path, writable=True)
        self.published: list[Message] = []
        self.log = self.next_worker()

    def next_worker(self, keep: int = 8) -> EventLog:
        self.log = EventLog(NAME, self.page, lambda frame: self.published.append(decode(frame)), keep)
        return self.log

    @property
    def settled(self) -> tuple[int, int]:
        """The number and the bytes that the page has."""
        progress = self.page.words[Word.PROGRESS]
        return progress >> 24, progress & DONE_MASK


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "page")
    bench.log.begin_epoch(4)
    yield bench
    bench.page.close()


def test_events_are_numbered_from_1_without_gaps(bench: Bench) -> None:
    assert [bench.log.emit("STOP", {}).seq for _ in range(3)] == [1, 2, 3]
    assert bench.log.cursor == Cursor(4, 3)
    assert bench.settled == (3, 0)


def test_an_event_goes_out_as_one_frame_that_says_it_all(bench: Bench) -> None:
    made = bench.log.emit("BLOCK_IO_ERROR", {"device": "disk0"}, "qmp", 1_700_000_000_000_001)
    (message,) = bench.published
    assert (message.kind, message.service, message.op) == (Kind.EVENT, "vm/web1", "BLOCK_IO_ERROR")
    assert (message.epoch, message.seq) == (4, 1)
    expected = {
        "vm": "web1",
        "epoch": 4,
        "seq": 1,
        "time": 1_700_000_000_000_001,
        "event": "BLOCK_IO_ERROR",
        "data": {"device": "disk0"},
        "origin": "qmp",
    }
    assert unpack_map(message.body) == made.to_wire() == expected


def test_an_event_of_our_own_has_the_time_of_now(bench: Bench) -> None:
    before = time.time_ns() // 1000
    made = bench.log.emit("WORKER_STARTED", {})
    assert before <= made.time <= time.time_ns() // 1000
    assert made.origin == "vmloop"


def test_a_new_run_begins_at_1_again(bench: Bench) -> None:
    bench.log.emit("SHUTDOWN", {})
    bench.log.begin_epoch(5)
    assert bench.log.cursor == Cursor(5, 0)
    made = bench.log.emit("RESUME", {})
    assert (made.epoch, made.seq) == (5, 1)
    assert bench.page.words[Word.EPOCH] == 5


def test_the_next_worker_goes_on_with_the_numbers(bench: Bench) -> None:
    bench.log.emit("STOP", {})
    bench.log.emit("RESUME", {})
    log = bench.next_worker()
    assert log.cursor == Cursor(4, 2)
    assert log.emit("STOP", {}).seq == 3


# -- kept in step with the lines of the monitor -----------------------------------------------------------------------------


def test_events_of_a_line_are_settled_together_with_its_bytes(bench: Bench) -> None:
    bench.log.begin_line()
    bench.log.emit("STOP", {}, "qmp")
    bench.log.emit("VM_STATE", {})
    assert bench.settled == (0, 0)
    bench.log.end_line(100)
    assert bench.settled == (2, 100)
    assert bench.log.done == 100


def test_a_line_without_events_settles_its_bytes(bench: Bench) -> None:
    bench.log.begin_line()
    bench.log.end_line(17)
    assert bench.settled == (0, 17)


def test_an_event_between_lines_is_settled_at_once_and_leaves_the_bytes_alone(bench: Bench) -> None:
    bench.log.begin_line()
    bench.log.end_line(60)
    bench.log.emit("MONITOR_STATE", {})
    assert bench.settled == (1, 60)


def test_a_line_that_was_cut_short_gives_its_numbers_again(bench: Bench) -> None:
    bench.log.emit("RESUME", {})
    bench.log.begin_line()
    bench.log.emit("STOP", {"n": 1}, "qmp", 5)
    log = bench.next_worker()
    assert log.cursor == Cursor(4, 1)
    log.begin_line()
    again = log.emit("STOP", {"n": 1}, "qmp", 5)
    log.end_line(30)
    assert again.seq == 2
    assert bench.published[-1] == bench.published[-2]
    assert bench.settled == (2, 30)


@pytest.mark.xfail(
    strict=True, reason="numbers are given out again until the journal says which of them are out already"
)
def test_an_event_of_the_next_workers_own_takes_no_number_of_the_line_that_was_cut(bench: Bench) -> None:
    bench.log.begin_line()
    bench.log.emit("STOP", {}, "qmp", 5)
    log = bench.next_worker()
    log.emit("WORKER_LOST", {})
    log.begin_line()
    log.emit("STOP", {}, "qmp", 5)
    log.end_line(30)
    told = {message.seq: message.op for message in reversed(bench.published)}  # who has a number drops its repetition
    assert sorted(told.values()) == ["STOP", "WORKER_LOST"]


def test_the_largest_chunk_and_large_numbers_fit_beside_each_other(bench: Bench) -> None:
    bench.page.words[Word.PROGRESS] = ((1 << 40) - 2) << 24
    log = bench.next_worker()
    log.begin_line()
    log.emit("STOP", {})
    log.end_line(65536)
    assert bench.settled == ((1 << 40) - 1, 65536)
    assert log.cursor.seq == (1 << 40) - 1


# -- listeners ------------------------------------------------------------------------------------------------------------


def test_a_listener_hears_every_event_until_it_is_ended(bench: Bench) -> None:
    heard: list[str] = []
    unlisten = bench.log.listen(lambda event: heard.append(event.event))
    bench.log.emit("STOP", {})
    bench.log.emit("RESUME", {})
    unlisten()
    bench.log.emit("SHUTDOWN", {})
    assert heard == ["STOP", "RESUME"]


def test_a_listener_hears_an_event_that_is_out_and_kept_already(bench: Bench) -> None:
    def listener(event: Event) -> None:
        assert bench.published[-1].seq == event.seq
        assert list(bench.log.since(Cursor(4, 0)))[-1] == event
        heard.append(event.seq)

    heard: list[int] = []
    bench.log.listen(listener)
    bench.log.emit("STOP", {})
    assert heard == [1]


def test_a_listener_may_end_itself_while_it_is_called(bench: Bench) -> None:
    heard: list[str] = []

    def once(event: Event) -> None:
        heard.append("once")
        unlisten()

    unlisten = bench.log.listen(once)
    bench.log.listen(lambda event: heard.append("always"))
    bench.log.emit("STOP", {})
    bench.log.emit("STOP", {})
    assert heard == ["once", "always", "always"]


def test_a_listener_may_emit_and_the_numbers_still_follow_each_other(bench: Bench) -> None:
    def answer(event: Event) -> None:
        if event.event == "STOP":
            bench.log.emit("VM_STATE", {})

    bench.log.listen(answer)
    bench.log.emit("STOP", {})
    bench.log.emit("RESUME", {})
    assert [(message.seq, message.op) for message in bench.published] == [(1, "STOP"), (2, "VM_STATE"), (3, "RESUME")]


# -- what is kept ---------------------------------------------------------------------------------------------------------


def test_the_recent_events_are_kept_and_no_more_than_asked_for(bench: Bench) -> None:
    log = bench.next_worker(keep=3)
    for _ in range(10):
        log.emit("STOP", {})
    assert [event.seq for event in log.since(Cursor(4, 0))] == [8, 9, 10]


def test_since_gives_what_is_newer_than_the_cursor_across_runs(bench: Bench) -> None:
    for _ in range(3):
        bench.log.emit("STOP", {})
    bench.log.begin_epoch(5)
    bench.log.emit("RESUME", {})
    assert [(event.epoch, event.seq) for event in bench.log.since(Cursor(4, 2))] == [(4, 3), (5, 1)]
    assert [(event.epoch, event.seq) for event in bench.log.since(Cursor(5, 0))] == [(5, 1)]
    assert list(bench.log.since(Cursor(5, 1))) == []


# -- whatever QEMU says ---------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=10,
)


@given(st.text(min_size=1, max_size=200), st.dictionaries(st.text(max_size=5), json_values, max_size=3))
def test_any_name_and_data_that_json_can_hold_go_out(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: dict[str, Any]
) -> None:
    bench = Bench(tmp_path_factory.mktemp("events") / "page")
    try:
        bench.log.begin_epoch(1)
        made = bench.log.emit(name, data, "qmp")
        assert made.seq == bench.published[-1].seq == 1
        assert unpack_map(bench.published[-1].body)["event"] == name
    finally:
        bench.page.close()


def test_a_name_of_many_bytes_goes_out_whole_in_the_body(bench: Bench) -> None:
    bench.log.emit("é" * 200, {}, "qmp")
    assert unpack_map(bench.published[-1].body)["event"] == "é" * 200
    assert bench.published[-1].op == "é" * 127


def test_of_an_event_too_large_to_pass_on_the_size_is_told(bench: Bench) -> None:
    bench.log.emit("HUGE", {"data": "x" * MAX_EVENT_BYTES}, "qmp")
    (size,) = unpack_map(bench.published[-1].body)["data"].values()
    assert size > MAX_EVENT_BYTES
    assert len(bench.published[-1].body) < 1000
    (kept,) = bench.log.since(Cursor(4, 0))
    assert kept.data == {"too_large": size}


def test_data_as_deep_as_a_line_of_json_can_be_goes_out(bench: Bench) -> None:
    deep: Any = 1
    for _ in range(900):
        deep = [deep]
    bench.log.emit("DEEP", {"deep": deep}, "qmp")
    assert bench.settled == (1, 0)
