# SPDX-License-Identifier: Apache-2.0
"""Runs targets, each in a process of its own (one.py), and says how often each was executed and what was found; used by __main__.py."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

from .inputs import KEPT
from .one import EXECUTED
from .table import Target

START_SECONDS: Final = (
    60  # beside its time: imports, instrumentation, the seeds, and shrinking what hypothesis has found
)
END_OF_OUTPUT: Final = 4000  # characters of what a failed target said


class Ran(NamedTuple):
    """What became of one target. `found`: where the input is that broke it; None if nothing did."""

    executed: int
    failed: bool
    found: Path | None
    output: str


def run(target: Target, seconds: int) -> Ran:
    """Run one for so many seconds. An input that it finds is kept as a regression in tests/data/fuzz/."""
    with tempfile.TemporaryDirectory(prefix="vmloop-fuzz-found-") as directory:
        found = Path(directory) / "input"
        words = [sys.executable, "-m", "vmloop.tests.fuzz.one", target.name, str(seconds), str(found)]
        words += ["vmloop." + path.removesuffix(".py").replace("/", ".") for path in target.covers]
        try:
            done = subprocess.run(words, capture_output=True, timeout=seconds + START_SECONDS, check=False)
            code, out, err = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired as error:
            code, out, err = -1, error.stdout or b"", (error.stderr or b"") + b"\nit did not end in time"
        output = (out + err).decode(errors="replace")
        if code == 0 and _executed(output):
            return Ran(_executed(output), False, None, output)
        return Ran(_executed(output), True, _keep(target, found), output[-END_OF_OUTPUT:])


def _executed(output: str) -> int:
    for line in output.splitlines():
        if line.startswith(EXECUTED):
            return int(line.removeprefix(EXECUTED))
    return 0


def _keep(target: Target, found: Path) -> Path | None:
    if not found.exists():
        return None
    data = found.read_bytes()
    kept = KEPT / target.name / f"found-{len(list((KEPT / target.name).glob('*'))) + 1}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(data)
    return kept
