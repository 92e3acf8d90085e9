# SPDX-License-Identifier: Apache-2.0
"""Definitions that are wrong are refused with what is wrong in them; damaged files are named and set aside, and cost nobody else."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmloop.client.session import Host
from vmloop.client.vm import Vm
from vmloop.common.errors import AlreadyRunning, BadRequest, ConfigError, VmloopError
from vmloop.common.names import vm_name

from .site import START_SECONDS, Site, kill_process, wait_for


def refusal(host: Host, definition: dict[str, Any]) -> VmloopError:
    with pytest.raises(VmloopError) as caught:
        host.define(definition)
    return caught.value


def test_a_name_that_is_none_is_refused(site: Site, host: Host, beside: Vm) -> None:
    wrong = ["a/b", "..", ".", "", "n" * 65, "ä", "a b", "-a", "a\n", "a\0", "../../etc", 5, None, ["a"]]
    for name in wrong:
        error = refusal(host, {"name": name, "qemu": {"binary": "simulated"}})
        assert isinstance(error, BadRequest)
        assert repr(name)[:60] in error.message
    assert [path.name for path in site.paths.vms_state.iterdir()] == ["beside"]
    assert [vm.name for vm in host.list()] == ["beside"]


def test_what_a_definition_may_not_hold_is_refused_by_name(site: Site, host: Host, beside: Vm) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"qmeu": {}}, "did you mean 'qemu'"),
        ({"qemu": {"arg": []}}, "did you mean 'qemu.args'"),
        ({"qemu": {"colour": 1}}, "unknown key 'qemu.colour'"),
        ({"agent": {"enable": True}}, "did you mean 'agent.enabled'"),
        ({"qemu": []}, "qemu"),
        ({"qemu": {"args": "-m 512"}}, "args"),
        ({"qemu": {"args": ["-m", 512]}}, "args"),
        ({"qemu": {"binary": ""}}, "binary"),
        ({"qemu": {"binary": 1}}, "binary"),
        ({"agent": {"enabled": "yes"}}, "enabled"),
        ({"agent": {"timeout": 0}}, "timeout"),
        ({"handlers": {"on_crash": "cry"}}, "on_crash"),
        ({"handlers": {"limit": -1}}, "limit"),
        *(({"qemu": {"args": args}}, text) for args, text in clashing()),
    ]
    for section, text in wrong:
        error = refusal(host, {"name": "x", **section})
        assert isinstance(error, ConfigError), (section, error)
        assert text in error.message, (section, error)
        assert len(error.message) < 1000
    assert [vm.name for vm in host.list()] == ["beside"]


def clashing() -> list[tuple[list[str], str]]:
    """Arguments that would take QEMU out of vmloop's hands."""
    return [
        (["-daemonize"], "-daemonize"),
        (["--daemonize"], "-daemonize"),
        (["-qmp", "stdio"], "-qmp stdio"),
        (["-monitor", "stdio"], "-monitor stdio"),
        (["-serial", "mon:stdio"], "-serial mon:stdio"),
        (["-nographic"], "-nographic"),
        (["-chardev", "socket,id=vmloop-monitor,path=/x"], "vmloop-monitor"),
        (["-mon", "chardev=vmloop-monitor"], "vmloop-monitor"),
        (["-device", "virtserialport,chardev=vmloop-agent"], "vmloop-agent"),
        (["-m", "5\x0012"], "zero byte"),
    ]


def test_a_definition_of_megabytes_or_of_great_depth_is_refused(site: Site, host: Host, beside: Vm) -> None:
    deep: dict[str, Any] = {}
    for _ in range(400):
        deep = {"a": deep}
    for definition in (
        {"name": "x", "k" * (4 << 20): 1},
        {"name": "x", "qemu": {"binary": "b" * (4 << 20)}},
        {"name": "x", "a": deep},
    ):
        error = refusal(host, definition)
        assert isinstance(error, ConfigError)
        assert len(error.message) < 1000


