# SPDX-License-Identifier: Apache-2.0
"""A guest whose agent answers the operation `agent` of a NativeBroker: files in memory, programs that are functions, frozen file systems.

    guest = GuestOnWire(broker, "web1")
    guest.files["/etc/motd"] = b"hello"
    guest.programs["true"] = lambda started: Ended(exitcode=0)

Answers and error texts are those of qemu-ga 7.2.22, tried by hand: the end of a process is told once, flush and close can fail, a blocked
command has the class CommandNotFound. `lies` replaces answers, `before` is called with each command before it is carried out.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from vmloop.common.errors import AgentError, BadRequest, VmloopError
from vmloop.common.pack import unpack_map
from vmloop.common.wire import Message

from .native_broker import NativeBroker, partial, refusal, reply

MAX_COUNT = 48 << 20  # of guest-file-read
FIRST_HANDLE = 1000


@dataclass
class Started:
    """What a program got."""

    args: list[str]
    env: list[str] | None
    given: bytes
    files: dict[str, bytes]


@dataclass
class Ended:
    """How a program ended, and how often it was asked before."""

    exitcode: int | None = 0
    signal: int | None = None
    out: bytes = b""
    err: bytes = b""
    truncated: bool = False
    looks: int = 0


@dataclass
class _Handle:
    path: str
    writing: bool
    place: int = 0


Program = Callable[[Started], Ended]
Answers = Iterable["Message | bytes"]


def sha256sum(started: Started) -> Ended:
    """As coreutils and busybox have it."""
    *options, path = started.args
    if path.startswith("-") and options != ["--"]:
        return Ended(1, err=f"sha256sum: unrecognized option '{path}'\n".encode())
    if path not in started.files:
        return Ended(1, err=f"sha256sum: {path}: No such file or directory\n".encode())
    mark = "\\" if "\\" in path else ""
    return Ended(out=f"{mark}{hashlib.sha256(started.files[path]).hexdigest()}  {path}\n".encode())


def failed(desc: str, kind: str = "refused", of: str = "GenericError") -> AgentError:
    return AgentError(f"the guest agent of web1 refused: {desc}", **{"class": of, "desc": desc, "kind": kind})


@dataclass
class GuestOnWire:
    """Scripts run on the broker's thread; tests look when a call has returned."""

    broker: NativeBroker
    name: str = "web1"
    files: dict[str, bytes] = field(default_factory=dict)
    programs: dict[str, Program] = field(default_factory=lambda: {"sha256sum": sha256sum})
    disabled: set[str] = field(default_factory=set)
    lies: dict[str, Callable[[dict[str, Any]], Any]] = field(default_factory=dict)
    before: Callable[[str, dict[str, Any]], object] = lambda command, arguments: None
    commands: list[str] = field(default_factory=list)
    handles: dict[int, _Handle] = field(default_factory=dict)
    file_systems: int = 3  # that can be frozen
    size_limit: int = 1 << 40  # bytes in a file, after which the guest's disk is full
    accepts: int = 1 << 40  # bytes that one guest-file-write takes
    hold: tuple[int, Message] | None = None  # the request that holds, by its place in broker.seen

    def __post_init__(self) -> None:
        self._processes: dict[int, tuple[Ended, bool]] = {}
        self._next_handle = FIRST_HANDLE
        self._next_pid = 4711
        self._remembered: dict[bytes, Any] = {}
        self.broker.answer(f"vm/{self.name}", "agent", self._serve)

    def end_hold(self, why: str) -> None:
        """What the worker does at the limit, or when told to thaw."""
        if self.hold is not None:
            place, request = self.hold
            self.hold = None
            self.broker.send_to(place, reply(request, {"thawed": why}))

    # -- one request -----------------------------------------------------------------------------------------------------

    def _serve(self, request: Message) -> Answers:
        asked = unpack_map(request.body)
        command, arguments = asked["command"], asked.get("arguments", {})
        if request.key in self._remembered:  # as a worker does
            return [reply(request, self._remembered[request.key])]
        self.commands.append(command)
        try:
            self.before(command, arguments)
            if asked.get("hold"):
                return self._begin_hold(request)
            value = self._lie_or_truth(command, arguments)
        except VmloopError as error:
            return [refusal(request, error)]
        if request.key:
            self._remembered[request.key] = value
        return [reply(request, value)]

    def _lie_or_truth(self, command: str, arguments: dict[str, Any]) -> Any:
        if command in self.disabled:
            raise failed(f"Command {command} has been disabled", "disabled", "CommandNotFound")
        method = getattr(self, "_" + command.replace("-", "_"), None)
        if method is None:
            raise failed(f"The command {command} has not been found", "unknown", "CommandNotFound")
        truth = method(**{name.replace("-", "_"): value for name, value in arguments.items()})
        return self.lies[command](truth) if command in self.lies else truth

    # -- files -----------------------------------------------------------------------------------------------------------

    def _guest_ping(self) -> dict[str, Any]:
        return {}

    def _guest_file_open(self, path: str, mode: str = "r") -> int:
        if mode not in ("r", "rb", "w", "wb"):
            raise failed(f"invalid file open mode '{mode}'")
        writing = mode.startswith("w")
        if path.endswith("/"):
            raise failed(f"failed to open file '{path}' (mode: '{mode}'): Is a directory")
        if not writing and path not in self.files:
            raise failed(f"failed to open file '{path}' (mode: '{mode}'): No such file or directory")
        if writing:
            self.files[path] = b""
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        self.handles[handle] = _Handle(path, writing)
        return handle

    def _handle(self, number: int) -> _Handle:
        if number not in self.handles:
            raise failed(f"handle '{number}' has not been found")
        return self.handles[number]

    def _guest_file_read(self, handle: int, count: int = 4096) -> dict[str, Any]:
        file = self._handle(handle)
        if not 0 <= count <= MAX_COUNT:
            raise failed(f"value '{count}' is invalid for argument count")
        if file.writing:
            raise failed("failed to read file: Bad file descriptor")
        data = self.files[file.path][file.place : file.place + count]
        file.place += len(data)
        return {
            "count": len(data),
            "buf-b64": base64.b64encode(data).decode(),
            "eof": len(data) < count,
        }

    def _guest_file_write(self, handle: int, buf_b64: str) -> dict[str, Any]:
        file = self._handle(handle)
        try:
            data = base64.b64decode(buf_b64, validate=True)[: self.accepts]
        except binascii.Error:
            raise failed("Base64 data contains invalid characters") from None
        if not file.writing:
            raise failed("failed to write to file: Bad file descriptor")
        old = self.files[file.path]
        new = old[: file.place] + data + old[file.place + len(data) :]
        if len(new) > self.size_limit:
            raise failed("failed to write to file: No space left on device")
        self.files[file.path] = new
        file.place += len(data)
        return {"count": len(data), "eof": False}

    def _guest_file_seek(self, handle: int, offset: int, whence: int) -> dict[str, Any]:
        file = self._handle(handle)
        file.place = offset + {0: 0, 1: file.place, 2: len(self.files[file.path])}[whence]
        return {"position": file.place, "eof": False}

    def _guest_file_flush(self, handle: int) -> dict[str, Any]:
        self._handle(handle)
        return {}

    def _guest_file_close(self, handle: int) -> dict[str, Any]:
        self._handle(handle)
        del self.handles[handle]
        return {}

    # -- programs --------------------------------------------------------------------------------------------------------

    def _guest_exec(
        self,
        path: str,
        arg: list[str] | None = None,
        env: list[str] | None = None,
        input_data: str = "",
        capture_output: bool = False,
    ) -> dict[str, Any]:
        if path not in self.programs:
            reason = f"Failed to execute child process \u201c{path}\u201d (No such file or directory)"
            raise failed(f"Guest agent command failed, error was '{reason}'")
        ended = self.programs[path](Started(arg or [], env, base64.b64decode(input_data), self.files))
        pid, self._next_pid = self._next_pid, self._next_pid + 1
        self._processes[pid] = (ended, capture_output)
        return {"pid": pid}

    def _guest_exec_status(self, pid: int) -> dict[str, Any]:
        if pid not in self._processes:
            raise failed("Invalid parameter 'pid'")
        ended, captured = self._processes[pid]
        if ended.looks > 0:
            ended.looks -= 1
            return {"exited": False}
        del self._processes[pid]  # told once
        answer: dict[str, Any] = {"exited": True}
        if ended.signal is not None:
            answer["signal"] = ended.signal
        elif ended.exitcode is not None:
            answer["exitcode"] = ended.exitcode
        for stream, data in (("out", ended.out), ("err", ended.err)):
            if captured and data:
                answer[f"{stream}-data"] = base64.b64encode(data).decode()
                answer[f"{stream}-truncated"] = ended.truncated
        return answer

    # -- frozen file systems ---------------------------------------------------------------------------------------------

    def _begin_hold(self, request: Message) -> Answers:
        if "guest-fsfreeze-freeze" in self.disabled:
            raise failed("Command guest-fsfreeze-freeze has been disabled", "disabled", "CommandNotFound")
        if self.hold is not None:
            raise BadRequest("web1 is frozen already")
        if self.file_systems == 0:
            return [reply(request, {"thawed": "there was nothing to freeze"})]
        self.hold = (len(self.broker.seen) - 1, request)
        return [partial(request, {"return": self.file_systems}), partial(request, {"left": 59.0})]

    def _guest_fsfreeze_freeze(self) -> int:
        return self.file_systems

    def _guest_fsfreeze_status(self) -> str:
        return "thawed" if self.hold is None else "frozen"

    def _guest_fsfreeze_thaw(self) -> int:
        if self.hold is None:
            return 0
        self.end_hold("asked")
        return self.file_systems
