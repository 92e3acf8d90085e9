# SPDX-License-Identifier: Apache-2.0
"""What a worker hands the zygote: nothing that has ended, and all that lives to one that is slow to take it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmloop.common.names import VmName
from vmloop.common.zygote_wire import Drop, Keep, Packet, Watch, receive_packet
from vmloop.worker.entry import _connection
from vmloop.worker.keeper import Keeper

SECONDS = 15.0


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """Where the zygote is looked for; it takes no calls yet."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as bound:
        bound.bind(os.fspath(tmp_path / "zygote.sock"))
        bound.setblocking(False)
        yield bound


async def caller(listener: socket.socket) -> socket.socket:
    """The next one that calls the zygote."""
    connection, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(listener), SECONDS)
    connection.settimeout(SECONDS)
    return connection


def heard(connection: socket.socket) -> tuple[Packet | None, int]:
    """What the caller says next, and how many fds come beside it."""
    packet, fds = receive_packet(connection)
    for fd in fds:
        os.close(fd)
    return packet, len(fds)


def test_a_connection_that_has_ended_is_not_handed_to_another_zygote_under_its_old_number(
    listener: socket.socket, tmp_path: Path
) -> None:
    async def run() -> None:
        listener.listen()
        keeper = Keeper(tmp_path / "zygote.sock", VmName("web1"))
        mine, peer = socket.socketpair()
        number = mine.fileno()
        keeper.keep("monitor", number)
        with await caller(listener) as first:
            assert heard(first) == (Keep("web1", "monitor"), 1)
            keeper.release("monitor")
            assert heard(first) == (Drop("web1", "monitor"), 0)
        mine.close()
        os.dup2(peer.fileno(), number)  # whatever is opened next gets the number
        keeper.keep_again()
        keeper.keep("agent", peer.fileno())
        with await caller(listener) as second:
            assert heard(second) == (Keep("web1", "agent"), 1), "and nothing before it"
        os.close(number)
        peer.close()
        keeper.close()

    asyncio.run(run())


@pytest.mark.parametrize("own", [True, False])
def test_a_zygote_that_takes_no_calls_yet_hears_of_the_qemu_as_soon_as_it_does(
    listener: socket.socket, tmp_path: Path, own: bool
) -> None:
    async def run() -> None:
        keeper = Keeper(tmp_path / "zygote.sock", VmName("web1"))
        keeper.follow(4711, own=own)
        keeper.keep_again()
        for _ in range(2):
            await asyncio.sleep(0)  # it has tried
        listener.listen()
        with await caller(listener) as calling:
            assert heard(calling) == (Watch("web1", 4711), 0)
            await asyncio.wait_for(asyncio.gather(*keeper._tasks), SECONDS)
            assert len(keeper.filenos()) == (0 if own else 1), "it hears how somebody else's child ends"
        keeper.close()

    asyncio.run(run())


@pytest.mark.parametrize("what", ["a file", "packets", "another family"])
def test_what_was_kept_and_is_no_connection_is_closed_and_costs_no_worker(what: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    if what == "a file":
        fd = os.open(os.devnull, os.O_RDONLY)
    elif what == "packets":
        fd = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).detach()
    else:
        fd = socket.socket(socket.AF_INET, socket.SOCK_STREAM).detach()
    assert _connection("monitor", fd) is None
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_connection_that_was_kept_is_taken_over() -> None:
    mine, peer = socket.socketpair()
    with peer:
        taken = _connection("monitor", mine.detach())
        assert taken is not None
        with taken:
            taken.send(b"x")
            assert peer.recv(1) == b"x"
