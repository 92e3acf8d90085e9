# SPDX-License-Identifier: Apache-2.0
"""One VM in the foreground: waits for its end, for signals and for its console, in one poll(2). Used by run.py.

    SIGINT         asks the guest to power down; once more: kills the VM
    SIGTERM, HUP   ask the guest to power down, and kill the VM when its time is over

There is no event loop here that anything depends on: QEMU's monitor and the guest agent are served by the VM's worker, whatever this
process does. What takes time (start, stop, kill, the stream of events) waits in threads, which only report.
"""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

from ...common.errors import Internal, LaunchFailed, MonitorLost, NotRunning, OutcomeUnknown, VmloopError
from ..embedding import EmbeddedHost
from ..stream import Event
from ..subscription import Events
from ..vm import Vm
from .console import Console

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A guest that is asked by Ctrl-C has as long as it likes: the next one kills. The wire's limit, less what a stop is given beyond it.
PATIENCE: Final = 3595.0
# The end is known: threads that wait for answers about it get them within this.
LAST_ANSWERS: Final = 10.0

# What a request is answered when the VM ends under it; how it ended is told by its events.
_ABOUT_ITS_END: Final = (NotRunning, MonitorLost, OutcomeUnknown)


@dataclass(frozen=True, slots=True)
class End:
    """How a VM has ended: its last VM_STATE."""

    state: str
    reason: str
    detail: str
    panicked: bool  # its guest had panicked, and not run since


class Doorbell:
    """Signals and threads leave their news here and ring; the main thread polls `fileno`. Signals are caught within a `with`."""

    def __init__(self) -> None:
        self.signals: deque[int] = deque()
        self.news: deque[Callable[[], None]] = deque()  # of threads: a few for each thing asked
        self._read, self._write = socket.socketpair()
        for end in (self._read, self._write):
            end.setblocking(False)

    def __enter__(self) -> Doorbell:
        # What whoever started us ignores (nohup, a shell's background job) stays ignored.
        heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._on_signal) for number in heeded}
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._read.close()
        self._write.close()

    def fileno(self) -> int:
        return self._read.fileno()

    def tell(self, news: Callable[[], None]) -> None:
        """Called by threads: `news` is called on the main thread."""
        self.news.append(news)
        with contextlib.suppress(OSError):  # full: it rings already; closed: nobody listens any more
            self._write.send(b"\0")

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._read.recv(4096)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.signals.append(number)


