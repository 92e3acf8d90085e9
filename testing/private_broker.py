# SPDX-License-Identifier: Apache-2.0
"""A vmloop of one's own for a test: a private broker (client/embedding.py) under a short temporary directory, and nothing of it left.

Made by the fixture `broker` of the plugin; usable in a `with` without pytest too. What it starts shares nothing with other brokers of the
machine, so tests run side by side; and it ends with the process that has made it, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from ..client import embedding
from ..client.session import Host, connect
from ..client.short_directory import make_short_directory
from ..common.errors import LaunchFailed, NotRunning, VmloopError
from ..common.paths import Paths, paths_under

END_SECONDS: Final = 30.0  # for what is still there when the broker has ended; then it is killed and told
LOG_TAIL_BYTES: Final = 4096  # of the broker's log, in errors

_LOOK_AGAIN: Final = 0.01  # seconds between two looks at which processes are left
_STOP_TIMEOUT: Final = 1.0  # nobody is asked to power down: VMs are killed


class PrivateBroker:
    """One broker. `host` is a client of it, `root` its directory (as `vmloop --root` takes it)."""

    def __init__(self, settings: str = "") -> None:
        """`settings`: the text of etc/vmloop.toml. Raises `LaunchFailed` with its log if the broker does not come up, `ConfigError` if
        no directory can be made for it."""
        self.root = make_short_directory()
        self.paths: Paths = paths_under(self.root)
        self.handlers_directory = self.paths.etc / "handlers"
        # Temporary: if this process is killed the broker removes the directory.
        self._broker = embedding.PrivateBroker(self.paths, "kill", _STOP_TIMEOUT, temporary=True)
        self._host: Host | None = None
        self._vms: dict[str, int] = {}  # how many names of a kind were given out
        try:
            self.handlers_directory.mkdir(parents=True)
            if settings:
                self.paths.settings_file.write_text(settings)
            self.start()
            self._host = connect(root=self.root)
        except BaseException:
            self._clear_away()
            raise

    # -- start ------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """The next broker, after `kill`; the test's client goes on. Raises `LaunchFailed` with its log if it does not come up."""
        try:
            self._broker.start()
        except VmloopError as error:
            said = f"{error}\n{self.log()}"
            raise LaunchFailed(f"the test's broker did not come up: {said}", log=said) from error

    # -- run --------------------------------------------------------------------------------------------------------------

    @property
    def host(self) -> Host:
        """A client of the broker, closed with it. While no broker is there its requests wait for the next one."""
        assert self._host is not None
        return self._host

    def log(self) -> str:
        """The end of the broker's log."""
        try:
            return self.paths.broker_log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
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
        self._broker.kill()

    # -- stop -------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End broker, workers, VMs, and remove the directory. Raises `AssertionError` if they did not end by themselves."""
        trouble = ""
        try:
            trouble = self._shut_down()
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
        """Have the broker kill its VMs and end; why that did not work, or nothing."""
        fd = self._broker.fileno()
        if fd is None:  # killed on purpose: only the next one can end what it left
            self.start()
        elif _is_readable(fd):
            return "ended during the test"
        try:
            with connect(root=self.root, timeout=END_SECONDS) as host:
                for vm in host.list():
                    if vm.attached and vm.pid is None:  # nothing could end it but its owner
                        with contextlib.suppress(NotRunning):
                            host.vm(vm.name).detach()
            self._broker.end()
        except VmloopError as error:
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
        self._broker.kill()
        with contextlib.suppress(FileNotFoundError):  # the broker has removed it
            shutil.rmtree(self.root)


def _is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
