# SPDX-License-Identifier: Apache-2.0
"""When a worker is made again: never before its time, never later than the maximum, and the first one at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.broker.restarts import counts_as_stable, delay_before_restart
from vmloop.common.settings import RestartSettings

SETTINGS = RestartSettings(first_delay=0.5, max_delay=6.0, stable_after=10.0)


@pytest.mark.parametrize(
    ("deaths", "delay"), [(0, 0.0), (1, 0.0), (2, 0.5), (3, 1.0), (4, 2.0), (5, 4.0), (6, 6.0), (7, 6.0), (10**9, 6.0)]
)
def test_the_delay_doubles_up_to_its_maximum(deaths: int, delay: float) -> None:
    assert delay_before_restart(deaths, SETTINGS) == delay


def test_a_maximum_below_the_first_delay_holds() -> None:
    assert delay_before_restart(2, RestartSettings(first_delay=5.0, max_delay=1.0)) == 1.0


@given(st.integers(0, 10**6), st.floats(1e-6, 86400), st.floats(1e-6, 86400))
def test_delays_never_shrink_in_a_row_and_never_pass_the_maximum(deaths: int, first: float, most: float) -> None:
    settings = RestartSettings(first_delay=first, max_delay=most)
    delay = delay_before_restart(deaths, settings)
    assert 0.0 <= delay <= delay_before_restart(deaths + 1, settings) <= most


@pytest.mark.parametrize(("lived", "stable"), [(0.0, False), (9.999, False), (10.0, True), (1e9, True)])
def test_a_worker_is_stable_from_its_time_on(lived: float, stable: bool) -> None:
    assert counts_as_stable(lived, SETTINGS) is stable
