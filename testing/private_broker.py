# SPDX-License-Identifier: Apache-2.0
"""A vmloop of one's own for a test: a real broker process under a short temporary directory, and nothing of it left afterwards.

Made by the fixture `broker` of the plugin; usable in a `with` without pytest too. What it starts shares nothing with other brokers of the
machine, so tests run side by side.
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
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tenacity import Retrying, retry_if_exception, stop_after_delay

from ..client.session import Host, connect
from ..common.errors import ConfigError, LaunchFailed, NoBroker, NotRunning, VmloopError
from ..common.paths import Paths, paths_under

START_SECONDS: Final = 30.0  # half a second on an idle machine; test machines are not idle
END_SECONDS: Final = 30.0  # to kill its VMs and end; then everything that is left is killed and told
LOOK_AT_PROCESS: Final = 0.25  # seconds between two looks whether the broker that is to come up has ended instead
LINGER_SECONDS: Final = 1.0  # that processes have after the broker's end to end by themselves; then they are told to
LOG_TAIL_BYTES: Final = 4096  # of the broker's log, in errors
MAX_DIRECTORY_BYTES: Final = (
    32  # of the one that roots are made in: leaves names of VMs 40 letters of a socket path's 107 bytes
)

_LOOK_AGAIN: Final = 0.01  # seconds between two looks at which processes are left


class PrivateBroker:
    """One broker. `host` is a client of it, `root` its directory (as `vmloop --root` takes it)."""

    def __init__(self, settings: str = "") -> None:
        """`settings`: the text of etc/vmloop.toml. Raises `LaunchFailed` with its log if the broker does not come up."""
        self.root = Path(tempfile.mkdtemp(prefix="vml-", dir=_short_directory()))
        self.paths: Paths = paths_under(self.root)
        self.handlers_directory = self.paths.etc / "handlers"
        self._log_path = self.root / "broker.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._host: Host | None = None
        self._vms: dict[str, int] = {}  # how many names of a kind were given out
        try:
            self.handlers_directory.mkdir(parents=True)
            if settings:
                self.paths.settings_file.write_text(settings)
            self.start()
        except BaseException:
            self._clear_away()
            raise

    # -- start ------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """The next broker, after `kill`. Raises `LaunchFailed` with its log if it does not come up."""
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vmloop.broker", str(self.root)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,  # Ctrl-C is for the test, which ends the broker in order
            )
        process = self._process

        def may_come(error: BaseException) -> bool:
            return isinstance(error, NoBroker) and process.poll() is None

        try:
            retrying = Retrying(reraise=True, retry=retry_if_exception(may_come), stop=stop_after_delay(START_SECONDS))
            host = retrying(connect, root=self.root, wait=LOOK_AT_PROCESS)
        except NoBroker as error:
            raise LaunchFailed(f"the test's broker did not come up: {error}\n{self.log()}", log=self.log()) from error
        if self._host is None:
            self._host = host
        else:  # the client that the test has goes on
            host.close()

    # -- run --------------------------------------------------------------------------------------------------------------

    @property
    def host(self) -> Host:
        """A client of the broker, closed with it. While no broker is there its requests wait for the next one."""
        assert self._host is not None
        return self._host

    def log(self) -> str:
        """The end of the broker's log."""
        try:
            return self._log_path.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
        except OSError as error:
            return f"(no log: {error.strerror})"

    def new_name(self, kind: str = "vm") -> str:
        """A name that no VM of this broker has had: vm1, vm2 …"""
        self._vms[kind] = self._vms.get(kind, 0) + 1
        return f"{kind}{self._vms[kind]}"

    def define_simulated(self, name: str, *args: str, **sections: Any) -> None:
        """Define a simulated VM with its agent on. `sections`: further ones of a definition. Raises `ConfigError`, `VmExists`."""
        sections.setdefault("agent", {"enabled": True})
        self.host.define({"name": name, "qemu": {"binary": "simulated", "args": list(args)}, **sections})

    def kill(self) -> None:
        """The broker dies (SIGKILL): its VMs and their workers run on. `start` has the next one."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(END_SECONDS)
        self._process = None

    # -- stop -------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End broker, workers, VMs, and remove the directory. Raises `AssertionError` if they did not end by themselves."""
        trouble = ""
        try:
            trouble = self._shut_down()
            # A worker without a VM, and its zygote, stay for some seconds in case something is asked of them.
            for pid in self._wait_until_gone(LINGER_SECONDS):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            if left := self._wait_until_gone(END_SECONDS):
                trouble = f"{trouble}; left running: {left}"
        finally:
            log = self.log()
            self._clear_away()
        assert not trouble, f"the test's broker: {trouble}\n{log}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _shut_down(self) -> str:
        """Ask the broker to kill its VMs and end; why that did not work, or nothing."""
        if self._process is None:  # only it can end what the killed one left
            self.start()
        assert self._process is not None
        if self._process.poll() is not None:
            return f"ended during the test with status {self._process.returncode}"
        try:
            with connect(root=self.root, timeout=END_SECONDS) as host:
                for vm in host.list():
                    if vm.attached and vm.pid is None:  # nothing could end it but its owner
                        with contextlib.suppress(NotRunning):
                            host.vm(vm.name).detach()
                host.shutdown("kill")
            self._process.wait(END_SECONDS)
        except (VmloopError, subprocess.TimeoutExpired) as error:
            return f"did not end: {error}"
        return ""

    def _wait_until_gone(self, seconds: float) -> dict[int, str]:
        until = time.monotonic() + seconds
        while (left := self._processes()) and time.monotonic() < until:
            select.select([], [], [], _LOOK_AGAIN)
        return left

    def _processes(self) -> dict[int, str]:
        """Every process of this root: it stands in the command line or in the environment."""
        wanted = os.fsencode(self.root)
        found = {}
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                command = (directory / "cmdline").read_bytes()
                if command and (wanted in command or wanted in (directory / "environ").read_bytes()):
                    found[int(directory.name)] = command.replace(b"\0", b" ").decode(errors="replace").strip()
        found.pop(os.getpid(), None)
        return found

    def _clear_away(self) -> None:
        """Whatever there still is: kill it, close it, remove it."""
        if self._host is not None:
            self._host.close()
            self._host = None
        for pid in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait(END_SECONDS)
            self._process = None
        shutil.rmtree(self.root)


def _short_directory() -> str:
    """Where temporary files go, if that leaves room for a socket's path; else /tmp. Raises `ConfigError` if neither is to be had."""
    usual = tempfile.gettempdir()
    if len(os.fsencode(usual)) <= MAX_DIRECTORY_BYTES:
        return usual
    if not os.access("/tmp", os.W_OK):
        raise ConfigError(
            f"{usual} is too long for unix sockets, and /tmp cannot be written: set TMPDIR to a short path"
        )
    return "/tmp"
