# SPDX-License-Identifier: Apache-2.0
"""What the zygote tells of itself, of what it keeps and of orphans, and how it makes way for another one."""

from __future__ import annotations

import os
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmloop import __version__
from vmloop.broker.zygote import Peer, Zygote
from vmloop.common.names import VmName
from vmloop.common.process import identify
from vmloop.common.zygote_wire import (
    Drop,
    Dropped,
    Exited,
    Hello,
    Keep,
    Kept,
    Retire,
    Tell,
    Told,
    receive_packet,
    send_packet,
)
from vmloop.worker.orphan import Orphan

from ..fakes.zygote_process import SECONDS, Root, ZygoteProcess, expect, readable


@pytest.fixture
def zygote() -> Iterator[ZygoteProcess]:
    with ZygoteProcess() as started:
        yield started


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A VM's connection: the worker's end, and the peer's, which sees when nobody has the other any more."""
    mine, peer = socket.socketpair()
    with mine, peer:
        yield mine, peer


def keep(connection: socket.socket, end: socket.socket, vm: str = "web1", slot: str = "monitor") -> None:
    send_packet(connection, Keep(vm, slot), [end.fileno()])
    end.close()


# -- who it is, and what it keeps -------------------------------------------------------------------------------------------


def test_a_greeting_is_answered_with_version_and_process(zygote: ZygoteProcess) -> None:
    broker = zygote.connect()
    send_packet(broker, Hello("0.0.1"))
    identity = identify(zygote.child.pid)
    assert expect(broker, Hello) == Hello(__version__, identity.pid, identity.started)


def told(connection: socket.socket) -> list[tuple[str, str]]:
    """What the zygote tells that it keeps, until it has told all; the fds are closed."""
    found: list[tuple[str, str]] = []
    while True:
        packet, fds = receive_packet(connection)
        for fd in fds:
            os.close(fd)
        if isinstance(packet, Told):
            return found
        assert isinstance(packet, Kept)
        assert len(fds) == 1
        found.append((packet.vm, packet.slot))


def test_who_asks_is_told_of_all_that_is_kept_and_of_every_change(zygote: ZygoteProcess) -> None:
    worker, broker, stranger = zygote.connect(), zygote.connect(), zygote.connect()
    pairs = [socket.socketpair() for _ in range(3)]
    keep(worker, pairs[0][0], "web1", "monitor")
    keep(worker, pairs[1][0], "web1", "agent")
    assert zygote.lives_after(worker)
    send_packet(broker, Tell())
    assert told(broker) == [("web1", "monitor"), ("web1", "agent")]
    keep(worker, pairs[2][0], "web2", "monitor")
    packet, [fd] = receive_packet(broker)
    assert packet == Kept("web2", "monitor")
    pairs[2][1].send(b"to whoever has it")
    assert os.read(fd, 100) == b"to whoever has it"
    os.close(fd)
    send_packet(worker, Drop("web1", "agent"))
    assert expect(broker, Dropped) == Dropped("web1", "agent")
    send_packet(worker, Drop("web1"))
    assert expect(broker, Dropped) == Dropped("web1")
    send_packet(worker, Drop("web1"))
    assert zygote.lives_after(worker)
    assert not readable(broker, 0), "nothing was dropped that was not kept"
    assert not readable(stranger, 0)
    for _, peer in pairs:
        peer.close()


def test_a_spare_connection_is_kept_only_where_there_is_none(zygote: ZygoteProcess) -> None:
    broker = zygote.connect()
    pairs = [socket.socketpair() for _ in range(3)]
    keep(broker, pairs[0][0])
    for (mine, _), slot in zip(pairs[1:], ("monitor", "agent"), strict=True):
        send_packet(broker, Keep("web1", slot, spare=True), [mine.fileno()])
        mine.close()
    assert zygote.lives_after(broker)
    assert readable(pairs[1][1])
    assert not readable(pairs[0][1], 0)
    assert not readable(pairs[2][1], 0)
    for _, peer in pairs:
        peer.close()


def test_one_that_retires_lets_go_of_everything_and_ends_with_its_last_child(
    zygote: ZygoteProcess, pair: tuple[socket.socket, socket.socket]
) -> None:
    mine, peer = pair
    broker, worker = zygote.connect(), zygote.connect()
    keep(worker, mine)
    _, pidfd = zygote.fork(broker, "web2")
    send_packet(broker, Hello("0.0.1"))
    expect(broker, Hello)
    send_packet(broker, Tell())
    assert told(broker) == [("web1", "monitor")]
    send_packet(broker, Retire())
    assert readable(peer)
    assert not readable(broker, 0), "what goes to another zygote is not dropped"
    late, late_peer = socket.socketpair()
    keep(worker, late, "web3")
    packet, [fd] = receive_packet(broker)
    assert packet == Kept("web3", "monitor"), "a worker that has not heard of the other one yet"
    os.close(fd)
    assert readable(late_peer), "it keeps nothing itself any more"
    late_peer.close()
    assert not zygote.ended(0.2)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    assert zygote.ended()


def test_one_whose_place_another_has_taken_lets_go_when_its_broker_goes(
    zygote: ZygoteProcess, pair: tuple[socket.socket, socket.socket]
) -> None:
    mine, peer = pair
    broker = zygote.connect()
    keep(broker, mine)
    assert zygote.lives_after(broker)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        new = zygote.paths.run / "zygote.new"
        other.bind(os.fspath(new))
        new.rename(zygote.paths.zygote_socket)
        broker.close()
        assert zygote.ended()
    assert readable(peer)


