# SPDX-License-Identifier: Apache-2.0
"""What the agent of a simulated VM can do in its guest: one table of commands, over files, processes and frozen file systems.

Called by simulated_agent. Replies, error texts and the order of checks are those of qemu-ga 7.2 (tests/contract compares them). A function
returns the value of `return`, or raises `Refused`.
"""

from __future__ import annotations

import base64
import errno
import os
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from .simulated_emitted import Emitted
from .simulated_files import Files, is_mode
from .simulated_programs import MAX_OUTPUT, Outcome, Surroundings, run_program
from .simulated_requests import Argument, Refused, check_arguments, disabled_command, no_such_command
from .simulated_vm import SimulatedVm

AGENT_VERSION: Final = "7.2.22"
MARK_COMMAND: Final = (
    "x-mark"  # which qemu-ga has not, and guest-info does not tell of: one line in the file of -emitted
)

MAX_PROCESSES: Final = 64  # running, or ended and not asked for; each may hold twice MAX_OUTPUT
MAX_READ: Final = 48 << 20  # bytes that guest-file-read takes as its count
READ_COUNT: Final = 4096  # bytes read if no count is given
FIRST_PID: Final = 1000

# What is allowed while file systems are frozen: writing a log line would hang the agent.
_ALLOWED_FROZEN: Final = frozenset(
    {
        *("guest-ping", "guest-info", "guest-sync", "guest-sync-delimited"),
        *("guest-fsfreeze-status", "guest-fsfreeze-thaw"),
    }
)
_QUIET: Final = frozenset({"guest-shutdown", "guest-suspend-ram", "guest-suspend-disk", "guest-suspend-hybrid"})
_MOUNTPOINTS: Final = {"/": "vda1", "/home": "vdb"}
_MODES: Final = ("powerdown", "halt", "reboot")
_WHENCES: Final = {"set": os.SEEK_SET, "cur": os.SEEK_CUR, "end": os.SEEK_END}
_BASE64: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\n")
_ENVIRONMENT: Final = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}


class _Process(NamedTuple):
    outcome: Outcome
    captured: bool
    ends: float  # on the monotonic clock


class Guest:
    """The guest behind an agent. Its files outlive a reset of the machine."""

    def __init__(self, vm: SimulatedVm, emitted: Emitted) -> None:
        self.vm = vm
        self.emitted = emitted
        self.files = Files()
        self.processes: dict[int, _Process] = {}
        self.last_pid = FIRST_PID - 1
        self.frozen: set[str] = set()  # mount points

    def restart(self) -> None:
        """The machine was reset: processes, handles and frozen file systems are no more."""
        self.processes.clear()
        self.files.close_all()
        self.frozen.clear()

    def run(self, name: str, arguments: dict[str, Any]) -> Any:
        """Carry a command out; None for one that does not answer when it succeeds."""
        command = _COMMANDS.get(name)
        if command is None:
            raise no_such_command(name)
        if name in self.vm.faults.agent_disabled:
            raise disabled_command(name)
        if self.frozen and name not in _ALLOWED_FROZEN:
            raise disabled_command(name, "the agent is in frozen state")
        check_arguments(command.arguments, arguments)
        value = command.run(self, arguments)
        return None if name in _QUIET else value

    def enabled(self, name: str) -> bool:
        """Whether a command would be carried out now."""
        return name not in self.vm.faults.agent_disabled and (not self.frozen or name in _ALLOWED_FROZEN)


class _Command(NamedTuple):
    run: Callable[[Guest, dict[str, Any]], Any]
    arguments: tuple[Argument, ...] = ()


# -- the agent and the system --


def _sync(_: Guest, arguments: dict[str, Any]) -> Any:
    return arguments["id"]


def _ping(_guest: Guest, _: dict[str, Any]) -> Any:
    return {}


