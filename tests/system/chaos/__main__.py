# SPDX-License-Identifier: Apache-2.0
"""`make chaos`: one run of any length, its figures on standard output. Exit status 1 if a promise was broken.

python -m vmloop.tests.system.chaos [--seed N] [--seconds S] [--vms N] [--json] [--plan] [--keep DIR]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import msgspec

from .report import figures, lines
from .storm import Scenario, storm, strikes_of
from .verdict import judge


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description="Kill and stop processes under many VMs.")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of faults and commands; default: the time")
    parser.add_argument("--seconds", type=float, default=600.0, help="during which faults are injected")
    parser.add_argument("--vms", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="the figures as one JSON object, with every violation")
    parser.add_argument("--plan", action="store_true", help="print the plan and do nothing")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="what was recorded goes there, and all logs")
    options = parser.parse_args()
    scenario = Scenario(options.seed, options.seconds, options.vms)
    if options.plan or not options.json:
        print(f"seed {scenario.seed}, {scenario.seconds:g} s, {scenario.vms} VMs:")
        print("\n".join(strike.describe() for strike in strikes_of(scenario)), flush=True)
    if options.plan:
        return 0
    recording = storm(scenario, options.keep)
    if options.keep is not None:
        (options.keep / "recording.json").write_bytes(msgspec.json.encode(recording))
    violations = judge(recording)
    if options.json:
        all_of_them = [msgspec.to_builtins(violation) for violation in violations]
        print(json.dumps({**figures(recording, violations), "found": all_of_them}))
    else:
        print("\n".join(lines(recording, violations)))
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
