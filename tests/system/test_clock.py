# SPDX-License-Identifier: Apache-2.0
"""The wall clock jumps by hours, both ways, under a running vmloop: nothing but what people read takes notice.

Deadlines, ages, delays, the status page and locks go by the monotonic clock. Wall-clock time is in events, logs, `since` and run.json, and
begins the broker's numbers of requests, which only have to differ from those of the broker before: a jump back of the very nanoseconds
would be needed. A worker's stack file goes by its age in wall-clock time: after a jump a stack may be left out of WORKER_LOST, no more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmloop.client.session import Host

from ..conftest import require_binary
from .site import Site, kill_process

LIBRARY = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"
SECONDS = 10.0


class Clock:
    """The wall clock of what is started under it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.set(0)

    def set(self, hours: float) -> None:
        """So far from the true time, from now on."""
        new = self.path.with_suffix(".new")
        new.write_text(f"{hours * 3600:+.0f}\n")
        new.rename(self.path)


@pytest.fixture
def clock(tmp_path: Path) -> Iterator[Clock]:
    require_binary("faketime")
    if not Path(LIBRARY).exists():
        pytest.skip(f"{LIBRARY} is not there")
    made = Clock(tmp_path / "clock")
    wanted = {
        "LD_PRELOAD": LIBRARY,
        "FAKETIME_TIMESTAMP_FILE": str(made.path),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DONT_RESET": "1",
    }
    os.environ.update(wanted)
    try:
        yield made
    finally:
        for name in wanted:
            del os.environ[name]


@pytest.fixture
def jumping(clock: Clock) -> Iterator[tuple[Site, Host, Clock]]:
    site = Site("")
    try:
        site.start_broker()
        yield site, site.host(), clock
    finally:
        clock.set(0)
        site.close()


def test_a_clock_that_jumps_both_ways_disturbs_nothing(jumping: tuple[Site, Host, Clock]) -> None:
    site, host, clock = jumping
    site.define(host, "odd")
    host.vm("odd").start()
    first = host.vm("odd").show()
    times: list[int] = []
    with host.events("odd") as events:
        for hours in (0, 6, -12, 30, -30):
            clock.set(hours)
            assert host.vm("odd").qmp("query-status", timeout=SECONDS)["status"] == "running"
            host.vm("odd").pause()
            times.append(events.wait_for("STOP", SECONDS).time)
            host.vm("odd").resume()
            shown = host.vm("odd").show()
            assert (shown.pid, shown.worker_pid, shown.state) == (first.pid, first.worker_pid, "running")
            assert host.list()[0].blocked == 0
    assert times[2] < times[0] < times[1] < times[3]  # so it did jump
    before = host.vm("odd").show().worker_pid
    assert before is not None
    kill_process(before)
    assert host.vm("odd").qmp("query-status", timeout=SECONDS)["status"] == "running"
    assert host.vm("odd").show().pid == first.pid
    clock.set(5)
    site.kill_broker()
    site.start_broker()
    clock.set(-5)
    again = site.host()
    assert again.vm("odd").qmp("query-status", timeout=SECONDS)["status"] == "running"
    assert again.vm("odd").kill().state == "shutoff"
