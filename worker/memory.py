# SPDX-License-Identifier: Apache-2.0
"""A bound on a worker's private memory: a handler that leaks costs its own VM's worker, not the host. Used by entry.py and launch.py.

RLIMIT_DATA counts private writable mappings (getrlimit(2), since Linux 4.7). Only the soft limit is set: what the worker starts on its
VM's behalf, QEMU first of all, must not inherit it.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator


def limit_memory(count: int) -> None:
    """Let this process have `count` bytes of private memory at most; above that Python raises MemoryError."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = count if hard == resource.RLIM_INFINITY else min(count, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextlib.contextmanager
def unlimited_children() -> Iterator[None]:
    """Within the block a child is started without the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
