# SPDX-License-Identifier: Apache-2.0
"""One line of the bench's table, and how times stand in it."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One line. `limit` is what the design asks for, if it asks."""

    what: str
    figure: str
    limit: str = ""


def percentile(times: list[float], percent: int) -> float:
    """Of times in any order, in their own unit."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def times_text(times: list[float]) -> str:
    """p50 / p99 of seconds, in microseconds."""
    return f"{percentile(times, 50) * 1e6:.0f} / {percentile(times, 99) * 1e6:.0f}"
