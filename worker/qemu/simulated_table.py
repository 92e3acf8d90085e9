# SPDX-License-Identifier: Apache-2.0
"""What a command of the simulated monitor is, and what it may use: the row of the table in simulated_commands.

Imported by simulated_monitor and by every module that holds commands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from .simulated_dump import Dump
from .simulated_emitted import Emitted
from .simulated_fds import FdSets
from .simulated_requests import Argument
from .simulated_vm import SimulatedVm


class Chardev(NamedTuple):
    """A line of query-chardev."""

    label: str
    address: str
    connected: bool
    frontend_open: bool


class Jobs(msgspec.Struct):
    """What query-jobs and query-block-jobs list, as `x-simulate` has set it."""

    jobs: list[dict[str, Any]] = []
    block_jobs: list[dict[str, Any]] = []


class Monitor(msgspec.Struct):
    """What commands may use of the monitor that they came through."""

    vm: SimulatedVm
    fds: FdSets
    chardevs: Callable[[], list[Chardev]]
    dump: Dump
    jobs: Jobs
    emitted: Emitted


class Command(NamedTuple):
    """One command. Its function returns the value of `return`, or a future of it that holds up the monitor; `Refused` is its error."""

    run: Callable[[Monitor, dict[str, Any]], Any]
    arguments: tuple[Argument, ...] = ()
    oob: bool = False
    anything: bool = False  # the arguments are checked by the command itself
