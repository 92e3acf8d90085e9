# SPDX-License-Identifier: Apache-2.0
"""The prober as a process, with the test for its broker: presents itself, answers, ends when nobody asks or when it is told."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from vmloop.common.errors import error_from_wire
from vmloop.common.pack import pack, unpack
from vmloop.common.sockets import WORKER_QUEUE, bind_router
from vmloop.common.wire import Kind, Message, decode, encode

from ..fakes.recorded_qemu import binary_that

SOON = 15.0
CODE = """
import sys
from pathlib import Path
from vmloop.common.paths import paths_under
from vmloop.common.settings import Settings
from vmloop.worker.probe.prober import run_prober
run_prober("@test", paths_under(Path(sys.argv[1])), Settings(), float(sys.argv[2]))
"""


class Door:
    """The broker's worker door, and one prober behind it."""

    def __init__(self, root: Path, idle: float) -> None:
        for part in ("run", "state"):
            (root / part).mkdir()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = bind_router(self._context, root / "run" / "worker.sock", WORKER_QUEUE)
        self.prober = subprocess.Popen([sys.executable, "-c", CODE, str(root), str(idle)])
        self.identity, self.hello = self._receive()

    def _receive(self) -> tuple[bytes, Message]:
        assert self._socket.poll(int(SOON * 1000)), "nothing has come"
        identity, frame = self._socket.recv_multipart()
        return identity, decode(frame)

    def receive(self) -> Message:
        return self._receive()[1]

    def send(self, frame: bytes) -> None:
        self._socket.send_multipart([self.identity, frame])

    def ask(self, number: int, seconds: float = SOON, **arguments: object) -> None:
        body = pack(arguments)
        self.send(encode(Message(Kind.REQUEST, "vmloop", "capabilities", id=number, body=body, seconds=seconds)))

    def control(self, op: str) -> None:
        self.send(encode(Message(Kind.CONTROL, op=op)))

    def close(self) -> None:
        self.prober.kill()
        self.prober.wait(SOON)
        self._socket.close(linger=0)
        self._context.term()


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vml-") as directory:  # a socket's path has 107 bytes
        yield Path(directory)


@pytest.fixture
def door(root: Path) -> Iterator[Door]:
    door = Door(root, idle=60.0)
    try:
        yield door
    finally:
        door.close()


def test_it_presents_itself_with_its_process(door: Door) -> None:
    assert (door.hello.kind, door.hello.service) == (Kind.HELLO, "probe/@test")
    assert unpack(door.hello.body)["worker_pid"] == door.prober.pid


def test_it_answers_each_request_once_from_one_probe(door: Door, root: Path) -> None:
    binary = binary_that(root / "qemu", then=f"echo . >> {root}/starts")
    for number in range(1, 5):
        door.ask(number, binary=str(binary))
    answers = [door.receive() for _ in range(4)]
    assert {answer.id for answer in answers} == {1, 2, 3, 4}
    assert {unpack(answer.body)["version"] == [7, 2, 22] for answer in answers} == {True}
    assert (root / "starts").read_text().split() == [".", "."]
    door.ask(5, binary=str(binary))
    assert door.receive().body == answers[0].body


def test_errors_come_as_errors_and_it_serves_on(door: Door, root: Path) -> None:
    door.ask(1, binary="no-such-qemu")
    door.ask(2, binary=str(root))
    door.ask(3)
    door.ask(4, binary="a/b")
    door.send(b"VML1 and nothing that makes sense")
    door.control("cancel")
    door.control("something-new")
    codes = {answer.id: error_from_wire(unpack(answer.body)).code for answer in (door.receive() for _ in range(4))}
    assert codes == {1: "launch-failed", 2: "launch-failed", 3: "bad-request", 4: "bad-request"}
    assert door.prober.poll() is None


def test_a_deadline_is_the_callers_own(door: Door, root: Path) -> None:
    hung = binary_that(root / "qemu", hang=1)
    door.ask(1, seconds=0.3, binary=str(hung))
    assert error_from_wire(unpack(door.receive().body)).code == "deadline"


def test_it_ends_when_it_is_told_and_its_qemu_with_it(door: Door, root: Path) -> None:
    hung = binary_that(root / "qemu", then=f"echo $$ > {root}/pid", hang=1)
    door.ask(1, seconds=0.5, binary=str(hung))
    door.receive()
    pid = int((root / "pid").read_text())
    door.control("leave")
    assert door.prober.wait(SOON) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_it_ends_when_nobody_has_asked_for_a_while(root: Path) -> None:
    door = Door(root, idle=0.5)
    try:
        binary = binary_that(root / "qemu")
        door.ask(1, binary=str(binary))
        assert door.receive().kind is Kind.REPLY
        assert door.prober.wait(SOON) == 0
    finally:
        door.close()
