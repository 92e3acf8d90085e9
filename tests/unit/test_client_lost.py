# SPDX-License-Identifier: Apache-2.0
"""A connection that its program forgets without closing it: the garbage collector does not wait for it, and nothing of it stays."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from vmloop.client import aio, connect

from ..fakes.native_broker import NativeBroker, event_map

SECONDS: Final = 20.0


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[NativeBroker]:
    with NativeBroker(tmp_path) as broker:
        broker.answer_with("vmloop", "ping", {"time": 1.0})
        broker.serve_events("web1", [event_map("web1", 1, 1)])
        yield broker


def blocking(endpoint: str) -> None:
    connect(endpoint).ping()


def blocking_with_a_stream(endpoint: str) -> None:
    host = connect(endpoint)
    host.ping()
    host.vm("web1").events()


def on_a_loop_that_is_closed(endpoint: str) -> None:
    async def use() -> aio.Host:
        host = await aio.connect(endpoint)
        await host.ping()
        await host.vm("web1").events().__aenter__()
        return host

    loop = asyncio.new_event_loop()
    loop.run_until_complete(use())
    loop.close()


@pytest.mark.timeout(60)  # the collector would wait for ever
@pytest.mark.parametrize("use", [blocking, blocking_with_a_stream, on_a_loop_that_is_closed])
def test_a_lost_connection_is_told_of_and_ended(broker: NativeBroker, use: Callable[[str], None]) -> None:
    gc.collect()
    before = set(threading.enumerate())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        use(broker.endpoint)
        gc.collect()
    assert "a connection to a vmloop broker was not closed" in {str(warning.message) for warning in told}
    for thread in set(threading.enumerate()) - before:
        thread.join(SECONDS)
        assert not thread.is_alive()
