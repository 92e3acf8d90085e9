# SPDX-License-Identifier: Apache-2.0
"""Capabilities through broker and prober: of real binaries and of broken ones, of running VMs, and what they are used for."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from vmloop.client.cli.main import main
from vmloop.client.session import Host
from vmloop.common.errors import ConfigError, DeadlineExceeded, LaunchFailed, NotRunning, VmloopError

from ..fakes.recorded_qemu import binary_that
from .site import REAL_ARGS, Site, kill_process, wait_for

QEMU = "qemu-system-x86_64"


def counted(site: Site, name: str = "qemu", **broken: int) -> Path:
    """A stand-in that counts its starts in NAME.starts."""
    return binary_that(site.root / name, then=f"echo . >> {site.root / name}.starts", **broken)  # type: ignore[arg-type]


def starts(binary: Path) -> int:
    file = binary.with_name(f"{binary.name}.starts")
    return len(file.read_text().split()) if file.exists() else 0


def probers(site: Site) -> list[int]:
    """By the name that the kernel shows."""
    return [pid for pid in site.processes() if Path(f"/proc/{pid}/comm").read_text().strip() == "vml-probe"]


# -- probing ----------------------------------------------------------------------------------------------------------------


@pytest.mark.qemu
@pytest.mark.usefixtures("require_qemu")
def test_the_installed_qemu_is_probed_and_then_known(site: Site, host: Host) -> None:
    began = time.monotonic()
    first = host.capabilities()
    cold = time.monotonic() - began
    assert {"q35", "pc"} <= set(first.machines)
    times = []
    for _ in range(20):
        began = time.monotonic()
        assert host.capabilities() == first
        times.append(time.monotonic() - began)
    assert sorted(times)[0] < 0.1 * cold or sorted(times)[0] < 0.02, (cold, times)
    assert host.list() == []
    assert sorted(path.suffix for path in site.paths.capabilities.iterdir()) == [".json", ".lock"]


def test_many_clients_that_ask_at_once_get_one_probe(site: Site) -> None:
    binary = counted(site)
    found = []
    clients = [site.host() for _ in range(6)]
    threads = [threading.Thread(target=lambda h=h: found.append(h.capabilities(binary).version)) for h in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [(7, 2, 22)] * 6
    assert starts(binary) == 2  # with KVM, and without
    assert len(probers(site)) == 1


def test_a_binary_that_hangs_holds_up_nobody(site: Site, host: Host) -> None:
    hung, well = counted(site, "hung", hang=2), counted(site, "well")
    failed: list[VmloopError] = []

    def ask() -> None:
        try:
            host.capabilities(hung)
        except VmloopError as error:
            failed.append(error)

    asked = threading.Thread(target=ask)
    asked.start()
    other = site.host()
    assert wait_for(lambda: starts(hung) == 1, 10)
    assert other.capabilities(well).version == (7, 2, 22)
    began = time.monotonic()
    site.define(other, "web1")
    other.vm("web1").start()
    assert other.vm("web1").qmp("query-status")["status"] == "running"
    assert time.monotonic() - began < 5.0
    asked.join(30)
    assert [type(error) for error in failed] == [DeadlineExceeded]


def test_who_waits_for_a_hung_probe_has_a_deadline_of_its_own(site: Site) -> None:
    hung = counted(site, hang=2)
    with pytest.raises(DeadlineExceeded):
        site.host(timeout=0.5).capabilities(hung)


def test_a_prober_that_is_killed_is_replaced_and_the_answer_comes(site: Site, host: Host) -> None:
    binary = binary_that(
        site.root / "qemu", then=f"test -e {site.root}/go || {{ touch {site.root}/there; exec sleep 600; }}"
    )
    found = []
    asked = threading.Thread(target=lambda: found.append(host.capabilities(binary).version))
    asked.start()
    assert wait_for(lambda: (site.root / "there").exists(), 10)
    [prober] = probers(site)
    (site.root / "go").touch()
    kill_process(prober)
    asked.join(30)
    assert found == [(7, 2, 22)]


def test_a_binary_that_was_replaced_is_probed_again(site: Site, host: Host) -> None:
    binary = counted(site)
    host.capabilities(binary)
    host.capabilities(binary)
    assert starts(binary) == 2
    os.utime(binary)
    host.capabilities(binary)
    assert starts(binary) == 4
    host.capabilities(binary, refresh=True)
    assert starts(binary) == 6


def test_what_is_no_qemu_is_told(host: Host, tmp_path: Path) -> None:
    for name, what in (
        ("true", "no QEMU|Is it a QEMU"),
        ("no-such-qemu", "no executable"),
        (str(tmp_path), "directory"),
    ):
        with pytest.raises(LaunchFailed, match=what):
            host.capabilities(name)


def test_the_command_prints_the_same_with_a_broker_and_without(
    site: Site, host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    binary = str(counted(site))
    assert main(["--root", str(site.root), "probe", "--json", binary]) == 0
    through = capsys.readouterr().out
    host.shutdown("kill")
    assert site.broker is not None
    site.broker.wait(10)
    assert main(["--root", str(site.root), "probe", "--json", binary]) == 0
    assert capsys.readouterr().out == through
    assert starts(Path(binary)) == 2  # the second time from the same cache
    assert main(["--root", str(site.root / "elsewhere"), "probe", binary]) == 0
    assert "version: 7.2.22" in capsys.readouterr().out
    assert main(["--connect", f"ipc://{site.root}/nobody.sock", "probe", binary]) == 3


# -- used -------------------------------------------------------------------------------------------------------------------


@pytest.mark.qemu
@pytest.mark.usefixtures("require_qemu")
@pytest.mark.parametrize("known", [False, True])
def test_a_machine_that_is_not_there_is_named_with_one_that_is(site: Site, host: Host, known: bool) -> None:
    if known:
        host.capabilities()
    site.define(host, "web1", "-machine", "q36,accel=tcg", "-display", "none", binary=QEMU)
    with pytest.raises(ConfigError, match=r"-machine q36: .*did you mean 'q35'"):
        host.vm("web1").start()
    assert host.vm("web1").show().state == "shutoff"
    assert host.vm("web1").show().epoch == (0 if known else 1)  # what is known before is told before anything begins


@pytest.mark.qemu
@pytest.mark.usefixtures("require_qemu")
def test_a_qemu_that_ends_for_other_reasons_is_told_in_its_own_words(site: Site, host: Host) -> None:
    site.define(host, "web1", *REAL_ARGS, "-drive", "file=/no/such/image", binary=QEMU)
    with pytest.raises(LaunchFailed, match="/no/such/image"):
        host.vm("web1").start()


@pytest.mark.qemu
@pytest.mark.usefixtures("require_qemu")
def test_a_vm_keeps_the_capabilities_that_it_was_started_with(site: Site, host: Host) -> None:
    kept = host.capabilities()
    site.define_real(host, "web1")
    host.vm("web1").start(paused=True)
    [file] = site.paths.capabilities.glob("*.json")
    (site.root / "next").write_text("of the binary after an upgrade")
    os.rename(site.root / "next", file)
    assert host.vm("web1").capabilities() == kept
    worker = host.vm("web1").show().worker_pid
    assert worker is not None
    kill_process(worker)
    assert host.vm("web1").capabilities() == kept
    part = host.vm("web1").capabilities("device_del")
    assert list(part.arguments) == ["device_del"]
    assert part.commands == kept.commands


def test_a_vm_of_which_nothing_was_known_is_asked_itself(site: Site, host: Host) -> None:
    directory, [name] = site.simulate(1)
    host.attach("web1", directory / f"{name}.qmp")
    found = host.vm("web1").capabilities()
    assert "closefd" in found.commands
    assert found.machines == []
    assert host.vm("web1").capabilities() == found
    site.define(host, "off")
    with pytest.raises(NotRunning):
        host.vm("off").capabilities()


def test_a_handler_asks_what_its_qemu_can(site: Site, host: Host) -> None:
    handlers = site.paths.etc / "handlers"
    handlers.mkdir(parents=True)
    (handlers / "ask.py").write_text(
        "from vmloop.worker.handlers import on\n"
        "NAMES = ('query-status', 'STOP', 'nosuch')\n"
        "@on('STOP')\n"
        "async def look(vm, event):\n"
        "    vm.emit('LOOKED', {'can': [await vm.can(name) for name in NAMES]})\n"
        "@on('STOP')\n"
        "def look_too(vm, event):\n"
        "    vm.emit('LOOKED_TOO', {'can': [vm.can(name) for name in NAMES]})\n"
    )
    site.define(host, "web1")
    host.vm("web1").start()
    since = host.vm("web1").cursor()
    host.vm("web1").pause()
    seen: dict[str, object] = {}
    with host.events("web1", since=since) as events:
        for event in events:
            seen[event.event] = event.data
            if {"LOOKED", "LOOKED_TOO"} <= set(seen):
                break
    assert seen["LOOKED"] == seen["LOOKED_TOO"] == {"can": [True, True, False]}


def test_a_wrong_argument_is_told_before_anything_is_sent(
    site: Site, host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    site.define(host, "web1")
    host.vm("web1").start()

    def qmp(*words: str) -> tuple[int, str]:
        code = main(["--root", str(site.root), "qmp", "web1", *words])
        return code, capsys.readouterr().err

    code, text = qmp("closefd", "fdnam=x")
    assert (code, "fdname is missing; fdnam is unknown; did you mean fdname?" in text) == (2, True)
    code, text = qmp("closefd", "fdnam=x", "--no-check")
    assert (code, "qmp-error" in text) == (1, True)
    code, text = qmp("query-statu")
    assert (code, "did you mean query-status" in text, "CommandNotFound" in text) == (1, True, True)
    assert qmp("query-status") == (0, "")
    assert qmp("x-simulate", "mark=hello") == (0, "")  # its schema does not say what it takes
