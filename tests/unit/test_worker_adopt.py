# SPDX-License-Identifier: Apache-2.0
"""A monitor that many wait for: `attach` takes its turn, and says so if that does not come."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vmloop.common.errors import MonitorLost
from vmloop.worker.qemu.adopt import BUSY_LOOK, MonitorBusy, connect_in_turn

SECONDS = 10.0


@pytest.fixture
def full(tmp_path: Path) -> Iterator[socket.socket]:
    """A listening socket whose backlog is full, as that of a QEMU that does not run; at `tmp_path / "qmp"`."""
    with ExitStack() as opened:
        listener = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.setblocking(False)
        listener.bind(str(tmp_path / "qmp"))
        listener.listen(1)
        while True:
            waiting = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            waiting.setblocking(False)
            try:
                waiting.connect(str(tmp_path / "qmp"))
            except BlockingIOError:
                break
        yield listener


def test_it_is_connected_as_soon_as_one_of_those_that_wait_was_taken(full: socket.socket, tmp_path: Path) -> None:
    async def scene() -> None:
        task = asyncio.create_task(connect_in_turn(str(tmp_path / "qmp"), SECONDS))
        await asyncio.sleep(0)
        assert not task.done()
        full.accept()[0].close()
        (await task).close()

    asyncio.run(scene())


def test_a_monitor_that_stays_busy_is_given_up_in_time(full: socket.socket, tmp_path: Path) -> None:
    with pytest.raises(MonitorBusy, match="another client is connected"):
        asyncio.run(connect_in_turn(str(tmp_path / "qmp"), 3 * BUSY_LOOK))


def test_a_deadline_that_is_over_allows_one_try(full: socket.socket, tmp_path: Path) -> None:
    with pytest.raises(MonitorBusy):
        asyncio.run(connect_in_turn(str(tmp_path / "qmp"), -1.0))


def test_where_nobody_listens_nobody_waits(full: socket.socket, tmp_path: Path) -> None:
    full.close()
    with pytest.raises(MonitorLost, match="is QEMU running") as raised:
        asyncio.run(connect_in_turn(str(tmp_path / "qmp"), SECONDS))
    assert not isinstance(raised.value, MonitorBusy)
