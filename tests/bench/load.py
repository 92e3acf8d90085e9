# SPDX-License-Identifier: Apache-2.0
"""One client that asks `query-status` as fast as answers come: `python -m vmloop.tests.bench.load raw SOCKET S` or `… vmloop ROOT NAME S`.

Prints "ready", waits for a line, works for S seconds, prints how many answers came. Started by measures.py, many at once.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from vmloop.client import connect

LOAD_SECONDS: Final = 3.0


class BareMonitor:
    """The least that a QMP client can be: the floor for all others."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        self._lines.readline()
        self._socket.sendall(b'{"execute":"qmp_capabilities"}\n')
        self._lines.readline()

    def query_status(self) -> None:
        self._socket.sendall(b'{"execute":"query-status"}\n')
        while b'"return"' not in self._lines.readline():
            pass  # an event

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


def commands_per_second(clients: list[list[str]]) -> float:
    """All client processes at once; each says how many answers it got."""
    program = [sys.executable, "-m", "vmloop.tests.bench.load"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    children = [subprocess.Popen([*program, *client, str(LOAD_SECONDS)], text=True, **pipes) for client in clients]  # type: ignore[call-overload]
    try:
        for child in children:
            assert child.stdout.readline() == "ready\n", f"a client did not start: {child.args}"
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
        return sum(int(child.stdout.readline()) for child in children) / LOAD_SECONDS
    finally:
        for child in children:
            child.communicate(timeout=LOAD_SECONDS * 10)


def main() -> None:
    """One client, until its time is over."""
    seconds = float(sys.argv[-1])
    if sys.argv[1] == "raw":
        bare = BareMonitor(Path(sys.argv[2]))
        _work(bare.query_status, seconds)
        bare.close()
    else:
        with connect(root=sys.argv[2]) as host:
            vm = host.vm(sys.argv[3])
            _work(lambda: vm.qmp("query-status"), seconds)


def _work(ask: Callable[[], object], seconds: float) -> None:
    ask()
    print("ready", flush=True)
    sys.stdin.readline()
    count = 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        ask()
        count += 1
    print(count, flush=True)


if __name__ == "__main__":
    main()
