# SPDX-License-Identifier: Apache-2.0
"""vmloop inside a program: `embedded(DIR)` starts a private broker under a directory and ends it, with its VMs, when the program is done.

    with embedded("vms") as host:
        host.define({"name": "web1", "qemu": {"args": [...]}})
        host.vm("web1").start()

The broker is a process; in the caller there is no thread, no event loop and no signal handler of vmloop's, and of its own state nothing is
changed. The broker holds a pidfd of the caller: it sees the caller's end however it comes about, and no child that the caller has forked
keeps it alive. An exception (Ctrl-C too) may come between any two instructions and lose what was being started: then the caller's end of
the socket for reports is closed with the object that held it, and the broker ends as well.

aio_embedding.py is the same for asyncio, cli/run.py the command built on it.
"""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, get_args

from ..common.errors import BadRequest, ConfigError, DeadlineExceeded, Denied, Internal, NoBroker
from ..common.ownership import (
    MAX_REPORT_BYTES,
    MAX_STOP_TIMEOUT,
    Ending,
    Ownership,
    ownership_to_argument,
    read_farewell,
    read_report,
)
from ..common.paths import Paths, paths_under
from .calls import DEFAULT_TIMEOUT
from .endpoint import FIRST_WAIT, MAX_WAIT, find_endpoint, require_listening
from .session import Host
from .short_directory import make_short_directory

# A private broker serves within half a second; a machine with much else to do may need longer.
START_SECONDS: Final = 30.0
# Beyond the guests' own time: to kill what did not power down, to see workers and zygote off, and to remove a temporary root.
END_MARGIN: Final = 60.0
# Guests that do not listen must not make a program that was killed go on for long.
STOP_TIMEOUT: Final = 10.0

# A process that has ended, or was killed, is a zombie within this; if it is not, the kernel holds it.
REAP_SECONDS: Final = 5.0

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
    try:
        return EmbeddedHost(launch.paths, timeout, broker)
    except BaseException:
        if broker is not None:
            broker.end()
        raise


class EmbeddedHost(Host):
    """A Host whose broker ends with it. Close it, or use it in a `with`; one that is lost takes its broker with it all the same.

    In a child that the program forks it does nothing.
    """

    def __init__(self, paths: Paths, timeout: float, broker: PrivateBroker | None) -> None:
        """Made by `embedded`. `broker`: None for one that was there already."""
        super().__init__(find_endpoint(None, paths.run.parent), timeout)
        self.root = paths.run.parent
        self._owner = os.getpid()
        self._broker = broker

    @property
    def broker_fd(self) -> int | None:
        """An fd that becomes readable when the private broker ends, for who waits for several things.

        None: it is not this program's, or it has been ended.
        """
        return self._broker.fileno() if self._broker is not None else None

    def close(self) -> None:
        """End the broker, and the VMs as was chosen; returns when all that is to end has ended. One that was interrupted can be repeated.

        Raises `DeadlineExceeded` if that takes far too long; whatever is left goes on ending.
        """
        if os.getpid() != self._owner:
            return  # a forked child: sockets of ZeroMQ's must not be touched here, and the broker is not its own
        try:
            super().close()
        finally:
            if self._broker is not None:
                self._broker.end()


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
        self._given_up = threading.Event()
        self._deciding, self._started = threading.Lock(), False
        self._broker: PrivateBroker | None = None

    def start(self) -> PrivateBroker | None:
        """Start it; None if one that serves there already is joined."""
        if self._join and _serves(self.paths):
            return None
        made: Path | None = None
        try:
            if self._temporary:
                made = make_short_directory()
                self.paths = paths_under(made)
            broker = self._start_patiently()
            if self._is_wanted():
                return broker
            broker.end()
            return None
        except Denied as error:
            if self._join:
                return None
            raise Denied(f"{error.message}; with join=True that one is used", **error.fields) from None
        except BaseException:
            # Not under a broker that may still be ending: that removes it itself.
            if made is not None and (self._broker is None or self._broker.fileno() is None):
                shutil.rmtree(made, ignore_errors=True)
            raise

    def give_up(self) -> None:
        """Called by another thread than the one that is in `start`, which comes to its end soon.

        It raises, or gives None for a broker that it has ended again; or the broker, if that was started already.
        """
        with self._deciding:
            self._given_up.set()
            if not self._started and self._broker is not None:
                self._broker.give_up()

    def _is_wanted(self) -> bool:
        with self._deciding:
            self._started = not self._given_up.is_set()
        return self._started

    def _start_patiently(self) -> PrivateBroker:
        if self._join or self._wait <= 0:
            return self._start_one()
        from tenacity import (
            Retrying,
            retry_if_exception_type,
            sleep_using_event,
            stop_after_delay,
            stop_when_event_set,
            wait_exponential,
        )

        attempts = Retrying(
            reraise=True,
            retry=retry_if_exception_type(Denied),
            stop=stop_after_delay(self._wait) | stop_when_event_set(self._given_up),
            wait=wait_exponential(multiplier=FIRST_WAIT, max=MAX_WAIT),
            sleep=sleep_using_event(self._given_up),
        )
        return attempts(self._start_one)

    def _start_one(self) -> PrivateBroker:
        self._broker = PrivateBroker(self.paths, self._vms, self._stop_timeout, self._temporary)
        self._broker.start(self._given_up)
        return self._broker