def _info(guest: Guest, _: dict[str, Any]) -> Any:
    return {
        "version": AGENT_VERSION,
        "supported_commands": [
            {"enabled": guest.enabled(name), "name": name, "success-response": name not in _QUIET}
            for name in reversed(_COMMANDS)
            if name != MARK_COMMAND
        ],
    }


def _mark(guest: Guest, arguments: dict[str, Any]) -> Any:
    guest.emitted.mark(arguments["mark"])
    return {}


def _osinfo(_guest: Guest, _: dict[str, Any]) -> Any:
    return {
        "name": "Simulated GNU/Linux",
        "kernel-release": "6.1.0",
        "version": "12 (simulated)",
        "pretty-name": "Simulated GNU/Linux 12",
        "version-id": "12",
        "kernel-version": "#1 SMP",
        "machine": "x86_64",
        "id": "simulated",
    }


def _time(_guest: Guest, _: dict[str, Any]) -> Any:
    return time.time_ns()


def _host_name(guest: Guest, _: dict[str, Any]) -> Any:
    return {"host-name": guest.vm.name or "localhost"}


def _timezone(_guest: Guest, _: dict[str, Any]) -> Any:
    return {"zone": "UTC", "offset": 0}


def _users(_guest: Guest, _: dict[str, Any]) -> Any:
    return []


def _interfaces(_guest: Guest, _: dict[str, Any]) -> Any:
    return [
        _interface("lo", "00:00:00:00:00:00", "127.0.0.1", 8),
        _interface("eth0", "52:54:00:12:34:56", "192.0.2.15", 24),
    ]


def _interface(name: str, hardware: str, address: str, prefix: int) -> dict[str, Any]:
    counters = [f"{way}-{what}" for way in ("tx", "rx") for what in ("packets", "errs", "bytes", "dropped")]
    return {
        "name": name,
        "ip-addresses": [{"ip-address-type": "ipv4", "ip-address": address, "prefix": prefix}],
        "statistics": dict.fromkeys(counters, 0),
        "hardware-address": hardware,
    }


# -- power --


def _shutdown(guest: Guest, arguments: dict[str, Any]) -> Any:
    mode = arguments.get("mode", "powerdown")
    if mode not in _MODES:
        raise Refused("mode is invalid (valid values are: halt|powerdown|reboot")  # the bracket is qemu-ga's own
    if mode == "reboot":
        guest.vm.reset(guest=True, reason="guest-reset")
    else:
        guest.vm.guest_shutdown()


def _suspend(guest: Guest, _: dict[str, Any]) -> Any:
    guest.vm.guest_suspend()


def _hibernate(guest: Guest, _: dict[str, Any]) -> Any:
    guest.vm.guest_hibernate()


# -- file systems --


def _fsinfo(guest: Guest, _: dict[str, Any]) -> Any:
    return [
        {
            "name": device,
            "total-bytes": 1 << 30,
            "mountpoint": mountpoint,
            "disk": [],
            "used-bytes": guest.files.size() if mountpoint == "/" else 0,
            "type": "ext4",
        }
        for mountpoint, device in reversed(_MOUNTPOINTS.items())
    ]


def _fstrim(_guest: Guest, arguments: dict[str, Any]) -> Any:
    minimum = arguments.get("minimum", 0)
    return {"paths": [{"minimum": minimum, "path": path, "trimmed": 0} for path in _MOUNTPOINTS]}


def _freeze_status(guest: Guest, _: dict[str, Any]) -> Any:
    return "frozen" if guest.frozen else "thawed"


def _freeze(guest: Guest, arguments: dict[str, Any]) -> Any:
    guest.frozen = _MOUNTPOINTS.keys() & arguments.get("mountpoints", _MOUNTPOINTS)
    return len(guest.frozen)


def _thaw(guest: Guest, _: dict[str, Any]) -> Any:
    count = len(guest.frozen)
    guest.frozen = set()
    return count


# -- processes --


