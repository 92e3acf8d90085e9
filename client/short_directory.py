# SPDX-License-Identifier: Apache-2.0
"""A temporary directory that leaves room for the paths of unix sockets. Used by embedding.py, and by testing/ for what it makes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Final

from ..common.errors import ConfigError

MAX_PARENT_BYTES: Final = (
    32  # of the one that it is made in: leaves names of VMs 40 letters of a socket path's 107 bytes
)
PREFIX: Final = "vml-"


def make_short_directory() -> Path:
    """Made where temporary files go (TMPDIR), or in /tmp if the path of that is too long. The caller removes it. Raises `ConfigError`."""
    parent = tempfile.gettempdir()
    if len(os.fsencode(parent)) > MAX_PARENT_BYTES:
        parent = "/tmp"
    try:
        return Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    except OSError as error:
        text = f"no temporary directory can be made in {parent}: {error.strerror}; set TMPDIR to a short path where one can"
        raise ConfigError(text) from error
