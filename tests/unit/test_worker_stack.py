# SPDX-License-Identifier: Apache-2.0
"""The stack that a worker leaves when it is held up or crashes: what is written, who reads it, and that it stays bounded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vmloop.common.process import STACK_SIGNAL
from vmloop.worker.stack import MAX_BYTES, StackFile

# A worker in small: it arms, says that it is there, and is then held up in a function of that name.
HELD_UP = """
import sys
from pathlib import Path
from vmloop.worker.stack import StackFile

stack = StackFile(Path(sys.argv[1]))
stack.arm()

def held_up_here(how):
    print("here", flush=True)
    if how == "crash":
        import ctypes
        ctypes.string_at(0)
    sys.stdin.read()  # until the test closes it

held_up_here(sys.argv[2])
print(stack.take(), flush=True)
stack.close()
"""


def run(path: Path, how: str) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", HELD_UP, str(path), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "here\n"
    return child


def test_the_signal_writes_down_where_the_worker_is_and_it_goes_on(tmp_path: Path) -> None:
    child = run(tmp_path / "stack", "wait")
    child.send_signal(STACK_SIGNAL)
    text, _ = child.communicate(timeout=30)
    assert "held_up_here" in text
    assert child.returncode == 0
    assert (tmp_path / "stack").read_bytes() == b""


def test_a_crash_leaves_its_stack_to_the_successor(tmp_path: Path) -> None:
    child = run(tmp_path / "stack", "crash")
    child.communicate(timeout=30)
    assert child.returncode == -signal.SIGSEGV
    successor = StackFile(tmp_path / "stack")
    assert "Segmentation fault" in successor.left
    assert "held_up_here" in successor.left
    assert successor.take() == ""
    successor.close()


def test_the_first_worker_finds_nothing(tmp_path: Path) -> None:
    stack = StackFile(tmp_path / "stack")
    assert stack.left == ""
    assert (tmp_path / "stack").stat().st_mode & 0o777 == 0o600
    stack.close()


def test_of_a_long_stack_the_beginning_is_told(tmp_path: Path) -> None:
    (tmp_path / "stack").write_bytes(b"newest frame\n" + b"x" * 100_000)
    stack = StackFile(tmp_path / "stack")
    assert stack.left.startswith("newest frame")
    assert len(stack.left) <= MAX_BYTES
    assert (tmp_path / "stack").stat().st_size == 0
    stack.close()


def test_any_bytes_in_the_file_are_survived(tmp_path: Path) -> None:
    (tmp_path / "stack").write_bytes(os.urandom(5000))
    stack = StackFile(tmp_path / "stack")
    stack.left.encode()
    stack.close()


@pytest.mark.parametrize("obstacle", ["directory", "missing parent"])
def test_a_place_that_cannot_be_written_to_is_said(tmp_path: Path, obstacle: str) -> None:
    path = tmp_path / "stack" if obstacle == "directory" else tmp_path / "none" / "stack"
    if obstacle == "directory":
        path.mkdir()
    with pytest.raises(OSError, match="stack"):
        StackFile(path)
