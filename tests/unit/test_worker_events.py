# SPDX-License-Identifier: Apache-2.0
"""The stream of a VM's events: numbers without gaps, across workers too; who listens; what is kept; and that no data can break it."""

from __future__ import annotations

import contextlib
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
from vmloop.worker.events import MAX_EVENT_BYTES, Event, EventLog, LineChange
from vmloop.worker.journal.store import EventStore

NAME = VmName("web1")
DONE_MASK = (1 << 24) - 1


class Bench:
    """A page, and the logs of one worker after another on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.page = Page(path, writable=True)
        self.published: list[Message] = []
        self.store = EventStore(path.with_name("journal"))
        self.log = self._make_log()

    def next_worker(self) -> EventLog:
        """The one before was killed; its successor has begun."""
        self.store.close()
        self.store = EventStore(self.path.with_name("journal"))
        self.log = self._make_log()
        self.log.tell_of_predecessor()
        return self.log

    def _make_log(self) -> EventLog:
        return EventLog(NAME, self.page, lambda frame: self.published.append(decode(frame)), self.store)

    def close(self) -> None:
        self.store.close()
        self.page.close()

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
    bench.close()


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
    assert bench.published == []
    assert bench.log.cursor == Cursor(4, 0)  # what an answer may promise
    bench.log.end_line(100)
    assert bench.settled == (2, 100)
    assert [message.op for message in bench.published] == ["STOP", "VM_STATE"]
    assert bench.log.cursor == Cursor(4, 2)
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
    assert [message.seq for message in bench.published] == [1, 2]
    assert bench.settled == (2, 30)


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


# -- killed between the journal and the page ---------------------------------------------------------------------------------


class Death(Exception):
    """The worker ends here."""


class Dies(LineChange):
    """A change of the page during which the worker ends."""

    def effect(self) -> None:
        raise Death


def test_a_line_that_is_in_the_journal_and_not_on_the_page_is_settled_and_told_by_the_next_worker(bench: Bench) -> None:
    bench.log.emit("RESUME", {})
    bench.log.begin_line()
    bench.log.emit("STOP", {}, "qmp")
    bench.log.emit("VM_STATE", {"new": "paused"})
    bench.log.with_line(Dies())
    with pytest.raises(Death):
        bench.log.end_line(77)
    assert bench.settled == (1, 0)
    log = bench.next_worker()
    assert bench.settled == (3, 77)
    assert [event.event for event in log.unsettled] == ["STOP", "VM_STATE"]
    assert [message.op for message in bench.published] == ["RESUME", "STOP", "VM_STATE"]
    assert log.emit("WORKER_LOST", {}).seq == 4


def test_an_event_of_no_line_that_is_in_the_journal_alone_leaves_the_bytes_where_they_were(bench: Bench) -> None:
    bench.log.begin_line()
    bench.log.end_line(60)
    with contextlib.suppress(Death), bench.log.together():
        bench.log.emit("VM_STATE", {})
        bench.log.with_line(Dies())
    bench.next_worker()
    assert bench.settled == (1, 60)


def test_what_was_told_is_not_told_again_but_for_the_newest(bench: Bench) -> None:
    for _ in range(3):
        bench.log.emit("STOP", {})
    bench.page.words[Word.TOLD] = 2  # killed between the publishing and the note
    log = bench.next_worker()
    assert [message.seq for message in bench.published] == [1, 2, 3, 3]
    assert log.unheard == Cursor(4, 2)


def test_changes_of_a_line_come_in_their_order_around_its_settling(bench: Bench) -> None:
    steps: list[tuple[str, int]] = []

    class Change(LineChange):
        def prepare(self, progress: int) -> None:
            steps.append(("prepare", bench.settled[0]))
            assert progress == 1 << 24 | 9

        def effect(self) -> None:
            steps.append(("effect", bench.settled[0]))
            assert [event.seq for event in bench.log.since(Cursor(4, 0))] == [1]

        def afterwards(self) -> None:
            steps.append(("afterwards", bench.settled[0]))

    bench.log.begin_line()
    bench.log.emit("STOP", {})
    bench.log.with_line(Change())
    bench.log.end_line(9)
    assert steps == [("prepare", 0), ("effect", 0), ("afterwards", 1)]


def test_a_new_run_whose_beginning_was_cut_short_is_begun_by_the_next_worker(bench: Bench) -> None:
    bench.log.emit("STOP", {})
    bench.page.words[Word.NEXT_EPOCH] = 5
    log = bench.next_worker()
    assert log.cursor == Cursor(5, 0)
    assert log.emit("RESUME", {}).seq == 1


# -- a disk that takes nothing ------------------------------------------------------------------------------------------------


class Refusing(EventStore):
    """A store whose disk can be made to refuse."""

    refuses = False

    def _write(self, batch: Any) -> bool:
        if self.refuses:
            self._refused("cannot be written", OSError(28, "No space left on device"))
            return False
        return super()._write(batch)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Bench]:
    """A bench whose disk is full from now on."""
    bench = Bench(tmp_path / "page")
    bench.store.close()
    bench.store = Refusing(tmp_path / "journal", clock=lambda: bench.page.words[Word.WAKEUPS] * 1.0)
    bench.log = bench._make_log()
    bench.log.begin_epoch(4)
    bench.log.emit("STOP", {})
    bench.store.refuses = True
    yield bench
    bench.close()


def test_events_that_are_not_on_the_disk_are_marked_and_can_be_read_all_the_same(full: Bench) -> None:
    troubles: list[str] = []
    full.log.on_trouble = troubles.append
    full.log.emit("RESUME", {})
    assert [unpack_map(message.body).get("journalled", True) for message in full.published] == [True, False]
    assert [event.seq for event in full.log.since(Cursor(4, 0))] == [1, 2]
    assert len(troubles) == 1
    assert "No space left" in troubles[0]


def test_they_are_written_when_the_disk_takes_them_again(full: Bench) -> None:
    troubles: list[str] = []
    full.log.on_trouble = troubles.append
    full.log.emit("RESUME", {})
    full.store.refuses = False  # type: ignore[attr-defined]
    full.page.words[Word.WAKEUPS] = 1000  # time passes
    full.log.retry()
    assert troubles[-1] == ""
    log = full.next_worker()
    assert [event.event for event in log.since(Cursor(4, 0))] == ["STOP", "RESUME"]


def test_those_that_their_worker_took_with_it_are_told_as_lost(full: Bench) -> None:
    full.log.emit("RESUME", {})
    full.log.emit("STOP", {})
    full.store._backlog.clear()  # killed
    log = full.next_worker()
    lost = [event for event in log.since(Cursor(4, 0)) if event.event == "JOURNAL_TRUNCATED"]
    assert [(event.seq, event.data["first"], event.data["last"]) for event in lost] == [(4, "4.2", "4.3")]


def test_a_disk_that_stays_full_longer_than_the_memory_lasts_is_told_once_when_it_is_back(full: Bench) -> None:
    full.store._backlog_limit = 20_000
    for _ in range(400):
        full.log.emit("E", {})
    assert full.store.waiting < 100
    assert {message.op for message in full.published} == {"STOP", "E"}
    full.store.refuses = False  # type: ignore[attr-defined]
    full.page.words[Word.WAKEUPS] = 1000
    full.log.retry()
    told = [event for event in full.log.since(Cursor(0, 0)) if event.event == "JOURNAL_TRUNCATED"]
    kept = [event.seq for event in full.log.since(Cursor(0, 0)) if event.event == "E"]
    assert [(event.data["first"], event.data["last"]) for event in told] == [("4.2", f"4.{kept[0] - 1}")]
    assert kept == list(range(kept[0], 402))


def test_the_end_of_a_run_that_was_not_written_down_is_told_as_lost_before_the_next_run(full: Bench) -> None:
    full.log.emit("SHUTDOWN", {}, "qmp")
    full.store._backlog.clear()
    log = full.next_worker()
    log.begin_epoch(5)
    log.emit("WORKER_STARTED", {})
    names = [(str(event.cursor), event.event) for event in log.since(Cursor(0, 0))]
    assert names == [("4.1", "STOP"), ("4.3", "JOURNAL_TRUNCATED"), ("5.1", "WORKER_STARTED")]


def test_a_run_of_which_nothing_was_written_down_is_told_as_lost(full: Bench) -> None:
    full.log.begin_epoch(5)
    full.log.emit("WORKER_STARTED", {})
    full.store._backlog.clear()
    log = full.next_worker()
    lost = [event for event in log.since(Cursor(0, 0)) if event.event == "JOURNAL_TRUNCATED"]
    assert [(str(event.cursor), event.data["first"], event.data["last"]) for event in lost] == [("5.2", "5.1", "5.1")]


def test_on_a_new_page_the_journal_says_how_far_the_events_go(bench: Bench, tmp_path: Path) -> None:
    """After a reboot: a cursor of nothing would have every client fetch what it has had."""
    bench.log.emit("STOP", {})
    bench.store.close()
    page = Page(tmp_path / "next", writable=True)
    bench.store = EventStore(tmp_path / "journal")
    log = EventLog(NAME, page, lambda _: None, bench.store)
    assert log.cursor == Cursor(4, 1)
    log.tell_of_predecessor()
    assert log.cursor == Cursor(4, 1)
    log.begin_epoch(5)
    assert log.cursor == Cursor(5, 0)
    page.close()


def test_the_largest_chunk_and_large_numbers_fit_beside_each_other(bench: Bench) -> None:
    bench.page.words[Word.PROGRESS] = ((1 << 40) - 3) << 24
    log = bench.next_worker()  # which tells that nothing of this is in the journal
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


def test_the_newest_events_are_kept_and_what_was_dropped_is_told(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "page")
    bench.store.close()
    bench.store = EventStore(tmp_path / "journal", 64 * 1024, segment=8 * 1024)
    bench.log = bench._make_log()
    bench.log.begin_epoch(4)
    try:
        for _ in range(1000):
            bench.log.emit("STOP", {})
        kept = list(bench.log.since(Cursor(4, 0)))
        assert [event.seq for event in kept] == list(range(kept[0].seq, kept[-1].seq + 1))
        dropped = [event.data for event in kept if event.event == "JOURNAL_TRUNCATED"]
        assert dropped[-1]["last"] == f"4.{kept[0].seq - 1}"
    finally:
        bench.close()


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
        bench.close()


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
