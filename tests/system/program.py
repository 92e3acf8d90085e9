# SPDX-License-Identifier: Apache-2.0
"""Programs of their own that use vmloop embedded, for the tests of what is left when they end."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from vmloop.common.paths import paths_under

SECONDS: Final = 20.0

# What every script begins with; `told` is how it speaks to the test.
PREAMBLE: Final = """
import json, os, signal, sys, threading
from vmloop.client import embedded
WEB1 = {"name": "web1", "qemu": {"binary": "simulated"}}
place = sys.argv[1]
def told(**facts):
    print(json.dumps(facts), flush=True)
"""


class Script:
    """A program of its own; `told` reads what it says, one line at a time."""

    def __init__(self, place: Path, body: str, **options: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + body, str(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # a line that has been read ahead is not seen by select
            cwd=place,
            **options,
        )

    def told(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], SECONDS)[0], "it says nothing"
        facts: dict[str, Any] = json.loads(self.process.stdout.readline())
        return facts

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.close()

    def end(self) -> int:
        code = self.process.wait(SECONDS)
        self.close()
        return code

    def close(self) -> None:
        self.process.wait(SECONDS)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def ended(root: Path, name: str = "web1") -> dict[str, Any]:
    """How a VM's newest run ended, as its worker has written it down."""
    found = json.loads(paths_under(root).vms_state.joinpath(name, "run.json").read_text())
    assert found["ended"] is not None
    return dict(found["ended"])