def test_a_refused_definition_leaves_the_old_one(site: Site, host: Host, beside: Vm) -> None:
    site.define(host, "x", "-name", "old")
    file = site.paths.vm(vm_name("x")).definition
    before = file.read_bytes()
    refusal(host, {"name": "x", "qemu": {"args": ["-daemonize"]}})
    assert file.read_bytes() == before
    assert host.vm("x").start().state == "running"
    assert host.vm("x").qmp("query-name") == {"name": "old"}


# -- the root -------------------------------------------------------------------------------------------------------------


def broker_of(root: Path) -> subprocess.CompletedProcess[str]:
    """A broker that ends by itself."""
    command = [sys.executable, "-m", "vmloop.broker", str(root)]
    return subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS, check=False)


@pytest.fixture
def long_root() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="vml-" + "long-" * 19))
    yield root
    shutil.rmtree(root)


def test_a_root_whose_socket_path_is_too_long_is_refused_with_its_length(long_root: Path) -> None:
    ended = broker_of(long_root)
    length = len(str(long_root / "run/client.sock"))
    assert ended.returncode == 1
    assert ended.stderr.startswith("vmloop: config-error: ")
    assert f"{length} bytes, 107 are possible" in ended.stderr
    assert list(long_root.iterdir()) == []


def test_a_name_too_long_for_its_socket_is_refused_at_the_start(site: Site, host: Host, beside: Vm) -> None:
    longest = "n" * 64
    shallow = len(str(site.paths.vm(vm_name(longest)).monitor_socket)) <= 107
    site.define(host, longest)
    if shallow:
        assert host.vm(longest).start().state == "running"
    else:
        with pytest.raises(ConfigError, match="bytes, 107 are possible"):
            host.vm(longest).start()


def test_a_second_broker_on_the_same_root_names_the_first_and_leaves_it_alone(
    site: Site, host: Host, beside: Vm
) -> None:
    assert site.broker is not None
    ended = broker_of(site.root)
    assert ended.returncode == 1
    assert ended.stderr.startswith("vmloop: denied: ")
    assert f"(pid {site.broker.pid})" in ended.stderr
    assert host.version().pid == site.broker.pid


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[worker]\nlanch = 1", "did you mean 'worker.launch'"),
        ("[worker]\nlaunch = 'soon'", "launch"),
        ("[worker]\nlaunch = -1", "launch"),
        ("[broker", "not TOML"),
        ("\xff\xfe", "vmloop.toml"),
    ],
    ids=["unknown key", "wrong type", "out of range", "no TOML", "odd text"],
)
def test_settings_that_are_wrong_keep_the_broker_from_starting(tmp_path: Path, text: str, wanted: str) -> None:
    root = Path(tempfile.mkdtemp(prefix="vml-"))
    try:
        (root / "etc").mkdir()
        (root / "etc/vmloop.toml").write_bytes(text.encode("latin-1"))
        ended = broker_of(root)
        assert (ended.returncode, ended.stderr.startswith("vmloop: config-error: ")) == (1, True), ended.stderr
        assert wanted in ended.stderr
    finally:
        shutil.rmtree(root)


# -- damaged files ----------------------------------------------------------------------------------------------------------