class Foreground:
    """One run of one VM."""

    def __init__(
        self,
        host: EmbeddedHost,
        vm: Vm,
        bell: Doorbell,
        console: tuple[Console, Path] | None,
        *,
        paused: bool,
        stop_timeout: float,
        say: Callable[[str], None],
        on_event: Callable[[Event], None],
        on_running: Callable[[], None],
        on_stopping: Callable[[], None],
    ) -> None:
        """`console`: with the path of QEMU's end. `paused`: the VM is left so. `on_event` is called by another thread."""
        self._host = host
        self._vm = vm
        self._bell = bell
        self._console: Console | None = console[0] if console is not None else None
        self._console_path: Path | None = console[1] if console is not None else None
        self._paused = paused
        self._stop_timeout = stop_timeout
        self._say = say
        self._on_event = on_event
        self._on_running = on_running
        self._on_stopping = on_stopping
        self._end: End | None = None
        self._failure: VmloopError | None = None
        self._starting, self._came_up = True, False
        self._asked = self._kills = False
        self._threads: list[threading.Thread] = []

    def run(self) -> End:
        """Start it, and return how it ended. Raises what its start raised, and `Internal` if the broker is lost."""
        with self._host.events(self._vm.name) as events, contextlib.ExitStack() as at_end:
            self._spawn(lambda: self._watch(events))
            at_end.callback(self._join)
            if self._console is not None:
                at_end.callback(self._console.close)
            self._ask(lambda: self._vm.start(paused=self._console is not None or self._paused), self._on_started)
            while self._goes_on:
                self._turn()
            self._on_stopping()
        if self._failure is not None:
            raise self._failure
        assert self._end is not None
        return self._end

    @property
    def _goes_on(self) -> bool:
        """A start that fails says why after the end has been told."""
        return self._failure is None and (self._end is None or self._starting)

    # -- one turn -----------------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        poll = select.poll()
        for fd, events in self._interests():
            poll.register(fd, events)
        ready = dict(poll.poll())  # until something happens: a VM may run for years
        if self._bell.fileno() in ready:
            self._bell.drain()
        while self._bell.news:
            self._bell.news.popleft()()
        while self._bell.signals:
            self._on_signal(self._bell.signals.popleft())
        if self._host.broker_fd in ready and self._goes_on:
            self._failure = Internal(f"VM {self._vm.name}: its broker has ended under it; it is being stopped")
        if self._console is not None:
            self._console.turn(ready)

    def _interests(self) -> Iterator[tuple[int, int]]:
        yield self._bell.fileno(), select.POLLIN
        if self._host.broker_fd is not None:
            yield self._host.broker_fd, select.POLLIN
        if self._console is not None:
            yield from self._console.interests().items()

    # -- start --------------------------------------------------------------------------------------------------------------

    def _on_started(self, error: VmloopError | None) -> None:
        self._starting = False
        if error is not None:
            ended = self._came_up and isinstance(error, (*_ABOUT_ITS_END, LaunchFailed))
            if not ended:  # before its start was answered; its events tell how
                self._failure = error
            return
        self._came_up = True
        if self._console is not None and self._console_path is not None:
            try:
                if not self._console.open(self._console_path):
                    self._say("in the background: what the guest says is shown, and nothing is typed to it")
            except VmloopError as failure:
                self._failure = failure
                return
            if not self._paused:  # it was held until somebody listens: its first words are not lost
                self._ask(self._vm.resume, self._on_resumed)
                return
        self._on_running()

    def _on_resumed(self, error: VmloopError | None) -> None:
        if error is None:
            self._on_running()
        elif not isinstance(error, _ABOUT_ITS_END):
            self._failure = error

    # -- stop ---------------------------------------------------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        self._on_stopping()
        if number == signal.SIGINT and (self._asked or not self._came_up):
            self._kill()
        elif number == signal.SIGINT:
            self._asked = True
            self._say("asking the guest to power down; Ctrl-C once more kills the VM")
            self._ask(lambda: self._vm.stop(timeout=PATIENCE), self._on_stopped)
        elif not self._kills:
            self._kills = True
            self._say(f"asking the guest to power down; in {self._stop_timeout:g} s the VM is killed")
            self._ask(lambda: self._vm.stop(timeout=self._stop_timeout, force=True), self._on_forced)

    def _kill(self) -> None:
        self._say("killing the VM")
        self._ask(self._vm.kill, self._on_stopped)

    def _on_forced(self, error: VmloopError | None) -> None:
        """It was to be killed at its time by who was asked to stop it; if that went wrong it is killed now: nobody may be at a keyboard."""
        if error is not None and not isinstance(error, _ABOUT_ITS_END) and self._end is None:
            self._say(f"{error.code}: {error}")
            self._kill()

    def _on_stopped(self, error: VmloopError | None) -> None:
        """Its end is told by its events; here is only what goes wrong."""
        if error is not None and not isinstance(error, _ABOUT_ITS_END) and self._end is None:
            self._asked = self._kills = True
            self._say(f"{error.code}: {error}; Ctrl-C kills it")

    # -- threads ------------------------------------------------------------------------------------------------------------

    def _ask(self, call: Callable[[], Any], then: Callable[[VmloopError | None], None]) -> None:
        """Have a request made by a thread; `then` is told on the main thread what went wrong, if anything did."""

        def work() -> None:
            error: VmloopError | None = None
            try:
                call()
            except VmloopError as failure:
                error = failure
            self._bell.tell(lambda: then(error))

        self._spawn(work)

    def _watch(self, events: Events) -> None:
        try:
            end = self._end_in(events)
        except Exception as error:  # noqa: BLE001 - whatever it is: without this thread the command would never end
            failure = error if isinstance(error, VmloopError) else Internal(f"VM {self._vm.name}: {error!r:.500}")
            self._bell.tell(lambda: setattr(self, "_failure", failure))
        else:
            self._bell.tell(lambda: setattr(self, "_end", end))

    def _end_in(self, events: Events) -> End | None:
        """Follow the VM to its end; None if the stream was closed before."""
        panicked = False
        for event in events:
            state = str(event.data.get("new")) if event.event == "VM_STATE" else ""
            self._came_up = self._came_up or state == "running"  # before anybody is told
            self._on_event(event)
            panicked = event.event == "GUEST_PANICKED" or (panicked and state != "running")
            reason = str(event.data.get("reason"))
            if state == "shutoff" or (state, reason) == ("unknown", "detached"):
                return End(state, reason, str(event.data.get("detail", "")), panicked)
        return None

    def _spawn(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _join(self) -> None:
        if self._failure is None:
            for thread in self._threads:
                thread.join(LAST_ANSWERS)
