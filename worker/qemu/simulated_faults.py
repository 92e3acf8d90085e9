# SPDX-License-Identifier: Apache-2.0
"""The faults of a simulated VM, as one frozen value: nothing wrong by default.

Switched at start (`-simulate key=value,…`), at run time (the command `x-simulate`) and from Python (`SimulatedVm.change_faults`). Read by
the simulated monitor, agent and VM; each asks for the present value when it needs it.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

# What a garbled line is instead of the reply it stands for (see simulated_monitor.garble).
GarbledKind = Literal[
    "not-json",
    "truncated",
    "not-an-object",
    "unknown-id",
    "no-id",
    "neither",
    "nameless-event",
    "binary",
    "deep",
    "twice",
    "stray-ff",
    "nested",
]

# In text the names in a list stand with this between them: the comma is taken.
_BETWEEN_NAMES: Final = "+"


class Faults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is wrong with a VM. Every fault that is a state is over as soon as its field is back at the default."""

    # The monitor.
    slow: float = 0.0  # seconds that each in-band command takes; out of band is answered beside it
    silent: bool = False  # commands are swallowed, without a reply
    frozen: bool = False  # nothing is read, written or accepted, like a process under SIGSTOP
    busy: bool = False  # the main loop hangs in a command: in-band waits, out-of-band is answered
    garbled: int = 0  # this many next lines are damaged; counts down
    garbled_kind: GarbledKind = "not-json"
    flooding: float = 0.0  # events per second (X_SIMULATED_FLOOD)
    big_reply: int = 0  # bytes added to the return value of each reply
    schema_bytes: int = 0  # least size of the reply to query-qmp-schema; QEMU 7.2's has 207 000
    no_greeting: bool = False  # a new client gets no greeting until this is over
    early_events: int = 0  # events that a new client gets before its greeting
    close_midline: bool = False  # the next line is cut in half and its connection closed; over after that
    # The VM.
    exit_after: float = 0.0  # seconds until the process is gone without a word, like after a crash
    ignore_powerdown: bool = False  # the guest does not react to the power button
    powerdown_delay: float = 0.05  # seconds that an obedient guest takes to shut down
    boot_delay: float = 0.0  # seconds of running until the guest's agent opens its port
    dump_seconds: float = 0.0  # seconds that dump-guest-memory takes
    # The agent. It stops when its output is not read, as the real one does: nothing of it piles up here.
    agent_silent: bool = False  # commands are swallowed
    agent_garbled: int = 0  # this many next lines are damaged, as garbled_kind says; counts down
    agent_flood: float = 0.0  # lines per second that nobody asked for, as far as they are read
    agent_slow: float = 0.0  # seconds that each command takes; the next one waits
    agent_late: float = 0.0  # seconds that each reply takes, while later commands are read and carried out
    agent_absent: bool = False  # the guest has its port closed
    agent_flapping: float = 0.0  # times per second that the port is closed and opened again, each with its event
    agent_idless: bool = False  # replies have no id, as from agents before 2.5
    agent_big_reply: int = 0  # bytes added to the return value of each reply but those to a sync
    agent_half_line: bool = False  # half of the next line is the last that is heard
    agent_disabled: tuple[str, ...] = ()  # commands refused as disabled; in text `name+name`

    @property
    def stuck(self) -> bool:
        """True if the main loop does not go round: no timer, no event, no signal is seen to."""
        return self.frozen or self.busy


def changed(faults: Faults, changes: dict[str, Any]) -> Faults:
    """The faults with some fields changed; `msgspec.ValidationError` for what is no fault or has the wrong type."""
    named = {name.replace("-", "_"): value for name, value in changes.items()}
    disabled = named.get("agent_disabled")
    if isinstance(disabled, str):
        named["agent_disabled"] = [name for name in disabled.split(_BETWEEN_NAMES) if name]
    return msgspec.convert({**msgspec.structs.asdict(faults), **named}, Faults, strict=False)


def faults_from_text(text: str, faults: Faults = Faults()) -> Faults:  # noqa: B008 - a frozen value
    """The faults in `key=value,key=value`; a key alone means true. `msgspec.ValidationError` as in `changed`."""
    changes: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        changes[name.strip()] = value.strip() if equals else True
    return changed(faults, changes)
