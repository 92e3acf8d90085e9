# SPDX-License-Identifier: Apache-2.0
"""The order of events: repetitions, gaps, losses, new runs. No sockets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from vmloop.client.stream import (
    EVENTS_LOST,
    PAGE,
    RECENT,
    Event,
    Fetch,
    Page,
    Stream,
    begin,
    checked_interest,
    event_from,
    page_of,
)
from vmloop.common.cursor import Cursor
from vmloop.common.errors import (
    BadRequest,
    Busy,
    DeadlineExceeded,
    Internal,
    NoBroker,
    NoSuchVm,
    NotRunning,
    VmloopError,
    WorkerLost,
)
from vmloop.common.names import VmName
from vmloop.common.pack import pack

from ..fakes.native_broker import event_map

WEB1 = VmName("web1")


class Shell:
    """What subscription.py does, with a list for the worker's memory."""

    def __init__(self, position: tuple[int, int] | None = None, kept: Sequence[tuple[int, int]] = ()) -> None:
        self.stream = Stream((WEB1,))
        self.stream.begin({} if position is None else {WEB1: Cursor(*position)})
        self.kept = list(kept)
        self.reachable = True
        self.error: VmloopError = NoBroker("x")
        self.fetches: list[Cursor] = []

    def arrive(self, *places: tuple[int, int]) -> list[str]:
        for epoch, seq in places:
            self.stream.arrived(pack(event_map("web1", epoch, seq)))
        return self.run()

    def run(self) -> list[str]:
        out = []
        while (step := self.stream.step()) is not None:
            if isinstance(step, Event):
                lost = f"lost after {step.data['after']} to " if step.event == EVENTS_LOST else ""
                out.append(f"{lost}{step.cursor}")
            else:
                self.fetch(step)
        return out

    def fetch(self, fetch: Fetch) -> None:
        self.fetches.append(fetch.since)
        if self.reachable:
            after = [place for place in self.kept if place > fetch.since][-(fetch.last or 10**9) :]
            self.stream.fetched(Page([event_map("web1", *place) for place in after[:PAGE]], len(after) > PAGE))
        elif self.stream.fetch_failed(self.error):
            raise self.error


def test_what_comes_in_order_is_handed_out_without_a_question() -> None:
    shell = Shell((1, 2))
    assert shell.arrive((1, 3), (1, 4)) == ["1.3", "1.4"]
    assert shell.fetches == []


def test_repetitions_are_dropped() -> None:
    shell = Shell((1, 2))
    assert shell.arrive((1, 1), (1, 2), (1, 3), (1, 3), (1, 2), (1, 4)) == ["1.3", "1.4"]


def test_a_gap_is_filled_in_its_place() -> None:
    shell = Shell((1, 2), kept=[(1, seq) for seq in range(1, 9)])
    assert shell.arrive((1, 6), (1, 7)) == ["1.3", "1.4", "1.5", "1.6", "1.7", "1.8"]
    assert shell.fetches == [Cursor(1, 2)]
    assert shell.arrive((1, 8), (1, 9)) == ["1.9"]


def test_what_nobody_has_is_marked_with_its_span() -> None:
    shell = Shell((1, 2), kept=[(1, 5), (1, 6)])
    assert shell.arrive((1, 6)) == ["lost after 1.2 to 1.4", "1.5", "1.6"]
    assert shell.arrive((1, 9)) == ["lost after 1.6 to 1.8", "1.9"]


@pytest.mark.parametrize("error", [NoBroker("x"), WorkerLost("x"), DeadlineExceeded("x"), Busy("x"), Internal("x")])
def test_a_journal_that_cannot_be_asked_now_loses_nothing(error: VmloopError) -> None:
    shell = Shell((1, 2), kept=[(1, seq) for seq in range(1, 9)])
    shell.reachable, shell.error = False, error
    for _ in range(3):
        with pytest.raises(type(error)):
            shell.arrive((1, 6))
    shell.reachable = True
    assert shell.run() == ["1.3", "1.4", "1.5", "1.6", "1.7", "1.8"]


def test_a_vm_that_is_no_more_has_no_journal_to_wait_for() -> None:
    shell = Shell((1, 2))
    shell.reachable, shell.error = False, NoSuchVm("x")
    assert shell.arrive((1, 6)) == ["lost after 1.2 to 1.5", "1.6"]


def test_the_past_of_all_vms_is_that_of_those_that_have_a_worker() -> None:
    stream = Stream(())
    begin(stream, (), None, True, {"web1": Cursor(1, 5), "off": Cursor(3, 9)}, {"web1"})
    fetch = stream.step()
    assert fetch == Fetch(WEB1, Cursor(0, 0), RECENT)
    stream.fetched(Page([], False))
    assert stream.step() is None


def test_a_page_says_whether_there_are_more() -> None:
    assert page_of([1], {"more": True}).more
    assert not page_of([1] * PAGE, {"more": False}).more
    assert page_of([1] * PAGE, {"count": PAGE}).more  # a worker that does not say so
    assert not page_of([1], None).more


def test_a_new_run_asks_for_the_end_of_the_last_one() -> None:
    shell = Shell((1, 2), kept=[(1, 3), (2, 1), (2, 2)])
    assert shell.arrive((2, 1), (2, 2)) == ["1.3", "2.1", "2.2"]
    shell = Shell((1, 2))
    assert shell.arrive((2, 1)) == ["2.1"]  # nobody knows of anything missing
    shell = Shell((1, 2))
    assert shell.arrive((2, 3)) == ["lost after 1.2 to 2.2", "2.3"]


