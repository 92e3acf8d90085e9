# SPDX-License-Identifier: Apache-2.0
"""Logging set-up: one line a record, to standard error (broker) or to a file of bounded size (zygote, workers)."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import sys
from pathlib import Path

_FORMAT = "%(asctime)s %(levelname)-7s %(process)d %(name)s: %(message)s"


def log_to_stderr(level: str) -> None:
    """Send everything from `level` on to standard error."""
    _install(logging.StreamHandler(sys.stderr), level)


def log_to_file(path: Path, level: str, max_bytes: int) -> None:
    """Send everything from `level` on to a file; at `max_bytes` it becomes FILE.1 and a new one starts."""
    _install(logging.handlers.RotatingFileHandler(path, maxBytes=max_bytes, backupCount=1, delay=True), level)


def _install(handler: logging.Handler, level: str) -> None:
    logging.raiseExceptions = False  # a log that cannot be written must not end a process that keeps VMs
    handler.setFormatter(logging.Formatter(_FORMAT))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        with contextlib.suppress(
            OSError
        ):  # a full disk: what a forked process has inherited unwritten is its parent's to tell
            old.close()
    root.addHandler(handler)
    root.setLevel(level.upper())
