# SPDX-License-Identifier: Apache-2.0
"""What is said to a guest agent and whose a reply is: commands, guest-sync-delimited, late replies, noise. Pure; used by session.py.

The agent answers in order. qemu-ga repeats a command's `id` since 4.0; older ones do not, and a reply without one is then told by its
place: after a sync it is the current command's, before the sync's answer it is the late one of the oldest command that was given up.
The 0xFF before a sync makes qemu-ga throw away half a command in its parser. It complains about the byte, without an id: that is expected.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from enum import Enum
from typing import Any, Final

import msgspec

from ...common.errors import AgentError, BadRequest, TooLarge
from .lines import MIN_REPLY

MAX_COMMAND_BYTES: Final = 16 * 1024 * 1024
MAX_VALUES: Final = 1_000_000  # in one reply: as Python objects they take 80 times the bytes of `[]`
MAX_GIVEN_UP: Final = 64  # commands whose late reply is still expected
OLD_SYNCS: Final = 16  # numbers of unanswered syncs that are remembered
ERROR_TEXT: Final = 2000  # characters of the agent's error text that are passed on

_random = random.SystemRandom()  # a guest must not guess an id


class NotAReply(Exception):
    """A line that is no reply; the text says why."""


class Reply(msgspec.Struct, frozen=True):
    """A reply's parts, each as the JSON text that it came as; empty for what is missing."""

    id: msgspec.Raw = msgspec.Raw(b"")
    value: msgspec.Raw = msgspec.field(name="return", default=msgspec.Raw(b""))
    error: msgspec.Raw = msgspec.Raw(b"")

    @property
    def has_id(self) -> bool:
        return bytes(self.id) != b""

    @property
    def is_error(self) -> bool:
        return bytes(self.error) != b""

    def decoded(self) -> dict[str, Any]:
        """`return` or `error` as a value. Raises `NotAReply` for one that cannot be held or is damaged."""
        name, raw = ("error", bytes(self.error)) if self.is_error else ("return", bytes(self.value))
        if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > MAX_VALUES:
            raise NotAReply(f"it holds more than {MAX_VALUES} values")
        try:
            return {name: msgspec.json.decode(raw)}
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise NotAReply(str(error)) from error


_reply_decoder: Final = msgspec.json.Decoder(Reply)


def read_reply(line: bytes) -> Reply:
    """The reply in a line. `NotAReply` for everything else. The values inside are not looked at yet."""
    if len(line) < MIN_REPLY:
        raise NotAReply("too short")
    try:
        reply = _reply_decoder.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise NotAReply(str(error)) from error
    if bool(bytes(reply.value)) == reply.is_error:
        raise NotAReply("it holds neither return nor error, or both")
    return reply


class Whose(Enum):
    """Whose a line is."""

    SYNC = "sync"  # the newest sync is answered: what comes now belongs to what is sent now
    ANSWER = "answer"  # to the current command
    LATE = "late"  # to one that was given up
    STALE = "stale"  # expected, and of no use: an older sync's answer, the complaint about 0xFF
    NOISE = "noise"  # nobody asked for it


