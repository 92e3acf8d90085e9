# SPDX-License-Identifier: Apache-2.0
"""An end that is gone is an end, however it went; what makes no sense is named in the log."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from vmloop.broker.packets import PacketEnd, PacketPoll


@pytest.fixture
def lost() -> list[str]:
    return []


@pytest.fixture
def other(lost: list[str]) -> Iterator[tuple[PacketPoll, socket.socket]]:
    """A poll with one end, and the socket at the other end of that."""
    mine, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with closing(PacketPoll()) as poll, peer:
        end = PacketEnd(mine)

        def on_lost() -> None:
            lost.append("lost")
            poll.close_end(end)

        poll.add(end, lambda packet, fds: None, on_lost)
        yield poll, peer


@pytest.mark.parametrize("reset", [False, True])
def test_an_end_that_is_gone_is_told_of_and_no_error(
    other: tuple[PacketPoll, socket.socket], lost: list[str], reset: bool, caplog: pytest.LogCaptureFixture
) -> None:
    poll, peer = other
    if reset:  # the kernel resets where something was left unread
        next(iter(poll._ends.values()))[0].socket.send(b"unread")
    peer.close()
    poll.turn()
    assert lost == ["lost"]
    assert not caplog.records


def test_an_end_that_talks_nonsense_is_lost_and_named(
    other: tuple[PacketPoll, socket.socket], lost: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    poll, peer = other
    peer.send(b"\xc1")
    poll.turn()
    assert lost == ["lost"]
    assert [record.levelname for record in caplog.records] == ["ERROR"]
