# SPDX-License-Identifier: Apache-2.0
"""The reader of a monitor: every line once and in order however it is cut, and successors that go on wherever they were killed.

The killing is exhaustive: each scenario is run once to count its steps, and then again with a death before each of them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import socket
import zlib
from collections.abc import Iterable, Iterator
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.common.page import Word
from vmloop.worker.qmp.framing import LineReader, LineTooLong
from vmloop.worker.qmp.peeking import CHUNK_BYTES, SO_PEEK_OFF

from ..fakes.killed_worker import Bench, Killed, Published, Worker

BUFFER: Final = 212_992  # net.core.wmem_default; what the socket takes before it is full, or less


# -- what a line stands for -----------------------------------------------------------------------------------------------


def events_of(line: bytes) -> list[tuple[str, dict[str, int]]]:
    """The events that a line causes: none, one or two, as the line's length has it."""
    data = {"bytes": len(line), "crc": zlib.crc32(line)}
    return [(f"E{number}", data) for number in range(len(line) % 3)]


def emit_events(worker: Worker, line: bytes) -> None:
    for name, data in events_of(line):
        worker.events.emit(name, data, "qmp", 1)


def without_repetitions(published: Iterable[Published]) -> Iterator[Published]:
    """What a subscriber keeps: one event of a number. That a repetition is the same event again is asserted."""
    seen: dict[int, Published] = {}
    for event in published:
        first = seen.setdefault(event[0], event)
        assert first == event, "a number was given to two events"
        if first is event:
            yield event


def assert_told_exactly(bench: Bench, lines: list[bytes], deaths: int) -> None:
    """Every event once, in order, numbered from 1 without a gap; and nothing is left half done."""
    kept = list(without_repetitions(bench.published))
    assert [event for _, *event in kept] == [[name, data] for line in lines for name, data in events_of(line)]
    assert [seq for seq, *_ in kept] == list(range(1, len(kept) + 1))
    assert len(bench.published) - len(kept) <= 2 * deaths, "more was repeated than the line at hand"
    assert bench.left_over() == (0, 0, len(kept))
    assert bench.journal() == sorted(kept)
    with pytest.raises(BlockingIOError):
        bench.connection.recv(1)


def run(writes: list[bytes], lines: list[bytes], kills: list[int]) -> int:
    """Read the writes to the end with these deaths; the steps that the last worker made."""
    with Bench(emit_events, kills) as bench:
        for data in writes:
            bench.send(data)
            bench.read()
        assert bench.read_all()
        assert_told_exactly(bench, lines, len(kills))
        return bench.worker.steps.made


def written(*lines: bytes) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def pieces(data: bytes, *cuts: int) -> list[bytes]:
    bounds = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(bounds) if end > start]


# -- reading --------------------------------------------------------------------------------------------------------------


def lines_of(bench_lines: list[bytes]) -> Bench:
    return Bench(lambda _, line: bench_lines.append(line))


def test_lines_come_without_their_ends_and_in_order() -> None:
    got: list[bytes] = []
    with lines_of(got) as bench:
        bench.send(b'{"a": 1}\r\n\n{"b": 2}\n')
        assert bench.read_all()
    assert got == [b'{"a": 1}\r', b"", b'{"b": 2}']


def test_a_line_that_has_not_ended_is_not_handed_out() -> None:
    got: list[bytes] = []
    with lines_of(got) as bench:
        bench.send(b"begun")
        assert bench.read_all()
        assert got == []
        bench.send(b" and ended\n")
        assert bench.read_all()
    assert got == [b"begun and ended"]


def test_nothing_to_read_is_not_the_end() -> None:
    with lines_of([]) as bench:
        assert bench.read()
        assert bench.worker.reader.taken == 0


def test_the_end_of_the_stream_comes_after_its_last_line() -> None:
    got: list[bytes] = []
    with lines_of(got) as bench:
        bench.send(b"last\nhalf a li")
        bench.peer.close()
        assert bench.read()
        assert not bench.read()
    assert got == [b"last"]


def test_a_peer_that_closes_with_something_of_ours_unread_has_ended_too() -> None:
    got: list[bytes] = []
    with lines_of(got) as bench:
        bench.connection.send(b"never read")
        bench.send(b"last\n")
        bench.peer.close()
        assert bench.read()
        assert not bench.read()
    assert got == [b"last"]


