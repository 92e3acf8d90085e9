# SPDX-License-Identifier: Apache-2.0
"""All tests (`make test`), in two processes side by side: system tests mostly wait, the others mostly compute.

    python -m vmloop.tests [PYTEST'S OPTIONS]

What the system tests print comes as they run, the others' when both have ended. Ends with 0 if all have passed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

TESTS: Final = Path(__file__).parent
WAITING: Final = (TESTS / "system",)
COMPUTING: Final = (TESTS / "unit", TESTS / "contract")


def main(options: list[str]) -> int:
    """Returns the exit code; KeyboardInterrupt ends both, which have it from the terminal too."""
    with tempfile.TemporaryFile() as printed:
        computing = subprocess.Popen(_pytest(COMPUTING, options), stdout=printed, stderr=subprocess.STDOUT)
        try:
            waiting = subprocess.run(_pytest(WAITING, options), check=False)
        finally:
            code = computing.wait()
            printed.seek(0)
            sys.stdout.write(printed.read().decode(errors="replace"))
    return max(abs(waiting.returncode), abs(code))


def _pytest(folders: tuple[Path, ...], options: list[str]) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", *options, *map(str, folders)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
