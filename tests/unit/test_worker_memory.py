# SPDX-License-Identifier: Apache-2.0
"""The bound on a worker's memory: it holds for the worker, and what the worker starts does not inherit it."""

from __future__ import annotations

import subprocess
import sys

LIMITED = """
import resource, subprocess, sys
from vmloop.worker.memory import limit_memory, unlimited_children

before = resource.getrlimit(resource.RLIMIT_DATA)
limit_memory(300 << 20)
try:
    bytearray(400 << 20)
except MemoryError:
    print("refused")
with unlimited_children():
    subprocess.run([sys.executable, "-c", "bytearray(400 << 20); print('child has it')"], check=True)
soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
print(soft == 300 << 20, hard == before[1])
"""


def test_a_worker_gets_no_more_than_its_limit_and_its_children_do() -> None:
    ended = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.split("\n") == ["refused", "child has it", "True True", ""]


def test_a_lower_limit_of_the_system_stays() -> None:
    program = (
        "import resource; from vmloop.worker.memory import limit_memory; h = 200 << 20; "
        "resource.setrlimit(resource.RLIMIT_DATA, (h, h)); limit_memory(1 << 40); "
        "print(resource.getrlimit(resource.RLIMIT_DATA) == (h, h))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "True\n"
