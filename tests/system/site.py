# SPDX-License-Identifier: Apache-2.0
"""A vmloop of its own for one test: a real broker process under a directory of its own, and what is left of it afterwards.

Used by the fixtures in conftest.py, and by tests/bench and deploy/demo.py's kind of programs that want a broker for a while.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from vmloop.client import connect
from vmloop.client.session import Host
from vmloop.common.errors import NoBroker, NotRunning
from vmloop.common.paths import Paths, paths_under

# A broker is up within half a second here; a busy machine may need longer.
START_SECONDS: Final = 15.0
END_SECONDS: Final = 15.0

# The smallest real VM: no devices, no guest, CPUs that run the firmware.
REAL_ARGS: Final = ["-machine", "q35,accel=tcg", "-m", "64", "-nodefaults", "-display", "none"]


class Site:
    """One root directory with its broker."""

    def __init__(self, settings: str = "") -> None:
        """`settings`: the text of etc/vmloop.toml, which the broker reads when it starts."""
        # Not pytest's tmp_path: a unix socket's path has 107 bytes.
        self.root = Path(tempfile.mkdtemp(prefix="vml-"))
        self.paths: Paths = paths_under(self.root)
        self.broker: subprocess.Popen[bytes] | None = None
        self._hosts: list[Host] = []
        self._started: list[subprocess.Popen[bytes]] = []
        self._log = (self.root / "broker.log").open("ab")
        if settings:
            self.paths.etc.mkdir()
            self.paths.settings_file.write_text(settings)

    # -- the broker ---------------------------------------------------------------------------------------------------------

    def start_broker(self) -> None:
        self.broker = subprocess.Popen(
            [sys.executable, "-m", "vmloop.broker", str(self.root)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            process_group=0,
        )

    def host(self, timeout: float = 30.0) -> Host:
        """A new client."""
        host = connect(root=self.root, wait=START_SECONDS, timeout=timeout)
        self._hosts.append(host)
        return host

    def kill_broker(self) -> None:
        assert self.broker is not None
        self.broker.kill()
        self.broker.wait()

    def log(self) -> str:
        return (self.root / "broker.log").read_text()

    # -- VMs ----------------------------------------------------------------------------------------------------------------

    def define(self, host: Host, name: str, *args: str, binary: str = "simulated", **sections: Any) -> None:
        host.define({"name": name, "qemu": {"binary": binary, "args": list(args)}, **sections})

    def define_real(self, host: Host, name: str, *more: str) -> None:
        self.define(host, name, *REAL_ARGS, *more, binary="qemu-system-x86_64")

    def start(self, argv: list[str], ready: bytes) -> subprocess.Popen[bytes]:
        """A program of the test's own that prints a line when it is ready; ended with the site."""
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._log)
        self._started.append(child)
        assert child.stdout is not None
        assert select.select([child.stdout], [], [], START_SECONDS)[0], f"{argv[0]} is not ready in time"
        line = child.stdout.readline()
        assert line.startswith(ready), line
        return child

    def simulate(self, count: int, prefix: str = "sim", *more: str) -> tuple[Path, list[str]]:
        """Simulated VMs, many in one process: their directory and names; sockets are DIR/NAME.qmp and DIR/NAME.qga. `more`: arguments."""
        directory = self.root / "s"
        directory.mkdir(exist_ok=True)
        program = [sys.executable, "-m", "vmloop.worker.qemu.simulated", "--directory", str(directory)]
        self.start([*program, "--count", str(count), "--prefix", prefix, *more], b"ready")
        return directory, sorted(path.stem for path in directory.glob(f"{prefix}*.qmp"))

    # -- the end ------------------------------------------------------------------------------------------------------------

    def processes(self) -> dict[int, str]:
        """Every process that belongs to this root, by its command line or its environment."""
        return processes_of(self.root)

    def close(self) -> None:
        """End everything, and check that nothing of it is left: processes, sockets, files of runs."""
        try:
            self.close_processes()
            sockets = [str(path) for path in self.paths.run.glob("vms/*/*.sock")]
            assert not sockets, f"left over: {sockets}"
        finally:
            for host in self._hosts:
                host.close()
            for child in self._started:
                if child.stdout is not None:
                    child.stdout.close()
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._log.close()
            shutil.rmtree(self.root)

    def close_processes(self) -> None:
        """End everything that runs, and check that nothing does; a second call does nothing."""
        self._end_broker()
        for child in self._started:
            child.terminate()
            child.wait(END_SECONDS)
        left = wait_for(lambda: not (found := self.processes()) or found, END_SECONDS)
        assert left is True, f"left running: {left}"

    def _end_broker(self) -> None:
        if self.broker is None:
            return
        if self.broker.poll() is not None:
            self.start_broker()  # whatever the test did to it, another one can end what is left
        try:
            with connect(root=self.root, wait=START_SECONDS) as host:
                for vm in host.list():
                    if vm.state == "unknown" and vm.pid is None:
                        with contextlib.suppress(NotRunning):  # detached already
                            host.vm(vm.name).detach()
                host.shutdown("kill")
        except NoBroker as error:
            raise AssertionError(f"the broker does not come up any more: {self.log()}") from error
        self.broker.wait(END_SECONDS)
        self.broker = None


def processes_of(root: Path) -> dict[int, str]:
    """Every process that belongs to a root, by its command line or its environment; but not this one."""
    wanted = os.fsencode(root)
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            command = (directory / "cmdline").read_bytes()
            if command and (wanted in command or wanted in (directory / "environ").read_bytes()):
                found[int(directory.name)] = command.replace(b"\0", b" ").decode(errors="replace")
    found.pop(os.getpid(), None)
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Ask until the answer is true, or time is over; the last answer. For what no event tells the test."""
    deadline = time.monotonic() + seconds
    while True:
        answer = condition()
        if answer is True or (answer and not isinstance(answer, dict)) or time.monotonic() >= deadline:
            return answer
        select.select([], [], [], 0.01)


def kill_process(pid: int) -> None:
    """SIGKILL, and wait for the end."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert select.select([pidfd], [], [], END_SECONDS)[0], f"{pid} does not end"
    finally:
        os.close(pidfd)


def signal_process(pid: int, number: int) -> None:
    """Send a signal through a pidfd."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, number)
    finally:
        os.close(pidfd)
