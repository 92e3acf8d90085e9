# SPDX-License-Identifier: Apache-2.0
"""The short chaos test: some seconds of faults under thirty VMs, always the same plan. `make chaos` runs a long one."""

from __future__ import annotations

import pytest

from .report import lines
from .storm import Scenario, storm, strikes_of
from .verdict import judge

SCENARIO = Scenario(seed=35, seconds=10.0, vms=30)


@pytest.mark.timeout(180)
def test_processes_die_and_stop_and_no_event_or_answer_is_lost() -> None:
    print("\n".join(strike.describe() for strike in strikes_of(SCENARIO)))
    recording = storm(SCENARIO)
    violations = judge(recording)
    told = "\n".join(lines(recording, violations))
    print(told)
    assert not violations, told
