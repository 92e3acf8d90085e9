# SPDX-License-Identifier: Apache-2.0
"""Sockets where there is no room for more: an error of the tree, and nothing is left of what was begun."""

from __future__ import annotations

import os
import resource
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from vmloop.common.errors import Busy
from vmloop.common.sockets import CLIENT_QUEUE, connect_dealer, connect_subscriber, ipc

SECONDS = 10.0


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    """One whose threads have been started, with what they need."""
    with zmq.Context() as made, made.socket(zmq.PAIR):
        yield made


@contextmanager
def free_fds(count: int) -> Iterator[None]:
    """So many further ones, and no more."""
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(count + 1)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for fd in opened:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened[-1], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def settled(count: int) -> bool:
    """Whether so many fds are open, soon: libzmq's reaper closes them in its own time."""
    until = time.monotonic() + SECONDS
    while len(os.listdir("/proc/self/fd")) != count and time.monotonic() < until:
        select.select([], [], [], 0.01)
    return len(os.listdir("/proc/self/fd")) == count


@pytest.mark.parametrize("free", [0, 1])
def test_a_dealer_without_room_is_refused_and_leaves_no_half(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path, free: int
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with free_fds(free), pytest.raises(Busy, match="Too many open files"):
        connect_dealer(context, ipc(tmp_path / "s"), CLIENT_QUEUE)
    assert settled(before)


def test_a_subscriber_without_room_is_refused(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> None:
    with free_fds(0), pytest.raises(Busy, match="raise its limit of open files"):
        connect_subscriber(context, ipc(tmp_path / "s"), [b"x"])


def test_a_context_that_has_no_room_for_another_socket_says_so_too(tmp_path: Path) -> None:
    with zmq.Context() as context:
        context.set(zmq.MAX_SOCKETS, 1)
        with context.socket(zmq.PAIR), pytest.raises(Busy):
            connect_dealer(context, ipc(tmp_path / "s"), CLIENT_QUEUE)
