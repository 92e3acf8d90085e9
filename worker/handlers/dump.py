# SPDX-License-Identifier: Apache-2.0
"""The guest's memory in a file, with progress: state/vms/NAME/dump-EPOCH-SEQ.kdump, or .elf. Used by crash.py.

    DUMP_STARTED {path, format} … DUMP_PROGRESS {completed, total, percent} … DUMP_FINISHED {path, bytes, error?}      fact `dump`

QEMU writes it on a thread of its own (`detach`) and stops a guest that runs meanwhile; it offers no event of its progress, so query-dump
is asked each second until the dump is over or its time is. Seen on QEMU 7.2: STOP comes before the reply, RESUME after DUMP_COMPLETED;
`cont` and a second dump are refused meanwhile; a file that QEMU makes has mode 0400, one that is there keeps its own; query-dump names
no reason of a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from pathlib import Path
from typing import Any, Final

from ...common.errors import BadRequest, DeadlineExceeded, Denied, QmpError, VmloopError
from . import fields
from .context import VmContext

log = logging.getLogger(__name__)

KEEP: Final = 3  # dumps of one VM, the newest ones; each is as large as the guest's memory
QUERY_SECONDS: Final = 10.0
START_SECONDS: Final = 60.0  # QEMU stops the CPUs and writes the headers before it answers
FIRST_LOOK: Final = 0.05  # seconds; a small guest is dumped by then
LOOK_AGAIN: Final = 1.0  # seconds between two looks
TELL_PERCENT: Final = 10.0  # progress is told when it has grown by so much, and each second if it has grown at all

_NAME = re.compile(r"dump-(\d+)-(\d+)\.(?:elf|kdump)", re.ASCII)


async def keep_dump(vm: VmContext, epoch: int, seq: int, seconds: float) -> Path:
    """Dump the guest into the VM's state directory, for the event EPOCH.SEQ, in the best format there is; the oldest dumps make room.

    Raises as `dump_guest` does.
    """
    path = vm.paths.state / f"dump-{epoch}-{seq}.{await _suffix(vm)}"
    old = dumps(vm.paths.state)[KEEP - 1 :]
    await _require_room(vm, path.parent, sum(_blocks(file) for file in old))
    for file in old:
        log.info("VM %s: removing %s: %d dumps are kept", vm.name, file, KEEP)
        _unlink(file)
    await dump_guest(vm, path, seconds)
    return path


def dumps(directory: Path) -> list[Path]:
    """The dumps in a VM's state directory, newest first."""
    found = [
        (int(match[1]), int(match[2]), file) for file in directory.iterdir() if (match := _NAME.fullmatch(file.name))
    ]
    return [file for _, _, file in sorted(found, reverse=True)]


async def dump_guest(vm: VmContext, path: Path, seconds: float) -> int:
    """Dump the guest's memory into a new file, mode 0600: `.kdump` is kdump-zlib, any other name ELF. Its size in bytes.

    `seconds`: how long it may take in all. Raises `BadRequest` if the file exists or cannot be made, `Denied` if it would not fit,
    `QmpError` if QEMU refuses or fails, `DeadlineExceeded` if time is over (QEMU writes on), and the monitor's errors. A dump that
    failed is removed.
    """
    until = vm.loop.time() + seconds
    await _require_room(vm, path.parent, 0)
    kind = "kdump-zlib" if path.suffix == ".kdump" else "elf"
    _create(vm, path)
    arguments = {"paging": False, "protocol": f"file:{path}", "detach": True, "format": kind}
    vm.expect("dump")  # of the pause that QEMU begins before it answers
    try:
        await vm.qmp("dump-guest-memory", arguments, seconds=min(seconds, START_SECONDS), reading=False)
    except QmpError as error:
        _unlink(path)
        raise QmpError(f"VM {vm.name}: no dump: {error}", **error.fields) from error
    finally:
        vm.expect("")
    return await _follow(vm, path, kind, until)


