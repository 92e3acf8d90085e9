# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the system tests: a broker for a test, and real QEMU where it is."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from vmloop.client.session import Host
from vmloop.client.vm import Vm

from .site import Site, processes_of, wait_for

# That what a program has left may go on ending.
SECONDS: Final = 20.0


@pytest.fixture
def settings() -> str:
    """The text of etc/vmloop.toml; a module that wants other settings than the defaults has a fixture of this name."""
    return ""


@pytest.fixture
def site(settings: str) -> Iterator[Site]:
    """A root with a running broker; afterwards nothing of it may be left."""
    made = Site(settings)
    try:
        made.start_broker()
        yield made
    finally:
        made.close()


@pytest.fixture
def host(site: Site) -> Host:
    """A client of that broker."""
    return site.host()


@pytest.fixture
def beside(site: Site, host: Host) -> Iterator[Vm]:
    """A healthy VM beside what a test does to others: it, its worker and the broker must come out of it untouched."""
    site.define(host, "beside")
    host.vm("beside").start()
    vm = host.vm("beside")
    before, broker = vm.show(), host.version().pid
    assert vm.qmp("query-status")["status"] == "running"
    yield vm
    assert vm.qmp("query-status", timeout=5.0)["status"] == "running"
    after = vm.show()
    assert (after.worker_pid, after.pid, after.cursor) == (before.worker_pid, before.pid, before.cursor)
    assert host.version().pid == broker


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short path, in which nothing may be left running."""
    made = Path(tempfile.mkdtemp(prefix="vml-"))
    try:
        yield made
        left = wait_for(lambda: not (found := processes_of(made)) or found, SECONDS)
        assert left is True, f"left running: {left}"
        assert list(made.rglob("*.sock")) == []
    finally:
        for pid in processes_of(made):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(made)
