# SPDX-License-Identifier: Apache-2.0
"""`make bench`: measures vmloop on this machine and prints a table. `python -m vmloop.tests.bench [--json] [NAME …]`."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time

from vmloop.tests.bench.measures import ALL
from vmloop.tests.bench.row import Row
from vmloop.tests.system.site import Site


def main() -> int:
    """Run all measures, or those that are named; a fresh broker for each."""
    names = [word for word in sys.argv[1:] if not word.startswith("-")]
    chosen = [measure for measure in ALL if not names or measure.__name__ in names]
    if not chosen:
        print(f"no such measure; there are: {', '.join(measure.__name__ for measure in ALL)}", file=sys.stderr)
        return 2
    if shutil.which("qemu-system-x86_64") is None:
        print("qemu-system-x86_64 is not installed; run deploy/bootstrap first", file=sys.stderr)
        return 1
    rows: list[Row] = []
    for measure in chosen:
        print(f"measuring: {measure.__name__} …", file=sys.stderr, flush=True)
        site = Site()
        try:
            site.start_broker()
            rows += measure(site, site.host())
        finally:
            site.close()
    if "--json" in sys.argv:
        print(json.dumps([row._asdict() for row in rows], indent=1))
    else:
        _print_table(rows)
    return 0


def _print_table(rows: list[Row]) -> None:
    version = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout
    print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, Python {platform.python_version()}, {version.splitlines()[0]}\n"
    )
    print("| what | measured | aim |\n|---|---|---|")
    for row in rows:
        print(f"| {row.what} | {row.figure} | {row.limit} |")


if __name__ == "__main__":
    sys.exit(main())