def _exec(guest: Guest, arguments: dict[str, Any]) -> Any:
    stdin = _decoded(arguments.get("input-data", ""))
    if len(guest.processes) >= MAX_PROCESSES:
        raise _spawn_error(f"Failed to fork ({os.strerror(errno.EAGAIN)})")
    pid = guest.last_pid + 1
    environment = _ENVIRONMENT
    if "env" in arguments:  # it takes the place of the agent's own
        pairs = [setting.partition("=") for setting in arguments["env"]]
        environment = _ENVIRONMENT | {name: value for name, equals, value in pairs if equals}
    surroundings = Surroundings(guest.files, pid, environment, stdin)
    try:
        outcome = run_program(arguments["path"], arguments.get("arg", []), surroundings)
    except OSError as error:
        named = f"\N{LEFT DOUBLE QUOTATION MARK}{arguments['path']}\N{RIGHT DOUBLE QUOTATION MARK}"
        raise _spawn_error(f"Failed to execute child process {named} ({error.strerror})") from None
    guest.last_pid = pid
    captured = arguments.get("capture-output", False)
    guest.processes[pid] = _Process(outcome, captured, time.monotonic() + outcome.seconds)
    return {"pid": pid}


def _exec_status(guest: Guest, arguments: dict[str, Any]) -> Any:
    process = guest.processes.get(arguments["pid"])
    if process is None:
        raise Refused("Invalid parameter 'pid'")
    if time.monotonic() < process.ends:
        return {"exited": False}
    del guest.processes[arguments["pid"]]  # whoever asks a second time is too late
    outcome = process.outcome
    ended = {"exitcode": outcome.status} if outcome.signal is None else {"signal": outcome.signal}
    streams = {"err": outcome.err, "out": outcome.out} if process.captured else {}
    written = {name: data for name, data in streams.items() if data}
    return {
        **ended,
        **{f"{name}-data": base64.b64encode(data[:MAX_OUTPUT]).decode() for name, data in written.items()},
        **{f"{name}-truncated": len(data) > MAX_OUTPUT for name, data in written.items()},
        "exited": True,
    }


def _spawn_error(words: str) -> Refused:
    return Refused(f"Guest agent command failed, error was '{words}'")


