# SPDX-License-Identifier: Apache-2.0
"""The zygote as a process of its own: it keeps connections, forks workers, tells of exits, and ends when it should."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import zmq

from vmloop.common.names import VmName
from vmloop.common.pack import pack, unpack
from vmloop.common.sockets import WORKER_QUEUE, bind_router
from vmloop.common.wire import Kind, Message, decode, encode
from vmloop.common.zygote_wire import (
    MAX_PACKET_BYTES,
    Drop,
    Dropped,
    Exited,
    Fork,
    Forked,
    Keep,
    Kept,
    NotForked,
    Quit,
    Told,
    send_packet,
)
from vmloop.worker.orphan import Orphan

from ..fakes.zygote_process import SECONDS, ZygoteProcess, expect, readable


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


# -- connections ------------------------------------------------------------------------------------------------------------


def test_a_kept_connection_outlives_its_worker_and_ends_with_drop(
    zygote: ZygoteProcess, pair: tuple[socket.socket, socket.socket]
) -> None:
    mine, peer = pair
    worker, broker = zygote.connect(), zygote.connect()
    keep(worker, mine)
    worker.close()
    assert zygote.lives_after(broker)
    assert not readable(peer, 0)
    peer.send(b"said to nobody yet")
    send_packet(broker, Drop("web1"))
    assert readable(peer)
    with pytest.raises(ConnectionResetError):
        peer.recv(1)  # reset and not EOF: what was sent was never read


def test_what_is_kept_for_one_vm_is_not_dropped_with_another(
    zygote: ZygoteProcess, pair: tuple[socket.socket, socket.socket]
) -> None:
    mine, peer = pair
    connection = zygote.connect()
    keep(connection, mine)
    send_packet(connection, Drop("web2"))
    send_packet(connection, Drop("web11"))
    assert zygote.lives_after(connection)
    assert not readable(peer, 0)


def test_the_newest_connection_of_a_slot_takes_the_place_of_the_one_before(zygote: ZygoteProcess) -> None:
    connection = zygote.connect()
    pairs = [socket.socketpair() for _ in range(3)]
    for (mine, _), slot in zip(pairs, ("monitor", "agent", "monitor"), strict=True):
        keep(connection, mine, slot=slot)
    peers = [peer for _, peer in pairs]
    assert readable(peers[0])
    assert peers[0].recv(1) == b""
    assert zygote.lives_after(connection)
    assert not any(readable(peer, 0) for peer in peers[1:])
    send_packet(connection, Drop("web1"))
    for peer in peers:
        assert readable(peer)
        peer.close()


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_keep_without_exactly_one_connection_keeps_none_and_leaks_none(zygote: ZygoteProcess, count: int) -> None:
    connection = zygote.connect()
    assert zygote.lives_after(connection)
    before = len(os.listdir(f"/proc/{zygote.child.pid}/fd"))
    pairs = [socket.socketpair() for _ in range(count)]
    send_packet(connection, Keep("web1", "monitor"), [mine.fileno() for mine, _ in pairs])
    for mine, peer in pairs:
        mine.close()
        assert readable(peer)
        peer.close()
    assert zygote.lives_after(connection)
    assert len(os.listdir(f"/proc/{zygote.child.pid}/fd")) == before


# -- workers ----------------------------------------------------------------------------------------------------------------


def test_a_forked_worker_comes_with_its_pidfd_and_its_end_is_told(zygote: ZygoteProcess) -> None:
    broker = zygote.connect()
    pid, pidfd = zygote.fork(broker)
    assert pid != zygote.child.pid
    assert not readable(pidfd, 0)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert readable(pidfd)
    os.close(pidfd)
    assert expect(broker, Exited) == Exited(pid, -signal.SIGKILL, "web1")


def test_a_forked_worker_presents_itself_and_leaves_when_it_is_told_to(zygote: ZygoteProcess) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    door = bind_router(context, zygote.paths.worker_socket, WORKER_QUEUE)
    try:
        broker = zygote.connect()
        pid, pidfd = zygote.fork(broker)
        kinds = []
        for sent in (None, signal.SIGTERM):
            if sent is not None:
                signal.pidfd_send_signal(pidfd, sent)
            assert door.poll(int(SECONDS * 1000))
            _, frame = door.recv_multipart()
            kinds.append(decode(frame).kind)
            assert decode(frame).service == "vm/web1"
        assert kinds == [Kind.HELLO, Kind.BYE]
        assert readable(pidfd)
        os.close(pidfd)
        assert expect(broker, Exited) == Exited(pid, 0, "web1")
    finally:
        door.close(0)
        context.term()


def test_a_worker_holds_no_connection_of_the_zygotes_but_its_own_vms(zygote: ZygoteProcess) -> None:
    broker = zygote.connect()
    (mine, peer), (others, others_peer) = socket.socketpair(), socket.socketpair()
    keep(broker, mine, "web1")
    keep(broker, others, "web2")
    _, pidfd = zygote.fork(broker, "web1")
    try:
        send_packet(broker, Drop("web2"))
        assert readable(others_peer), "held by the zygote alone"
        assert not readable(peer, 0)
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
        others_peer.close()
        peer.close()


def test_a_brokers_connection_ends_with_the_zygote_though_workers_live_on(zygote: ZygoteProcess) -> None:
    broker = zygote.connect()
    _, pidfd = zygote.fork(broker)
    zygote.child.kill()
    zygote.child.wait()
    assert readable(broker)
    assert broker.recv(1) == b""
    assert not readable(pidfd, 0), "the worker lives on"
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert readable(pidfd)
    os.close(pidfd)


def test_every_broker_that_asked_for_a_fork_is_told_of_exits_and_workers_are_not(zygote: ZygoteProcess) -> None:
    broker, other, worker = zygote.connect(), zygote.connect(), zygote.connect()
    pid, pidfd = zygote.fork(broker, "web1")
    second, second_pidfd = zygote.fork(other, "web2")
    for fd in (pidfd, second_pidfd):
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        assert readable(fd)
        os.close(fd)
    told = [{expect(connection, Exited) for _ in range(2)} for connection in (broker, other)]
    assert told[0] == told[1] == {Exited(pid, -9, "web1"), Exited(second, -9, "web2")}
    assert not readable(worker, 0)


@pytest.mark.parametrize("spec", [b"", b"\xc1", msgspec.msgpack.encode({"name": "web1"})])
def test_a_fork_that_makes_no_sense_is_refused_and_makes_no_process(zygote: ZygoteProcess, spec: bytes) -> None:
    broker = zygote.connect()
    send_packet(broker, Fork("web1", spec))
    refused = expect(broker, NotForked)
    assert isinstance(refused, NotForked)
    assert refused.vm == "web1"
    assert refused.error
    assert len(zygote.processes()) == 1


def test_a_worker_with_a_name_that_is_none_fails_and_touches_nothing(zygote: ZygoteProcess) -> None:
    broker = zygote.connect()
    pid, pidfd = zygote.fork(broker, "../../outside")
    assert readable(pidfd)
    os.close(pidfd)
    assert expect(broker, Exited) == Exited(pid, 1, "../../outside")
    assert not (zygote.paths.run.parent.parent / "outside").exists()


def test_a_new_run_is_told_before_its_qemu_is_launched(zygote: ZygoteProcess) -> None:
    """A launch holds the loop up; events of the new run beside the state of the old one would look like a VM that ended at once."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    door = bind_router(context, zygote.paths.worker_socket, WORKER_QUEUE)
    try:
        _, pidfd = zygote.fork(zygote.connect())
        assert door.poll(int(SECONDS * 1000))
        identity, _ = door.recv_multipart()
        asked(door, identity, "define", {"definition": {"name": "web1", "qemu": {"binary": "simulated"}}})
        said: list[Message] = []
        qemu = asked(door, identity, "start", {"name": "web1"}, said)["pid"]
        told = [unpack(message.body) for message in said if message.kind is Kind.STATUS]
        states = [(status["state"], status["pid"]) for status in told]
        assert ("starting", None) in states
        assert states.index(("starting", None)) < states.index(("starting", qemu))
        os.kill(qemu, signal.SIGKILL)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
    finally:
        door.close(0)
        context.term()


