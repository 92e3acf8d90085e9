# SPDX-License-Identifier: Apache-2.0
"""worker/agent/lines.py: any bytes in any pieces, in bounded memory; and the allowance for what nobody asked for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmloop.worker.agent.lines import RESUME_AT, SHARE, Allowance, Lines

noisy = st.lists(st.sampled_from([b"\n", b"\xff", b"a", b'{"return": 1}', b"bb", b"\xff\xff", b"\x00"])).map(b"".join)


def by_hand(data: bytes, limit: int) -> list[bytes]:
    """What should come out."""
    lines = [line.rpartition(b"\xff")[2] for line in data.split(b"\n")[:-1]]
    return [line for line in lines if line and len(line) <= limit]


@given(noisy | st.binary(max_size=200), st.lists(st.integers(1, 30)), st.integers(1, 40))
def test_any_chunking_gives_the_same_lines(data: bytes, cuts: list[int], limit: int) -> None:
    lines = Lines(limit)
    got: list[bytes] = []
    at = 0
    for cut in [*cuts, len(data)]:
        got += lines.feed(data[at : at + cut])
        at += cut
        assert lines.held <= limit
    assert got == by_hand(data, limit)


def test_a_long_line_is_dropped_to_its_end_and_counted_once() -> None:
    lines = Lines(1 << 16)
    for _ in range(320):
        assert lines.feed(b"x" * 65536) == []
        assert lines.held <= 1 << 16
    assert lines.feed(b"tail\nnext\n") == [b"next"]
    assert lines.too_long == 1


def test_the_delimiter_ends_a_line_that_is_too_long() -> None:
    lines = Lines(10)
    assert lines.feed(b"x" * 100) == []
    assert lines.feed(b"\xffshort\n") == [b"short"]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.01)), max_size=60))
def test_the_allowance_is_never_overspent(steps: list[tuple[float, float]]) -> None:
    allowance = Allowance(0.0, max_reply=1)
    now = spent = 0.0
    for wait, cost in steps:
        now += wait
        if allowance.spend(0.0, now):
            allowance.spend(cost, now)
            spent += cost
    assert spent <= allowance.capacity + SHARE * now + 0.01


def test_an_empty_allowance_says_when_to_go_on() -> None:
    allowance = Allowance(0.0, max_reply=1)
    assert not allowance.spend(allowance.capacity, 0.0)
    pause = allowance.pause(0.0)
    assert abs(pause - allowance.capacity * RESUME_AT / SHARE) < 1e-6
    assert allowance.spend(0.0, pause)
