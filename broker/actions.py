# SPDX-License-Identifier: Apache-2.0
"""What the core decides and the loop does. Made by core.py, carried out in order by loop.py."""

from __future__ import annotations

from typing import NamedTuple

from ..common.names import VmName


class ToClient(NamedTuple):
    """Send these frames to a client; dropped (and counted) if it is gone or does not read."""

    identity: bytes
    frames: list[bytes]


class ToWorker(NamedTuple):
    """Send this frame to a worker; `number` is told back as undeliverable if its queue is full or it is gone (0: do not tell)."""

    identity: bytes
    frame: bytes
    number: int


class Publish(NamedTuple):
    """Tell subscribers."""

    topic: bytes
    body: bytes


class Fork(NamedTuple):
    """Make a worker for this VM."""

    name: VmName


class KillWorker(NamedTuple):
    """End a worker that never presented itself, or does not get on. The VM runs on."""

    name: VmName


class DumpStack(NamedTuple):
    """Make a worker write down where it is (worker/stack.py)."""

    name: VmName


class WatchWorker(NamedTuple):
    """Watch a worker that presented itself without having been forked for this broker."""

    name: VmName
    pid: int
    started: int


class Forget(NamedTuple):
    """Release what is held for a VM that is no more."""

    name: VmName


class EndZygote(NamedTuple):
    """The zygote ends with its last worker."""


class RenewZygote(NamedTuple):
    """Another zygote takes the place of this one, so that workers have the code that is on disk now; told back by `on_renewed`.

    `even_fresh` False: only if this broker has not started it.
    """

    even_fresh: bool


class BootServed(NamedTuple):
    """What was to be started at this boot has been tried: a broker that comes back does not start it again."""


Action = (
    ToClient
    | ToWorker
    | Publish
    | Fork
    | KillWorker
    | DumpStack
    | WatchWorker
    | Forget
    | EndZygote
    | RenewZygote
    | BootServed
)