def test_bytes_stay_in_the_socket_until_their_lines_are_dealt_with() -> None:
    with Bench(emit_events, kills=[1]) as bench:
        bench.send(b"a\nb\n")
        with pytest.raises(Killed):
            bench.worker.read()
        bench.connection.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)
        assert bench.connection.recv(100) == b"a\nb\n"


def test_a_closed_reader_hands_out_nothing_more_not_even_of_the_chunk_at_hand() -> None:
    got: list[bytes] = []

    def on_line(worker: Worker, line: bytes) -> None:
        got.append(line)
        worker.reader.close()

    with Bench(on_line) as bench:
        bench.send(b"one\ntwo\n")
        assert bench.read()
    assert got == [b"one"]


@pytest.mark.parametrize("size", [CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * BUFFER])
def test_a_line_of_any_size_comes_whole(size: int) -> None:
    got: list[bytes] = []
    line = bytes(index % 251 for index in range(size)).replace(b"\n", b"_")
    with lines_of(got) as bench:
        bench.send(written(b"before", line, b"after"))
        assert bench.read_all()
    assert got == [b"before", line, b"after"]


def test_a_line_over_the_limit_is_refused_and_nothing_of_it_is_handed_out() -> None:
    got: list[bytes] = []
    with Bench(lambda _, line: got.append(line), max_line=100_000) as bench:
        bench.send(b"fine\n" + bytes(150_000))
        with pytest.raises(LineTooLong, match="100000"):
            bench.read_all()
    assert got == [b"fine"]


def test_a_carry_file_that_cannot_be_written_is_an_error_and_loses_nothing_to_the_next_worker() -> None:
    with Bench(emit_events) as bench:
        bench.paths.carry(0).mkdir()
        bench.paths.carry(1).mkdir()
        bench.send(b"a\nbb")
        with pytest.raises(OSError, match="carry"):
            bench.worker.read()
        bench.paths.carry(0).rmdir()
        bench.paths.carry(1).rmdir()
        bench.worker.steps.allowed = 0  # and then it dies
        bench.send(b"\n")
        assert bench.read_all()
        assert_told_exactly(bench, [b"a", b"bb"], deaths=1)


def test_a_disk_that_takes_only_a_part_of_a_carry_is_an_error_too() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Bench(emit_events) as bench:
        bench.send(b"a\n" + b"b" * 10_000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(OSError, match="large"):
                bench.worker.read()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        bench.worker.steps.allowed = 0
        bench.send(b"\n")
        assert bench.read_all()
        assert_told_exactly(bench, [b"a", b"b" * 10_000], deaths=1)


def test_a_fresh_connection_forgets_what_the_page_says_of_an_older_one() -> None:
    with Bench(emit_events) as bench:
        bench.send(b"a\nhalf a line of the old connection")
        assert bench.read_all()
        bench.peer.close()
        bench.peer, connection = socket.socketpair()
        bench.connection.close()
        bench.connection = connection
        connection.setblocking(False)
        bench.worker.close()
        bench.worker = Worker(bench, bench.worker.steps)
        bench.worker.page.words[Word.PENDING] = 77
        bench.worker.reader.begin()
        bench.send(b"bb\n")
        assert bench.read_all()
        assert_told_exactly(bench, [b"a", b"bb"], deaths=0)


def test_reading_leaves_no_descriptor_open() -> None:
    with Bench(emit_events) as bench:
        before = len(os.listdir("/proc/self/fd"))
        bench.send(written(bytes(3 * CHUNK_BYTES)) + b"rest")
        bench.read_all()
        assert len(os.listdir("/proc/self/fd")) == before
        assert bench.carry_files() == ["carry.0", "carry.1"]


# -- any lines, in any pieces ---------------------------------------------------------------------------------------------

short = st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"_"))
sizes = st.sampled_from([CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, 100_000, 300_000])
huge = st.builds(lambda size, mark: bytes([mark]) * size, sizes, st.sampled_from(b"xyz"))
any_lines = st.lists(st.one_of(short, short, short, huge), max_size=12)
any_cuts = st.lists(st.integers(0, 1 << 20), max_size=12)


@given(any_lines, any_cuts)
def test_any_lines_in_any_pieces_arrive_once_and_in_order(lines: list[bytes], cuts: list[int]) -> None:
    got: list[bytes] = []
    with lines_of(got) as bench:
        for data in pieces(written(*lines), *cuts):
            bench.send(data)
            bench.read()
        assert bench.read_all()
        assert bench.left_over() == (0, 0, 0)
    assert got == lines


