# SPDX-License-Identifier: Apache-2.0
"""vmloop inside a program: `embedded(DIR)` starts a private broker under a directory and ends it, with its VMs, when the program is done.

    with embedded("vms") as host:
        host.define({"name": "web1", "qemu": {"args": [...]}})
        host.vm("web1").start()

The broker is a process; in the caller there is no thread, no event loop and no signal handler of vmloop's, and of its own state nothing is
changed. The broker holds a pidfd of the caller: it sees the caller's end however it comes about, and no child that the caller has forked
keeps it alive. aio_embedding.py is the same for asyncio, cli/run.py the command built on it.
"""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Final, get_args

from ..common.errors import BadRequest, ConfigError, DeadlineExceeded, Denied, Internal, NoBroker
from ..common.ownership import (
    MAX_REPORT_BYTES,
    MAX_STOP_TIMEOUT,
    NOT_ENDED,
    Ending,
    Ownership,
    ownership_to_argument,
    read_report,
)
from ..common.paths import Paths, paths_under
from .calls import DEFAULT_TIMEOUT
from .endpoint import FIRST_WAIT, MAX_WAIT, find_endpoint, require_listening
from .session import Host

# A private broker serves within half a second; a machine with much else to do may need longer.
START_SECONDS: Final = 30.0
# Beyond the guests' own time: to kill what did not power down, to see workers and zygote off, and to remove a temporary root.
END_MARGIN: Final = 60.0
# Guests that do not listen must not make a program that was killed go on for long.
STOP_TIMEOUT: Final = 10.0

_LOG_TAIL_BYTES: Final = 2000  # of broker.log, when it says nothing else


def embedded(
    directory: str | Path | None = None,
    *,
    vms: Ending = "stop",
    stop_timeout: float = STOP_TIMEOUT,
    join: bool = False,
    wait: float = 0.0,
    timeout: float = DEFAULT_TIMEOUT,
) -> EmbeddedHost:
    """A host of this program's own, under a directory (made if need be; None: a temporary one, removed at the end).

    `vms`: what becomes of those that run when it is closed, or when this process ends in any other way: `stop`: asked to power down,
    and killed after `stop_timeout` seconds; `kill`: at once; `leave`: they run on, for a later `embedded` of the same directory, or a
    `vmloop --root DIR broker`. `join`: where a broker serves the directory already, use that one, and leave it as it is. `wait`: seconds
    to keep trying while another one has the directory, which may just be ending. `timeout`: as of `connect`.

    Raises `Denied` (field `pid`) if a broker serves the directory, `ConfigError` if the directory is of no use (its sockets' paths
    would be over 107 bytes, for instance), `Internal` if the broker does not come up.
    """
    launch = Launch(directory, vms, stop_timeout, join, wait)
    broker = launch.start()
    return EmbeddedHost(launch.paths, timeout, broker)


class EmbeddedHost(Host):
    """A Host whose broker ends with it. Close it, or use it in a `with`. In a child that the program forks it does nothing."""

    def __init__(self, paths: Paths, timeout: float, broker: PrivateBroker | None) -> None:
        """Made by `embedded`. `broker`: None for one that was there already."""
        super().__init__(find_endpoint(None, paths.run.parent), timeout)
        self.root = paths.run.parent
        self._owner = os.getpid()
        self._broker = broker

    @property
    def broker_fd(self) -> int | None:
        """An fd that becomes readable when the private broker ends, for who waits for several things; None: it is not this program's."""
        return self._broker.fileno() if self._broker is not None else None

    def close(self) -> None:
        """End the broker, and the VMs as was chosen; returns when all that is to end has ended.

        Raises `DeadlineExceeded` if that takes far too long; whatever is left goes on ending.
        """
        if os.getpid() != self._owner:
            return  # a forked child: sockets of ZeroMQ's must not be touched here, and the broker is not its own
        try:
            super().close()
        finally:
            broker, self._broker = self._broker, None
            if broker is not None:
                broker.end()


class Launch:
    """What `embedded` was asked for, checked; for the blocking client and the asyncio one. Raises `BadRequest` and `ConfigError`."""

    def __init__(self, directory: str | Path | None, vms: Ending, stop_timeout: float, join: bool, wait: float) -> None:
        if vms not in get_args(Ending):
            raise BadRequest(f"embedded: vms={vms!r:.60} is none of {', '.join(get_args(Ending))}")
        if not 0 < stop_timeout <= MAX_STOP_TIMEOUT:
            raise BadRequest(f"embedded: stop_timeout={stop_timeout!r} is not over 0 and at most {MAX_STOP_TIMEOUT:g}")
        if directory is None and vms == "leave":
            raise BadRequest("embedded: VMs that are left running need a directory in which they are found again")
        if not sys.executable:
            raise ConfigError("embedded: this Python does not know its own executable (sys.executable)")
        self._temporary = directory is None
        self._vms: Ending = vms
        self._stop_timeout = stop_timeout
        self._join = join
        self._wait = wait
        self._directory = Path(directory).absolute() if directory is not None else None
        self.paths = paths_under(self._directory or Path("/"))

    def start(self) -> PrivateBroker | None:
        """Start it; None if one that serves there already is joined."""
        if self._directory is None:
            self.paths = paths_under(Path(tempfile.mkdtemp(prefix="vml-")))
        elif self._join and _serves(self.paths):
            return None
        try:
            return self._start_patiently()
        except Denied as error:
            if self._join:
                return None
            raise Denied(f"{error.message}; with join=True that one is used", **error.fields) from None
        except BaseException:
            if self._temporary:
                shutil.rmtree(self.paths.run.parent, ignore_errors=True)
            raise

    def _start_patiently(self) -> PrivateBroker:
        if self._join or self._wait <= 0:
            return self._start_one()
        from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

        attempts = Retrying(
            reraise=True,
            retry=retry_if_exception_type(Denied),
            stop=stop_after_delay(self._wait),
            wait=wait_exponential(multiplier=FIRST_WAIT, max=MAX_WAIT),
        )
        return attempts(self._start_one)

    def _start_one(self) -> PrivateBroker:
        broker = PrivateBroker(self.paths, self._vms, self._stop_timeout, self._temporary)
        broker.start()
        return broker


