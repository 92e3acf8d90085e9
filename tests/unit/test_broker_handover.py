# SPDX-License-Identifier: Apache-2.0
"""One zygote in the place of another: of another version, asked for, or because the one before hangs; no connection is lost on the way."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
from collections.abc import Iterator

import pytest

from vmloop import __version__
from vmloop.broker.packets import PacketPoll
from vmloop.broker.spawner import ANSWER_SECONDS, START_SECONDS, Spawner
from vmloop.broker.zygote_process import Former, let_go
from vmloop.common.names import VmName
from vmloop.common.zygote_wire import (
    Drop,
    Dropped,
    Fork,
    Hello,
    Keep,
    Kept,
    NotForked,
    Quit,
    Retire,
    Tell,
    Told,
    receive_packet,
    send_packet,
)

from ..fakes.spawner_notes import WEB1, WEB2, FakeZygote, Notes, greet
from ..fakes.zygote_process import SECONDS, Root, ZygoteProcess, children, readable


@pytest.fixture
def notes() -> Iterator[Notes]:
    """A spawner in a root without a zygote."""
    root = Root()
    made = Notes(root)
    yield made
    made.spawner.close()
    root.close()


@pytest.fixture
def fake(notes: Notes) -> Iterator[socket.socket]:
    """The fake zygote's end of the connection of a spawner that uses it."""
    zygote = FakeZygote(notes.root)
    assert notes.spawner.start() is False
    with zygote.accept() as connection, zygote.listener:
        greet(notes, connection)
        yield connection


# -- another zygote in its place --------------------------------------------------------------------------------------------


def pair_in(zygote: socket.socket, vm: str = "web1") -> socket.socket:
    """Have a connection kept; its peer, which sees when nobody has the other end any more."""
    mine, peer = socket.socketpair()
    send_packet(zygote, Keep(vm, "monitor"), [mine.fileno()])
    mine.close()
    return peer


def test_a_zygote_of_another_version_hands_everything_over_and_ends() -> None:
    with ZygoteProcess() as old:
        worker = old.connect()
        peers = [pair_in(worker, f"vm{number}") for number in range(300)]
        notes = Notes(old, version="99.0")
        assert notes.spawner.start() is False
        notes.spawner.fork(WEB1)
        assert [told[0] for told in notes.next(2)] == ["new zygote", "forked"]
        assert old.ended()
        assert not any(readable(peer, 0) for peer in peers)
        with old.connect() as new:
            send_packet(new, Drop("vm7"))
            assert readable(peers[7]), "the new one has it, and nobody else"
        assert not (old.paths.run / "zygote.new").exists()
        notes.spawner.close()
        for peer in peers:
            peer.close()


@pytest.mark.parametrize("victim", ["old", "new"])
def test_whichever_zygote_is_killed_while_it_hands_over_no_connection_is_lost(victim: str) -> None:
    """The old one is stopped when it is asked, so that the kill comes in between."""
    with ZygoteProcess() as old:
        worker = old.connect()
        peer = pair_in(worker)
        assert old.lives_after(worker)
        notes = Notes(old, version="99.0")
        notes.spawner.start()
        notes.turn_until(lambda: notes.zygotes())  # the greeting is answered, and the new one started
        if victim == "new":
            [new] = notes.zygotes()
            os.kill(new, signal.SIGKILL)
            notes.turn_until(lambda: not notes.zygotes())
            assert notes.fork(), "the old one goes on"
            assert not readable(peer, 0)
            with old.connect() as again:
                send_packet(again, Drop("web1"))
                assert readable(peer)
        else:
            old.child.kill()
            old.child.wait()
            assert [told[0] for told in notes.next()] == ["new zygote"], "workers hand over what it could not"
            assert notes.fork()
        notes.spawner.close()
        peer.close()


