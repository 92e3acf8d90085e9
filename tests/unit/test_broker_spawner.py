# SPDX-License-Identifier: Apache-2.0
"""The broker's hold on processes, with real zygotes and real workers: it uses what runs, replaces what dies, and tells every end once."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from vmloop.common.names import VmName
from vmloop.common.process import identify
from vmloop.common.settings import Settings
from vmloop.common.zygote_wire import (
    Exited,
    Fork,
    Forked,
    NotForked,
    Quit,
    WorkerSpec,
    receive_packet,
    send_packet,
)

from ..fakes.spawner_notes import WEB1, WEB2, FakeZygote, Notes, greet, lives
from ..fakes.zygote_process import SECONDS, Root, ZygoteProcess, readable


@pytest.fixture
def notes() -> Iterator[Notes]:
    """A spawner in a root without a zygote."""
    root = Root()
    made = Notes(root)
    yield made
    made.spawner.close()
    root.close()


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is nobody's worker; it ends when its input is closed."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        yield child


@pytest.fixture
def fake(notes: Notes) -> Iterator[socket.socket]:
    """The fake zygote's end of the connection of a spawner that uses it."""
    zygote = FakeZygote(notes.root)
    assert notes.spawner.start() is False
    with zygote.accept() as connection, zygote.listener:
        greet(notes, connection)
        yield connection


# -- a zygote ---------------------------------------------------------------------------------------------------------------


def test_a_zygote_is_started_where_there_is_none(notes: Notes) -> None:
    assert notes.spawner.start() is True
    assert len(notes.zygotes()) == 1
    pid = notes.fork()
    assert identify(pid).pid == pid
    assert notes.told == []


def test_a_zygote_that_runs_is_used() -> None:
    with ZygoteProcess() as zygote:
        notes = Notes(zygote)
        assert notes.spawner.start() is False
        assert f"PPid:\t{zygote.child.pid}\n" in Path(f"/proc/{notes.fork()}/status").read_text()
        assert notes.zygotes() == []
        notes.spawner.close()


@pytest.mark.parametrize("left", ["a socket that nobody listens on", "a file"])
def test_what_a_dead_zygote_left_is_replaced(notes: Notes, left: str) -> None:
    path = notes.root.paths.zygote_socket
    if left == "a file":
        path.write_text("")
    else:
        FakeZygote(notes.root).listener.close()
    assert notes.spawner.start() is True
    notes.fork()


def test_the_next_broker_uses_the_same_zygote_and_the_workers_live_on(notes: Notes) -> None:
    notes.spawner.start()
    worker = notes.fork()
    notes.spawner.close()
    second = Notes(notes.root)
    assert second.spawner.start() is False
    assert lives(worker)
    second.spawner.pidfds.watch(WEB1, worker, identify(worker).started)
    os.kill(worker, signal.SIGKILL)
    assert second.next() == [("exit", WEB1, worker)]
    second.spawner.close()
    assert lives(notes.zygotes()[0])


def test_a_worker_is_told_all_it_needs(notes: Notes, fake: socket.socket) -> None:
    notes.spawner.fork(WEB1)
    packet, fds = receive_packet(fake)
    assert isinstance(packet, Fork)
    assert (packet.vm, fds) == ("web1", [])
    paths = notes.root.paths
    spec = msgspec.msgpack.decode(packet.spec, type=WorkerSpec)
    assert spec == WorkerSpec("web1", str(paths.run), str(paths.state), str(paths.etc), Settings())


def test_all_workers_of_a_host_can_call_a_zygote_that_has_not_come_up_yet(notes: Notes) -> None:
    notes.spawner.start()
    [zygote] = notes.zygotes()
    os.kill(zygote, signal.SIGSTOP)
    callers = [notes.root.connect() for _ in range(300)]
    os.kill(zygote, signal.SIGCONT)
    for caller in callers:
        caller.close()
    notes.fork()


# -- workers ----------------------------------------------------------------------------------------------------------------


def test_a_workers_end_is_told_once(notes: Notes) -> None:
    notes.spawner.start()
    pid = notes.fork()
    os.kill(pid, signal.SIGKILL)
    assert notes.next() == [("exit", WEB1, pid)]
    assert notes.fork(WEB2), "and nothing was told in between"


