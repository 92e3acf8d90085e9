# SPDX-License-Identifier: Apache-2.0
"""The store of fds with systemd itself, where that is pid 1 and we may start units; elsewhere these tests skip."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from vmloop.client import connect

from .managed import comm
from .site import END_SECONDS, Site, processes_of, wait_for

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


# -- one VM as one service ----------------------------------------------------------------------------------------------------

UNIT = Path(__file__).parents[2] / "deploy" / "vmloop@.service"
OURS = ("ExecStart", "StateDirectory")  # lines of the unit in whose place the test has its own


class VmService:
    """A transient unit with the lines of deploy/vmloop@.service, around a simulated VM."""

    def __init__(self, root: Path, *args: str) -> None:
        self.root = root
        self.unit = f"vmloop-test-{root.name}.service"
        definition = root / "web1.toml"
        definition.write_text(f'name = "web1"\n[qemu]\nbinary = "simulated"\nargs = {list(args)}\n')
        lines = [
            line.partition("=") for line in UNIT.read_text().split("[Service]")[1].split("[Install]")[0].splitlines()
        ]
        properties = [(name, value) for name, equals, value in lines if equals and not name.startswith(("#", *OURS))]
        options = [f"--property={name}={value}" for name, value in properties]
        assert "--property=Type=notify" in options
        program = [sys.executable, "-m", "vmloop.client.cli.main", "--root", str(root), "run", str(definition)]
        subprocess.run(["systemd-run", f"--unit={self.unit}", *options, *program], check=True, timeout=END_SECONDS)

    def show(self, name: str) -> str:
        asked = ["systemctl", "show", f"--property={name}", "--value", self.unit]
        return subprocess.run(asked, check=True, capture_output=True, text=True, timeout=END_SECONDS).stdout.strip()

    def stop(self) -> None:
        subprocess.run(["systemctl", "stop", self.unit], check=False, capture_output=True, timeout=END_SECONDS)

    def qemu(self) -> int:
        with connect(root=self.root, wait=END_SECONDS) as host:
            return host.vm("web1").show().pid or 0


@pytest.fixture
def service_root() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="vml-"))
    yield root
    assert not processes_of(root)
    shutil.rmtree(root)


def test_a_vm_is_a_service_that_is_ready_when_it_runs_and_powered_down_by_stop(service_root: Path) -> None:
    service = VmService(service_root)  # returns at READY=1
    try:
        assert service.show("ActiveState") == "active"
        assert service.show("StatusText") == "web1 runs"
        assert service.qemu() > 0
    finally:
        service.stop()
    assert service.show("Result") == "success"
    assert service.show("ActiveState") == "inactive"


@pytest.mark.parametrize("victims", ["qemu", "main", "all of vmloop"])
def test_a_vm_that_dies_or_whose_vmloop_dies_is_started_anew(service_root: Path, victims: str) -> None:
    service = VmService(service_root)
    try:
        qemu, main = service.qemu(), int(service.show("MainPID"))
        everything = [pid for pid in processes_of(service_root) if pid != qemu]
        for pid in {"qemu": [qemu], "main": [main], "all of vmloop": everything}[victims]:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        assert wait_for(
            lambda: service.show("NRestarts") == "1" and service.show("ActiveState") == "active", END_SECONDS
        )
        assert service.qemu() not in (0, qemu)
        assert not Path(f"/proc/{qemu}").exists(), "never two for one VM"
    finally:
        service.stop()