class PrivateBroker:
    """A broker's process that belongs to this one. `end` may be called by several threads at once, and again after it has failed."""

    _pidfd = -1
    _reports: socket.socket | None = None

    def __init__(self, paths: Paths, vms: Ending, stop_timeout: float, temporary: bool) -> None:
        self._process: subprocess.Popen[bytes] | None = None  # until it has been reaped
        self._paths = paths
        self._vms: Ending = vms
        self._stop_timeout = stop_timeout
        self._temporary = temporary
        self._pid = os.getpid()
        self._all_ended: bool | None = None  # its last word; None: it had none
        # Of `end`: a second thread waits for the first, whose waits have deadlines. Reentrant, for a signal handler may close the host.
        self._lock = threading.RLock()

    def fileno(self) -> int | None:
        """Its pidfd: readable when it has ended; None if it is not there, or has been seen to have ended."""
        return self._pidfd if self._pidfd >= 0 else None

    def __del__(self) -> None:
        self._let_go()

    # -- start --------------------------------------------------------------------------------------------------------------

    def start(self, given_up: threading.Event | None = None) -> None:
        """Start it and wait until it serves. Raises what it says; then it has ended. `given_up`: set before `give_up` is called."""
        self._paths.create()
        try:
            self._start(given_up)
        except OSError as error:
            raise ConfigError(f"no broker can be started under {self._paths.run.parent}: {error}") from error

    def _start(self, given_up: threading.Event | None) -> None:
        with ExitStack() as fds:
            owner = _above_standard(os.pidfd_open(os.getpid()))
            fds.callback(os.close, owner)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._reports = socket.socket(fileno=_above_standard(ours.detach()))
            report = _above_standard(theirs.detach())
            fds.callback(os.close, report)
            try:
                if given_up is not None and given_up.is_set():
                    raise Internal(f"the start of a private broker under {self._paths.run.parent} was given up")
                self._process = self._spawn(owner, report)
                self._pidfd = _above_standard(os.pidfd_open(self._process.pid))
                self._await_report(self._reports)
            except BaseException:
                self._abandon()
                raise

    def give_up(self) -> None:
        """Called by another thread than the one that is in `start`: the broker is let go, and `start` raises."""
        reports = self._reports
        if reports is not None:
            with suppress(OSError):  # closed meanwhile
                reports.shutdown(socket.SHUT_RDWR)

    def _spawn(self, owner: int, report: int) -> subprocess.Popen[bytes]:
        ownership = Ownership(owner, report, self._vms, self._stop_timeout, self._temporary)
        root = os.fspath(self._paths.run.parent)
        environ = dict(os.environ)
        if environ.get("PYTHONPATH"):  # it may be relative to where we are
            environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, environ["PYTHONPATH"].split(os.pathsep)))
        with self._paths.broker_log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "vmloop.broker", root, "--owned", ownership_to_argument(ownership)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=[owner, report],
                start_new_session=True,  # Ctrl-C and the end of the terminal are for the caller, who ends the broker
                cwd="/",
                env=environ,
            )

    def _await_report(self, report: socket.socket) -> None:
        """Its one packet: it serves, or why not. Its death is waited for beside it, for a child of ours may hold the other end open."""
        poll = select.poll()
        for fd in (report.fileno(), self._pidfd):
            poll.register(fd, select.POLLIN)
        if not poll.poll(START_SECONDS * 1000):
            raise Internal(f"the private broker does not serve within {START_SECONDS:g} s: {self._log_tail()}")
        try:
            said = report.recv(MAX_REPORT_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            said = b""
        if not said:
            raise Internal(f"the private broker has ended before it served: {self._log_tail()}")
        error = read_report(said)
        if error is not None:
            raise error

    def _abandon(self) -> None:
        """It is of no use: it has ended, or is told to. If this is interrupted too, it ends for having been let go."""
        if self._reports is not None:
            self._reports.close()
        if self._process is not None:
            self._tell(signal.SIGTERM)
            if self._pidfd < 0 or not self._ends_within(END_MARGIN):
                self._tell(signal.SIGKILL)
            self._reap()
        self._let_go()

    def _log_tail(self) -> str:
        try:
            text = self._paths.broker_log.read_bytes()[-_LOG_TAIL_BYTES:]
        except OSError as error:
            return str(error)
        return text.decode(errors="replace").strip() or "it has not said why"

    # -- end ----------------------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """Have it end, with what was chosen for the VMs, and wait. One that was killed is started once more to do so.

        Raises `DeadlineExceeded`, `Internal`; then, and after an interruption, it may be called again. In a forked child it does nothing.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            before = self._process is None  # an earlier `end` saw it end, and failed or was interrupted
            self._end_process()
            if not self._is_over and (before or self._all_ended is None or self._all_ended):
                try:
                    self.start()
                except Denied:  # somebody else serves there meanwhile, and whatever runs is his
                    self._all_ended = True
                    return
                self._end_process()
        if self._all_ended is None:
            raise Internal(
                f"the private broker of {self._paths.run.parent} was killed, and the one that was to end what it left"
                f" has not done so: {self._log_tail()}"
            )
        if not self._all_ended:
            raise DeadlineExceeded(
                f"not all that runs under {self._paths.run.parent} could be ended: {self._log_tail()}"
            )

    def kill(self) -> None:
        """SIGKILL: what it served runs on. `start` has the next one, `end` ends it all. For tests of that (testing/private_broker.py)."""
        with self._lock:
            if self._process is not None:
                self._tell(signal.SIGKILL)
                self._reap()
                self._let_go()

    @property
    def _is_over(self) -> bool:
        return self._all_ended is True and not (self._temporary and self._paths.run.parent.exists())

    def _end_process(self) -> None:
        if self._process is None:
            return
        self._tell(signal.SIGTERM)
        if not self._ends_within(self._stop_timeout + END_MARGIN):
            pid = self._process.pid
            raise DeadlineExceeded(f"the private broker of {self._paths.run.parent} (pid {pid}) does not end")
        if self._process is not None:  # else a signal handler has closed the host while we waited
            self._all_ended = self._last_word()
            self._reap()
            self._let_go()

    def _last_word(self) -> bool | None:
        """Whether it has ended all that was to end; None if it was killed before it could say so."""
        assert self._reports is not None
        try:
            said = self._reports.recv(MAX_REPORT_BYTES, socket.MSG_DONTWAIT | socket.MSG_PEEK)  # if we are interrupted
        except BlockingIOError:  # a child of ours has its end of the socket, by a fork while it was being started
            said = b""
        return read_farewell(said) if said else None

    # -- its process --------------------------------------------------------------------------------------------------------

    def _tell(self, number: signal.Signals) -> None:
        """By its pidfd: its pid may be another's by now, if somebody else in this program reaps its children."""
        assert self._process is not None
        if self._pidfd < 0:
            self._process.send_signal(number)
            return
        with suppress(ProcessLookupError):  # it has ended
            signal.pidfd_send_signal(self._pidfd, number)

    def _ends_within(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def _reap(self) -> None:
        """It has ended, or was killed just now. What the kernel holds for longer is left to it."""
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(REAP_SECONDS)
            self._process = None

    def _let_go(self) -> None:
        if self._reports is not None:
            self._reports.close()
        self._reports = None
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)


def _serves(paths: Paths) -> bool:
    try:
        require_listening(find_endpoint(None, paths.run.parent))
    except NoBroker:
        return False
    return True


def _above_standard(fd: int) -> int:
    """The fd under a number over 2: in a program that has closed its standard streams it may have one of theirs."""
    if fd > 2:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)
