# SPDX-License-Identifier: Apache-2.0
"""A recorded dialogue played again, by a stand-in for QEMU in a process of its own, behind a socket that any QMP client can be pointed at.

Used by the plugin's fixtures; usable in a `with` without pytest too. What is played how: worker/qemu/simulated_script.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from ..client.short_directory import make_short_directory
from ..common.definition import MONITOR_ID
from ..common.paths import require_socket_path
from ..worker.qemu.recording import read_recording
from ..worker.qemu.simulated_script import Script

END_SECONDS: Final = 10.0  # for the stand-in after SIGTERM; then it is killed
BACKLOG: Final = 8  # clients that wait for their turn


class Replay(NamedTuple):
    """A monitor that says what was recorded: its socket, and the process behind it."""

    socket: Path
    pid: int


@contextlib.contextmanager
def replaying(recording: str | Path, *, pace: float = 0.0) -> Iterator[Replay]:
    """Play a recording for the length of a `with`. `pace`: 0 says everything at once, 1 as slowly as it was recorded.

    Raises `ConfigError` for a file that is torn or no recording, or if no directory can be made for its socket.
    """
    path = Path(recording).absolute()
    Script(read_recording(path))  # here: the stand-in's own words would go to its standard error
    directory = make_short_directory()
    try:
        where = require_socket_path(directory / "qmp.sock")
        with _started(where, path, pace) as process:
            yield Replay(where, process.pid)
    finally:
        shutil.rmtree(directory)


@contextlib.contextmanager
def _started(where: Path, path: Path, pace: float) -> Iterator[subprocess.Popen[bytes]]:
    # It inherits a listening socket, so a client can connect before it has even started.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(os.fspath(where))
        listener.listen(BACKLOG)
        file = str(path).replace(",", ",,")
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "vmloop.worker.qemu.simulated"),
                *("-chardev", f"socket,id={MONITOR_ID},fd={listener.fileno()},server=on,wait=off"),
                *("-mon", f"chardev={MONITOR_ID},mode=control"),
                *("-replay", f"file={file},pace={pace:g}"),
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            process_group=0,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
