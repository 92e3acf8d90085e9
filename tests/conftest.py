# SPDX-License-Identifier: Apache-2.0
"""Set-up of all tests: what needs QEMU skips where there is none (but fails in CI); no test leaves a process behind, nor what one was."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

QEMU: Final = "qemu-system-x86_64"

# Marks what a test starts, in the environment, so that orphans are found too: they are nobody's children that we know.
MARK: Final = "VMLOOP_TEST_MARK"

# A process that was told to end may still be at it when the test is over.
GRACE: Final = 3.0  # seconds


def require_binary(name: str) -> str:
    """The path of a program; skips the test if it is not there, or fails it where CI promises that it is."""
    found = shutil.which(name)
    if found is not None:
        return found
    if os.environ.get("CI") == "true":
        pytest.fail(f"{name} is not installed, and CI must have it")
    pytest.skip(f"{name} is not installed")


@pytest.fixture(scope="session")
def require_qemu() -> str:
    """The path of QEMU, for tests with the marker `qemu`."""
    return require_binary(QEMU)


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Fail a test that leaves processes behind, and end these."""
    before = _children()
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    outer = os.environ.get(MARK)
    os.environ[MARK] = mark
    try:
        yield
    finally:
        if outer is None:
            del os.environ[MARK]
        else:
            os.environ[MARK] = outer
    left = _still_running((_children() - before) | _marked(mark)) + _zombies(_children() - before)
    assert not left, f"left behind: {left}"


def _children() -> set[int]:
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended has none
            found |= set(map(int, path.read_text().split()))
    return found


def _marked(mark: str) -> set[int]:
    wanted = f"{MARK}={mark}".encode()
    found: set[int] = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in path.read_bytes().split(b"\0"):
                found.add(int(path.parent.name))
        except OSError:
            continue  # gone meanwhile, or not ours to look at
    return found


def _zombies(children: set[int]) -> list[str]:
    """Children that have ended and that nobody has waited for: they are waited for."""
    left: list[str] = []
    for pid in children:
        with contextlib.suppress(ChildProcessError):  # waited for meanwhile
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is not None:
                left.append(f"{pid}: ended, and not waited for")
    return left


def _still_running(pids: set[int]) -> list[str]:
    """Those that do not end within the grace, by their command line; they are killed."""
    deadline = time.monotonic() + GRACE
    left: list[str] = []
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                left.append(f"{pid}: {command}")
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)
    return left