def test_kill_ends_the_workers_of_one_vm(notes: Notes) -> None:
    notes.spawner.start()
    first, beside, second = notes.fork(WEB1), notes.fork(WEB2), notes.fork(WEB1)
    notes.spawner.pidfds.kill(WEB1)
    assert sorted(notes.next(2)) == sorted([("exit", WEB1, first), ("exit", WEB1, second)])
    assert lives(beside)
    notes.spawner.pidfds.kill(WEB1)
    notes.spawner.pidfds.kill(VmName("nobody"))
    notes.spawner.pidfds.kill(WEB2)
    assert notes.next() == [("exit", WEB2, beside)]


def test_a_fork_that_is_refused_is_told_with_the_reason(notes: Notes, fake: socket.socket) -> None:
    notes.spawner.fork(WEB1)
    send_packet(fake, NotForked("web1", "no memory"))
    assert notes.next() == [("not forked", WEB1, "no memory")]


def test_forks_that_the_zygote_does_not_take_at_once_are_sent_as_it_reads(notes: Notes, fake: socket.socket) -> None:
    names = [VmName(f"vm{number}") for number in range(2000)]
    for name in names:
        notes.spawner.fork(name)
    asked: set[str] = set()
    while len(asked) < len(names):
        packet, _ = receive_packet(fake)
        assert isinstance(packet, Fork)
        asked.add(packet.vm)
        if readable(notes.spawner.fileno(), 0):
            notes.spawner.turn()
    assert asked == set(names)
    assert notes.told == []