def test_one_whose_socket_was_removed_keeps_what_it_has(
    zygote: ZygoteProcess, pair: tuple[socket.socket, socket.socket]
) -> None:
    mine, peer = pair
    broker, other = zygote.connect(), zygote.connect()
    keep(broker, mine)
    assert zygote.lives_after(broker)
    zygote.paths.zygote_socket.unlink()
    broker.close()
    assert zygote.lives_after(other)
    assert not readable(peer, 0)


def test_a_broker_that_does_not_read_is_told_of_no_more_than_there_is_room_for(zygote: ZygoteProcess) -> None:
    worker, broker = zygote.connect(), zygote.connect()
    send_packet(broker, Tell())
    assert told(broker) == []
    pair = socket.socketpair()
    for _ in range(600):
        send_packet(worker, Keep("web1", "monitor"), [pair[0].fileno()])
        send_packet(worker, Drop("web1"))
    assert zygote.lives_after(worker)
    news: list[type] = []
    while len(news) < 1200:
        packet, fds = receive_packet(broker)
        for fd in fds:
            os.close(fd)
        news.append(type(packet))
    assert news == [Kept, Dropped] * 600
    for end in pair:
        end.close()


def test_without_a_free_fd_it_says_what_it_cannot_pass_on_and_lives(
    zygote: ZygoteProcess, pair: tuple[socket.socket, socket.socket]
) -> None:
    mine, peer = pair
    follower, worker, asks = zygote.connect(), zygote.connect(), zygote.connect()
    send_packet(follower, Tell())
    assert told(follower) == []
    heard_all(zygote, worker)
    assert zygote.lives_after(asks)
    used = {int(fd.name) for fd in Path(f"/proc/{zygote.child.pid}/fd").iterdir()}
    lowest = min(set(range(len(used) + 1)) - used)
    limit = (lowest + 1, resource.prlimit(zygote.child.pid, resource.RLIMIT_NOFILE)[1])  # room for the connection alone
    resource.prlimit(zygote.child.pid, resource.RLIMIT_NOFILE, limit)
    keep(worker, mine)
    assert receive_packet(follower) == (Kept("web1", "monitor"), [])
    send_packet(asks, Tell())
    assert receive_packet(asks) == (Kept("web1", "monitor"), [])
    assert receive_packet(asks) == (Told(), [])
    assert zygote.lives_after(worker)
    assert not readable(peer, 0), "it keeps it"


def test_how_a_former_zygotes_worker_ended_is_remembered_until_the_next_one_is_made() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        zygote = Zygote(listener)
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        broker = Peer(here)
        zygote._obey(Exited(101, -9, "web1"), broker)
        zygote._obey(Exited(102, 0, "web2"), broker)
        zygote._workers[103] = "web3"
        zygote._obey(Exited(104, -9, "web3"), broker)
        assert zygote._exits == {"web1": -9}
        for end in (here, there, zygote._wake_read, zygote._wake_write):
            end.close()
        os.close(zygote._spare)


# -- orphans ----------------------------------------------------------------------------------------------------------------


def heard_all(zygote: ZygoteProcess, broker: socket.socket) -> None:
    """What was sent on other connections before is dealt with: in one turn they are accepted, in the next one read."""
    for _ in range(2):
        assert zygote.lives_after(broker)


def test_how_an_orphan_ended_is_told_to_its_vms_worker_and_remembered_for_the_next(zygote: ZygoteProcess) -> None:
    broker = zygote.connect()
    pid, pidfd = zygote.fork(broker)  # any child does
    orphan = Orphan(zygote.paths.zygote_socket, VmName("web1"))
    orphan.watch(pid)
    heard_all(zygote, broker)
    assert orphan.status(0) is None
    send_packet(broker, Exited(99999, 7, ""))  # of a zygote that has retired, and of nobody that is watched
    assert zygote.lives_after(broker)
    assert orphan.status(0) is None
    send_packet(broker, Exited(pid, 7, ""))
    assert orphan.status(SECONDS) == 7
    orphan.close()
    second = Orphan(zygote.paths.zygote_socket, VmName("web1"))
    second.watch(pid)
    assert second.status(SECONDS) == 7, "remembered"
    second.watch(pid + 1)
    assert second.status(0.05) is None, "of another process"
    other = Orphan(zygote.paths.zygote_socket, VmName("web2"))
    other.watch(pid)
    assert other.status(0.05) is None, "of another VM"
    send_packet(broker, Drop("web1"))
    assert zygote.lives_after(broker)
    second.watch(pid)
    assert second.status(0.05) is None, "the run is over"
    second.close()
    other.close()
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)


def test_another_zygote_is_told_whom_to_watch_and_what_the_one_before_has_told_stays(zygote: ZygoteProcess) -> None:
    broker = zygote.connect()
    told, waiting = (Orphan(zygote.paths.zygote_socket, VmName(name)) for name in ("web1", "web2"))
    told.watch(1001)
    waiting.watch(1002)
    heard_all(zygote, broker)
    send_packet(broker, Exited(1001, 3, ""))
    assert zygote.lives_after(broker)
    zygote.child.kill()
    zygote.child.wait()
    with ZygoteProcess() as second:
        second.paths.zygote_socket.rename(zygote.paths.zygote_socket)
        told.again()
        waiting.again()
        other = Root.connect(zygote)
        heard_all(second, other)
        send_packet(other, Exited(1002, 4, ""))
        assert (told.status(SECONDS), waiting.status(SECONDS)) == (3, 4)
        other.close()
    told.close()
    waiting.close()


def test_without_a_zygote_nothing_is_known_and_only_a_new_one_is_called_again(tmp_path: Path) -> None:
    orphan = Orphan(tmp_path / "none.sock", VmName("web1"))
    orphan.announce(os.getpid())
    orphan.watch(os.getpid())
    with pytest.raises(FileNotFoundError):
        orphan.again()  # which the keeper tries again
    assert orphan.status() is None
    assert orphan.fileno() == -1
    orphan.close()