@given(any_lines, any_cuts, st.lists(st.integers(0, 60), max_size=8))
def test_any_lines_survive_any_deaths(lines: list[bytes], cuts: list[int], kills: list[int]) -> None:
    run(pieces(written(*lines), *cuts), lines, kills)


# -- killed at every step -------------------------------------------------------------------------------------------------

SMALL = [b"a", b"", b"bb", b"ccc", b"dddd"]
LONG = [b"a", b"B" * (CHUNK_BYTES + 7), b"bb", b"C" * (2 * CHUNK_BYTES + 2), b"D" * 100_001, b"e"]

SCENARIOS: dict[str, tuple[list[bytes], list[bytes]]] = {
    "one write": ([written(*SMALL)], SMALL),
    "a write for each line": ([written(line) for line in SMALL], SMALL),
    "byte by byte": (pieces(written(*SMALL), *range(20)), SMALL),
    "cut within lines": (pieces(written(*SMALL), 1, 4, 7, 8, 12), SMALL),
    "cut before each end": ([b"a", b"\n\nbb", b"\nccc", b"\ndddd", b"\n"], SMALL),
    "long lines in one write": ([written(*LONG)], LONG),
    "long lines in pieces": (pieces(written(*LONG), *range(0, 400_000, 50_021)), LONG),
    "the start of a line behind the end of a carried one": (pieces(written(*LONG), 10, 70_000, 140_000), LONG),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_worker_killed_at_any_step_loses_and_doubles_nothing(scenario: str) -> None:
    writes, lines = SCENARIOS[scenario]
    steps = run(writes, lines, [])
    assert steps > 10
    for allowed in range(steps):
        run(writes, lines, [allowed])


@pytest.mark.parametrize("scenario", ["cut within lines", "the start of a line behind the end of a carried one"])
def test_nor_does_one_whose_successor_is_killed_at_any_step_of_its_own(scenario: str) -> None:
    writes, lines = SCENARIOS[scenario]
    for first in range(run(writes, lines, [])):
        for second in range(16):  # all that a take-over does, and the turn after it
            run(writes, lines, [first, second])


def test_what_each_worker_says_itself_takes_no_number_of_the_line_that_was_cut() -> None:
    lines = [b"a", b"bb", b"ccccc", b"dddd"]
    for first in range(60):
        for second in (3, 8, 1000):
            with Bench(emit_events, [first, second], own_event="WORKER_LOST") as bench:
                bench.send(b"\n".join(lines) + b"\n")
                assert bench.read_all()
                told = sorted(without_repetitions(bench.published))
                assert bench.journal() == told
                assert [seq for seq, *_ in told] == list(range(1, len(told) + 1))
                own = [event for event in told if event[1] == "WORKER_LOST"]
                assert [event[1:] for event in told if event not in own] == [
                    (name, data) for line in lines for name, data in events_of(line)
                ]


def test_a_row_of_workers_that_each_make_a_few_steps_gets_through() -> None:
    writes, lines = SCENARIOS["long lines in pieces"]
    for allowed in (12, 20):
        run(writes, lines, [allowed] * 40)


def test_what_comes_between_a_death_and_the_next_worker_is_read_behind_what_was_left() -> None:
    for allowed in range(run([b"a\nbb", b"b\ncccc\n"], [b"a", b"bbb", b"cccc"], [])):
        with Bench(emit_events, [allowed]) as bench:
            bench.send(b"a\nbb")
            with contextlib.suppress(Killed):
                bench.worker.read()
            bench.send(b"b\ncccc\n")
            assert bench.read_all()
            assert_told_exactly(bench, [b"a", b"bbb", b"cccc"], deaths=1)


def test_the_peek_offset_belongs_to_the_connection_and_not_to_the_process() -> None:
    """What all this rests on: a duplicate sees how far the first one has peeked and consumed."""
    with Bench(emit_events) as bench:
        bench.send(b"abcdef")
        other = bench.connection.dup()
        assert bench.connection.recv(4, socket.MSG_PEEK) == b"abcd"
        assert other.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF) == 4
        assert other.recv(3) == b"abc"
        assert bench.connection.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF) == 1
        other.close()


def test_a_reader_is_made_without_touching_the_connection() -> None:
    with Bench(emit_events) as bench:
        steps = bench.worker.steps.made
        LineReader(bench.connection, bench.worker.page, bench.paths, bench.worker.events, 1)
        assert bench.worker.steps.made == steps
