# SPDX-License-Identifier: Apache-2.0
"""One target in a process of its own: `python -m vmloop.tests.fuzz.one TARGET SECONDS FOUND [MODULE …]`, started by runner.py.

With atheris where it is installed: libFuzzer, led by which lines of the modules an input reaches. Else by hypothesis. `EXECUTED N` in the
output, in libFuzzer's own words, says how often the target was executed. An input that breaks a promise, takes too long or too much memory
ends the process with another exit code than 0, and is left in the file FOUND.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import logging
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Final

INPUT_SECONDS: Final = 20  # for one input; most take under a millisecond, and the machine may be busy
MEMORY_BYTES: Final = 2 << 30  # of address space; atheris alone takes a part of it
EXECUTED: Final = "stat::number_of_executed_units:"  # as libFuzzer says it
BATCH: Final = 200  # hypothesis' examples between two looks at the clock


def main() -> int:
    """Run the target for so many seconds. 0: nothing was found."""
    name, seconds, found = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.CRITICAL)  # parsers say what they drop; formatting it costs more than parsing
    if importlib.util.find_spec("atheris") is not None:
        return _with_atheris(name, seconds, found, sys.argv[4:])
    return _with_hypothesis(name, seconds, found)


def _with_atheris(name: str, seconds: int, found: Path, modules: list[str]) -> int:
    import atheris

    from .inputs import known_inputs
    from .table import TARGETS

    for module in modules:
        for function in _functions_of(importlib.import_module(module)):
            atheris.instrument_func(function)
    target = TARGETS[name]
    corpus = found.with_name(
        "corpus"
    )  # in the runner's directory, which it removes: libFuzzer ends this process without a word
    corpus.mkdir()
    for number, data in enumerate(known_inputs(target)):
        (corpus / str(number)).write_bytes(data)
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={target.max_bytes}",
        f"-timeout={INPUT_SECONDS}",
        f"-rss_limit_mb={MEMORY_BYTES >> 20}",
        f"-exact_artifact_path={found}",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], target.run)
    atheris.Fuzz()  # ends the process
    return 0


def _functions_of(module: ModuleType) -> Iterator[FunctionType]:
    """Those that a module defines, and its classes. Atheris' own import hook would go over all of vmloop, which takes seconds."""
    classes = [item for item in vars(module).values() if isinstance(item, type) and item.__module__ == module.__name__]
    for owner in (module, *classes):
        for item in list(vars(owner).values()):
            function = item.__func__ if isinstance(item, staticmethod | classmethod) else item
            function = function.fget if isinstance(function, property) else function
            if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                yield function


def _with_hypothesis(name: str, seconds: int, found: Path) -> int:
    from hypothesis import HealthCheck, given, seed, settings

    from .inputs import any_input, known_inputs
    from .table import TARGETS

    target = TARGETS[name]
    executed = 0

    def run(data: bytes) -> None:
        nonlocal executed
        executed += 1
        found.write_bytes(data)  # before, for what ends the process without a word
        faulthandler.dump_traceback_later(INPUT_SECONDS, exit=True)
        try:
            target.run(data)
        finally:
            faulthandler.cancel_dump_traceback_later()

    unchecked: Any = list(HealthCheck)
    quiet = settings(max_examples=BATCH, deadline=None, database=None, suppress_health_check=unchecked)
    batch = quiet(given(any_input(target))(run))
    until = time.monotonic() + seconds
    first = time.time_ns()
    try:
        for data in known_inputs(target):
            run(data)
        while time.monotonic() < until:
            seed(first + executed)(batch)()
    finally:
        print(f"{EXECUTED} {executed}", flush=True)
    found.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