def test_a_vm_that_was_not_there_begins_with_its_first_event() -> None:
    shell = Shell(kept=[(4, 1), (4, 2)])
    assert shell.arrive((4, 2)) == ["4.1", "4.2"]
    assert shell.fetches == [Cursor(4, 0)]


def test_a_vm_whose_runs_are_numbered_anew_is_noticed_by_the_second_check() -> None:
    shell = Shell((7, 9), kept=[(1, 1), (1, 2)])
    assert shell.arrive((1, 1)) == []
    assert shell.stream.check_wanted
    shell.stream.known({"web1": Cursor(1, 2)})
    assert shell.run() == []
    shell.stream.known({"web1": Cursor(1, 2)})
    assert shell.run() == ["1.1", "1.2"]


@pytest.mark.parametrize("before", [(0, 0), (1, 2)])
def test_an_answer_that_is_older_than_the_events_hands_nothing_out_again(before: tuple[int, int]) -> None:
    now = (before[0] + 1, 1)
    shell = Shell(before, kept=sorted({(1, 1), before, now} - {(0, 0)}))
    assert shell.arrive(now) == [f"{now[0]}.1"]
    shell.stream.known({"web1": Cursor(*before)})
    assert shell.run() == []
    shell.stream.known({"web1": Cursor(*now)})
    assert shell.run() == []


def test_a_check_finds_what_pub_dropped_before_a_silence() -> None:
    shell = Shell((1, 2), kept=[(1, 3), (1, 4)])
    shell.stream.known({"web1": Cursor(1, 4), "other": Cursor(9, 9)})
    assert shell.run() == ["1.3", "1.4"]
    shell.stream.known({"web1": Cursor(1, 4)})
    assert shell.run() == []
    assert len(shell.fetches) == 1


def test_a_check_that_nobody_can_satisfy_marks_the_loss_once() -> None:
    shell = Shell((1, 2), kept=[(1, 3)])
    shell.stream.known({"web1": Cursor(1, 5)})
    assert shell.run() == ["1.3", "lost after 1.3 to 1.5"]
    shell.stream.known({"web1": Cursor(1, 5)})
    assert shell.run() == []


def test_a_check_whose_fetch_fails_is_left_to_the_next_one() -> None:
    shell = Shell((1, 2), kept=[(1, 3)])
    shell.reachable = False
    shell.stream.known({"web1": Cursor(1, 3)})
    assert shell.run() == []
    shell.reachable = True
    shell.stream.known({"web1": Cursor(1, 3)})
    assert shell.run() == ["1.3"]


def test_a_long_past_is_fetched_a_page_at_a_time() -> None:
    shell = Shell(kept=[(1, seq) for seq in range(1, 2 * PAGE + 3)])
    begin(shell.stream, (WEB1,), Cursor(1, 1), False, {}, set())
    assert shell.run() == [f"1.{seq}" for seq in range(2, 2 * PAGE + 3)]
    assert len(shell.fetches) == 3


def test_recent_events_begin_where_the_memory_begins() -> None:
    shell = Shell((1, 9), kept=[(1, 7), (1, 8), (1, 9)])
    begin(shell.stream, (WEB1,), None, True, {"web1": Cursor(1, 9)}, set())
    assert shell.run() == ["1.7", "1.8", "1.9"]


def test_a_worker_that_answers_nonsense_does_not_hang_or_break_the_stream() -> None:
    nonsense: list[list[Any]] = [[None] * PAGE, [{}] * PAGE, [event_map("other", 1, 1)] * PAGE, [b"\xff"]]
    for parts in nonsense:
        stream = Stream((WEB1,))
        begin(stream, (WEB1,), Cursor(1, 0), False, {}, set())
        assert isinstance(stream.step(), Fetch)
        stream.fetched(Page(parts, more=True))
        assert stream.step() is None


def test_malformed_and_foreign_messages_are_dropped() -> None:
    stream = Stream((WEB1,))
    for body in (b"", b"\xc1", pack(5), pack({"event": 5}), pack(event_map("web10", 1, 1))):
        stream.arrived(body)
    assert stream.step() is None


def test_events_of_the_host_have_no_place_and_pass() -> None:
    stream = Stream(())
    stream.arrived(pack({"event": "VM_DEFINED", "data": {"name": "x"}, "new": 1}))
    stream.arrived(pack({"event": "WORKER_LOST", "vm": "web1"}))
    steps = [stream.step(), stream.step()]
    assert [step.event for step in steps if isinstance(step, Event)] == ["VM_DEFINED", "WORKER_LOST"]


def test_only_a_past_that_was_asked_for_by_name_can_fail() -> None:
    asked, followed = Stream((WEB1,)), Stream((WEB1,))
    asked.replay(WEB1, Cursor(0, 0))
    fetch = asked.step()
    assert isinstance(fetch, Fetch)
    assert asked.refuses(fetch, NoSuchVm("x"))
    assert not asked.refuses(fetch, NotRunning("x"))
    assert not followed.refuses(fetch, NoSuchVm("x"))


def test_a_cursor_belongs_to_one_vm() -> None:
    assert checked_interest(("a",), "1.2") == (("a",), Cursor(1, 2))
    for names, since in (((), "1.2"), (("a", "b"), Cursor(1, 2)), (("a",), "x"), (("../a",), None)):
        with pytest.raises(BadRequest):
            checked_interest(names, since)


def test_an_event_ignores_what_a_newer_worker_adds() -> None:
    event = event_from({**event_map("web1", 1, 2), "colour": "red"})
    assert event is not None
    assert (event.vm, event.cursor, event.event, event.origin) == ("web1", Cursor(1, 2), "STOP", "qmp")