def _decoded(text: str) -> bytes:
    if not _BASE64.issuperset(text):
        raise Refused("Base64 data contains invalid characters")
    plain = text.replace("\n", "")
    return base64.b64decode(plain[: len(plain) // 4 * 4])  # GLib leaves out a group that is not whole


# -- files --


def _file_open(guest: Guest, arguments: dict[str, Any]) -> Any:
    path, mode = arguments["path"], arguments.get("mode", "r")
    if not is_mode(mode):
        raise Refused(f"invalid file open mode '{mode}'")
    try:
        return guest.files.open(path, mode)
    except OSError as error:
        raise Refused(f"failed to open file '{path}' (mode: '{mode}'): {error.strerror}") from None


def _file_close(guest: Guest, arguments: dict[str, Any]) -> Any:
    guest.files.close(_handle(guest, arguments))
    return {}


def _file_read(guest: Guest, arguments: dict[str, Any]) -> Any:
    handle, count = _handle(guest, arguments), arguments.get("count", READ_COUNT)
    if not 0 <= count <= MAX_READ:
        raise Refused(f"value '{count}' is invalid for argument count")
    try:
        data, eof = guest.files.read(handle, count)
    except OSError as error:
        raise Refused(f"failed to read file: {error.strerror}") from None
    return {"count": len(data), "buf-b64": base64.b64encode(data).decode(), "eof": eof}


def _file_write(guest: Guest, arguments: dict[str, Any]) -> Any:
    handle, data = _handle(guest, arguments), _decoded(arguments["buf-b64"])
    count = arguments.get("count", len(data))
    if not 0 <= count <= len(data):
        raise Refused(f"value '{count}' is invalid for argument count")
    try:
        guest.files.write(handle, data[:count])
    except OSError as error:
        raise Refused(f"failed to write to file: {error.strerror}") from None
    return {"count": count, "eof": False}


def _file_seek(guest: Guest, arguments: dict[str, Any]) -> Any:
    given = arguments["whence"]
    if isinstance(given, float):
        raise Refused("Invalid parameter type for 'whence', expected: integer")
    if isinstance(given, bool) or not isinstance(given, int | str):
        raise Refused("Invalid parameter type for 'whence', expected: GuestFileWhence")
    if isinstance(given, str) and given not in _WHENCES:
        raise Refused(f"Parameter 'whence' does not accept value '{given}'")
    handle = _handle(guest, arguments)
    whence = _WHENCES[given] if isinstance(given, str) else given
    if whence not in _WHENCES.values():
        raise Refused(f"invalid whence code {whence}")
    try:
        return {"eof": False, "position": guest.files.seek(handle, arguments["offset"], whence)}
    except OSError as error:
        raise Refused(f"failed to seek file: {error.strerror}") from None


def _file_flush(guest: Guest, arguments: dict[str, Any]) -> Any:
    _handle(guest, arguments)
    return {}


def _handle(guest: Guest, arguments: dict[str, Any]) -> int:
    number: int = arguments["handle"]
    if not guest.files.has(number):
        raise Refused(f"handle '{number}' has not been found")
    return number


_HANDLE: Final = Argument("handle", "integer")

_COMMANDS: Final[dict[str, _Command]] = {
    "guest-sync-delimited": _Command(_sync, (Argument("id", "integer"),)),
    "guest-sync": _Command(_sync, (Argument("id", "integer"),)),
    "guest-ping": _Command(_ping),
    "guest-get-time": _Command(_time),
    "guest-info": _Command(_info),
    "guest-shutdown": _Command(_shutdown, (Argument("mode", optional=True),)),
    "guest-file-open": _Command(_file_open, (Argument("path"), Argument("mode", optional=True))),
    "guest-file-close": _Command(_file_close, (_HANDLE,)),
    "guest-file-read": _Command(_file_read, (_HANDLE, Argument("count", "integer", True))),
    "guest-file-write": _Command(_file_write, (_HANDLE, Argument("buf-b64"), Argument("count", "integer", True))),
    "guest-file-seek": _Command(_file_seek, (_HANDLE, Argument("offset", "integer"), Argument("whence", "any"))),
    "guest-file-flush": _Command(_file_flush, (_HANDLE,)),
    "guest-fsfreeze-status": _Command(_freeze_status),
    "guest-fsfreeze-freeze": _Command(_freeze),
    "guest-fsfreeze-freeze-list": _Command(_freeze, (Argument("mountpoints", "strings", True),)),
    "guest-fsfreeze-thaw": _Command(_thaw),
    "guest-fstrim": _Command(_fstrim, (Argument("minimum", "integer", True),)),
    "guest-suspend-disk": _Command(_hibernate),
    "guest-suspend-ram": _Command(_suspend),
    "guest-suspend-hybrid": _Command(_suspend),
    "guest-network-get-interfaces": _Command(_interfaces),
    "guest-get-fsinfo": _Command(_fsinfo),
    "guest-exec-status": _Command(_exec_status, (Argument("pid", "integer"),)),
    "guest-exec": _Command(
        _exec,
        (
            Argument("path"),
            Argument("arg", "strings", True),
            Argument("env", "strings", True),
            Argument("input-data", optional=True),
            Argument("capture-output", "boolean", True),
        ),
    ),
    "guest-get-host-name": _Command(_host_name),
    "guest-get-users": _Command(_users),
    "guest-get-timezone": _Command(_timezone),
    "guest-get-osinfo": _Command(_osinfo),
    MARK_COMMAND: _Command(_mark, (Argument("mark"),)),
}
