# SPDX-License-Identifier: Apache-2.0
"""The operations of a worker. To add one: the function in its family's file, a row here, a line in docs/operations.md, a test."""

from __future__ import annotations

from typing import Final

from . import agent, capabilities, definition, lifecycle, monitor
from .request import Lane, NoArguments, Verb

_ROWS: Final = (
    Verb("start", lifecycle.StartArguments, Lane.TURN, run=lifecycle.start, begins=True),
    Verb("attach", lifecycle.AttachArguments, Lane.TURN, run=lifecycle.attach, begins=True),
    Verb("stop", lifecycle.StopArguments, Lane.OWN, run=lifecycle.stop, begins=True),
    Verb("kill", NoArguments, Lane.OWN, run=lifecycle.kill, begins=True),
    Verb("pause", NoArguments, Lane.TURN, run=lifecycle.pause, begins=True),
    Verb("resume", NoArguments, Lane.TURN, run=lifecycle.resume, begins=True),
    Verb("reset", NoArguments, Lane.TURN, run=lifecycle.reset, begins=True),
    Verb("detach", NoArguments, Lane.TURN, run=lifecycle.detach, begins=True),
    Verb("define", definition.DefineArguments, Lane.TURN, run=definition.define, begins=True),
    Verb("undefine", definition.UndefineArguments, Lane.TURN, run=definition.undefine, begins=True),
    Verb("qmp", monitor.QmpArguments, Lane.TURN, direct=monitor.qmp),
    Verb("hmp", monitor.HmpArguments, Lane.TURN, direct=monitor.hmp),
    Verb("agent", agent.AgentArguments, Lane.READ, run=agent.hold, direct=agent.agent),
    Verb("capabilities", capabilities.CapabilitiesArguments, Lane.READ, run=capabilities.capabilities),
    Verb("events", monitor.EventsArguments, Lane.READ, run=monitor.events),
)

VERBS: Final = {verb.op: verb for verb in _ROWS}
