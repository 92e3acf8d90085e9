# SPDX-License-Identifier: Apache-2.0
"""One open connection to a guest agent: a bounded queue, one command on the wire, a sync whenever it is not sure whose a reply is.

Made by agent.py when the guest has opened its port. A caller's end never wedges the channel: the command is given up, a sync follows at
once, and its answer says that everything before it is over. What must outlive a connection (owed answers, the allowance for noise, the
count of failed syncs) is in `Standing`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any, Final, Protocol

import tenacity

from ...common.deadlines import Deadlines
from ...common.errors import AgentError, Busy, TooLarge, VmloopError
from ...common.states import AgentState
from .commands import AgentCommand, end_of, not_answered, not_in_step, not_sent_in_time, not_taken
from .lines import BYTE_COST, END_COST, LINE_COST, TURN_COST, Allowance, Lines
from .sync import MAX_GIVEN_UP, Conversation, NotAReply, Reply, Whose, agent_error, read_reply

log = logging.getLogger(__name__)

MAX_WAITING: Final = 1024  # commands of one VM, on the wire or before it
CHUNK: Final = 64 * 1024  # bytes of one read while an answer is owed
CHUNKS: Final = 4  # in one turn of the loop
IDLE_CHUNK: Final = 4 * 1024  # bytes of one turn while nothing is owed: nobody waits for what comes
IDLE_LINE: Final = 64 * 1024  # bytes of a line that are kept then
FAILED_SYNCS: Final = 3  # in a row: the connection itself is suspected

# Between syncs that nobody asks for: an agent that is silent is looked after less and less often.
_sync_again: Final = tenacity.wait_exponential(multiplier=1.0, max=60.0)


class Listener(Protocol):
    """What a session tells. None of these may raise."""

    def on_state(self, state: AgentState, reason: str) -> None: ...
    def on_late(self, command: AgentCommand, reply: dict[str, Any]) -> None: ...
    def on_end(self, reason: str) -> None: ...


class Standing:
    """What is known of one agent over all its connections."""

    def __init__(self, now: float, *, max_reply: int) -> None:
        """max_reply: bytes in one line."""
        self.conversation = Conversation()
        self.allowance = Allowance(now, max_reply=max_reply)
        self.max_reply = max_reply
        self.given_up: dict[int, AgentCommand] = {}  # their replies will be late
        self.failed_syncs = 0  # in a row
        self.noise = 0  # lines that answered nothing

    def lost(self) -> None:
        """The guest has closed the port: the agent, and what it owed, is gone."""
        self.conversation.lost()
        self.given_up.clear()
        self.failed_syncs = 0


class AgentSession:
    """Life: made → `start` → commands → `close`, or `on_end` when it ends by itself."""

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
        self._lines = Lines(IDLE_LINE)
        self._waiting: dict[int, AgentCommand] = {}
        self._current: AgentCommand | None = None
        self._rest = b""  # of what is being sent
        self._deadlines: Deadlines[int] = Deadlines()
        self._timer: asyncio.TimerHandle | None = None
        self._asking: asyncio.TimerHandle | None = None  # a sync is out, until then
        self._asked = 0.0  # when the newest one was sent
        self._asking_again: asyncio.TimerHandle | None = None
        self._paused: asyncio.TimerHandle | None = None
        self._unsettled = 0.0  # what was spent on the unfinished line
        self._ended = False

    def start(self) -> None:
        """Listen, and sync at once: ready means that the agent has really answered."""
        self._conversation.synced = False
        self._loop.add_reader(self._socket, self._readable)
        self._sync()

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
        """End it; everybody who waits is told. The listener is not."""
        if self._ended:
            return
        self._ended = True
        for timer in (self._timer, self._asking, self._asking_again, self._paused):
            if timer is not None:
                timer.cancel()
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        current = self._current
        if current is not None:
            self._give_up(current)
            self._answer(current, None, end_of(current, reason, port_open=port_open))
        waiting, self._waiting = self._waiting, {}
        for command in waiting.values():
            self._answer(command, None, end_of(command, reason, port_open=port_open))

    # -- out ------------------------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Do the next thing that can be done."""
        if self._ended or self._current is not None or not self._waiting or self._asking is not None:
            return
        if not self._conversation.synced:
            self._sync()
            return
        number = next(iter(self._waiting))
        command = self._current = self._waiting.pop(number)
        command.sent = self._loop.time()
        self._conversation.sent(number)
        self._lines.limit = self._standing.max_reply
        self._deadlines.add(number, command.due(self._timeout))
        self._set_timer()
        self._write(command.text)

    def _sync(self) -> None:
        if self._paused is not None:
            return
        self._stop_asking()
        self._asked = self._loop.time()
        self._asking = self._loop.call_later(self._timeout, self._sync_unanswered)
        text = self._conversation.sync()
        self._listener.on_state(AgentState.SYNCING, "asked whether the agent answers")
        self._write(text)

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

    def _write(self, text: bytes) -> None:
        """Send; what is left of an unfinished command is dropped for it (only a sync can come then, and it starts with 0xFF)."""
        self._loop.remove_writer(self._socket)
        self._rest = text
        self._flush()

    def _flush(self) -> None:
        try:
            sent = self._socket.send(self._rest)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            # Not from inside a caller's submit: whoever asks is told on the loop.
            self._loop.call_soon(self._end, f"the agent's socket takes no more: {error.strerror}")
            return
        self._rest = self._rest[sent:]
        if self._rest:
            self._loop.add_writer(self._socket, self._flush)
        else:
            self._loop.remove_writer(self._socket)

    # -- in -------------------------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        spent = TURN_COST
        for _ in range(CHUNKS):
            owed = self._conversation.owed
            self._lines.limit = self._standing.max_reply if owed else IDLE_LINE
            try:
                data = self._socket.recv(CHUNK if owed else IDLE_CHUNK)
            except BlockingIOError:
                break
            except OSError as error:
                self._end(f"reading from the agent's socket failed: {error.strerror}")
                return
            if not data:
                self._end("the agent's socket was closed")
                return
            spent += len(data) * BYTE_COST + data.count(b"\n") * END_COST
            if not self._take(data, spent) or self._ended or not owed:
                break
            spent = 0.0

    def _take(self, data: bytes, spent: float) -> bool:
        """Deal with some bytes; False if reading has to pause."""
        allowance = self._standing.allowance
        too_long = self._lines.too_long
        now = self._loop.time()
        allowance.spend(spent, now)
        self._unsettled += spent
        for line in self._lines.feed(data):
            if self._on_line(line):
                allowance.refund(self._unsettled)
            else:
                self._standing.noise += 1
                allowance.spend(LINE_COST, now)
            self._unsettled = 0.0
            if self._ended:
                return False
        if self._lines.too_long > too_long:
            self._on_too_long()
        if self._ended or allowance.spend(0.0, now):
            return True
        self._pause(now)
        return False

    def _on_line(self, line: bytes) -> bool:
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
        self._advance()

    def _on_answer(self, reply: Reply) -> None:
        command, self._current = self._current, None
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

    def _on_too_long(self) -> None:
        limit = self._lines.limit
        log.warning("guest agent: a line of more than %d bytes was dropped, %d so far", limit, self._lines.too_long)
        command = self._current
        if command is None or not self._conversation.synced:
            return
        self._standing.allowance.refund(self._unsettled)
        self._unsettled = 0.0
        self._give_up(command)
        text = f"{command.name}: the guest agent sent a line of more than {limit} bytes; ask for less, or raise max_agent_reply"
        self._answer(command, None, TooLarge(text, limit=limit, sent=True))
        self._sync()

    # -- floods ---------------------------------------------------------------------------------------------------------------

    def _pause(self, now: float) -> None:
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
        if not self._ended:
            self._sync()

    def _give_up(self, command: AgentCommand) -> bool:
        """Nobody waits for the command on the wire any more. False if it has not left whole, and so will not be carried out."""
        self._current = None
        if self._rest:
            self._conversation.cut()
            command.sent = 0.0
            return False
        self._conversation.give_up()
        given_up = self._standing.given_up
        given_up[command.number] = command
        if len(given_up) > MAX_GIVEN_UP:
            del given_up[next(iter(given_up))]
        return True

    # -- end --------------------------------------------------------------------------------------------------------------------

    def _end(self, reason: str) -> None:
        if not self._ended:
            self.close(reason, port_open=True)
            self._listener.on_end(reason)

    def _answer(self, command: AgentCommand, value: Any, error: VmloopError | None) -> None:
        done, command.done = command.done, None
        self._deadlines.drop(command.number)
        if done is not None:
            done(value, error)
