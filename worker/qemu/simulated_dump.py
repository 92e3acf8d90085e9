# SPDX-License-Identifier: Apache-2.0
"""dump-guest-memory of a simulated VM: a small file, written over as many seconds as the fault dump_seconds says.

Made by `simulated.serve`, one for a VM, and used by simulated_machine. Checks, texts, events and their order are those of QEMU 7.2.
"""

from __future__ import annotations

import asyncio
import os
import stat
import struct
import time
from typing import Any, Final

from .simulated_requests import Refused
from .simulated_vm import SimulatedVm

FORMATS: Final = ("elf", "kdump-zlib", "kdump-lzo", "kdump-snappy", "win-dmp")
AVAILABLE: Final = ("elf", "kdump-zlib", "win-dmp")

_FIRMWARE: Final = 256 << 10  # bytes that a dump has beside the memory

# An ELF header of a core file for x86_64, without a single segment.
_ELF: Final = struct.pack("<4s12sHHIQQQIHHHHHH", b"\x7fELF", b"\x02\x01\x01", 4, 62, 1, 0, 0, 0, 0, 64, 0, 0, 0, 0, 0)
_KDUMP: Final = b"KDUMP   ".ljust(64, b"\0")
_REST: Final = bytes(4096 - len(_ELF))


class Dump:
    """The dump that runs, or the last one."""

    def __init__(self, vm: SimulatedVm) -> None:
        self._vm = vm
        self._status = "none"
        self._total = 0
        self._completed = 0
        self._begun = 0.0
        self._seconds = 0.0
        self._fd = -1
        self._resume = False
        self._done: asyncio.Future[dict[str, Any]] | None = None  # what a caller that did not detach waits for

    def query(self) -> dict[str, Any]:
        """The value of query-dump."""
        completed = self._completed
        if self._vm.dumping:
            completed = int(self._total * min(1.0, (time.monotonic() - self._begun) / (self._seconds or 1.0)))
        return {"total": self._total, "status": self._status, "completed": completed}

    def start(self, arguments: dict[str, Any]) -> Any:
        """Begin a dump. Returns at once if it is detached, else a future; `Refused` if nothing begins."""
        self._check(arguments)
        self._fd = _opened(arguments["protocol"])
        self._total = arguments.get("length", self._vm.memory + _FIRMWARE)
        self._status, self._completed = "active", 0
        self._begun, self._seconds = time.monotonic(), self._vm.faults.dump_seconds
        self._resume = self._vm.running
        self._vm.stop("save-vm")
        self._vm.dumping = True
        self._done = None if arguments.get("detach") else asyncio.get_running_loop().create_future()
        kind = arguments.get("format", "elf")
        if kind == "win-dmp":
            self._end("win-dump: invalid vmcoreinfo note size")  # a guest that has no such driver
        elif not self._written(_ELF if kind == "elf" else _KDUMP):
            self._end("dump: failed to write elf header: No space left on device")
        elif self._seconds or self._done is None:
            self._vm.later("dump", self._seconds, self._finish)
        else:
            self._finish()
        return {} if self._done is None else self._done

    def _check(self, arguments: dict[str, Any]) -> None:
        self.refuse_while_dumping()
        kind = arguments.get("format", "elf")
        filtered = "begin" in arguments or "length" in arguments
        if kind != "elf" and (arguments["paging"] or filtered):
            raise Refused("kdump-compressed format doesn't support paging or filter")
        for one, other in (("begin", "length"), ("length", "begin")):
            if one in arguments and other not in arguments:
                raise Refused(f"Parameter '{other}' is missing")
        if kind not in AVAILABLE:
            raise Refused(f"{kind} is not available now")

    def refuse_while_dumping(self) -> None:
        """`Refused` while a dump runs, in QEMU's words."""
        if self._vm.dumping:
            raise Refused("There is a dump in process, please wait.")

    def close(self) -> None:
        """The VM is gone."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._done is not None:
            self._done.cancel()

    def _finish(self) -> None:
        self._end("" if self._written(_REST) else "dump: failed to save memory: No space left on device")

    def _written(self, data: bytes) -> bool:
        try:
            return os.write(self._fd, data) == len(data)
        except OSError:
            return False

    def _end(self, error: str) -> None:
        os.close(self._fd)
        self._fd = -1
        self._vm.dumping = False
        self._status, self._completed = ("failed", 0) if error else ("completed", self._total)
        result: dict[str, Any] = {"result": self.query()}
        self._vm.emit("DUMP_COMPLETED", {**result, "error": error} if error else result)
        if self._resume:
            self._vm.cont()
        if self._done is not None and error:
            self._done.set_exception(Refused(error))
        elif self._done is not None:
            self._done.set_result({})


def _opened(protocol: str) -> int:
    """The file to write to, made if need be. A FIFO without a reader is an error here; QEMU would hang in it."""
    kind, _, path = protocol.partition(":")
    if kind != "file" or protocol == kind:
        raise Refused("Invalid parameter 'protocol'")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, flags, stat.S_IRUSR)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "Invalid argument"
        raise Refused(f"Could not open '{path}': {reason}") from None
