# SPDX-License-Identifier: Apache-2.0
"""VMs that are started with the host, with boots that the test makes up."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from vmloop.client.session import Host

from .managed import comm
from .site import END_SECONDS, Site, kill_process, wait_for

_PROGRAM = """
import sys
from pathlib import Path
from vmloop.broker.__main__ import serve
from vmloop.common.paths import paths_under
sys.exit(serve(paths_under(Path(sys.argv[1])), boot=sys.argv[2]))
"""


class BootedSite(Site):
    """A site whose broker is told which boot this is."""

    boot = "boot-1"

    def start_broker(self) -> None:
        self.broker = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(self.root), self.boot],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            process_group=0,
        )

    def restart_broker(self, boot: str) -> Host:
        self.kill_broker()
        self.boot = boot
        self.start_broker()
        return self.host()


@pytest.fixture
def booted() -> Iterator[BootedSite]:
    made = BootedSite()
    try:
        made.start_broker()
        yield made
    finally:
        made.close()


def states(host: Host) -> dict[str, str]:
    return {vm.name: vm.state for vm in host.list()}


def served(site: BootedSite) -> bool:
    return bool(wait_for(lambda: site.paths.boot_file.exists() and site.paths.boot_file.read_text() == site.boot))


def test_a_vm_with_autostart_is_started_once_in_a_boot(booted: BootedSite) -> None:
    host = booted.host()
    booted.define(host, "auto", autostart=True)
    booted.define(host, "bad", "-no-such-argument", binary="/nowhere/qemu", autostart=True)
    booted.define(host, "plain")
    assert served(booted)
    assert states(host) == {"auto": "shutoff", "bad": "shutoff", "plain": "shutoff"}, "not when it is defined"
    host = booted.restart_broker("boot-1")
    host.ping()
    assert states(host)["auto"] == "shutoff", "not when only the broker is new"
    host = booted.restart_broker("boot-2")
    assert host.vm("auto").wait("running", timeout=END_SECONDS).epoch == 1
    assert served(booted)
    assert states(host) == {"auto": "running", "bad": "shutoff", "plain": "shutoff"}
    assert "VM bad could not be started with the host" in booted.log()
    host.vm("auto").kill()
    host = booted.restart_broker("boot-2")
    host.ping()
    assert states(host)["auto"] == "shutoff", "not again after an operator ended it"


def test_a_vm_that_runs_already_is_left_as_it_is(booted: BootedSite) -> None:
    host = booted.host()
    booted.define(host, "auto", autostart=True)
    pid = host.vm("auto").start().pid
    for worker in [pid for pid in booted.processes() if comm(pid).startswith("vml:")]:
        kill_process(worker)
    host = booted.restart_broker("boot-2")
    assert served(booted)
    assert host.vm("auto").wait("running", timeout=END_SECONDS).epoch == 1
    assert host.vm("auto").show().pid == pid
