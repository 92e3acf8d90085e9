# SPDX-License-Identifier: Apache-2.0
"""One command to a guest agent on its way, which commands take long, and what a caller is told who gets no answer. Pure.

Every error here has a field `sent`: whether the whole command has left for the guest, so that it may take effect.
"""

from __future__ import annotations

from typing import Final

import msgspec

from ...common.errors import AgentAbsent, AgentUnresponsive, DeadlineExceeded, OutcomeUnknown, VmloopError, WorkerLost
from ..qmp.commands import Done
from .ledger import AgentOwed, Part

# They wait for disks or firmware, or for what the guest does on its way down: the caller's deadline is theirs.
SLOW: Final = frozenset(
    {
        "guest-fsfreeze-freeze",
        "guest-fsfreeze-freeze-list",
        "guest-fsfreeze-thaw",
        "guest-fstrim",
        "guest-set-vcpus",
        "guest-set-memory-blocks",
    }
)


class AgentCommand(msgspec.Struct):
    """`done` is None once nobody waits any more; times are loop time, sent is 0 before it. quiet: success has no answer.

    key, limit (of a freeze) and reboot are for the next worker. held: whoever asked must stay for as long as the guest is frozen.
    """

    name: str
    text: bytes
    done: Done | None
    number: int
    deadline: float
    request: int = 0
    reading: bool = False
    quiet: bool = False
    queued: float = 0.0
    sent: float = 0.0
    key: bytes = b""
    limit: float = 0.0
    reboot: bool = False
    held: bool = False

    def due(self, timeout: float) -> float:
        """When the wait for the answer ends. timeout: seconds for an ordinary command."""
        return self.deadline if self.name in SLOW else min(self.deadline, self.sent + timeout)


def owed(command: AgentCommand) -> AgentOwed:
    """What the page says of a command on the wire. Nobody can take over for one who holds a freeze."""
    return AgentOwed(
        part=Part.CURRENT,
        number=command.number,
        request=0 if command.held else command.request,
        reading=command.reading,
        quiet=command.quiet,
        reboot=command.reboot,
        deadline=command.deadline,
        sent=command.sent,
        limit=0.0 if command.held else command.limit,
        key=command.key,
        name=command.name,
    )


def adopted(entry: AgentOwed) -> AgentCommand:
    """A command of an earlier worker, as the page has it; nobody is told its answer yet."""
    return AgentCommand(
        name=entry.name,
        text=b"",
        done=None,
        number=entry.number,
        deadline=entry.deadline,
        request=entry.request,
        reading=entry.reading,
        quiet=entry.quiet,
        queued=entry.sent,
        sent=entry.sent,
        key=entry.key,
        limit=entry.limit,
        reboot=entry.reboot,
    )


def not_sent_in_time(command: AgentCommand, ahead: int) -> VmloopError:
    text = f"not sent in time: {ahead} earlier commands wait for the guest agent"
    return DeadlineExceeded(f"{command.name}: {text}", command=command.name, sent=False)


def not_taken(command: AgentCommand) -> VmloopError:
    """The pipe to the guest is full. What the agent has of the command it throws away at the next sync."""
    text = "the guest does not read its agent's port; the command was not sent whole and will not be carried out"
    return AgentUnresponsive(f"{command.name}: {text}", command=command.name, sent=False)


def not_begun(command: AgentCommand) -> VmloopError:
    """The worker leaves, and it was still in line."""
    text = f"{command.name}: the worker makes way for another one; the command was not sent, try again"
    return WorkerLost(text, command=command.name, sent=False)


def lost_with_its_worker(command: AgentCommand, *, cut: bool) -> VmloopError:
    """An earlier worker sent it, and a later sync was answered before it. cut: that worker died inside the send."""
    if cut and not command.quiet:  # of a quiet one silence says nothing
        text = f"{command.name}: the worker was killed while it sent the command; it was not carried out, try again"
        return WorkerLost(text, command=command.name, sent=False)
    return end_of(command, "its answer was lost", port_open=True)


def not_answered(command: AgentCommand, now: float) -> VmloopError:
    """The deadline of the caller, or of the agent, has passed."""
    text = "it may still take effect; its late reply will come as COMMAND_LATE"
    if now >= command.deadline:
        error: type[VmloopError] = DeadlineExceeded
        text = f"{command.name}: the guest agent has not answered in time; {text}"
    else:
        error = AgentUnresponsive
        text = f"{command.name}: the guest agent has not answered for {now - command.sent:.1f} s; {text}"
    return error(text, command=command.name, sent=True)


def not_in_step(command: AgentCommand, reason: str) -> VmloopError:
    """It waited for a sync that was not answered."""
    return AgentUnresponsive(f"{command.name}: not sent: {reason}; try again later", command=command.name, sent=False)


def end_of(command: AgentCommand, reason: str, *, port_open: bool) -> VmloopError:
    """What a caller is told whose command was not answered before the connection ended."""
    absence: type[VmloopError] = AgentUnresponsive if port_open else AgentAbsent
    if not command.sent:
        return absence(f"{command.name}: not sent: {reason}", command=command.name, sent=False)
    if command.reading:
        return absence(f"{command.name}: {reason} before the guest agent answered", command=command.name, sent=True)
    text = f"{command.name}: {reason} before the guest agent answered; look at the guest before you repeat it"
    return OutcomeUnknown(text, command=command.name, sent=True)
