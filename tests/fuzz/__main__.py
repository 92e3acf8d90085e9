# SPDX-License-Identifier: Apache-2.0
"""`make fuzz`: runs the fuzz targets. `python -m vmloop.tests.fuzz [--seconds N] [--jobs N] [TARGET …]`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from concurrent.futures import ThreadPoolExecutor

from vmloop.tests.fuzz.runner import Ran, run
from vmloop.tests.fuzz.table import TARGETS

SECONDS = 60  # of each target


def main() -> int:
    """Run the targets that are named, or all; a line for each. 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="make fuzz", description="Run fuzz targets, each in a process of its own.")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of each target (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at the same time (default: %(default)s)")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of: {', '.join(TARGETS)}")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.targets if name not in TARGETS]
    if unknown:
        parser.error(f"there is no target {unknown[0]!r}; there are: {', '.join(TARGETS)}")
    engine = "atheris" if importlib.util.find_spec("atheris") is not None else "hypothesis (atheris is not installed)"
    print(f"by {engine}, {arguments.seconds} s each", flush=True)
    names = arguments.targets or list(TARGETS)
    failed = 0
    with ThreadPoolExecutor(max(1, arguments.jobs)) as pool:
        for name, ran in zip(names, pool.map(lambda name: run(TARGETS[name], arguments.seconds), names), strict=True):
            failed += ran.failed
            _tell(name, ran)
    return 1 if failed else 0


def _tell(name: str, ran: Ran) -> None:
    print(f"{name:15} {ran.executed:9} executions   {'FAILED' if ran.failed else 'nothing found'}", flush=True)
    if ran.failed:
        print(f"{ran.output}\nthe input: {ran.found or 'none was left'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