DAMAGE = {
    "empty": b"",
    "cut": b'{"epoch": 1, "boot_',
    "foreign": b"\x7fELF\x02\x01\x01" + b"\0" * 600,
    "other types": b'{"epoch": "one", "ended": 5}',
    "deep": b"[" * 100_000,
    "no UTF-8": b'{"epoch": 1, "monitor": "\xff"}',
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_file_is_set_aside_and_the_vm_can_be_started_again(site: Site, host: Host, damage: str) -> None:
    site.define(host, "x")
    host.vm("x").start()
    host.vm("x").kill()
    site.define(host, "well")
    pid = host.vm("well").start().pid
    site.kill_broker()
    file = site.paths.vm(vm_name("x")).run_file
    file.write_bytes(DAMAGE[damage])
    site.start_broker()
    fresh = site.host()
    assert fresh.vm("x").wait("shutoff", timeout=15).state == "shutoff"
    assert [path.read_bytes() for path in file.parent.glob("run.json.damaged-*")] == [DAMAGE[damage]]
    started = fresh.vm("x").start()
    assert (started.state, started.epoch) == ("running", 2)
    assert (fresh.vm("well").qmp("query-status")["status"], fresh.vm("well").show().pid) == ("running", pid)


def test_a_damaged_definition_is_named_and_can_be_replaced(site: Site, host: Host, beside: Vm) -> None:
    file = site.paths.vm(vm_name("x")).definition
    for damage in (b"", b"name = ", b"\xff\xfe", b'name = "other"', b"a = [" * 5000, b"qemu = 5"):
        site.define(host, "x")
        file.write_bytes(damage)
        with pytest.raises(ConfigError, match=r"x/vm\.toml"):
            host.vm("x").start()
        assert file.read_bytes() == damage
    site.define(host, "x")
    assert host.vm("x").start().state == "running"


@pytest.mark.parametrize(
    "damage", [b"VMLPAGE", b"\0" * 4096, b"\xff" * 4096, b"x" * 9999], ids=["short", "zeros", "ones", "long"]
)
def test_a_damaged_page_is_set_aside_and_the_vm_found_again(site: Site, host: Host, damage: bytes) -> None:
    site.define(host, "x")
    pid = host.vm("x").start().pid
    site.kill_broker()
    shown = site.paths.vm(vm_name("x"))
    kill_worker(site, "x")
    shown.page.unlink()
    shown.page.write_bytes(damage)
    site.start_broker()
    fresh = site.host()
    fresh.vm("x").wait("running", timeout=15)
    assert (fresh.vm("x").show().pid, fresh.vm("x").qmp("query-status")["status"]) == (pid, "running")
    assert [path.read_bytes() for path in shown.run.glob("page.damaged-*")] == [damage]
    assert "page.damaged-" in shown.worker_log.read_text()
    with pytest.raises(AlreadyRunning):
        fresh.vm("x").start()


@pytest.mark.parametrize("also", ["", "monitor_socket", "page"], ids=["alone", "and no socket", "and no page"])
def test_a_damaged_run_file_of_a_running_vm_is_never_read_as_its_end(site: Site, host: Host, also: str) -> None:
    site.define(host, "x")
    pid = host.vm("x").start().pid
    assert pid is not None
    site.kill_broker()
    kill_worker(site, "x")
    paths = site.paths.vm(vm_name("x"))
    paths.run_file.write_bytes(b"")
    if also:
        getattr(paths, also).unlink()
    site.start_broker()
    vm = site.host().vm("x")
    try:
        assert wait_for(lambda: vm.show().worker == "ready" and vm.show().pid == pid), vm.show()
        assert vm.show().state != "shutoff"
        assert vm.kill().state == "shutoff"
    finally:
        with contextlib.suppress(ProcessLookupError):
            kill_process(pid)


def test_foreign_files_in_the_state_directory_are_passed_over(site: Site, host: Host) -> None:
    site.define(host, "well")
    site.kill_broker()
    state = site.paths.vms_state
    (state / "a file").write_text("x")
    (state / "file").write_text("x")
    (state / "no name!").mkdir()
    (state / "empty").mkdir()
    (state / "directory").mkdir()
    (state / "directory" / "run.json").mkdir()
    (state / "dangling").symlink_to("/nowhere")
    site.start_broker()
    fresh = site.host()
    names = [vm.name for vm in fresh.list()]
    assert "well" in names
    assert not {"a file", "no name!", "empty", "dangling", "file"} & set(names)
    assert fresh.vm("well").start().state == "running"


def kill_worker(site: Site, name: str) -> None:
    """Kill a VM's worker while no broker can make another."""
    for pid in site.processes():
        with contextlib.suppress(FileNotFoundError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == f"vml:{name}":
                kill_process(pid)