def test_a_vm_whose_worker_died_becomes_the_zygotes_child_and_its_status_is_told(zygote: ZygoteProcess) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    door = bind_router(context, zygote.paths.worker_socket, WORKER_QUEUE)
    try:
        broker = zygote.connect()
        pid, pidfd = zygote.fork(broker)
        definition = {"name": "web1", "qemu": {"binary": "simulated"}}
        assert door.poll(int(SECONDS * 1000))
        identity, _ = door.recv_multipart()
        asked(door, identity, "define", {"definition": definition})
        qemu = asked(door, identity, "start", {"name": "web1"})["pid"]
        orphan = Orphan(zygote.paths.zygote_socket, VmName("web1"))
        orphan.announce(qemu)
        qemu_pidfd = os.pidfd_open(qemu)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert expect(broker, Exited) == Exited(pid, -9, "web1")
        assert not readable(qemu_pidfd, 0), "it lives on"
        signal.pidfd_send_signal(qemu_pidfd, signal.SIGKILL)
        assert expect(broker, Exited) == Exited(qemu, -9, "")
        orphan.watch(qemu)
        assert orphan.status(SECONDS) == -9
        orphan.close()
        os.close(pidfd)
        os.close(qemu_pidfd)
    finally:
        door.close(0)
        context.term()