def forsake(spawner: Spawner) -> None:
    """Close what the kernel closes for a broker that is killed, and no more."""
    handover, spawner._handover = spawner._handover, None
    assert handover is not None
    let_go(handover.child)
    spawner._poll.close()
    spawner.pidfds.close()


def test_a_broker_killed_while_a_zygote_hands_over_leaves_the_old_one_in_its_place() -> None:
    with ZygoteProcess() as old:
        worker = old.connect()
        peer = pair_in(worker)
        notes = Notes(old, version="99.0")
        notes.spawner.start()
        notes.turn_until(lambda: notes.zygotes())
        [new] = notes.zygotes()
        forsake(notes.spawner)
        pidfd = os.pidfd_open(new)
        assert readable(pidfd), "nobody will ever use it"
        os.close(pidfd)
        assert old.lives_after(worker)
        assert not readable(peer, 0)
        peer.close()


def test_a_zygote_that_knows_no_greeting_is_old_and_forks_what_it_alone_keeps(notes: Notes) -> None:
    zygote = FakeZygote(notes.root)
    with zygote.listener:
        notes.spawner.start()
        notes.spawner.fork(WEB1)
        with zygote.accept() as first:
            assert receive_packet(first)[0] == Hello(__version__)
        assert readable(notes.spawner.fileno())
        notes.spawner.turn()
        with zygote.accept() as second:
            notes.turn_until(lambda: readable(second, 0))
            assert notes.told == [("new zygote",)]
            assert isinstance(receive_packet(second)[0], Fork), "its worker inherits what is kept there"
            assert receive_packet(second)[0] == Quit()
            notes.told.clear()
            assert notes.fork(WEB2), "of the new one"


def test_a_fresh_zygote_is_made_when_it_is_asked_for(notes: Notes) -> None:
    notes.spawner.start()
    worker = notes.fork()
    [old] = notes.zygotes()
    notes.spawner.renew(even_fresh=False)
    assert notes.next() == [("renewed", "")]
    assert notes.zygotes() == [old]
    notes.spawner.renew()
    assert notes.next(2) == [("new zygote",), ("renewed", "")]
    assert len(notes.zygotes()) == 2, "the old one has a child"
    os.kill(worker, signal.SIGKILL)
    assert notes.next() == [("exit", WEB1, worker)]
    notes.turn_until(lambda: old not in notes.zygotes())


# -- a zygote that hangs ----------------------------------------------------------------------------------------------------


def test_a_zygote_that_does_not_answer_in_time_is_ended_and_replaced_and_the_fork_asked_again() -> None:
    with ZygoteProcess() as zygote:
        notes = Notes(zygote)
        notes.spawner.start()
        notes.fork(WEB2)
        zygote.child.send_signal(signal.SIGSTOP)
        notes.spawner.fork(WEB1)
        notes.tick(ANSWER_SECONDS / 2)
        assert notes.told == []
        notes.tick(ANSWER_SECONDS)
        assert [told[:2] for told in notes.next(2)] == [("new zygote",), ("forked", WEB1)]
        assert zygote.child.wait(SECONDS) == -signal.SIGKILL
        notes.spawner.close()


def test_a_process_that_is_not_surely_a_zygote_of_ours_is_left_alone(notes: Notes, fake: socket.socket) -> None:
    notes.spawner.fork(WEB1)
    notes.tick(ANSWER_SECONDS + 1)  # it would be this very process
    assert [told[:2] for told in notes.next(2)] == [("new zygote",), ("forked", WEB1)]


def test_answers_that_lie_here_unread_are_not_silence(notes: Notes, fake: socket.socket) -> None:
    """As after a broker was stopped for long: it reads one packet in a turn."""
    for name in (WEB1, WEB2):
        notes.spawner.fork(name)
        assert isinstance(receive_packet(fake)[0], Fork)
        send_packet(fake, NotForked(name, "no memory"))
    notes.ahead += ANSWER_SECONDS + 1
    notes.spawner.turn()
    notes.tick(ANSWER_SECONDS + 1)
    assert notes.next(2) == [("not forked", WEB1, "no memory"), ("not forked", WEB2, "no memory")]
    assert notes.spawner.next_due() is None


