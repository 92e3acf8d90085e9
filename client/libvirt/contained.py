# SPDX-License-Identifier: Apache-2.0
"""Running a program within bounds: of time, of output, and of what it leaves behind. Used by virsh.py.

libvirt starts the domain's emulator to learn what it can do, in a session of its own; should that hang, it is ended here too.
"""

from __future__ import annotations

import os
import selectors
import shlex
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
import psutil

from ...common.errors import DeadlineExceeded, TooLarge

# QEMU's arguments, or a domain's XML: some hundred KiB at most.
MAX_OUTPUT_BYTES: Final = 4 * 1024 * 1024
# A process that was killed is gone within milliseconds, unless it hangs in the kernel; then nobody can end it.
KILL_SECONDS: Final = 2.0
# A process may fork while it is being ended: so many rounds of looking.
_KILL_ROUNDS: Final = 5

_CHUNK: Final = 64 * 1024


class Finished(msgspec.Struct, frozen=True):
    """How a program ended, and what it printed."""

    status: int
    stdout: bytes
    stderr: bytes


class Identity(msgspec.Struct, frozen=True):
    """Whom to run it as."""

    user: int
    group: int
    groups: list[int]


def run(
    argv: list[str], seconds: float, *, environment: dict[str, str], identity: Identity | None = None, mark: str = ""
) -> Finished:
    """Run a program to its end. `mark`: a text in `environment` that is in no other process.

    Raises `DeadlineExceeded`, `TooLarge`, or OSError if it cannot be started. It is gone then, and all that carry the mark.
    """
    deadline = time.monotonic() + seconds
    try:
        with subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd="/",
            start_new_session=True,
            user=identity.user if identity is not None else None,
            group=identity.group if identity is not None else None,
            extra_groups=identity.groups if identity is not None else None,
        ) as child:
            try:
                stdout, stderr = _read(child, argv, deadline)
                status = child.wait(max(0.0, deadline - time.monotonic()))
            finally:
                _kill_group(child)
    except subprocess.TimeoutExpired as error:
        raise DeadlineExceeded(f"{shlex.join(argv)[:200]}: not done within {seconds:g} s") from error
    finally:
        if mark:
            _end(mark)
    return Finished(status, stdout, stderr)


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """Its session; not once it is reaped, when the number may be another's."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)


def _read(child: subprocess.Popen[bytes], argv: list[str], deadline: float) -> tuple[bytes, bytes]:
    assert child.stdout is not None
    assert child.stderr is not None
    read: dict[int, bytearray] = {child.stdout.fileno(): bytearray(), child.stderr.fileno(): bytearray()}
    with selectors.DefaultSelector() as selector:
        for fd in read:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(child.args, left)
            for key, _ in selector.select(left):
                chunk = os.read(key.fd, _CHUNK)
                read[key.fd] += chunk
                if not chunk:
                    selector.unregister(key.fd)
                elif len(read[key.fd]) > MAX_OUTPUT_BYTES:
                    raise TooLarge(
                        f"{shlex.join(argv)[:200]} printed more than {MAX_OUTPUT_BYTES} bytes", limit=MAX_OUTPUT_BYTES
                    )
    return bytes(read[child.stdout.fileno()]), bytes(read[child.stderr.fileno()])


def _end(mark: str) -> None:
    """End what carries the mark in its environment or its arguments: libvirt passes HOME on, and names a pid file to the emulator."""
    for _ in range(_KILL_ROUNDS):
        left = [process for process in psutil.process_iter() if _carries(process.pid, os.fsencode(mark))]
        if not left:
            return
        for process in left:
            with suppress(psutil.Error):  # gone meanwhile
                process.kill()
        psutil.wait_procs(left, timeout=KILL_SECONDS)


def _carries(pid: int, mark: bytes) -> bool:
    if pid == os.getpid():
        return False
    try:
        place = Path(f"/proc/{pid}")
        return mark in (place / "environ").read_bytes() or mark in (place / "cmdline").read_bytes()
    except OSError:
        return False  # gone meanwhile, or of another user, whose processes we have not begun