class Conversation:
    """Who is owed what, over all connections to one agent. `T` of the commands is the caller's; they are known here by number only."""

    def __init__(self) -> None:
        self.synced = False
        self._sync = 0  # the newest sync's number; 0 once it is answered
        self._old_syncs: deque[int] = deque(maxlen=OLD_SYNCS)
        self._complaints = 0  # about 0xFF that may still come
        self._current = 0
        self._doubtful = False  # the current command was sent by an earlier worker, and may not have been whole
        self._given_up: deque[int] = deque(maxlen=MAX_GIVEN_UP)
        self._repeats_ids = False

    def take_over(
        self, *, synced: bool, repeats_ids: bool, current: int, given_up: Sequence[int], syncs: Sequence[int]
    ) -> None:
        """Go on with what an earlier worker said. Unless it was `synced` a sync must follow; what comes before its answer is owed still."""
        self.synced, self._repeats_ids = synced, repeats_ids
        self._current, self._doubtful = current, bool(current) and not synced
        self._given_up.extend(given_up)
        self._old_syncs.extend(syncs)
        self._complaints = 0 if synced else OLD_SYNCS

    def doubt(self) -> None:
        """Of the answer to the current command something may be missing: it is expected until the next sync is answered."""
        self.synced, self._doubtful = False, bool(self._current)
        self._complaints = OLD_SYNCS

    @property
    def repeats_ids(self) -> bool:
        """Whether the agent is known to repeat a command's id."""
        return self._repeats_ids

    @property
    def expects_reply(self) -> bool:
        """Whether a reply to a command may come, which a successor must not miss."""
        return bool(self._current or self._given_up)

    @property
    def owed(self) -> bool:
        """Whether the agent owes any answer."""
        return bool(self._current or self._sync or self._given_up)

    def sync(self) -> bytes:
        """The line that asks for a new beginning; nothing else may be sent before its answer."""
        if self._sync:
            self._old_syncs.append(self._sync)
        self.synced = False
        self._sync = new_id()
        self._complaints = min(self._complaints + 1, OLD_SYNCS)
        return b"\xff" + encode_command("guest-sync-delimited", {"id": self._sync}, self._sync)

    @property
    def sync_number(self) -> int:
        """The number of the sync that is out; 0 if none is."""
        return self._sync

    def sent(self, number: int) -> None:
        """A command with this id is on the wire."""
        self._current = number

    def give_up(self) -> None:
        """Nobody waits for the current command any more: its reply will be late."""
        if self._current:
            self._given_up.append(self._current)
            self._current = 0
        self.synced = self._doubtful = False

    def cut(self) -> None:
        """The current command was not sent to its end. The next sync makes the agent forget what it has of it."""
        self._current = 0
        self.synced = self._doubtful = False

    def lost(self) -> None:
        """The agent at the other end is gone, and with it what it owed."""
        self._given_up.clear()
        self._old_syncs.clear()
        self._current = self._sync = self._complaints = 0
        self.synced = self._repeats_ids = self._doubtful = False

    def take(self, reply: Reply) -> tuple[Whose, int]:
        """Whose a reply is, and the number of its command (0 if it has none)."""
        if not reply.has_id:
            return self._take_without_id(reply)
        number = _integer(reply.id)
        if number == 0:
            return Whose.NOISE, 0
        if number == self._sync:  # an error too: an agent that refuses the sync by its id is in step all the same
            self._repeats_ids = True
            return self._in_step()
        if number == self._current and (self.synced or self._doubtful):
            return self._answered()
        if number in self._given_up:
            while self._given_up.popleft() != number:
                pass  # in order: those before it will not be answered any more
            return Whose.LATE, number
        if number in self._old_syncs:
            self._old_syncs.remove(number)
            return Whose.STALE, 0
        return Whose.NOISE, 0

    def _take_without_id(self, reply: Reply) -> tuple[Whose, int]:
        number = 0 if reply.is_error else _integer(reply.value)
        if number and number == self._sync:
            return self._in_step()
        if number and number in self._old_syncs:
            self._old_syncs.remove(number)
            return Whose.STALE, 0
        if not self.synced and self._complaints and _is_complaint(reply):
            self._complaints -= 1
            return Whose.STALE, 0
        expected = self._current and (self.synced or self._doubtful)
        if expected and (reply.is_error or not self._repeats_ids):
            # With ids, an error without one is still an answer: the agent could not even parse the command.
            return self._answered()
        if not self.synced and self._given_up and not self._repeats_ids:
            return Whose.LATE, self._given_up.popleft()
        return Whose.NOISE, 0

    def _answered(self) -> tuple[Whose, int]:
        number, self._current, self._doubtful = self._current, 0, False
        return Whose.ANSWER, number

    def _in_step(self) -> tuple[Whose, int]:
        self.synced = True
        if self._doubtful:
            self._current, self._doubtful = 0, False
        self._sync = self._complaints = 0
        self._old_syncs.clear()
        self._given_up.clear()  # in order: what has not been answered before the sync will not be
        return Whose.SYNC, 0


def new_id() -> int:
    """A random number of 63 bits, never 0."""
    return _random.getrandbits(63) or 1


def encode_command(name: str, arguments: dict[str, Any] | None, number: int) -> bytes:
    """The line to send. Raises `BadRequest` for arguments that JSON does not have, `TooLarge` over `MAX_COMMAND_BYTES`."""
    message: dict[str, Any] = {"execute": name, "id": number}
    if arguments:
        message["arguments"] = arguments
    try:
        text = msgspec.json.encode(message) + b"\n"
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise BadRequest(f"{name}: the arguments are no JSON: {error}") from error
    if len(text) > MAX_COMMAND_BYTES:
        raise TooLarge(f"{name}: the command has {len(text)} bytes", limit=MAX_COMMAND_BYTES)
    return text


def agent_error(name: str, error: object) -> AgentError:
    """The agent's error reply as one of ours; `kind` is disabled, unknown or refused."""
    error = error if isinstance(error, dict) else {}
    label = str(error.get("class", "GenericError"))[:100]
    desc = str(error.get("desc", "no description"))[:ERROR_TEXT]
    # qemu-ga says CommandNotFound for both since 4.2; CommandDisabled is from before.
    if label == "CommandDisabled" or (label == "CommandNotFound" and "has been disabled" in desc):
        kind = "disabled"
        text = f"{name}: the guest agent is there, and has this command disabled: {desc}"
        if "frozen" in desc:
            text += "; thaw the guest's file systems first (guest-fsfreeze-thaw)"
    elif label == "CommandNotFound":
        kind, text = "unknown", f"{name}: the guest agent is there, and does not know this command: {desc}"
    else:
        kind, text = "refused", f"{name}: {desc}"
    return AgentError(text, kind=kind, **{"class": label, "desc": desc})


def _is_complaint(reply: Reply) -> bool:
    return reply.is_error and b"JSON parse error" in bytes(reply.error)[:200]


def _integer(raw: msgspec.Raw) -> int:
    """The positive integer that a JSON text is; 0 for anything else."""
    text = bytes(raw)
    return int(text) if len(text) <= 20 and text.isdigit() else 0
