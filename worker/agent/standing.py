# SPDX-License-Identifier: Apache-2.0
"""What is known of one agent over all its connections, and as far as the page holds it over all workers. Used by agent.py, session.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from ...common.page import Page
from ...common.paths import VmPaths
from .commands import AgentCommand, end_of
from .ledger import AgentLedger, AgentOwed, Part
from .lines import Allowance
from .sync import Conversation


class Keeping(Protocol):
    """Where a connection is kept for the next worker: the zygote, by way of keeper.py."""

    def keep(self, slot: str, fd: int) -> None: ...
    def release(self, slot: str) -> None: ...


class Standing:
    """Owed answers, the allowance for noise, the count of failed syncs."""

    def __init__(self, now: float, page: Page, paths: VmPaths, *, max_reply: int) -> None:
        """max_reply: bytes in one line."""
        self.conversation = Conversation()
        self.ledger = AgentLedger(page)
        self.allowance = Allowance(now, max_reply=max_reply)
        self.max_reply = max_reply
        self.page = page
        self.paths = paths
        self.given_up: dict[int, AgentCommand] = {}  # their replies will be late
        self.failed_syncs = 0  # in a row
        self.noise = 0  # lines that answered nothing

    def lost(self) -> None:
        """The guest has closed the port: the agent, and what it owed, is gone."""
        self.conversation.lost()
        self.given_up.clear()
        self.ledger.in_step()
        self.failed_syncs = 0

    def take_over(self, now: float, inherit: Callable[[AgentOwed], AgentCommand]) -> Inherited:
        """Go on with what an earlier worker left on the page. `inherit` makes a command of an entry."""
        ledger = self.ledger
        entries = list(ledger)
        current = next((owed for owed in entries if owed.part is Part.CURRENT), None)
        cut = current is not None and ledger.sending == current.number
        synced = ledger.synced and not ledger.sending
        late = [o for o in entries if o.part is Part.GIVEN_UP or (o.part is Part.ENDING and not synced)]
        self.conversation.take_over(
            synced=synced,
            repeats_ids=ledger.repeats_ids,
            current=current.number if current is not None else 0,
            given_up=[owed.number for owed in late],
            syncs=[owed.number for owed in entries if owed.part is Part.SYNC],
        )
        commands = {owed.number: inherit(owed) for owed in entries if owed.part is not Part.SYNC}
        self.given_up = {owed.number: commands[owed.number] for owed in late}
        command = commands[current.number] if current is not None else None
        if command is not None:
            command.sent = now  # nobody has read since: the agent is given its time anew, within the caller's
        return Inherited(command, cut)

    def not_kept(self, inherited: Inherited) -> None:
        """The connection went with the worker: what was on the wire is lost, unless its reply comes late on the next connection."""
        command = inherited.command
        if command is None:
            return
        self.conversation.give_up()
        self.given_up[command.number] = command
        done, command.done = command.done, None
        if done is not None:
            done(None, end_of(command, "its worker died, and with it the connection,", port_open=True))
        self.ledger.given_up(command.number)


class Inherited:
    """The command that was on the wire when the last worker died; cut: inside its send."""

    def __init__(self, command: AgentCommand | None, cut: bool) -> None:
        self.command: Final = command
        self.cut: Final = cut
