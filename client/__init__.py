# SPDX-License-Identifier: Apache-2.0
"""For programs and people: the blocking client, the asyncio client and the command line (cli/).

    from vmloop.client import connect
    with connect() as host:
        print(host.vm("web1").qmp("query-status"))

Reading order: requests (every operation, typed), calls (what is in flight, no sockets), lane (one socket of the blocking client),
session and vm (what users call), steps (conversations of several requests, no sockets) with guest_exec, guest_files, guest_freeze and
guest_answers, stream (the order of events, no sockets) and subscription, aio, aio_vm and aio_events (the same names for asyncio), results,
endpoint; embedding and aio_embedding (a broker of the program's own); command_check (QMP arguments before they are sent, for the
command line).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .embedding import embedded as embedded
    from .session import Host as Host
    from .session import connect as connect
    from .vm import Vm as Vm

_HOME = {"connect": "session", "embedded": "embedding", "Host": "session", "Vm": "vm"}


def __getattr__(name: str) -> object:
    """Late import: `import vmloop.client.cli` must not pay for what it does not use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)
