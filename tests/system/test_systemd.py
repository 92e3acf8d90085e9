# SPDX-License-Identifier: Apache-2.0
"""The store of fds with systemd itself, where that is pid 1 and we may start units; elsewhere these tests skip."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .managed import comm
from .site import END_SECONDS, Site, wait_for

pytestmark = pytest.mark.skipif(
    Path("/proc/1/comm").read_text().strip() != "systemd" or os.getuid() != 0 or shutil.which("systemd-run") is None,
    reason="systemd is not pid 1 here, or we may start no units",
)


class UnitSite(Site):
    """A site whose broker is a transient unit with the properties that matter of deploy/vmloop.service."""

    @property
    def unit(self) -> str:
        return f"vmloop-test-{self.root.name}.service"

    def start_broker(self) -> None:
        properties = [
            *("Type=notify", "NotifyAccess=main", "KillMode=process", "Restart=always", "RestartSec=100ms"),
            *("FileDescriptorStoreMax=64", "StartLimitIntervalSec=0"),
        ]
        options = [f"--property={one}" for one in properties]
        program = [sys.executable, "-m", "vmloop.broker", str(self.root)]
        subprocess.run(["systemd-run", f"--unit={self.unit}", *options, *program], check=True, timeout=END_SECONDS)

    def main_pid(self) -> int:
        asked = ["systemctl", "show", "--property=MainPID", "--value", self.unit]
        return int(subprocess.run(asked, check=True, capture_output=True, timeout=END_SECONDS).stdout or 0)

    def stored(self) -> int:
        asked = ["systemctl", "show", "--property=NFileDescriptorStore", "--value", self.unit]
        return int(subprocess.run(asked, check=True, capture_output=True, timeout=END_SECONDS).stdout or 0)

    def close(self) -> None:
        try:
            with self.host() as host:
                for vm in host.list():
                    host.vm(vm.name).kill()
        finally:
            subprocess.run(["systemctl", "stop", self.unit], check=False, timeout=END_SECONDS)
            super().close()


@pytest.fixture
def unit() -> Iterator[UnitSite]:
    made = UnitSite()
    try:
        made.start_broker()
        yield made
    finally:
        made.close()


def test_systemd_keeps_the_connections_over_the_death_of_everything(unit: UnitSite) -> None:
    host = unit.host()
    unit.define(host, "web1")
    host.vm("web1").start()
    assert wait_for(lambda: unit.stored() == 1)
    cursor = host.vm("web1").cursor()
    first = unit.main_pid()
    for pid in [first, *(pid for pid in unit.processes() if comm(pid).startswith("vml"))]:
        os.kill(pid, 9)
    assert wait_for(lambda: unit.main_pid() not in (0, first))
    host = unit.host()
    assert host.vm("web1").qmp("query-status", timeout=END_SECONDS)["status"] == "running"
    told = [event.event for event in host.events("web1", since=cursor, follow=False)]
    assert "WORKER_LOST" in told
    assert "EVENTS_LOST" not in told
    assert unit.stored() == 1