def test_news_without_a_pidfd_or_of_no_worker_is_nothing_to_hold(
    notes: Notes, fake: socket.socket, other: subprocess.Popen[bytes]
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    send_packet(fake, Forked("web1", other.pid))
    send_packet(fake, Exited(other.pid, 0, "web1"))
    send_packet(fake, Quit(), [fake.fileno(), fake.fileno()])
    send_packet(fake, NotForked("web1", "last"))
    assert notes.next() == [("not forked", WEB1, "last")]
    assert len(os.listdir("/proc/self/fd")) == before


# -- workers that were not forked for it ------------------------------------------------------------------------------------


def test_a_worker_that_presented_itself_is_watched_once(notes: Notes, other: subprocess.Popen[bytes]) -> None:
    for _ in range(2):
        notes.spawner.pidfds.watch(WEB1, other.pid, identify(other.pid).started)
    assert notes.told == []
    other.kill()
    assert notes.next() == [("exit", WEB1, other.pid)]
    assert not readable(notes.spawner.fileno(), 0)


def test_a_process_that_is_not_the_worker_is_the_workers_end_and_is_left_alone(
    notes: Notes, other: subprocess.Popen[bytes]
) -> None:
    notes.spawner.pidfds.watch(WEB1, other.pid, identify(other.pid).started + 1)
    assert notes.told == [("exit", WEB1, other.pid)]
    notes.spawner.pidfds.kill(WEB1)
    assert other.stdin is not None
    other.stdin.close()
    assert other.wait(SECONDS) == 0, "it was not killed"


@pytest.mark.parametrize("pid", [2**22 + 1, 2**31, 2**40, 0, -1])
def test_a_pid_of_nobody_is_the_workers_end(notes: Notes, pid: int) -> None:
    notes.spawner.pidfds.watch(WEB1, pid, 1)
    assert notes.told == [("exit", WEB1, pid)]


def test_a_worker_that_has_just_ended_is_told_by_its_pidfd(notes: Notes, other: subprocess.Popen[bytes]) -> None:
    started = identify(other.pid).started
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    notes.spawner.pidfds.watch(WEB1, other.pid, started)
    assert notes.next() == [("exit", WEB1, other.pid)]


# -- a zygote that dies -----------------------------------------------------------------------------------------------------


def test_a_zygote_that_dies_is_replaced_and_its_workers_are_still_watched(notes: Notes) -> None:
    notes.spawner.start()
    worker = notes.fork()
    notes.kill_zygote()
    assert notes.next() == [("new zygote",)]
    assert len(notes.zygotes()) == 1
    assert notes.fork(WEB2)
    os.kill(worker, signal.SIGKILL)
    assert notes.next() == [("exit", WEB1, worker)]


def test_a_fork_asked_of_a_zygote_that_is_dead_is_asked_of_the_next_one_or_told(notes: Notes) -> None:
    notes.spawner.start()
    notes.kill_zygote()
    notes.spawner.fork(WEB1)
    [first, *_] = notes.next()
    assert first[0] in ("not forked", "new zygote")
    notes.turn_until(lambda: ("new zygote",) in [first, *notes.told])
    notes.told.clear()
    assert notes.fork()


def test_a_zygote_that_talks_nonsense_is_connected_to_anew_and_keeps_what_it_has(notes: Notes) -> None:
    zygote = FakeZygote(notes.root)
    with zygote.listener:
        notes.spawner.start()
        with zygote.accept() as first:
            greet(notes, first)
            first.send(b"\xc1")
            assert readable(notes.spawner.fileno())
            notes.spawner.turn()
            assert first.recv(1) == b"", "nobody listens on that connection any more"
        with zygote.accept() as second:
            greet(notes, second)
            notes.spawner.fork(WEB1)
            assert isinstance(receive_packet(second)[0], Fork)
            assert notes.told == []
            notes.spawner.close()


def test_a_worker_whose_pidfd_did_not_arrive_costs_no_zygote(notes: Notes) -> None:
    """Without a free fd the kernel delivers the packet and drops the fd (MSG_CTRUNC)."""
    zygote = FakeZygote(notes.root)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with zygote.listener:
        notes.spawner.start()
        with zygote.accept() as connection:
            greet(notes, connection)
            send_packet(connection, Forked("web1", 4711), [connection.fileno()])
            assert readable(notes.spawner.fileno())
            with open(os.devnull) as next_free:
                lowest = next_free.fileno()
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
            try:
                notes.spawner.turn()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            notes.spawner.fork(WEB1)
            assert isinstance(receive_packet(connection)[0], Fork)
            assert notes.told == []
            notes.spawner.close()


def test_a_worker_that_cannot_be_watched_for_want_of_an_fd_has_not_ended(
    notes: Notes, other: subprocess.Popen[bytes]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    started = identify(other.pid).started
    with open(os.devnull) as next_free:
        lowest = next_free.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        notes.spawner.pidfds.watch(WEB1, other.pid, started)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert notes.told == []


def test_a_zygote_that_was_told_to_end_is_not_replaced_until_it_is_needed(notes: Notes) -> None:
    notes.spawner.start()
    [zygote] = notes.zygotes()
    pidfd = os.pidfd_open(zygote)
    notes.spawner.end_zygote()
    assert readable(pidfd)
    os.close(pidfd)
    assert readable(notes.spawner.fileno())
    notes.spawner.turn()
    assert (notes.zygotes(), notes.told) == ([], [])
    notes.spawner.fork(WEB1)
    assert [told[0] for told in notes.next(2)] == ["new zygote", "forked"]


def test_a_zygote_that_cannot_be_replaced_does_not_take_the_broker_along(notes: Notes) -> None:
    notes.spawner.start()
    notes.kill_zygote()
    run = notes.root.paths.run
    aside = run.with_name("aside")
    run.rename(aside)
    notes.spawner.turn()
    assert notes.told == []
    notes.spawner.fork(WEB1)
    [(what, name, error)] = notes.next()
    assert (what, name) == ("not forked", WEB1)
    assert "zygote" in error
    aside.rename(run)
    notes.spawner.fork(WEB1)
    assert [told[0] for told in notes.next(2)] == ["new zygote", "forked"]


# -- the end ----------------------------------------------------------------------------------------------------------------


def test_closing_lets_go_of_every_fd_and_leaves_zygote_and_workers_alone() -> None:
    root = Root()
    try:
        before = len(os.listdir("/proc/self/fd"))
        notes = Notes(root)
        notes.spawner.start()
        workers = [notes.fork(name) for name in (WEB1, WEB2)]
        notes.spawner.close()
        assert len(os.listdir("/proc/self/fd")) == before
        assert all(lives(pid) for pid in (*workers, *notes.zygotes()))
    finally:
        root.close()
    assert not root.paths.run.exists()
    shutil.rmtree(root.paths.run.parent, ignore_errors=True)
