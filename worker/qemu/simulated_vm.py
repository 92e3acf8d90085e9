# SPDX-License-Identifier: Apache-2.0
"""The simulated VM itself: its run state, its guest's reactions, its events and its end.

Changed by the commands of its monitor and agent (simulated_commands, simulated_agent), by signals (simulated) and by tests. It knows of
its two ports only that they can be told things; it runs on the loop of whoever made it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final, Literal, Protocol

import msgspec

from .simulated_faults import Faults, changed

FLOOD_EVENT: Final = "X_SIMULATED_FLOOD"
MARK_EVENT: Final = "X_SIMULATED_MARK"
EVENTS: Final = (
    *("SHUTDOWN", "POWERDOWN", "RESET", "STOP", "RESUME", "SUSPEND", "SUSPEND_DISK", "WAKEUP", "VSERPORT_CHANGE"),
    *("GUEST_PANICKED", "GUEST_CRASHLOADED", "WATCHDOG", "DUMP_COMPLETED", FLOOD_EVENT, MARK_EVENT),
)

NO_UUID: Final = "00000000-0000-0000-0000-000000000000"

# A flood comes in a burst per tick: a timer per event would cost more than the event.
FLOOD_TICK: Final = 0.01

MAX_BURST: Final = 1.0  # seconds; what a loop that was held up longer has missed is not made up for

CRASH_STATUS: Final = 1  # exit status of a process that ends by the fault exit_after, or by its guest's panic
_FORCED: Final = ("host-qmp-quit", "host-signal")  # reasons to shut down that end the process whatever the actions are

MIB: Final = 1 << 20


class Actions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What follows what: the option -action and the command set-action, with QEMU's defaults."""

    reboot: Literal["reset", "shutdown"] = "reset"
    shutdown: Literal["poweroff", "pause"] = "poweroff"
    panic: Literal["pause", "shutdown", "exit-failure", "none"] = "shutdown"
    watchdog: Literal["reset", "shutdown", "poweroff", "pause", "debug", "none", "inject-nmi"] = "reset"


class Attachment(Protocol):
    """What a VM tells its monitor and its agent."""

    def event(self, name: str, data: dict[str, Any] | None) -> None:
        """Something has happened to the VM."""

    def faults_changed(self, faults: Faults) -> None:
        """Other faults are in force."""

    def close(self) -> None:
        """The VM is gone."""