class PrivateBroker:
    """A broker's process that belongs to this one. `end` may be called from another thread than `start`."""

    def __init__(self, paths: Paths, vms: Ending, stop_timeout: float, temporary: bool) -> None:
        self._paths = paths
        self._vms: Ending = vms
        self._stop_timeout = stop_timeout
        self._temporary = temporary
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def fileno(self) -> int:
        """Its pidfd: readable when it has ended."""
        return self._pidfd

    # -- start --------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start it and wait until it serves. Raises what it says; then it has ended."""
        self._paths.create()
        with ExitStack() as fds:
            owner = _above_standard(fds, os.pidfd_open(os.getpid()))
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            fds.enter_context(ours)
            report = _above_standard(fds, theirs.detach())
            self._process = self._spawn(owner, report)
            try:
                self._pidfd = os.pidfd_open(self._process.pid)
                self._await_report(ours)
            except BaseException:
                self._abandon()
                raise

    def _spawn(self, owner: int, report: int) -> subprocess.Popen[bytes]:
        ownership = Ownership(owner, report, self._vms, self._stop_timeout, self._temporary)
        root = os.fspath(self._paths.run.parent)
        try:
            with self._paths.broker_log.open("ab") as log:
                return subprocess.Popen(
                    [sys.executable, "-m", "vmloop.broker", root, "--owned", ownership_to_argument(ownership)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    pass_fds=[owner, report],
                    start_new_session=True,  # Ctrl-C and the end of the terminal are for the caller, who ends the broker
                    cwd="/",
                )
        except OSError as error:
            raise ConfigError(f"no broker can be started under {root}: {error}") from error

    def _await_report(self, report: socket.socket) -> None:
        """Its one packet: it serves, or why not. Its death is waited for beside it, for a child of ours may hold the other end open."""
        poll = select.poll()
        for end in (report, self):
            poll.register(end, select.POLLIN)
        if not poll.poll(START_SECONDS * 1000):
            raise Internal(f"the private broker does not serve within {START_SECONDS:g} s: {self._log_tail()}")
        report.setblocking(False)
        try:
            said = report.recv(MAX_REPORT_BYTES)
        except BlockingIOError:
            said = b""
        if not said:
            raise Internal(f"the private broker has ended before it served: {self._log_tail()}")
        error = read_report(said)
        if error is not None:
            raise error

    def _abandon(self) -> None:
        """It is of no use: it has ended, or is told to."""
        assert self._process is not None
        self._process.terminate()
        if self._pidfd < 0 or not self._ends_within(END_MARGIN):
            self._process.kill()
        self._reap()

    def _log_tail(self) -> str:
        try:
            text = self._paths.broker_log.read_bytes()[-_LOG_TAIL_BYTES:]
        except OSError as error:
            return str(error)
        return text.decode(errors="replace").strip() or "it has not said why"

    # -- end ----------------------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """Have it end, with what was chosen for the VMs, and wait. One that was killed is started once more to do so.

        Raises `DeadlineExceeded`, `Internal`.
        """
        code = self._end_process()
        root = self._paths.run.parent
        if code not in (0, NOT_ENDED) or (self._temporary and code == 0 and root.exists()):
            try:
                self.start()
            except Denied:
                return  # somebody else serves there meanwhile, and whatever runs is his
            code = self._end_process()
        if code == NOT_ENDED:
            raise DeadlineExceeded(f"not all that runs under {root} could be ended: {self._log_tail()}")
        if code != 0:
            raise Internal(
                f"the private broker of {root} was killed, and the one that was to end what it left too ({code})"
            )

    def _end_process(self) -> int:
        assert self._process is not None
        self._process.terminate()  # does nothing if it has ended
        if not self._ends_within(self._stop_timeout + END_MARGIN):
            raise DeadlineExceeded(f"the private broker of {self._paths.run.parent} (pid {self.pid}) does not end")
        return self._reap()

    def _ends_within(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def _reap(self) -> int:
        assert self._process is not None
        code = self._process.wait()  # it has ended, or was killed just now
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        return code


def _serves(paths: Paths) -> bool:
    try:
        require_listening(find_endpoint(None, paths.run.parent))
    except NoBroker:
        return False
    return True


def _above_standard(fds: ExitStack, fd: int) -> int:
    """The fd under a number over 2: in a program that has closed its standard streams it may have one of theirs."""
    if fd <= 2:
        low, fd = fd, fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
        os.close(low)
    fds.callback(os.close, fd)
    return fd
