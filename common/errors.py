# SPDX-License-Identifier: Apache-2.0
"""The one tree of errors, shared by broker, workers and clients.

    VmloopError
    ├── BadRequest         bad-request         the request itself is wrong; it was not carried out
    ├── NoSuchVm           no-such-vm          no VM of that name is known here
    ├── VmExists           vm-exists           the name is taken
    ├── NotRunning         not-running         the VM has no running QEMU
    ├── AlreadyRunning     already-running     the VM runs already
    ├── Denied             denied              allowed by nobody, or not safe to do
    ├── Busy               busy                a bound is reached; nothing was done, try again later
    ├── TooLarge           too-large           a message over the size limit; nothing was cut
    ├── DeadlineExceeded   deadline            the caller's time is over; a sent command lives on
    ├── OutcomeUnknown     outcome-unknown     nobody can know whether the command ran; never repeated by vmloop
    ├── WorkerLost         worker-lost         the VM's worker ended before it took up the request
    ├── MonitorLost        monitor-lost        no connection to the VM's monitor
    ├── MonitorFrozen      monitor-frozen      QEMU answers nothing, not even out of band
    ├── QmpError           qmp-error           QEMU refused; fields `class` and `desc` are QEMU's
    ├── AgentAbsent        agent-absent        the guest runs no agent, or the VM has no port for one
    ├── AgentUnresponsive  agent-unresponsive  the agent is there and does not answer
    ├── AgentError         agent-error         the agent refused; fields `class` and `desc` are the agent's
    ├── LaunchFailed       launch-failed       QEMU did not come up; field `log` is the end of qemu.log
    ├── ConfigError        config-error        a file of the operator's is wrong
    ├── Internal           internal            a fault of vmloop's own
    └── NoBroker           no-broker           nobody answers at the broker's socket (never on the wire)

The codes are stable: programs compare them, and a code is never used again for something else.
A message says what happened, to which VM, and what to do next.
"""

from __future__ import annotations

import reprlib
from typing import Any, ClassVar

type_of_code: dict[str, type[VmloopError]] = {}


class VmloopError(Exception):
    """Root of the tree. `fields` are further facts, carried over the wire beside code and message."""

    code: ClassVar[str] = "internal"

    # Positional only: a peer's error body may hold a field of any name, `self` and `message` included.
    def __init__(self, message: str, /, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields

    def __init_subclass__(cls, *, code: str | None = None) -> None:
        if code is not None:  # a class without one refines its parent and shares its code
            cls.code = code
            type_of_code[code] = cls

    def __str__(self) -> str:
        return self.message

    def to_wire(self) -> dict[str, Any]:
        """The map that is the body of an error message: `{code, message, …fields}`."""
        return {**self.fields, "code": self.code, "message": self.message}


def error_from_wire(body: object) -> VmloopError:
    """The error that an error body stands for; an unknown code becomes `Internal` and keeps its text."""
    if not isinstance(body, dict):
        return Internal(f"an error arrived whose body is no map: {_text(body)}")
    fields = {_text(name): value for name, value in body.items() if name not in ("code", "message")}
    code = _text(body.get("code", "internal"))
    message = _text(body.get("message", "no message"))
    error_type = type_of_code.get(code)
    if error_type is None:
        return Internal(f"{message} (unknown error code {code!r})", **fields)
    return error_type(message, **fields)


def _text(value: object) -> str:
    """A text as it is; of anything else the beginning: its whole repr may be too deep for Python, and far too long."""
    return value if isinstance(value, str) else reprlib.repr(value)


class BadRequest(VmloopError, code="bad-request"):
    """The request is malformed or asks for something that does not exist; nothing was done."""


class NoSuchVm(VmloopError, code="no-such-vm"):
    """No VM of this name is defined or attached."""


class VmExists(VmloopError, code="vm-exists"):
    """A VM of this name is already there."""


class NotRunning(VmloopError, code="not-running"):
    """The operation needs a running VM."""


class AlreadyRunning(VmloopError, code="already-running"):
    """The operation needs a VM that does not run."""


class Denied(VmloopError, code="denied"):
    """Refused because it is not allowed, or because it could hit the wrong process."""


class Busy(VmloopError, code="busy"):
    """A queue or table is full; nothing was done."""


class TooLarge(VmloopError, code="too-large"):
    """A message is over the limit; field `limit` is in bytes."""


class DeadlineExceeded(VmloopError, code="deadline"):
    """The caller's deadline passed. What was already sent to QEMU lives on there."""


class OutcomeUnknown(VmloopError, code="outcome-unknown"):
    """The command may or may not have been carried out. Look at the VM before you repeat it."""


class WorkerLost(VmloopError, code="worker-lost"):
    """The worker ended; the request was not carried out."""


class MonitorLost(VmloopError, code="monitor-lost"):
    """The monitor's connection is gone."""


class MonitorFrozen(VmloopError, code="monitor-frozen"):
    """QEMU does not answer at all."""


class QmpError(VmloopError, code="qmp-error"):
    """QEMU's own error; fields `class` and `desc`."""


class AgentAbsent(VmloopError, code="agent-absent"):
    """No guest agent is connected."""


class AgentUnresponsive(VmloopError, code="agent-unresponsive"):
    """The guest agent does not answer."""


class AgentError(VmloopError, code="agent-error"):
    """The guest agent's own error; fields `class` and `desc`."""


class LaunchFailed(VmloopError, code="launch-failed"):
    """QEMU did not start; field `log` holds the end of its output."""


class ConfigError(VmloopError, code="config-error"):
    """A definition or settings file is wrong; nothing was changed."""


class Internal(VmloopError, code="internal"):
    """A defect of vmloop."""


class NoBroker(VmloopError, code="no-broker"):
    """No broker listens; raised by clients only."""