async def _follow(vm: VmContext, path: Path, kind: str, until: float) -> int:
    """Tell the progress of a dump that was begun, and its end."""
    vm.emit("DUMP_STARTED", {"path": str(path), "format": kind})
    vm.set_fact("dump", {"path": str(path), "status": "active"})
    try:
        await _wait_over(vm, until)
    except VmloopError as error:
        if isinstance(error, QmpError):  # QEMU is through with it; else it may write on
            _unlink(path)
        _finished(vm, path, error)
        raise
    return _finished(vm, path, None)


async def _wait_over(vm: VmContext, until: float) -> None:
    told, pause = 0.0, FIRST_LOOK
    while True:
        await asyncio.sleep(max(0.0, min(pause, until - vm.loop.time())))
        pause = min(pause * 2, LOOK_AGAIN)
        reply = fields.mapping(await vm.qmp("query-dump", seconds=QUERY_SECONDS))
        completed, total = fields.number(reply, "completed") or 0, fields.number(reply, "total") or 0
        match reply.get("status"):
            case "completed":
                return
            case "active":
                percent = round(min(100.0, 100.0 * completed / total), 1) if total else 0.0
                if percent >= told + TELL_PERCENT or (percent > told and pause == LOOK_AGAIN):
                    told = percent
                    vm.emit("DUMP_PROGRESS", {"completed": completed, "total": total, "percent": percent})
            case other:  # failed; none, in a QEMU that knows nothing of it
                desc = f"QEMU reports it as {fields.plain(other)} after {completed} of {total} bytes"
                text = f"VM {vm.name}: the dump has failed: {desc}; the event DUMP_COMPLETED has the reason"
                raise QmpError(text, **{"class": "GenericError", "desc": desc})
        if vm.loop.time() >= until:
            raise DeadlineExceeded(
                f"VM {vm.name}: the dump is not over in time; QEMU writes on, and keeps the guest paused until it is through"
            )


def _finished(vm: VmContext, path: Path, error: VmloopError | None) -> int:
    size = 0
    with contextlib.suppress(OSError):  # removed
        size = path.stat().st_size
    data: dict[str, Any] = {"path": str(path), "bytes": size}
    if error is not None:
        data["error"] = str(error)
    vm.set_fact("dump", {**data, "status": "completed" if error is None else "failed"})
    vm.emit("DUMP_FINISHED", data)
    return size


async def _suffix(vm: VmContext) -> str:
    try:
        reply = fields.mapping(await vm.qmp("query-dump-guest-memory-capability", seconds=QUERY_SECONDS))
    except QmpError:  # a target or a QEMU without it: dump-guest-memory itself tells
        return "elf"
    formats = reply.get("formats")
    return "kdump" if isinstance(formats, list) and "kdump-zlib" in formats else "elf"


async def _require_room(vm: VmContext, directory: Path, freed: int) -> None:
    """`Denied` if the guest's memory does not fit, even if it cannot be compressed. `freed`: bytes that will be removed before."""
    reply = fields.mapping(await vm.qmp("query-memory-size-summary", seconds=QUERY_SECONDS))
    needed = (fields.number(reply, "base-memory") or 0) + (fields.number(reply, "plugged-memory") or 0)
    try:
        status = os.statvfs(directory)
    except OSError as error:
        raise BadRequest(f"VM {vm.name}: no dump: {directory}: {error.strerror}") from error
    room = status.f_bavail * status.f_frsize + freed
    if needed > room:
        raise Denied(
            f"VM {vm.name}: no dump: its memory has {needed} bytes and {directory} has room for {room}; make room there, and "
            "dump it with the QMP command dump-guest-memory while it is still there",
            needed=needed,
            room=room,
        )


def _create(vm: VmContext, path: Path) -> None:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise BadRequest(f"VM {vm.name}: no dump: {path}: {error.strerror}") from error


def _blocks(file: Path) -> int:
    with contextlib.suppress(OSError):
        return file.lstat().st_blocks * 512
    return 0


def _unlink(*files: Path) -> None:
    for file in files:
        with contextlib.suppress(OSError):  # gone already, or in the way of nobody
            file.unlink()
