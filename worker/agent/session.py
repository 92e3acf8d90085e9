# SPDX-License-Identifier: Apache-2.0
"""One open connection to a guest agent: a bounded queue, one command on the wire, a sync whenever it is not sure whose a reply is.

Made by agent.py when the guest has opened its port. A caller's end never wedges the channel: the command is given up, a sync follows at
once, and its answer says that everything before it is over. What must outlive a connection (owed answers, the allowance for noise, the
count of failed syncs) is in `Standing`; what must outlive the worker is on the page (ledger.py) and in the socket (reading.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from typing import Any, Final, Protocol

import tenacity

from ...common.deadlines import Deadlines
from ...common.errors import AgentError, Busy, TooLarge, VmloopError
from ...common.states import AgentState
from ..qmp.writer import end_connection
from .commands import (
    AgentCommand,
    end_of,
    lost_with_its_worker,
    not_answered,
    not_begun,
    not_in_step,
    not_sent_in_time,
    not_taken,
    owed,
)
from .intake import Intake
from .ledger import AgentOwed, Part
from .standing import Inherited, Standing
from .sync import MAX_GIVEN_UP, NotAReply, Reply, Whose, agent_error, read_reply
from .writer import AgentWriter

log = logging.getLogger(__name__)

MAX_WAITING: Final = 1024  # commands of one VM, on the wire or before it
FAILED_SYNCS: Final = 3  # in a row: the connection itself is suspected

# Between syncs that nobody asks for: an agent that is silent is looked after less and less often.
_sync_again: Final = tenacity.wait_exponential(multiplier=1.0, max=60.0)


class Listener(Protocol):
    """What a session tells. None of these may raise."""

    def on_state(self, state: AgentState, reason: str) -> None: ...
    def on_late(self, command: AgentCommand, reply: dict[str, Any]) -> None: ...
    def on_end(self, reason: str) -> None: ...


class AgentSession:
    """Life: made → `start` or `take_over` → commands → `close` or `leave`, or `on_end` when it ends by itself."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: socket.socket,
        standing: Standing,
        timeout: float,
        listener: Listener,
    ) -> None:
        """timeout: seconds for a sync or an ordinary command."""
        self.fileno = connection.fileno  # -1 once it is closed
        self._loop = loop
        self._socket = connection
        self._standing = standing
        self._conversation = standing.conversation
        self._timeout = timeout
        self._listener = listener
        self._ledger = standing.ledger
        self._intake = Intake(loop, connection, standing, self)
        self._intact = True  # a successor finds the start of the line that has begun
        self._writer = AgentWriter(loop, connection, standing.ledger, self._end)
        self._waiting: dict[int, AgentCommand] = {}
        self._current: AgentCommand | None = None
        self._cut: bool | None = (
            None  # of a current command that an earlier worker sent: whether it died inside the send
        )
        self._late: list[int] = []  # commands whose late replies are in the chunk at hand
        self._in_step = False  # a sync's answer is
        self._deadlines: Deadlines[int] = Deadlines()
        self._timer: asyncio.TimerHandle | None = None
        self._asking: asyncio.TimerHandle | None = None  # a sync is out, until then
        self._asked = 0.0  # when the newest one was sent
        self._asking_again: asyncio.TimerHandle | None = None
        self._paused: asyncio.TimerHandle | None = None
        self._ended = False

    def start(self) -> None:
        """Listen, and sync at once: ready means that the agent has really answered."""
        self._conversation.synced = False
        self._intake.reader.begin()
        self._ledger.opened(os.fstat(self._socket.fileno()).st_ino)
        self._loop.add_reader(self._socket, self._intake.turn)
        self._sync()

    def take_over(self, inherited: Inherited) -> None:
        """On a connection that an earlier worker has spoken on: go on where it was killed; a sync only if it was not in step."""
        command = self._current = inherited.command
        self._intake.reader.take_over(self._standing.max_reply)
        self._intact = self._intake.reader.intact
        if not self._intact:
            self._conversation.doubt()
        if command is not None:
            self._cut = None if self._conversation.synced else inherited.cut
            self._deadlines.add(command.number, command.due(self._timeout))
        self._loop.add_reader(self._socket, self._intake.turn)
        # Without ids, what a predecessor has answered must not be taken for the answer to what is sent now.
        self._intake.take_left()
        if self._ended:
            return
        self._set_timer()
        if not self._conversation.synced and self._asking is None:
            self._sync()

    def confirm(self) -> None:
        """The port is known to be open: what the page said of the agent holds."""
        if self._conversation.synced and self._asking is None and self._paused is None:
            self._listener.on_state(AgentState.READY, "in step since an earlier worker")

    @property
    def queued(self) -> int:
        """Commands that wait for their turn or their answer."""
        return len(self._waiting) + (self._current is not None)

    def submit(self, command: AgentCommand) -> None:
        """Send a command, or put it in line; its `done` is called once. Raises `Busy`, `AgentUnresponsive`."""
        if self._paused is not None:
            raise not_in_step(command, "the guest floods its agent's port, which is not read for now")
        if self.queued >= MAX_WAITING:
            raise Busy(f"{command.name}: {self.queued} commands wait for this VM's guest agent; try again later")
        command.queued = self._loop.time()
        self._waiting[command.number] = command
        self._deadlines.add(command.number, command.deadline)
        self._set_timer()
        self._advance()

    def distrust(self) -> None:
        """The port was closed and opened again in between: what comes next must follow a sync."""
        if self._current is None and self._conversation.synced:
            self._sync()

    def close(self, reason: str, *, port_open: bool = False) -> None:
        """End it for good; what is in the socket still is dealt with, then everybody who waits is told. The listener is not."""
        if self._ended:
            return
        if self._paused is None:
            self._intake.drain()
        self._stop()
        end_connection(self._socket)
        self._ledger.ended()
        current = self._current
        if current is not None:
            self._give_up(current)
            self._answer(current, None, end_of(current, reason, port_open=port_open))
            self._ledger.given_up(current.number)
        waiting, self._waiting = self._waiting, {}
        for command in waiting.values():
            self._answer(command, None, end_of(command, reason, port_open=port_open))

    def leave(self) -> None:
        """The worker ends: the connection, and whoever waits, is the next one's. Only vmloop's own and who holds a freeze are told.

        The fd stays open as long as this process: the zygote may not have its duplicate yet.
        """
        if self._ended:
            return
        self._stop()
        self._socket.detach()
        waiting, self._waiting = self._waiting, {}
        for command in waiting.values():
            if command.held or not command.request:  # the broker gives the others to the next worker
                self._answer(command, None, not_begun(command))
        current = self._current
        if current is not None and current.held:
            self._answer(current, None, end_of(current, "the worker ends", port_open=True))

    def _stop(self) -> None:
        self._ended = True
        self._intake.stop()
        for timer in (self._timer, self._asking, self._asking_again, self._paused):
            if timer is not None:
                timer.cancel()
        self._loop.remove_reader(self._socket)
        self._writer.close()

    # -- out ------------------------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Do the next thing that can be done."""
        if (
            self._ended
            or self._intake.inside
            or self._current is not None
            or not self._waiting
            or self._asking is not None
        ):
            return
        if not self._conversation.synced:
            self._sync()
            return
        number = next(iter(self._waiting))
        command = self._current = self._waiting.pop(number)
        command.sent = self._loop.time()
        self._conversation.sent(number)
        self._deadlines.add(number, command.due(self._timeout))
        self._set_timer()
        self._ledger.sending = number  # before it is entered: else a successor would wait for what was never sent
        self._ledger.enter(owed(command))
        self._writer.write(command.text, number)

    def _sync(self) -> None:
        if self._paused is not None or self._intake.draining:
            return
        self._stop_asking()
        self._asked = self._loop.time()
        self._asking = self._loop.call_later(self._timeout, self._sync_unanswered)
        text = self._conversation.sync()
        self._note()
        self._ledger.enter(AgentOwed(Part.SYNC, self._conversation.sync_number, sent=self._asked))
        self._listener.on_state(AgentState.SYNCING, "asked whether the agent answers")
        self._writer.write(text)

    def _sync_unanswered(self) -> None:
        standing = self._standing
        self._asking = None
        standing.failed_syncs += 1
        reason = f"the guest agent has not answered a sync for {self._timeout:g} s"
        self._listener.on_state(AgentState.UNRESPONSIVE, reason)
        if standing.failed_syncs % FAILED_SYNCS == 0:
            self._end(f"{FAILED_SYNCS} syncs in a row were not answered")
            return
        retry = tenacity.RetryCallState(tenacity.AsyncRetrying(), None, (), {})
        retry.attempt_number = standing.failed_syncs
        self._asking_again = self._loop.call_later(_sync_again(retry), self._sync)
        for command in tuple(self._waiting.values()):
            if command.queued <= self._asked:  # who came later is given a sync of its own
                self._waiting.pop(command.number, None)
                self._answer(command, None, not_in_step(command, reason))
        self._advance()

    def _note(self) -> None:
        conversation = self._conversation
        synced = conversation.synced and self._intake.reader.intact
        self._ledger.note(synced=synced, repeats_ids=conversation.repeats_ids)

    # -- in -------------------------------------------------------------------------------------------------------------------

    def on_consumed(self) -> None:
        """A chunk is dealt with: now the page may say so, and what waits be sent. Earlier, a successor would read it as something else."""
        late, self._late = self._late, []
        for number in late:
            self._ledger.answered(number)
        if self._in_step:
            self._in_step = False
            self._ledger.in_step()
            self._ledger.sending = 0
            self._note()
        if self._intact is not self._intake.reader.intact:
            self._intact = self._intake.reader.intact
            self._note()
        self._advance()

    def on_closed(self, reason: str) -> None:
        """The other end has closed the connection."""
        self._end(reason)

    def on_line(self, line: bytes) -> bool:
        """The router of everything that the guest says; False for what nobody asked for, which is counted and dropped here alone."""
        try:
            reply = read_reply(line)
        except NotAReply as error:
            return self._drop(line, str(error))
        whose, number = self._conversation.take(reply)
        if whose is Whose.SYNC:
            self._on_sync()
        elif whose is Whose.ANSWER:
            self._on_answer(reply)
        elif whose is Whose.LATE:
            self._on_late(number, reply)
        elif whose is Whose.NOISE:
            return self._drop(line, "an answer to nothing that was asked")
        return True

    def _drop(self, line: bytes, why: str) -> bool:
        noise = self._standing.noise
        if noise < 10 or noise % 10_000 == 0:
            log.warning("guest agent: line dropped (%s), %d so far: %.120r", why, noise + 1, line[:120])
        return False

    def _on_sync(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None
        if self._asking_again is not None:  # late, but there
            self._asking_again.cancel()
            self._asking_again = None
        self._standing.failed_syncs = 0
        self._standing.given_up.clear()
        self._listener.on_state(AgentState.READY, "the agent answers")
        unanswered, self._current = self._current, None  # one that an earlier worker sent: the agent does not have it
        if unanswered is not None:
            self._answer(unanswered, None, lost_with_its_worker(unanswered, cut=self._cut is True))
            self._ledger.answered(unanswered.number)
        self._cut = None
        self._in_step = True

    def _on_answer(self, reply: Reply) -> None:
        command, self._current, self._cut = self._current, None, None
        assert command is not None
        self._deadlines.drop(command.number)
        value, error = None, None
        try:
            content = reply.decoded()
        except NotAReply as damage:
            text = f"{command.name}: the guest agent's answer cannot be read: {damage}"
            error = AgentError(text, kind="damaged", desc=str(damage), **{"class": ""})
        else:
            value = content.get("return")
            error = agent_error(command.name, content["error"]) if "error" in content else None
        self._answer(command, value, error)
        self._ledger.answered(command.number)
        self._ledger.sending = 0
        if self._conversation.synced:
            self._listener.on_state(AgentState.READY, "the agent answers")
        self._advance()

    def _on_late(self, number: int, reply: Reply) -> None:
        command = self._standing.given_up.pop(number, None)
        if command is None:
            return
        try:
            content = reply.decoded()
        except NotAReply as damage:
            content = {"error": {"class": "", "desc": f"the late answer cannot be read: {damage}"}}
        self._listener.on_late(command, content)
        self._late.append(number)

    def on_too_long(self) -> None:
        """A line was dropped for its length; an answer, if one is waited for."""
        lines = self._intake.reader.lines
        log.warning("guest agent: a line of more than %d bytes was dropped, %d so far", lines.limit, lines.too_long)
        command = self._current
        if command is None or not (self._conversation.synced or self._cut is not None):
            return
        self._intake.refund()
        self._give_up(command)
        text = f"{command.name}: the guest agent sent a line of more than {lines.limit} bytes; ask for less, or raise max_agent_reply"
        self._answer(command, None, TooLarge(text, limit=lines.limit, sent=True))
        self._ledger.given_up(command.number)
        self._sync()

    # -- floods ---------------------------------------------------------------------------------------------------------------

    def on_flood(self, now: float) -> None:
        """Leave the guest's bytes in the socket: its own writes will soon wait. After that the connection is opened anew, without them."""
        self._loop.remove_reader(self._socket)
        seconds = self._standing.allowance.pause(now)
        noise = self._standing.noise
        reason = (
            f"the guest floods its agent's port ({noise} lines that answer nothing); it is not read for {seconds:.0f} s"
        )
        log.warning("guest agent: %s", reason)
        self._paused = self._loop.call_later(seconds, self._end, "opened anew after a flood")
        self._stop_asking()
        self._conversation.synced = False
        self._note()
        self._listener.on_state(AgentState.UNRESPONSIVE, reason)
        waiting, self._waiting = self._waiting, {}
        for command in waiting.values():
            self._answer(command, None, not_in_step(command, reason))

    def _stop_asking(self) -> None:
        for timer in (self._asking, self._asking_again):
            if timer is not None:
                timer.cancel()
        self._asking = self._asking_again = None

    # -- time -----------------------------------------------------------------------------------------------------------------

    def _set_timer(self) -> None:
        due = self._deadlines.next_due()
        if due is None or self._ended or (self._timer is not None and self._timer.when() <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = self._loop.time()
        for number in self._deadlines.take_due(now):
            command = self._waiting.pop(number, None)
            if command is not None:
                self._answer(command, None, not_sent_in_time(command, self.queued))
            elif self._current is not None and self._current.number == number:
                self._on_unanswered(self._current, now)
        self._set_timer()
        self._advance()

    def _on_unanswered(self, command: AgentCommand, now: float) -> None:
        taken = self._give_up(command)
        error = not_answered(command, now) if taken else not_taken(command)
        if (now < command.deadline and not command.quiet) or not taken:
            self._listener.on_state(AgentState.UNRESPONSIVE, f"{command.name} was not answered in time")
        self._answer(command, None, error)
        if taken:
            self._ledger.given_up(command.number)
        else:
            self._ledger.strike(command.number)
        self._ledger.sending = 0
        if not self._ended:
            self._sync()

    def _give_up(self, command: AgentCommand) -> bool:
        """Nobody waits for the command on the wire any more. False if it has not left whole, and so will not be carried out."""
        doubtful, self._cut = self._cut is not None, None
        self._current = None
        if self._writer.unfinished and not doubtful:
            self._conversation.cut()
            self._note()
            command.sent = 0.0
            return False
        self._conversation.give_up()
        self._note()
        given_up = self._standing.given_up
        given_up[command.number] = command
        if len(given_up) > MAX_GIVEN_UP:
            del given_up[next(iter(given_up))]
        return True

    # -- end --------------------------------------------------------------------------------------------------------------------

    def _end(self, reason: str) -> None:
        if not (self._ended or self._intake.draining):
            self.close(reason, port_open=True)
            self._listener.on_end(reason)

    def _answer(self, command: AgentCommand, value: Any, error: VmloopError | None) -> None:
        done, command.done = command.done, None
        self._deadlines.drop(command.number)
        if done is not None:
            done(value, error)