def asked(
    door: zmq.Socket[bytes], identity: bytes, op: str, arguments: dict[str, Any], said: list[Message] | None = None
) -> Any:
    """What the worker at the door answers to a request. `said`: takes what else it says before that."""
    request = Message(Kind.REQUEST, service="vm/web1", op=op, id=5, body=pack(arguments), seconds=SECONDS)
    door.send_multipart([identity, encode(request)])
    while True:
        assert door.poll(int(SECONDS * 1000))
        _, frame = door.recv_multipart()
        message = decode(frame)
        if message.kind in (Kind.REPLY, Kind.ERROR):
            assert message.kind is Kind.REPLY, unpack(message.body)
            return unpack(message.body)
        if said is not None:
            said.append(message)


# -- nonsense ---------------------------------------------------------------------------------------------------------------

GARBAGE = {
    "no msgpack": b"\xc1\xc1",
    "a number": msgspec.msgpack.encode(5),
    "a kind that does not exist": msgspec.msgpack.encode({"type": "Explode"}),
    "a field missing": msgspec.msgpack.encode({"type": "Drop"}),
    "a field of another type": msgspec.msgpack.encode({"type": "Drop", "vm": 5}),
    "nested without end": b"\x91" * 5000,
    "text": b"GET / HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("packet", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_costs_its_sender_the_connection_and_nobody_else_anything(
    zygote: ZygoteProcess, packet: bytes, pair: tuple[socket.socket, socket.socket]
) -> None:
    mine, peer = pair
    broker, stranger = zygote.connect(), zygote.connect()
    keep(broker, mine)
    stranger.send(packet)
    assert readable(stranger)
    assert stranger.recv(1) == b""
    assert zygote.lives_after(broker)
    assert not readable(peer, 0)


def test_the_fds_beside_garbage_are_closed(zygote: ZygoteProcess, pair: tuple[socket.socket, socket.socket]) -> None:
    mine, peer = pair
    broker, stranger = zygote.connect(), zygote.connect()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", mine.fileno()))]
    stranger.sendmsg([b"\xc1"], rights)
    mine.close()
    assert readable(peer)
    assert peer.recv(1) == b""
    assert zygote.lives_after(broker)


def test_more_fds_than_a_packet_may_have_are_refused_and_closed(zygote: ZygoteProcess) -> None:
    broker, stranger = zygote.connect(), zygote.connect()
    pairs = [socket.socketpair() for _ in range(20)]
    send_packet(stranger, Keep("web1", "monitor"), [mine.fileno() for mine, _ in pairs])
    for mine, peer in pairs:
        mine.close()
        assert readable(peer)
        peer.close()
    assert zygote.lives_after(broker)


