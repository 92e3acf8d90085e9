# SPDX-License-Identifier: Apache-2.0
"""Where files live: under --root, for root, for everybody else; and the 107 bytes of a socket's path."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import pytest

from vmloop.common.errors import ConfigError
from vmloop.common.names import vm_name
from vmloop.common.paths import MAX_SOCKET_PATH_BYTES, Paths, default_paths, paths_under, require_socket_path


def test_everything_is_under_the_root() -> None:
    paths = paths_under(Path("/srv/x"))
    assert paths.client_socket == Path("/srv/x/run/client.sock")
    assert paths.events_socket == Path("/srv/x/run/events.sock")
    assert paths.worker_socket == Path("/srv/x/run/worker.sock")
    assert paths.zygote_socket == Path("/srv/x/run/zygote.sock")
    assert paths.broker_lock == Path("/srv/x/run/broker.lock")
    assert paths.settings_file == Path("/srv/x/etc/vmloop.toml")


def test_a_relative_root_is_made_absolute_once(tmp_path: Path) -> None:
    assert paths_under(Path("x")).run == Path.cwd() / "x" / "run"


def test_a_vm_has_a_directory_in_run_and_one_in_state() -> None:
    vm = paths_under(Path("/srv/x")).vm(vm_name("web1"))
    assert vm.monitor_socket == Path("/srv/x/run/vms/web1/monitor.sock")
    assert vm.agent_socket == Path("/srv/x/run/vms/web1/agent.sock")
    assert vm.page == Path("/srv/x/run/vms/web1/page")
    assert vm.definition == Path("/srv/x/state/vms/web1/vm.toml")
    assert vm.run_file == Path("/srv/x/state/vms/web1/run.json")
    assert vm.carry(0) != vm.carry(1)


def test_root_uses_the_hosts_own_places_whatever_the_environment_says() -> None:
    paths = default_paths({"XDG_RUNTIME_DIR": "/elsewhere", "HOME": "/root"}, uid=0)
    assert paths == Paths(Path("/run/vmloop"), Path("/var/lib/vmloop"), Path("/etc/vmloop"))


def test_others_use_the_xdg_directories() -> None:
    environ = {"XDG_RUNTIME_DIR": "/run/user/7", "XDG_STATE_HOME": "/s", "XDG_CONFIG_HOME": "/c", "HOME": "/home/u"}
    assert default_paths(environ, uid=7) == Paths(Path("/run/user/7/vmloop"), Path("/s/vmloop"), Path("/c/vmloop"))


@pytest.mark.parametrize(
    "environ", [{"HOME": "/home/u"}, {"HOME": "/home/u", "XDG_STATE_HOME": "", "XDG_RUNTIME_DIR": ""}]
)
def test_without_xdg_the_usual_places_are_used(environ: dict[str, str]) -> None:
    assert default_paths(environ, uid=7) == Paths(
        Path("/tmp/vmloop-7"), Path("/home/u/.local/state/vmloop"), Path("/home/u/.config/vmloop")
    )


# -- the length of a socket's path ----------------------------------------------------------------------------------------


def padded(base: Path, length: int) -> Path:
    return base / ("s" * (length - len(os.fsencode(base)) - 1))


def test_107_bytes_are_possible_and_108_are_not() -> None:
    base = Path("/tmp")
    assert require_socket_path(padded(base, 107)) == padded(base, 107)
    with pytest.raises(ConfigError, match="108 bytes"):
        require_socket_path(padded(base, 108))


def test_the_limit_is_the_kernels_own(tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind("s" * MAX_SOCKET_PATH_BYTES)
        with socket.socket(socket.AF_UNIX) as sock, pytest.raises(OSError, match="too long"):
            sock.bind("s" * (MAX_SOCKET_PATH_BYTES + 2))


def test_bytes_count_not_characters() -> None:
    with pytest.raises(ConfigError, match="110 bytes"):
        require_socket_path(Path("/tmp") / ("ä" * 52 + "x"))


# -- making the directories -----------------------------------------------------------------------------------------------


def test_create_makes_private_directories_and_may_be_repeated(tmp_path: Path) -> None:
    paths = paths_under(tmp_path / "r")
    paths.create()
    paths.create()
    for directory in (paths.run, paths.state, paths.vms_run, paths.vms_state):
        assert directory.stat().st_mode & 0o777 == 0o700
    assert not paths.etc.exists()


def test_create_refuses_a_root_too_deep_for_its_sockets_and_makes_nothing(tmp_path: Path) -> None:
    root = tmp_path / ("d" * 100)
    with pytest.raises(ConfigError, match="bytes"):
        paths_under(root).create()
    assert not root.exists()


def test_create_names_what_it_cannot_make(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ConfigError, match=str(tmp_path / "run")):
        paths_under(tmp_path).create()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
@pytest.mark.parametrize("tree", ["run", "state"])
def test_create_refuses_somebody_elses_directory(tmp_path: Path, tree: str) -> None:
    (tmp_path / tree).mkdir()
    os.chown(tmp_path / tree, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to uid 12345"):
        paths_under(tmp_path).create()
