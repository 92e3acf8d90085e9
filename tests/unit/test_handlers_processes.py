# SPDX-License-Identifier: Apache-2.0
"""Handlers that fork, run programs or take all memory, each in a process of its own that stands for a worker."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from .test_handlers_dispatch import DEADLINE

PREAMBLE = """
    import asyncio, ctypes, json, os, resource, subprocess, sys, warnings
    from pathlib import Path
    from vmloop.common.errors import Denied
    from vmloop.worker.handlers.forks import CHILD_EXIT, forked, guard_forks
    from vmloop.tests.unit.test_handlers_dispatch import Bench, handler

    told = []  # what the test looks at
    directory = Path(sys.argv[1])
    monitor = os.open("/dev/null", os.O_RDONLY)
    guard_forks(lambda: [monitor])

    def is_open(fd):
        try:
            os.fstat(fd)
        except OSError:
            return False
        return True

    def death_signal():
        signal = ctypes.c_int()
        ctypes.CDLL(None).prctl(2, ctypes.byref(signal), 0, 0, 0)  # PR_GET_PDEATHSIG
        return signal.value

    async def happen(function):
        async with Bench(directory, handler(function)) as bench:
            bench.vm.happen("STOP")
            await bench.settle()
        told.append([failure["error"] for failure in bench.failures])
"""


def worker(tmp_path: Path, script: str) -> list[Any]:
    """Run a script after the preamble; what it has told."""
    text = textwrap.dedent(PREAMBLE) + textwrap.dedent(script) + "\nprint(json.dumps(told))\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", text, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=3 * DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines: list[str] = done.stdout.splitlines()
    assert len(lines) == 1, "no second worker came this far"
    told: list[Any] = json.loads(lines[0])
    return told


def test_a_fork_in_an_async_handler_ends_where_it_would_go_on_as_a_worker(tmp_path: Path) -> None:
    told = worker(
        tmp_path,
        """
        def in_child(vm):
            try:
                vm.emit("SITE_NEWS")
            except Denied:
                refused = True
            result = [refused, is_open(monitor), death_signal(), forked()]
            (directory / "child").write_text(json.dumps(result))

        async def forks(vm, event):
            child = os.fork()
            if not child:
                in_child(vm)
                return
            told.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

        async def forks_and_waits(vm, event):
            child = os.fork()
            if not child:
                await asyncio.sleep(0)
            told.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

        asyncio.run(happen(forks))
        asyncio.run(happen(forks_and_waits))
        told.append(json.loads((directory / "child").read_text()))
        told.append([forked(), is_open(monitor)])
        """,
    )
    assert told == [70, [], 70, [], [True, False, 9, True], [False, True]]


def test_a_fork_in_a_handler_on_the_thread_ends_after_the_handler(tmp_path: Path) -> None:
    told = worker(
        tmp_path,
        """
        def forks(vm, event):
            child = os.fork()
            if not child:
                try:
                    vm.qmp("stop")
                except Denied:
                    raise ValueError("in the child") from None
            told.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

        asyncio.run(happen(forks))
        """,
    )
    assert told == [70, []]


def test_a_fork_that_ends_by_itself_is_none_of_our_business(tmp_path: Path) -> None:
    told = worker(
        tmp_path,
        """
        def forks(vm, event):
            child = os.fork()
            if not child:
                os._exit(5)
            told.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

        asyncio.run(happen(forks))
        """,
    )
    assert told == [5, []]


def test_subprocesses_of_handlers_work_as_usual_and_may_outlive_the_worker(tmp_path: Path) -> None:
    told = worker(
        tmp_path,
        """
        ask = "import ctypes; s = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(s), 0, 0, 0); print(s.value)"

        def runs(vm, event):
            for more in ({}, {"preexec_fn": os.setsid}):
                done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=10, **more)
                told.append([done.returncode, done.stdout.strip()])

        asyncio.run(happen(runs))
        """,
    )
    assert told == [[0, "0"], [0, "0"], []]


def test_a_handler_that_takes_all_memory_fails_and_the_next_event_is_handled(tmp_path: Path) -> None:
    told = worker(
        tmp_path,
        """
        async def happen_twice(function):
            async with Bench(directory, handler(function)) as bench:
                bench.vm.happen("STOP")
                bench.vm.happen("STOP")
                await bench.settle()
            told.append([[f["why"], f["error"].split(":")[0], f["seq"], "take" in f["traceback"]] for f in bench.failures])

        def take(event):
            kept = []
            while event.seq == 1:
                kept.append(bytearray(1 << 20))
            told.append(event.seq)

        async def on_loop(vm, event):
            take(event)

        def on_thread(vm, event):
            take(event)

        # Soon: filling memory takes CPU time, of which a handler gets only so much.
        here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (here + (96 << 20), here + (96 << 20)))
        asyncio.run(happen_twice(on_loop))
        asyncio.run(happen_twice(on_thread))
        """,
    )
    assert told == [2, [["raised", "MemoryError", 1, True]]] * 2
