# SPDX-License-Identifier: Apache-2.0
"""A guest's console on the standard streams of a process, with a socket in QEMU's place: bytes both ways, windows, and the terminal."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from vmloop.client.cli.console import WINDOW_BYTES, console_arguments

from ..fakes.terminal import Terminal

SECONDS: Final = 20.0
# Drives a console by poll alone until the guest hangs up, as foreground.py does; SIGINT is told.
PROGRAM: Final = """
import select, signal, sys
from pathlib import Path
from vmloop.client.cli.console import Console
signal.signal(signal.SIGINT, lambda *_: print("INTERRUPTED", file=sys.stderr, flush=True))
console = Console(guest_interrupt="guest" in sys.argv, on_left=lambda: print("LEFT", file=sys.stderr, flush=True))
console.open(Path(sys.argv[1]))
print("OPEN", file=sys.stderr, flush=True)
while console._guest is not None:
    poll = select.poll()
    for fd, events in console.interests().items():
        poll.register(fd, events)
    console.turn(dict(poll.poll()))
console.close()
"""


class Guest:
    """QEMU's end of the console."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "console.sock"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(os.fspath(self.path))
        self._listener.listen(1)
        self._listener.settimeout(SECONDS)

    def accept(self) -> socket.socket:
        self.end, _ = self._listener.accept()
        self.end.settimeout(SECONDS)
        return self.end

    def hear(self, count: int) -> bytes:
        heard = b""
        while len(heard) < count:
            heard += self.end.recv(count - len(heard))
        return heard

    def close(self) -> None:
        self._listener.close()
        if hasattr(self, "end"):
            self.end.close()


@pytest.fixture
def guest() -> Iterator[Guest]:
    with tempfile.TemporaryDirectory(prefix="vml-") as directory:
        made = Guest(Path(directory))
        try:
            yield made
        finally:
            made.close()


@contextlib.contextmanager
def piped(
    guest: Guest, stdin: Any = subprocess.PIPE, stdout: Any = subprocess.PIPE
) -> Iterator[subprocess.Popen[bytes]]:
    argv = [sys.executable, "-c", PROGRAM, str(guest.path)]
    with subprocess.Popen(argv, stdin=stdin, stdout=stdout, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()  # one that does not end as it should


def in_terminal(guest: Guest, *words: str) -> Terminal:
    return Terminal([sys.executable, "-c", PROGRAM, str(guest.path), *words], guest.path.parent, os.environ)


def test_pipes_carry_every_byte_both_ways_and_the_end_of_input_ends_nothing(guest: Guest) -> None:
    every = bytes(range(256)) * 200
    with piped(guest) as process:
        guest.accept()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"typed\x03\x1d\n")
        process.stdin.close()
        assert guest.hear(8) == b"typed\x03\x1d\n"
        guest.end.sendall(every)
        guest.end.close()
        assert process.stdout.read() == every
        assert process.wait(SECONDS) == 0


def test_a_guest_that_reads_nothing_makes_the_input_wait(guest: Guest) -> None:
    with piped(guest, stdout=subprocess.DEVNULL) as process:
        guest.accept()
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        taken = 0
        while select.select([], [process.stdin], [], 1.0)[1]:
            taken += os.write(process.stdin.fileno(), b"x" * 4096)
            assert taken < 16 * WINDOW_BYTES, "it takes whatever comes"
        guest.end.close()
        process.stdin.close()
        assert process.wait(SECONDS) == 0


def test_an_output_that_nobody_reads_makes_the_guest_wait(guest: Guest) -> None:
    with piped(guest) as process:
        guest.accept()
        guest.end.setblocking(False)
        sent = 0
        while select.select([], [guest.end], [], 1.0)[1]:
            sent += guest.end.send(b"x" * 4096)
            assert sent < 32 * WINDOW_BYTES, "it takes whatever comes"
        assert process.stdout is not None
        guest.end.close()
        assert process.stdout.read() == b"x" * sent
        assert process.wait(SECONDS) == 0