def test_a_packet_over_the_limit_is_refused(zygote: ZygoteProcess) -> None:
    broker, stranger = zygote.connect(), zygote.connect()
    stranger.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_PACKET_BYTES)
    try:
        stranger.send(bytes(MAX_PACKET_BYTES + 1))
    except OSError:
        return  # the kernel's own limit comes first here
    assert readable(stranger)
    assert zygote.lives_after(broker)


def test_packets_that_only_the_zygote_sends_are_ignored(zygote: ZygoteProcess) -> None:
    broker = zygote.connect()
    for packet in (Forked("web1", 5), NotForked("web1", "why"), Kept("web1", "monitor"), Dropped("web1"), Told()):
        send_packet(broker, packet)
    assert zygote.lives_after(broker)


# -- its end ----------------------------------------------------------------------------------------------------------------


def test_it_ends_when_nobody_is_connected_and_nothing_is_kept(zygote: ZygoteProcess) -> None:
    broker, worker = zygote.connect(), zygote.connect()
    assert zygote.lives_after(broker)
    worker.close()
    assert zygote.lives_after(broker)
    broker.close()
    assert zygote.ended()


def test_a_broker_that_asked_for_nothing_leaves_no_zygote_behind(zygote: ZygoteProcess) -> None:
    zygote.connect().close()
    assert zygote.ended()


def test_it_outlives_the_broker_while_a_worker_lives(zygote: ZygoteProcess) -> None:
    broker = zygote.connect()
    _, pidfd = zygote.fork(broker)
    broker.close()
    next_broker = zygote.connect()
    assert zygote.lives_after(next_broker)
    next_broker.close()
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    assert zygote.ended(), "with its last worker"


def test_it_outlives_the_broker_while_a_connection_is_kept(
    zygote: ZygoteProcess, pair: tuple[socket.socket, socket.socket]
) -> None:
    mine, peer = pair
    broker = zygote.connect()
    keep(broker, mine)
    assert zygote.lives_after(broker)
    broker.close()
    next_broker = zygote.connect()
    assert zygote.lives_after(next_broker)
    assert not readable(peer, 0)
    send_packet(next_broker, Drop("web1"))
    next_broker.close()
    assert zygote.ended()
    assert peer.recv(1) == b""


def test_quit_ends_it_with_its_last_worker_and_all_that_is_kept(
    zygote: ZygoteProcess, pair: tuple[socket.socket, socket.socket]
) -> None:
    mine, peer = pair
    broker = zygote.connect()
    keep(broker, mine, "web2")
    pid, pidfd = zygote.fork(broker)
    send_packet(broker, Quit())
    assert zygote.lives_after(broker), "while the worker lives"
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    assert zygote.ended()
    assert expect(broker, Exited) == Exited(pid, -9, "web1")
    assert peer.recv(1) == b""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_ends_it_like_quit_and_an_interrupt_in_a_terminal_is_not_for_it(
    zygote: ZygoteProcess, number: signal.Signals
) -> None:
    broker = zygote.connect()
    assert zygote.lives_after(broker)
    zygote.child.send_signal(number)
    if number == signal.SIGTERM:
        assert zygote.ended()
    else:
        assert zygote.lives_after(broker)


def test_a_zygote_without_a_socket_is_an_error_at_once() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "vmloop.broker.zygote"], capture_output=True, timeout=SECONDS, check=False, cwd="/"
    )
    assert ended.returncode == 2
    assert b"--listen-fd" in ended.stderr


def test_names_of_vms_are_only_labels_here(zygote: ZygoteProcess, pair: tuple[socket.socket, socket.socket]) -> None:
    mine, peer = pair
    broker = zygote.connect()
    keep(broker, mine, VmName("x" * 200))
    send_packet(broker, Drop("x" * 200))
    assert peer.recv(1) == b""
    assert zygote.lives_after(broker)
