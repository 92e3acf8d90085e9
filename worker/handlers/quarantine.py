# SPDX-License-Identifier: Apache-2.0
"""Handlers that cost their VM its worker, and are not loaded again in the same run: run/vms/NAME/handlers.json. Used by handling.py.

A worker that is killed by its handler (os._exit, a crash in C code, a loop that the broker had to end) leaves the culprit's name on the
status page. The next worker reads it and blames: a handler that did so twice in a run, or a file once while it was loaded, is left out for
the rest of the run, unless its file has changed since.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final

import msgspec

from ...common.durable import set_aside, write_whole
from .context import VmContext
from .naming import Culprit, label, parse_task
from .report import HANDLER_FAILED, MAX_ERROR_BYTES, clean

log = logging.getLogger(__name__)

FILE_NAME: Final = "handlers.json"
KILLS_ALLOWED: Final = 1  # of a handler: the first may have been chance, a kill by somebody while it ran
LOADING_KILLS_ALLOWED: Final = 0  # of a file: it would keep every next worker from coming up

MAX_FILE_BYTES: Final = 1 << 20
MAX_CULPRITS: Final = 1024


class _Entry(msgspec.Struct):
    """One culprit. `file` is its file as it was when next looked at: mtime in ns, and size."""

    kills: int = 0
    loading: bool = False
    file: tuple[int, int] | None = None


class _Kept(msgspec.Struct):
    epoch: int
    culprits: dict[str, _Entry]


class Quarantine:
    """The culprits of one run. Not to be used before the run's epoch is known."""

    def __init__(self, context: VmContext) -> None:
        """Read the file; one that is torn or foreign is set aside, one of an earlier run is forgotten."""
        self._context = context
        self._path = context.paths.run / FILE_NAME
        self._culprits = _read(self._path, context.epoch)

    def blame(self, task: str, how: str) -> bool:
        """The predecessor was killed (`how`) while the page said `task`: count it and emit HANDLER_FAILED. False if that names no handler.

        vmloop's own handlers are told, and never left out.
        """
        culprit = parse_task(task)
        if culprit is None:
            return False
        quarantined = culprit.kind != "shipped" and self._count(culprit)
        text = f"it ran when the VM's worker was lost: {how}"
        if quarantined:
            text += "; it is left out for the rest of this run, or until its file changes"
        log.error("VM %s: handler %s: %s", self._context.name, culprit.label, text)
        data = {
            "handler": culprit.label,
            "event": culprit.event,
            "seq": culprit.seq,
            "why": "killed its worker",
            "error": clean(text.encode("utf-8", "replace")[:MAX_ERROR_BYTES]),
            "kind": culprit.kind,
            "quarantined": quarantined,
        }
        self._context.emit(HANDLER_FAILED, data)
        return True

    def holds(self, name: str, file: Path) -> bool:
        """Whether a handler ("mail.on_error"), a hook or a file of handlers ("mail.py") is to be left out."""
        entry = self._culprits.get(label(name))
        if entry is None:
            return False
        now = _look_of(file)
        if entry.file is None:
            entry.file = now
            self._save()
        elif entry.file != now:
            log.info("VM %s: %s has changed; it may show itself anew", self._context.name, file)
            del self._culprits[label(name)]
            self._save()
            return False
        return _is_held(entry)

    def _count(self, culprit: Culprit) -> bool:
        entry = self._culprits.get(culprit.label)
        if entry is None:
            if len(self._culprits) >= MAX_CULPRITS:
                return False
            entry = self._culprits[culprit.label] = _Entry()
        entry.kills += 1
        entry.loading = entry.loading or culprit.kind == "loading"
        self._save()
        return _is_held(entry)

    def _save(self) -> None:
        try:
            write_whole(self._path, msgspec.json.encode(_Kept(self._context.epoch, self._culprits)))
        except OSError as error:  # a full disk: the run goes on, the count is this worker's alone
            log.error("VM %s: %s cannot be written: %s", self._context.name, self._path, error)


def _is_held(entry: _Entry) -> bool:
    return entry.kills > (LOADING_KILLS_ALLOWED if entry.loading else KILLS_ALLOWED)


def _look_of(file: Path) -> tuple[int, int]:
    try:
        status = os.stat(file)
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


def _read(path: Path, epoch: int) -> dict[str, _Entry]:
    try:
        with path.open("rb") as file:
            kept = msgspec.json.decode(file.read(MAX_FILE_BYTES), type=_Kept)
    except FileNotFoundError:
        return {}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        log.error("%s is damaged (%s); it begins anew, the old one is %s", path, error, _aside(path))
        return {}
    except OSError as error:
        log.error("%s cannot be read: %s", path, error)
        return {}
    return kept.culprits if kept.epoch == epoch else {}


def _aside(path: Path) -> str:
    try:
        return str(set_aside(path))
    except OSError as error:
        return f"where it was ({error})"