def test_an_output_file_keeps_what_was_in_it(guest: Guest) -> None:
    path = guest.path.parent / "out"
    path.write_bytes(b"before\n")
    with path.open("ab") as out, piped(guest, stdin=subprocess.DEVNULL, stdout=out) as process:
        guest.accept().sendall(b"said\n")
        guest.end.close()
        assert process.wait(SECONDS) == 0
    assert path.read_bytes() == b"before\nsaid\n"


def test_a_terminal_is_raw_for_the_guest_and_given_back_at_its_end(guest: Guest) -> None:
    with in_terminal(guest) as at:
        guest.accept()
        at.see(b"OPEN")
        assert at.is_raw
        at.type(b"a\x04\x1a\x1c\r")
        assert guest.hear(5) == b"a\x04\x1a\x1c\r"
        guest.end.sendall(b"\x1b[1mlast words\n")
        guest.end.close()
        assert at.end() == 0
        assert at.seen.endswith(b"\x1b[1mlast words\n"), "as it was said, without a carriage return"
        assert at.attributes() == at.before


def test_ctrl_c_is_the_programs(guest: Guest) -> None:
    with in_terminal(guest) as at:
        guest.accept()
        at.see(b"OPEN")
        at.type(b"\x03")
        at.see(b"INTERRUPTED")
        guest.end.close()
        assert at.end() == 0


def test_ctrl_c_is_the_guests_where_that_is_wanted(guest: Guest) -> None:
    with in_terminal(guest, "guest") as at:
        guest.accept()
        at.see(b"OPEN")
        at.type(b"\x03x")
        assert guest.hear(2) == b"\x03x"
        guest.end.close()
        assert at.end() == 0
        assert b"INTERRUPTED" not in at.seen


def test_a_console_that_was_left_gives_the_terminal_back_and_the_guest_goes_on(guest: Guest) -> None:
    with in_terminal(guest) as at:
        guest.accept()
        at.see(b"OPEN")
        at.type(b"ab\x1dcd")
        at.see(b"LEFT")
        assert at.attributes() == at.before
        assert guest.hear(2) == b"ab"
        guest.end.sendall(b"x" * (4 * WINDOW_BYTES))
        guest.end.close()
        assert at.end() == 0
        assert b"x" not in at.seen


def test_a_terminal_is_given_back_also_after_sigint_to_a_program_that_ends_by_it(guest: Guest) -> None:
    with in_terminal(guest) as at:
        guest.accept()
        at.see(b"OPEN")
        at.process.send_signal(signal.SIGINT)
        at.see(b"INTERRUPTED")
        guest.end.close()
        assert at.end() == 0
        assert at.attributes() == at.before


def test_commas_in_a_path_are_qemus_own() -> None:
    assert console_arguments(Path("/a,b/c"))[1] == "socket,id=vmloop-console,path=/a,,b/c,server=on,wait=off"


# Runs a program as a shell's background job, and tells what became of it.
BACKGROUND: Final = """
import os, signal, sys
job = os.fork()
if job == 0:
    os.setpgid(0, 0)
    os.execv(sys.argv[1], sys.argv[1:])
status = os.waitpid(job, os.WUNTRACED)[1]
if os.WIFSTOPPED(status):
    os.kill(job, signal.SIGKILL)
print("STOPPED" if os.WIFSTOPPED(status) else "ENDED", flush=True)
"""


def test_in_the_background_it_shows_what_the_guest_says_and_is_not_stopped(guest: Guest) -> None:
    program = [sys.executable, "-c", PROGRAM, os.fspath(guest.path)]
    with Terminal([sys.executable, "-c", BACKGROUND, *program], guest.path.parent, os.environ) as at:
        at.see(b"OPEN")
        guest.accept()
        guest.end.sendall(b"hello from the guest")
        at.see(b"hello from the guest")
        assert not at.is_raw
        at.type(b"for the shell\r")
        guest.end.close()
        at.see(b"ENDED")
        assert at.attributes() == at.before
