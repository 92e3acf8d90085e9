# SPDX-License-Identifier: Apache-2.0
"""Processes as the worker holds them: identified beyond doubt, signalled only through their pidfd, let go without a trace."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from vmloop.common.process import Identity, NotTheProcess, ProcessGone, identify
from vmloop.worker.qemu.process import QemuProcess, describe_exit, peer_of

from ..fakes.raw_qmp import DEADLINE

# Says that it is there, and stays until its input ends.
STAYS = [sys.executable, "-c", "print('up', flush=True); input()"]


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(STAYS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        yield child
        child.kill()


def end_unreaped(child: subprocess.Popen[bytes]) -> None:
    """Kill it and leave the zombie."""
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)


def readable(process: QemuProcess, seconds: float = DEADLINE) -> bool:
    return bool(select.select([process], [], [], seconds)[0])


# -- who it is ------------------------------------------------------------------------------------------------------------


def test_this_process_is_itself() -> None:
    identity = identify(os.getpid())
    assert identity.pid == os.getpid()
    assert identity.executable == os.path.realpath(sys.executable)
    assert identity.started > 0
    assert identify(os.getpid()) == identity


def test_a_child_that_started_later_has_a_later_time(child: subprocess.Popen[bytes]) -> None:
    assert identify(child.pid).started >= identify(os.getpid()).started


def test_a_name_that_looks_like_fields_misleads_nobody(tmp_path: Path) -> None:
    program = tmp_path / "a) Z 1 (b"
    program.symlink_to(sys.executable)
    with subprocess.Popen([program, *STAYS[1:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        comm = Path(f"/proc/{child.pid}/comm").read_text().strip()
        assert ")" in comm
        assert identify(child.pid).started >= identify(os.getpid()).started
        child.kill()


def test_no_process_is_gone() -> None:
    with pytest.raises(ProcessGone, match="no process"):
        identify(_unused_pid())


def test_a_zombie_is_gone(child: subprocess.Popen[bytes]) -> None:
    end_unreaped(child)
    with pytest.raises(ProcessGone, match="has ended"):
        identify(child.pid)


def test_a_program_whose_file_was_replaced_is_still_the_same(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(Path("/bin/cat").read_bytes())
    program.chmod(0o700)
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        before = identify(child.pid)
        program.unlink()
        assert identify(child.pid) == before
        child.stdin.close()
        child.wait(DEADLINE)


def test_the_maker_of_a_listening_socket_is_known_to_whoever_connects(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        client.connect(str(tmp_path / "s"))
        assert peer_of(client) == os.getpid()


# -- held by its pidfd ----------------------------------------------------------------------------------------------------


def test_another_process_with_the_pid_is_not_taken_for_ours(child: subprocess.Popen[bytes]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    now = identify(child.pid)
    with pytest.raises(NotTheProcess, match=str(child.pid)):
        QemuProcess(msgspec.structs.replace(now, started=now.started - 1))
    assert len(os.listdir("/proc/self/fd")) == before
    assert child.poll() is None


@pytest.mark.parametrize("zombie", [True, False])
def test_a_process_that_is_gone_cannot_be_held(child: subprocess.Popen[bytes], zombie: bool) -> None:
    before = len(os.listdir("/proc/self/fd"))
    identity = identify(child.pid)
    end_unreaped(child)
    if not zombie:
        child.wait()
    with pytest.raises(ProcessGone):
        QemuProcess(identity)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_live_process_has_not_ended_and_tells_when_it_has(child: subprocess.Popen[bytes]) -> None:
    process = QemuProcess(identify(child.pid))
    try:
        assert process.pid == child.pid
        assert not process.ended()
        assert not readable(process, 0)
        child.kill()
        assert readable(process)
        assert process.ended()
    finally:
        process.close()


def test_a_kill_hits_the_process_and_no_other() -> None:
    children = [subprocess.Popen(STAYS, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(3)]
    process = QemuProcess(identify(children[1].pid))
    try:
        process.kill()
        assert readable(process)
        assert children[1].wait(DEADLINE) == -signal.SIGKILL
        assert [child.poll() for child in (children[0], children[2])] == [None, None]
    finally:
        process.close()
        for child in children:
            child.communicate(timeout=DEADLINE)


def test_a_signal_to_a_process_that_is_gone_hits_nobody(child: subprocess.Popen[bytes]) -> None:
    process = QemuProcess(identify(child.pid))
    try:
        end_unreaped(child)
        process.kill()  # a zombie
        child.wait()
        process.kill()  # reaped: the number may be somebody else's by now
        assert process.ended()
    finally:
        process.close()


def test_a_chosen_signal_can_be_sent(child: subprocess.Popen[bytes]) -> None:
    process = QemuProcess(identify(child.pid))
    try:
        process.kill(signal.SIGTERM)
        assert child.wait(DEADLINE) == -signal.SIGTERM
    finally:
        process.close()


def test_the_status_of_a_child_is_known_and_of_others_not(child: subprocess.Popen[bytes]) -> None:
    adopted, own = QemuProcess(identify(child.pid)), QemuProcess(identify(child.pid), child)
    try:
        assert own.status() is None
        child.kill()
        assert readable(own)
        child.wait(DEADLINE)
        assert own.status() == -signal.SIGKILL
        assert adopted.status() is None
    finally:
        adopted.close()
        own.close()


def test_a_child_that_ended_at_once_can_be_held_until_its_status_is_read() -> None:
    child = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    process = QemuProcess(Identity(child.pid, 0, ""), child)
    try:
        assert process.ended()
        assert process.status() == 3
    finally:
        process.close()


def test_a_process_that_is_let_go_lives_on_and_nobody_warns() -> None:
    child = subprocess.Popen(STAYS, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    pid, stdin, stdout = child.pid, child.stdin, child.stdout
    assert stdin is not None
    assert stdout is not None
    QemuProcess(identify(pid), child).close()
    del child  # its finalizer would warn of a process that still runs
    assert stdout.readline() == b"up\n"
    assert identify(pid).pid == pid
    stdin.close()
    stdout.close()
    os.waitpid(pid, 0)


# -- how it ended ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (None, "ended; nobody has told its exit status"),
        (0, "exited with status 0"),
        (1, "exited with status 1"),
        (-9, "was ended by SIGKILL"),
        (-11, "was ended by SIGSEGV"),
        (-63, "was ended by signal 63"),
    ],
)
def test_an_exit_status_is_told_in_words(status: int | None, words: str) -> None:
    assert describe_exit(status) == words


def _unused_pid() -> int:
    """A pid that was a process a moment ago; the kernel comes round to it last."""
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid
