# SPDX-License-Identifier: Apache-2.0
"""Settings of the host, from etc/vmloop.toml: read once by the broker, handed to every worker. deploy/vmloop.toml is a commented sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from .config import read_toml
from .errors import ConfigError

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class BrokerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[broker]"""

    drain: Seconds = 10.0  # how long SIGTERM waits for answers in flight
    worker_hello: Seconds = 10.0  # a worker that has not presented itself by then is started again
    requests_per_client: Count = 1024
    requests_per_vm: Count = 1024
    blocked_after: Seconds = 1.0  # a worker whose loop has been in one turn for so long is reported as blocked
    blocked_limit: Seconds = 30.0  # and after so long replaced under its VM


class RestartSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[restart] of workers that die under their VM: at once, then doubling."""

    first_delay: Seconds = 0.2  # before the second restart in a row; the first one waits for nothing
    max_delay: Seconds = 30.0
    stable_after: Seconds = 10.0  # a worker that lived this long starts the row anew


class WorkerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[worker]"""

    launch: Seconds = 30.0  # QEMU's greeting and negotiation; slow storage can hold up a launch
    probe_after: Seconds = 1.0  # a command unanswered for this long makes the worker ask out of band
    frozen_after: Seconds = 1.0  # an out-of-band question unanswered for this long means frozen
    reconnect_max_delay: Seconds = 5.0  # between attempts to reach a lost monitor
    journal_bytes: Annotated[int, msgspec.Meta(ge=1 << 20, le=1 << 40)] = (
        16 << 20
    )  # of a VM's events on disk; the oldest go first
    outbox: Count = 4096  # messages kept for a broker that is away
    max_reply: Annotated[int, msgspec.Meta(ge=1 << 16, le=1 << 30)] = 64 << 20  # bytes in one line of a monitor
    max_agent_reply: Annotated[int, msgspec.Meta(ge=1 << 12, le=1 << 28)] = 16 << 20  # bytes in one line of an agent
    memory_limit: Annotated[int, msgspec.Meta(ge=256 << 20, le=1 << 50)] = (
        1 << 30
    )  # bytes of private memory that a worker may take
    log_bytes: Annotated[int, msgspec.Meta(ge=1 << 16, le=1 << 40)] = (
        4 << 20
    )  # qemu.log and worker.log are turned over at this size


class LogSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[log]"""

    level: Annotated[str, msgspec.Meta(pattern="^(debug|info|warning|error)$")] = "info"


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """etc/vmloop.toml; every key has a default and the file may be missing."""

    broker: BrokerSettings = BrokerSettings()
    restart: RestartSettings = RestartSettings()
    worker: WorkerSettings = WorkerSettings()
    log: LogSettings = LogSettings()


def read_settings(path: Path) -> Settings:
    """The settings in a file, the defaults if there is none. `ConfigError` if the file is wrong."""
    try:
        return read_toml(path, Settings)
    except ConfigError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return Settings()
        raise