class SimulatedVm:
    """One VM. `on_end` is called once with the exit status when it is gone, just before its ports are closed."""

    def __init__(
        self,
        name: str = "",
        faults: Faults | None = None,
        *,
        paused: bool = False,
        uuid: str = NO_UUID,
        actions: Actions = Actions(),  # noqa: B008 - a frozen value
        memory: int = 128 * MIB,
        on_end: Callable[[SimulatedVm, int], None] | None = None,
    ) -> None:
        self.name = name
        self.uuid = uuid
        self.status = "prelaunch" if paused else "running"
        self.ended = False
        self.agent_open = False  # the guest's agent has opened its port
        self.agent_driver = False  # the guest has a driver for it: it has opened it since the last reset
        self.agent_port_id: str | None = None  # the id of the agent's virtserialport; None if the VM has none
        self.actions = actions
        self.memory = memory  # bytes
        self.dumping = False  # until it is over the VM is neither stopped nor continued
        self._faults = faults or Faults()
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._attachments: list[Attachment] = []
        self._postponed: list[Callable[[], None]] = []  # what fell due while the main loop was stuck
        self._power_button = False  # pressed, and the guest has not reacted yet
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._flooded = 0
        self._flooded_at = 0.0
        self._flapped_at = 0.0

    # -- what others look at --

    @property
    def faults(self) -> Faults:
        """The faults in force."""
        return self._faults

    @property
    def running(self) -> bool:
        """True while the virtual CPUs run."""
        return self.status == "running"

    def attach(self, attachment: Attachment) -> None:
        """Add a monitor or an agent."""
        self._attachments.append(attachment)
        attachment.faults_changed(self._faults)

    def start(self) -> None:
        """Begin to live: call once, when everything is attached."""
        self._apply_faults(Faults())
        if self.running:
            self._guest_boots()

    # -- faults --

    def change_faults(self, **changes: Any) -> None:
        """Switch some faults; `msgspec.ValidationError` for what is no fault."""
        self.set_faults(changed(self._faults, changes))

    def set_faults(self, faults: Faults) -> None:
        """Put other faults in force."""
        before, self._faults = self._faults, faults
        self._apply_faults(before)

    def freeze_soon(self, faults: Faults) -> None:
        """Put faults in force when the loop comes round again: a monitor that is told to freeze says yes first."""
        self._loop.call_soon(self.set_faults, faults)

    def after_a_while(self, seconds: float, faults: Faults) -> None:
        """Put faults in force later, so that a VM can be told to freeze and to thaw again."""
        self.later("revert", seconds, lambda: self.set_faults(faults), even_stuck=True)

    def _apply_faults(self, before: Faults) -> None:
        faults = self._faults
        if faults.exit_after != before.exit_after:
            self.later("exit", faults.exit_after or None, lambda: self.end(CRASH_STATUS), even_stuck=True)
        if faults.flooding != before.flooding:
            self._flooded_at = time.monotonic()
            self.later("flood", FLOOD_TICK if faults.flooding else None, self._flood)
        if faults.agent_flapping != before.agent_flapping:
            self._flapped_at = time.monotonic()
            self.later("flap", FLOOD_TICK if faults.agent_flapping else None, self._flap)
        for attachment in self._attachments:
            attachment.faults_changed(faults)
        if faults.agent_absent and not before.agent_absent:
            self._agent_port(False)
        elif before.agent_absent and not faults.agent_absent and self.running:
            self._guest_boots()
        elif before.agent_flapping and not faults.agent_flapping and self.running and self.agent_driver:
            self._agent_port(True)
        if before.ignore_powerdown and not faults.ignore_powerdown:
            self._guest_shuts_down()
        if before.stuck and not faults.stuck:
            postponed, self._postponed = self._postponed, []
            for action in postponed:
                action()

    # -- what is done to the VM --

    def emit(self, name: str, data: dict[str, Any] | None = None) -> None:
        """Send an event to whoever is connected."""
        for attachment in self._attachments:
            attachment.event(name, data)

    def stop(self, status: str = "paused") -> None:
        """Pause the virtual CPUs, for the reason that the status names; nothing happens if they do not run."""
        if self.running:
            self.status = status
            self.emit("STOP")

    def cont(self) -> None:
        """Let the virtual CPUs run. A guest that sleeps sleeps on."""
        if self.running or self.status == "suspended":
            return
        first = self.status == "prelaunch"
        self.status = "running"
        self.emit("RESUME")
        if first:
            self._guest_boots()
        self._guest_shuts_down()

    def reset(self, *, guest: bool, reason: str) -> None:
        """Reset the machine. A paused one is as good as new after it, and so is one that sleeps, as QEMU has it."""
        if self.actions.reboot == "shutdown":
            self.shutdown(guest=guest, reason=reason)
            return
        if not self.running:
            self.status = "prelaunch"
        self._power_button = False
        self._cancel("powerdown")
        self.agent_driver = False
        self._agent_port(False)  # the devices are reset before the event
        self.emit("RESET", {"guest": guest, "reason": reason})
        if self.dumping and not self.running:
            self._loop.call_soon(self.end, CRASH_STATUS)  # QEMU 7.2 aborts: "invalid runstate transition"
        elif self.running:
            self._guest_boots()

    def powerdown(self) -> None:
        """Press the power button. An obedient guest shuts down a little later, once it runs."""
        self.emit("POWERDOWN")
        self._power_button = True
        self._guest_shuts_down()

    def shutdown(self, *, guest: bool, reason: str, status: int = 0) -> None:
        """Shut down. The process ends when the loop comes round again, so that the reply to `quit` still leaves."""
        if self._faults.stuck:
            self._postponed.append(lambda: self.shutdown(guest=guest, reason=reason, status=status))
            return
        self.emit("SHUTDOWN", {"guest": guest, "reason": reason})
        if self.actions.shutdown == "pause" and reason not in _FORCED:
            self.stop("shutdown")  # one that is paused stays as it is, as in QEMU
            return
        self._loop.call_soon(self.end, status)

    def wakeup(self) -> bool:
        """Wake the guest; False if it does not sleep."""
        if self.status != "suspended":
            return False
        self.status = "running"
        self.emit("WAKEUP")
        self._guest_shuts_down()
        return True

    def end(self, status: int) -> None:
        """Be gone, at once and without a word."""
        if self.ended:
            return
        self.ended = True
        for name in list(self._timers):
            self._cancel(name)
        self._postponed.clear()
        if self._on_end is not None:
            self._on_end(self, status)
        for attachment in self._attachments:
            attachment.close()

    # -- the guest --

    def _guest_boots(self) -> None:
        self.later("boot", self._faults.boot_delay, lambda: self._agent_port(True))

    def _guest_shuts_down(self) -> None:
        if self._power_button and self.running and not self._faults.ignore_powerdown:
            self._power_button = False
            self.later("powerdown", self._faults.powerdown_delay, self._obey_power_button)

    def _obey_power_button(self) -> None:
        if self.running:
            self.guest_shutdown()
        else:
            self._power_button = True  # paused meanwhile; it goes on with that when it runs

    def guest_shutdown(self) -> None:
        """The guest switches the machine off."""
        self.shutdown(guest=True, reason="guest-shutdown")

    def guest_suspend(self) -> None:
        """The guest goes to sleep. There is no STOP, and only `wakeup` or a reset ends it."""
        if self.running:
            self.status = "suspended"
            self.emit("SUSPEND")

    def guest_hibernate(self) -> None:
        """The guest writes itself to its disk and switches the machine off."""
        self.emit("SUSPEND_DISK")
        self.guest_shutdown()

    def guest_panic(self, info: dict[str, Any] | None) -> None:
        """The guest's kernel gives up and tells a pvpanic device; what follows is up to the actions."""
        action = self.actions.panic
        if action == "shutdown" and self.actions.shutdown == "pause":
            action = "pause"
        told = {"pause": "pause", "none": "run"}.get(action, "poweroff")
        self.emit("GUEST_PANICKED", {"action": told} if info is None else {"action": told, "info": info})
        if action == "pause":
            self.stop("guest-panicked")
        elif action != "none":
            self.shutdown(guest=True, reason="guest-panic", status=CRASH_STATUS * (action == "exit-failure"))

    def guest_crash_loaded(self) -> None:
        """The guest's kernel gives up and saves itself: a crash kernel is loaded, and the VM runs on."""
        self.emit("GUEST_CRASHLOADED", {"action": "run"})

    def watchdog(self) -> None:
        """The guest has not fed its watchdog."""
        action = self.actions.watchdog
        self.emit("WATCHDOG", {"action": action})
        if action == "reset":
            self.reset(guest=True, reason="guest-reset")
        elif action == "shutdown":
            self.powerdown()
        elif action == "poweroff":
            self._loop.call_soon(self.end, 0)  # QEMU exits, without SHUTDOWN and whatever the other actions are
        elif action == "pause":
            self.stop("watchdog")

    def _agent_port(self, opened: bool) -> None:
        if opened == self.agent_open or self.agent_port_id is None or (opened and self._faults.agent_absent):
            return
        self.agent_open = opened
        self.agent_driver = self.agent_driver or opened
        if self.agent_port_id:  # QEMU has no event for a port without an id
            self.emit("VSERPORT_CHANGE", {"open": opened, "id": self.agent_port_id})
        for attachment in self._attachments:
            attachment.faults_changed(self._faults)

    # -- time --

    def later(self, name: str, seconds: float | None, action: Callable[[], None], *, even_stuck: bool = False) -> None:
        """Do something later, once; None takes it back. A stuck main loop does it when it goes on."""
        self._cancel(name)
        if seconds is None:
            return

        def due() -> None:
            del self._timers[name]
            if self._faults.stuck and not even_stuck:
                self._postponed.append(action)
            else:
                action()

        self._timers[name] = self._loop.call_later(seconds, due)

    def _cancel(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def _flood(self) -> None:
        count, self._flooded_at = owed(self._faults.flooding, self._flooded_at)
        for _ in range(count):
            self._flooded += 1
            self.emit(FLOOD_EVENT, {"number": self._flooded})
        if self._faults.flooding:
            self.later("flood", FLOOD_TICK, self._flood)

    def _flap(self) -> None:
        rate = self._faults.agent_flapping
        count, self._flapped_at = owed(2 * rate, self._flapped_at)
        for _ in range(count if self.running and self.agent_driver else 0):
            self._agent_port(not self.agent_open)
        if rate and not self.ended:
            self.later("flap", FLOOD_TICK, self._flap)


def owed(rate: float, since: float) -> tuple[int, float]:
    """How many of what comes so many times a second are due, and the moment up to which they are then accounted for."""
    if not rate:
        return 0, since
    now = time.monotonic()
    since = max(since, now - MAX_BURST)
    count = int((now - since) * rate)
    return count, since + count / rate
