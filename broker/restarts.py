# SPDX-License-Identifier: Apache-2.0
"""When a worker that died under its VM is made again: at once, then after a delay that doubles. Plain arithmetic; used by core.py."""

from __future__ import annotations

from ..common.settings import RestartSettings


def delay_before_restart(deaths_in_a_row: int, settings: RestartSettings) -> float:
    """Seconds to wait before the next worker, after this many deaths in a row (1: the first)."""
    if deaths_in_a_row <= 1:
        return 0.0
    doublings = min(deaths_in_a_row - 2, 32)  # beyond that the maximum is reached anyway
    return float(min(settings.first_delay * 2**doublings, settings.max_delay))


def counts_as_stable(lived: float, settings: RestartSettings) -> bool:
    """Whether a worker lived long enough for its death to start a new row."""
    return lived >= settings.stable_after