def test_a_zygote_that_makes_one_worker_after_the_other_is_given_time_for_each(
    notes: Notes, fake: socket.socket
) -> None:
    names = [VmName(f"vm{number}") for number in range(4)]
    for name in names:
        notes.spawner.fork(name)
    for name in names[:3]:
        notes.tick(ANSWER_SECONDS * 0.8)
        send_packet(fake, NotForked(name, "no memory"))
        assert [told[0] for told in notes.next()] == ["not forked"]
    notes.tick(ANSWER_SECONDS + 1)
    assert [told[:2] for told in notes.next(2)] == [("new zygote",), ("forked", names[3])], "it hangs after all"


def asked_to_tell(notes: Notes, zygote: socket.socket) -> None:
    """A handover is begun, and the old zygote has heard of it."""
    notes.spawner.renew()
    assert receive_packet(zygote)[0] == Tell()


def test_what_the_old_zygote_has_told_and_nobody_has_read_is_not_silence(notes: Notes, fake: socket.socket) -> None:
    asked_to_tell(notes, fake)
    send_packet(fake, Dropped("web1"))
    send_packet(fake, Told())
    notes.tick(START_SECONDS + 1)
    assert notes.next(2) == [("new zygote",), ("renewed", "")]
    assert receive_packet(fake)[0] == Retire()


def test_a_handover_that_cannot_pass_everything_on_fails_and_the_old_zygote_serves_on(
    notes: Notes, fake: socket.socket
) -> None:
    asked_to_tell(notes, fake)
    notes.spawner.fork(WEB1)
    send_packet(fake, Kept("web2", "monitor"))
    [(what, error)] = notes.next()
    assert what == "renewed"
    assert "web2" in error
    assert isinstance(receive_packet(fake)[0], Fork), "also of what was asked meanwhile"
    send_packet(fake, NotForked("web1", "no memory"))
    assert notes.next() == [("not forked", WEB1, "no memory")]
    notes.turn_until(lambda: not notes.zygotes())


def test_a_handover_begun_on_a_zygote_that_has_just_died_goes_on_without_it(notes: Notes) -> None:
    notes.spawner.start()
    notes.fork()
    notes.kill_zygote()
    notes.spawner.renew()  # before the end of its connection has been read
    assert notes.next(2) == [("new zygote",), ("renewed", "")]
    [heir] = notes.zygotes()
    notes.fork(WEB2)
    os.kill(heir, signal.SIGKILL)
    # Its connection ends before the process does: it is reaped by a later turn.
    notes.turn_until(lambda: ("new zygote",) in notes.told and heir not in children())


def test_a_fresh_zygote_that_is_asked_for_too_early_is_made_when_the_old_one_has_answered() -> None:
    with ZygoteProcess() as old:
        notes = Notes(old)
        notes.spawner.start()
        notes.spawner.renew()
        assert notes.told == []
        assert notes.next(2) == [("new zygote",), ("renewed", "")]
        assert old.ended()
        notes.spawner.close()


def test_a_former_zygote_that_cannot_be_watched_for_want_of_an_fd_is_reaped_with_the_next() -> None:
    poll = PacketPoll()
    former = Former(poll)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with (
        subprocess.Popen(["cat"], stdin=subprocess.PIPE) as first,
        subprocess.Popen(["cat"], stdin=subprocess.PIPE) as second,
    ):
        with open(os.devnull) as next_free:
            lowest = next_free.fileno()
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            former.add(first, kill=True)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
        former.add(second, kill=True)
        assert first.returncode == -signal.SIGKILL
        assert readable(poll.fileno())
        poll.turn()
        assert second.returncode == -signal.SIGKILL
    former.close()
    poll.close()
