# SPDX-License-Identifier: Apache-2.0
"""The fds that a service manager passes to a service when it starts it (sd_listen_fds(3)). Used by __main__.py."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Final

# sd_listen_fds(3): the first fd that a service manager passes.
LISTEN_FDS_START: Final = 3


def take_passed_fds(environ: MutableMapping[str, str], pid: int) -> list[tuple[str, int]]:
    """The fds that a service manager has passed to this process, with their names, close-on-exec from now on.

    The variables are taken out of `environ`, so that no child believes them meant for it. What makes no sense is nothing passed.
    """
    meant_for, count, names = (environ.pop(key, "") for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if meant_for != str(pid) or not count.isascii() or not count.isdigit():
        return []
    named = names.split(":") if names else []
    passed = []
    for place in range(int(count)):
        fd = LISTEN_FDS_START + place
        try:
            os.set_inheritable(fd, False)
        except OSError:  # fewer are there than were announced
            break
        passed.append((named[place] if place < len(named) else "", fd))
    return passed
