# SPDX-License-Identifier: Apache-2.0
"""A simulated VM in a test's hands: the client's handle on it, switches for what is wrong with it, and what happened to it since its start.

Made by the plugin's fixtures. The switches go through `x-simulate`, the stand-in's own command (worker/qemu/simulated_control.py), which it
obeys whatever is wrong with it, and by SIGUSR1 where it hears nothing any more.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn, TypedDict, Unpack

import msgspec
from tenacity import RetryError, Retrying, retry_if_result, stop_after_delay, wait_fixed

from ..client.stream import Event
from ..client.subscription import Events
from ..client.vm import Vm
from ..common.cursor import Cursor
from ..common.errors import DeadlineExceeded, MonitorLost, NoSuchVm, NotRunning, OutcomeUnknown, TooLarge
from ..common.process import ProcessGone, open_pidfd
from ..worker.qemu.simulated_faults import Faults, GarbledKind
from .handler_files import LANES, SETTLE, SETTLED

DEADLINE: Final = 10.0  # seconds that a test waits for something unless it says otherwise
MAX_EVENTS: Final = 100_000  # that a double keeps: of a test, not of a flood
MAX_ROUNDS: Final = 100  # handlers that keep each other at work: events of events of events …

FAILED: Final = "HANDLER_FAILED"
_LOOK_AGAIN: Final = 0.01  # seconds between two looks whether the faults have ended

# States in which the simulated VM says no event any more: it is gone, or about to be.
_WITHOUT_GUEST: Final = frozenset({"shutoff", "unknown"})


class FaultChanges(TypedDict, total=False):
    """What may be wrong with a simulated VM; worker/qemu/simulated_faults.py says what each means. A test keeps the two alike."""

    slow: float
    silent: bool
    frozen: bool
    busy: bool
    garbled: int
    garbled_kind: GarbledKind
    flooding: float
    big_reply: int
    schema_bytes: int
    no_greeting: bool
    early_events: int
    close_midline: bool
    exit_after: float
    ignore_powerdown: bool
    powerdown_delay: float
    boot_delay: float
    dump_seconds: float
    agent_silent: bool
    agent_garbled: int
    agent_flood: float
    agent_slow: float
    agent_late: float
    agent_absent: bool
    agent_flapping: float
    agent_idless: bool
    agent_big_reply: int
    agent_half_line: bool
    agent_disabled: Sequence[str]


class HandlerFailed(AssertionError):
    """A handler has failed; `event` is its HANDLER_FAILED."""

    def __init__(self, event: Event) -> None:
        data = event.data if isinstance(event.data, dict) else {}
        text = f"handler {data.get('handler')} failed on {data.get('event')} ({data.get('why')}): {data.get('error')}"
        details = data.get("traceback") or data.get("stack") or data.get("stderr") or ""
        super().__init__(f"{text}\n{details}".rstrip())
        self.event = event


class Double:
    """One simulated VM, running. `vm` is the client's handle; every method raises the errors of vmloop.common.errors."""

    def __init__(self, vm: Vm, *, handlers: bool = False) -> None:
        """Of a VM that has just been started. `handlers`: it has the file that `settle` needs."""
        self.vm = vm
        self._start = Cursor(vm.show().epoch, 0)
        self._events: Events = vm.events(since=self._start)
        self._seen: list[Event] = []  # all that was read of them
        self._given = 0  # so many of these were looked at by wait_event
        self._handlers = handlers
        self._settled = itertools.count(1)
        self._expected: set[Cursor] = set()  # of HANDLER_FAILED that a test has asked for
        self._faults: FaultChanges = {}  # as far as they were switched here

    @property
    def name(self) -> str:
        """The VM's name."""
        return self.vm.name

    # -- what happened ----------------------------------------------------------------------------------------------------

    def wait_event(self, name: str, *, timeout: float = DEADLINE, **data: Any) -> Event:
        """The next event of that name, after the last one that this gave; those before it are passed over.

        `data`: members that its data must have. Raises `DeadlineExceeded`, and `HandlerFailed` if a handler fails before it.
        """
        until = time.monotonic() + timeout
        passed: list[str] = []
        while (event := self._following(self._given, until)) is not None:
            self._given += 1
            if event.event == name and _has(event, data):
                if name == FAILED:
                    self._expected.add(event.cursor)
                return event
            self._refuse_failure(event)
            passed.append(event.event)
        wanted = f"{name} with {data}" if data else name
        raise DeadlineExceeded(
            f"VM {self.name}: no event {wanted} within {timeout:g} s; passed: {', '.join(passed) or 'none'}"
        )

    def expect_failure(self, handler: str, *, timeout: float = DEADLINE) -> Event:
        """The next HANDLER_FAILED of a handler ("file.function"), which then does not fail the test."""
        return self.wait_event(FAILED, timeout=timeout, handler=handler)

    def forgive(self, failure: Event) -> None:
        """This HANDLER_FAILED does not fail the test."""
        self._expected.add(failure.cursor)

    def events(self, name: str | None = None) -> list[Event]:
        """Every event since the VM was started, or those of one name."""
        cursor, until = self.vm.cursor(), time.monotonic() + DEADLINE
        while (self._seen[-1].cursor if self._seen else self._start) < cursor:
            if self._following(len(self._seen), until) is None:
                raise DeadlineExceeded(
                    f"VM {self.name}: its events up to {cursor} could not be read within {DEADLINE:g} s"
                )
        return [event for event in self._seen if name in (None, event.event)]

    def settle(self, timeout: float = DEADLINE) -> None:
        """Wait until the handlers of all events so far have come to their end, and those of the events that they caused.

        For VMs of `vmloop_handlers`, while they run. Raises `HandlerFailed`, `DeadlineExceeded`.
        """
        if not self._handlers:
            raise NotRunning(f"VM {self.name} has no handlers of the test's: start it with vmloop_handlers(…)")
        until = time.monotonic() + timeout
        before = self._count()
        for number in itertools.islice(self._settled, MAX_ROUNDS):
            at = len(self._seen)
            self.emit(SETTLE, {"number": number})
            self._await_lanes(at, number, until)
            count = self._count()
            if count == before:
                self.check()
                return
            before = count
        raise DeadlineExceeded(f"VM {self.name}: its handlers do not come to rest: each round has new events")

    def _await_lanes(self, at: int, number: int, until: float) -> None:
        lanes = set(LANES)
        while lanes:
            event = self._following(at, until)
            if event is None:
                self.check()
                raise DeadlineExceeded(
                    f"VM {self.name}: its {' and '.join(sorted(lanes))} handlers do not come to their end in time"
                )
            at += 1
            if event.event == SETTLED and event.data.get("number") == number:
                lanes.discard(event.data["lane"])

    def _count(self) -> int:
        return sum(event.event not in (SETTLE, SETTLED) for event in self.events())

    def _following(self, at: int, until: float) -> Event | None:
        """The event at a place of all that were read or are still to be read; None if it does not come by then."""
        if at < len(self._seen):
            return self._seen[at]
        if at >= MAX_EVENTS:
            raise TooLarge(
                f"VM {self.name}: over {MAX_EVENTS} events: follow a flood by vm.events of the client", limit=MAX_EVENTS
            )
        event = self._events.get(max(0.0, until - time.monotonic()))
        if event is not None:
            self._seen.append(event)
        return event

    def check(self) -> None:
        """Raises `HandlerFailed` for the first handler of this run that has failed and was not expected to."""
        for event in self.events(FAILED):
            self._refuse_failure(event)

    def _refuse_failure(self, event: Event) -> None:
        __tracebackhide__ = True  # of pytest: the handler's own traceback is what matters
        if event.event == FAILED and event.cursor not in self._expected:
            raise HandlerFailed(event)

    # -- what happens to it -----------------------------------------------------------------------------------------------

    def emit(self, event: str, data: Mapping[str, Any] | None = None, *, count: int = 1) -> None:
        """QEMU says an event, any one: it means nothing to the simulated machine itself."""
        said: dict[str, Any] = {"event": event} if data is None else {"event": event, "data": dict(data)}
        self._simulate(emit=said, count=count)

    def panic(self, info: Mapping[str, Any] | None = None) -> None:
        """The guest's kernel panics; `info`: the member of that name in GUEST_PANICKED."""
        self._simulate(panic=True if info is None else dict(info))

    def crash_loaded(self) -> None:
        """The guest's kernel panics and a crash kernel takes over."""
        self._simulate(crashloaded=True)

    def fire_watchdog(self) -> None:
        """The guest has not fed its watchdog."""
        self._simulate(watchdog=True)

    def suspend(self) -> None:
        """The guest goes to sleep."""
        self._simulate(suspend=True)

    def hibernate(self) -> None:
        """The guest writes itself to its disk and switches off."""
        self._simulate(hibernate=True)

    def switch_off(self) -> None:
        """The guest switches the machine off."""
        self._simulate(switch_off=True)

    def reboot(self) -> None:
        """The guest reboots."""
        self._simulate(reboot=True)

    def set_jobs(self, jobs: Sequence[Mapping[str, Any]] = (), block_jobs: Sequence[Mapping[str, Any]] = ()) -> None:
        """What query-jobs and query-block-jobs list from now on."""
        self._simulate(jobs=[dict(job) for job in jobs], block_jobs=[dict(job) for job in block_jobs])

    def crash(self) -> None:
        """QEMU is gone at once, without a word (SIGKILL). Returns when vmloop knows it."""
        self._signal(signal.SIGKILL)
        self.vm.wait("shutoff", timeout=DEADLINE)

    # -- what is wrong with it --------------------------------------------------------------------------------------------

    def set_faults(self, **changes: Unpack[FaultChanges]) -> None:
        """Switch faults on or off; those not named stay. They stay until `heal` or the VM's end."""
        self._simulate(**{**changes, **_as_list(changes)})
        self._faults = {**self._faults, **changes}

    @contextlib.contextmanager
    def faults(self, **changes: Unpack[FaultChanges]) -> Iterator[None]:
        """Faults for the length of a `with`; afterwards all is as before, frozen VMs included."""
        before = self._faults.copy()
        self.set_faults(**changes)
        try:
            yield
        finally:
            self.heal()
            if before and self._pid() is not None:
                self.set_faults(**before)

    def heal(self) -> None:
        """End every fault, whatever it is, SIGSTOP too, and wait until they have ended. Nothing if QEMU is gone."""
        self._faults = {}
        with contextlib.suppress(
            NotRunning, MonitorLost, OutcomeUnknown
        ):  # it is gone, or vmloop has no connection to it
            self._signal(signal.SIGUSR1)
            self._signal(signal.SIGCONT)
            retrying = Retrying(
                retry=retry_if_result(lambda faults: not _is_healthy(faults)),
                wait=wait_fixed(_LOOK_AGAIN),
                stop=stop_after_delay(DEADLINE),
            )
            try:
                retrying(lambda: self._simulate())
            except RetryError as error:
                raise DeadlineExceeded(f"VM {self.name}: its faults do not end within {DEADLINE:g} s") from error

    # -- the end ----------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """End its faults, let handlers come to their end, raise `HandlerFailed` if one has failed: what the plugin does after a test."""
        __tracebackhide__ = True
        with contextlib.suppress(NoSuchVm):  # the test has undefined it
            self.heal()
            if self._handlers and self.vm.show().state not in _WITHOUT_GUEST:
                self.settle()
            else:
                self.check()

    def close(self) -> None:
        """Let go of the VM, which its broker ends."""
        self._events.close()

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _simulate(self, **words: Any) -> Any:
        """The faults after that. Out of band: a VM whose main loop hangs obeys too."""
        return self.vm.qmp("x-simulate", words, oob=True, wait_frozen=True, timeout=DEADLINE)

    def _pid(self) -> int | None:
        return self.vm.show().pid

    def _signal(self, number: int) -> None:
        pid = self._pid()
        if pid is None:
            self._gone()
        try:
            pidfd = open_pidfd(pid)
        except ProcessGone:
            self._gone()
        try:
            signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            self._gone()
        finally:
            os.close(pidfd)

    def _gone(self) -> NoReturn:
        raise NotRunning(f"VM {self.name}: its simulated QEMU is gone")


def _is_healthy(faults: Any) -> bool:
    """Whether `x-simulate` has answered that nothing is wrong. A fault may have changed this answer too."""
    try:
        return msgspec.convert(faults, Faults) == Faults()
    except msgspec.ValidationError:
        return False


def start_double(vm: Vm, *, agent: bool, handlers: bool = False) -> Double:
    """Start a defined simulated VM, and wait until its agent answers if it has one. Raises what a start does, `DeadlineExceeded`."""
    vm.start()
    double = Double(vm, handlers=handlers)
    try:
        if agent:
            double.wait_event("AGENT_STATE", new="ready")
    except BaseException:
        double.close()
        raise
    return double


def _has(event: Event, data: Mapping[str, Any]) -> bool:
    given = event.data if isinstance(event.data, dict) else {}
    return all(key in given and given[key] == value for key, value in data.items())


def _as_list(changes: FaultChanges) -> dict[str, Any]:
    disabled = changes.get("agent_disabled")
    return {} if disabled is None else {"agent_disabled": list(disabled)}
