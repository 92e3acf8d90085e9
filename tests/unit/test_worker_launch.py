# SPDX-License-Identifier: Apache-2.0
"""Starting a QEMU: its command line, a monitor that is there at once, its log, and nothing left behind where it fails."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from vmloop.common.definition import AGENT_ID, MONITOR_ID, SIMULATED, AgentSection, Definition, QemuSection
from vmloop.common.errors import ConfigError, LaunchFailed
from vmloop.common.paths import MAX_SOCKET_PATH_BYTES, VmPaths
from vmloop.worker.qemu.launch import LOG_TAIL_BYTES, Launched, command_line, launch, log_tail

from ..fakes.raw_qmp import DEADLINE, until

LOG_BYTES = 1 << 20


def definition(binary: str = SIMULATED, *args: str, agent: bool = True) -> Definition:
    return Definition("web1", QemuSection(binary, list(args)), AgentSection(enabled=agent))


@pytest.fixture
def paths(tmp_path: Path) -> VmPaths:
    paths = VmPaths(tmp_path / "run", tmp_path / "state")
    paths.run.mkdir()
    paths.state.mkdir()
    return paths


@contextlib.contextmanager
def launched(definition: Definition, paths: VmPaths, epoch: int = 1) -> Iterator[Launched]:
    result = launch(definition, paths, epoch, stopped=True, log_bytes=LOG_BYTES)
    try:
        yield result
    finally:
        result.process.kill()
        until(result.process.ended)
        assert result.process.status() is not None
        result.process.close()
        result.monitor.close()


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


# -- the command line -----------------------------------------------------------------------------------------------------


def test_the_users_arguments_come_first_and_as_they_are() -> None:
    argv = command_line(definition(SIMULATED, "-m", "64", "-name", "a b"), monitor_fd=5, agent_fd=None, stopped=False)
    assert argv == [
        *(sys.executable, "-m", "vmloop.worker.qemu.simulated"),
        *("-m", "64", "-name", "a b"),
        *("-chardev", f"socket,id={MONITOR_ID},fd=5,server=on,wait=off"),
        *("-mon", f"chardev={MONITOR_ID},mode=control"),
    ]


def test_an_agent_gets_a_port_of_its_own() -> None:
    argv = command_line(definition(), monitor_fd=5, agent_fd=6, stopped=False)
    assert f"socket,id={AGENT_ID},fd=6,server=on,wait=off" in argv
    (port,) = [argument for argument in argv if argument.startswith("virtserialport")]
    assert f"chardev={AGENT_ID}" in port
    assert "name=org.qemu.guest_agent.0" in port
    assert f"virtio-serial,id={AGENT_ID}-bus" in argv


@pytest.mark.parametrize("stopped", [True, False])
def test_its_cpus_begin_stopped_only_if_asked_for(stopped: bool) -> None:
    assert ("-S" in command_line(definition(), monitor_fd=5, agent_fd=None, stopped=stopped)) is stopped


def test_a_binary_is_looked_up_in_the_path() -> None:
    (found, *_) = command_line(definition("sh"), monitor_fd=5, agent_fd=None, stopped=False)
    assert os.path.isabs(found)
    assert found.endswith("/sh")


def test_a_binary_that_is_nowhere_is_named() -> None:
    with pytest.raises(LaunchFailed, match="no-such-qemu"):
        command_line(definition("no-such-qemu"), monitor_fd=5, agent_fd=None, stopped=False)


# -- a start --------------------------------------------------------------------------------------------------------------


def test_the_monitor_greets_on_the_connection_that_was_there_first(paths: VmPaths) -> None:
    with launched(definition(), paths) as vm:
        assert not vm.monitor.getblocking()
        vm.monitor.settimeout(DEADLINE)
        assert b'"QMP"' in vm.monitor.recv(4096)
        assert os.getsid(vm.process.pid) == vm.process.pid  # the terminal's signals are not for it
        assert vm.process.identity.pid == vm.process.pid


def test_it_knows_from_its_environment_whose_it_is(paths: VmPaths) -> None:
    with launched(definition(), paths, epoch=7) as vm:
        until(lambda: b"VMLOOP_VM=" in Path(f"/proc/{vm.process.pid}/environ").read_bytes())
        environment = Path(f"/proc/{vm.process.pid}/environ").read_bytes().split(b"\0")
        assert f"VMLOOP_VM={paths.state}:7".encode() in environment


def test_it_runs_where_its_definition_says_else_in_its_own_directory(paths: VmPaths, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for directory, expected in ((None, paths.state), (str(images), images)):
        with launched(Definition("web1", QemuSection(SIMULATED, directory=directory)), paths) as started:
            assert Path(f"/proc/{started.process.pid}/cwd").readlink() == expected


def test_a_directory_that_is_not_there_is_named_and_nothing_is_started(paths: VmPaths, tmp_path: Path) -> None:
    missing = Definition("web1", QemuSection(SIMULATED, directory=str(tmp_path / "gone")))
    before = open_fds()
    with pytest.raises(LaunchFailed, match=r"qemu\.directory: .*/gone is no directory"):
        launch(missing, paths, 1, stopped=True, log_bytes=LOG_BYTES)
    assert open_fds() == before
    assert list(paths.run.iterdir()) == []


def test_afterwards_only_the_process_and_the_monitor_are_open(paths: VmPaths) -> None:
    before = open_fds()
    with launched(definition(), paths) as vm:
        assert {int(fd) for fd in open_fds() - before} == {vm.process.fileno(), vm.monitor.fileno()}
    assert open_fds() == before


def test_sockets_that_an_earlier_run_left_behind_are_replaced(paths: VmPaths) -> None:
    paths.monitor_socket.touch()
    paths.agent_socket.touch()
    with launched(definition(), paths) as vm:
        assert paths.monitor_socket.is_socket()
        assert paths.agent_socket.is_socket()
        vm.monitor.settimeout(DEADLINE)
        assert vm.monitor.recv(1)


def test_without_an_agent_there_is_no_agent_socket(paths: VmPaths) -> None:
    with launched(definition(agent=False), paths):
        assert not paths.agent_socket.exists()


# -- a start that fails ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", ["no-such-qemu", "/bin", "not-executable"])
def test_a_start_that_fails_leaves_nothing_behind(paths: VmPaths, binary: str) -> None:
    if binary == "not-executable":
        program = paths.state / "program"
        program.write_bytes(b"\x7fELF no program")
        program.chmod(0o700)
        binary = os.fspath(program)
    before = open_fds()
    with pytest.raises(LaunchFailed, match=r"program|bin|qemu"):
        launch(definition(binary), paths, 1, stopped=True, log_bytes=LOG_BYTES)
    assert open_fds() == before
    assert list(paths.run.iterdir()) == []


def test_a_log_that_cannot_be_opened_leaves_nothing_behind(paths: VmPaths) -> None:
    paths.qemu_log.mkdir()
    before = open_fds()
    with pytest.raises(LaunchFailed, match=r"qemu\.log: Is a directory"):
        launch(definition(), paths, 1, stopped=True, log_bytes=LOG_BYTES)
    assert open_fds() == before
    assert list(paths.run.iterdir()) == []


def test_a_socket_path_that_is_too_long_is_refused_with_its_length(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * MAX_SOCKET_PATH_BYTES)
    directory.mkdir()
    paths = VmPaths(directory, directory)
    before = open_fds()
    with pytest.raises(ConfigError, match=str(len(os.fsencode(paths.monitor_socket)))):
        launch(definition(), paths, 1, stopped=True, log_bytes=LOG_BYTES)
    assert open_fds() == before
    assert list(directory.iterdir()) == []


def test_a_qemu_that_ends_at_once_is_held_all_the_same_and_its_words_are_in_the_log(paths: VmPaths) -> None:
    with launched(definition(SIMULATED, "-fail", "no such machine"), paths) as vm:
        until(vm.process.ended)
        assert vm.process.status() == 1
    assert log_tail(paths, 1) == "qemu-system-x86_64: no such machine"


# -- its log --------------------------------------------------------------------------------------------------------------


def test_the_tail_is_of_the_newest_run_only(paths: VmPaths) -> None:
    for epoch, words in ((1, "the first one's words"), (2, "the second one's")):
        with launched(definition(SIMULATED, "-fail", words), paths, epoch) as vm:
            until(vm.process.ended)
    log = paths.qemu_log.read_text()
    assert "the first one's words" in log
    assert "--- epoch 2: " in log
    assert log_tail(paths, 2) == "qemu-system-x86_64: the second one's"


@pytest.mark.parametrize("printed", [b"", b"the reason of the run before\n", b"blah blah\n" * 20_000])
@pytest.mark.parametrize("first", [b"--- epoch 1: qemu\n", b"--- epoch 20: qemu\n", b""])
def test_a_run_that_never_came_to_a_qemu_has_no_tail_and_not_that_of_the_one_before(
    paths: VmPaths, first: bytes, printed: bytes
) -> None:
    paths.qemu_log.write_bytes(first + printed)
    assert log_tail(paths, 2) == ""


@pytest.mark.parametrize("behind", [0, 5, 64 * 1024 - 12, 64 * 1024 - 5, 300_000])
def test_a_runs_words_are_found_however_much_it_printed_and_however_long_its_command_line_is(
    paths: VmPaths, behind: int
) -> None:
    for arguments in (b"", b"x" * 100_000):
        words = b"x" * behind + b"\nthe end\n"
        paths.qemu_log.write_bytes(b"--- epoch 1: qemu\nold words--- epoch 2: qemu %s\n%s" % (arguments, words))
        assert log_tail(paths, 2) == words.decode()[-LOG_TAIL_BYTES:].strip()


def test_a_run_that_printed_nothing_has_an_empty_tail(paths: VmPaths) -> None:
    paths.qemu_log.write_bytes(b"--- epoch 1: qemu\nold words\n--- epoch 2: qemu -m 64\n")
    assert log_tail(paths, 2) == ""


def test_the_tail_of_a_talkative_run_is_bounded(paths: VmPaths) -> None:
    paths.qemu_log.write_bytes(b"--- epoch 1: qemu\n" + b"blah blah\n" * LOG_TAIL_BYTES + b"the reason\xff\n")
    tail = log_tail(paths, 1)
    assert tail.endswith("the reason\ufffd")
    assert len(tail) <= LOG_TAIL_BYTES


def test_a_log_that_cannot_be_read_is_said_so(paths: VmPaths) -> None:
    assert "cannot be read" in log_tail(paths, 1)


def test_a_large_log_is_turned_over_before_the_next_run(paths: VmPaths) -> None:
    paths.qemu_log.write_bytes(b"x" * (LOG_BYTES + 1))
    with launched(definition(SIMULATED, "-fail", "new"), paths) as vm:
        until(vm.process.ended)
    assert paths.qemu_log.with_name("qemu.log.1").stat().st_size == LOG_BYTES + 1
    assert paths.qemu_log.stat().st_size < 1000


def test_the_agents_devices_come_after_the_users_also_where_those_are_in_json() -> None:
    """QEMU plugs in what is in JSON last: ours would take a slot that one of the user's names."""
    user = definition(SIMULATED, "-device", '{"driver":"VGA","addr":"0x1"}')
    argv = command_line(user, monitor_fd=7, agent_fd=8, stopped=False)
    devices = [json.loads(value) for option, value in pairwise(argv) if option == "-device"]
    assert [device["driver"] for device in devices] == ["VGA", "virtio-serial", "virtserialport"]
    assert devices[1]["id"] == f"{AGENT_ID}-bus"
    assert devices[2] == {
        "driver": "virtserialport",
        "bus": f"{AGENT_ID}-bus.0",
        "chardev": AGENT_ID,
        "name": "org.qemu.guest_agent.0",
        "id": f"{AGENT_ID}-port",
    }
