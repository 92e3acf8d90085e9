# SPDX-License-Identifier: Apache-2.0
"""A run's QEMU found again: held if it is surely the one, gone if it surely is, and else in doubt; a stranger is never held."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import vmloop
from vmloop.common.definition import SIMULATED, AgentSection, Definition, QemuSection
from vmloop.common.paths import VmPaths
from vmloop.common.process import CannotTell, Identity, ProcessGone, identify, open_pidfd
from vmloop.worker.qemu.launch import VM_VARIABLE, launch, mark_of
from vmloop.worker.qemu.process import QemuProcess
from vmloop.worker.qemu.recognise import MONITOR_ARGUMENT, find_marked, recognise
from vmloop.worker.runfile import Run, salvage_run

from ..fakes.raw_qmp import DEADLINE, until

EPOCH = 7
# Says that it is there, and stays until its input ends. Further arguments are of no use to it.
STAYS = [sys.executable, "-c", "print('up', flush=True); input()"]


@pytest.fixture
def paths(tmp_path: Path) -> VmPaths:
    paths = VmPaths(tmp_path / "run", tmp_path / "state")
    paths.run.mkdir()
    paths.state.mkdir()
    return paths


@pytest.fixture
def listener(paths: VmPaths) -> Iterator[socket.socket]:
    """Somebody listens at the monitor's socket."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(paths.monitor_socket))
        listener.listen(8)
        yield listener


def run_of(paths: VmPaths, process: Identity | None = None, *, launched: bool = True) -> Run:
    mark = mark_of(paths, EPOCH) if launched else ""
    return Run(epoch=EPOCH, process=process, monitor=str(paths.monitor_socket), launched=launched, mark=mark)


@contextlib.contextmanager
def process(*more: str, mark: str | None = None) -> Iterator[Identity]:
    """A process, with that mark in its environment and these arguments beside its own."""
    environ = {**os.environ, **({VM_VARIABLE: mark} if mark is not None else {})}
    with subprocess.Popen(
        [*STAYS, *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, start_new_session=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        try:
            yield identify(child.pid)
        finally:
            child.kill()


def held(found: QemuProcess | None) -> int | None:
    """The pid that was found, which is let go."""
    if found is None:
        return None
    found.close()
    return found.pid


# -- known by its pid -----------------------------------------------------------------------------------------------------


def test_the_noted_process_is_held(paths: VmPaths) -> None:
    with process() as identity:
        assert held(recognise(run_of(paths, identity), paths)) == identity.pid


def test_a_pid_that_is_used_again_is_gone_even_with_the_same_program(paths: VmPaths, listener: socket.socket) -> None:
    with process(MONITOR_ARGUMENT, mark=mark_of(paths, EPOCH)) as identity:
        earlier = msgspec.structs.replace(identity, started=identity.started - 1)
        with pytest.raises(ProcessGone, match="another one now"):
            recognise(run_of(paths, earlier), paths)


def test_a_pid_that_is_a_threads_number_now_is_gone(paths: VmPaths) -> None:
    wait = threading.Event()
    thread = threading.Thread(target=wait.wait)
    thread.start()
    try:
        assert thread.native_id is not None
        noted = Identity(thread.native_id, 1, "/usr/bin/qemu-system-x86_64")
        with pytest.raises(ProcessGone, match="thread"):
            recognise(run_of(paths, noted), paths)
    finally:
        wait.set()
        thread.join()


def test_a_launched_process_that_runs_another_program_now_is_held_by_its_mark(paths: VmPaths) -> None:
    with process(MONITOR_ARGUMENT, mark=mark_of(paths, EPOCH)) as identity:
        noted = msgspec.structs.replace(identity, executable="/usr/bin/dash")
        found = recognise(run_of(paths, noted), paths)
        assert found is not None
        assert found.identity == identity
        found.close()


@pytest.mark.parametrize("noted", ["/usr/bin/qemu-system-x86_64", ""], ids=["another", "could not be read"])
def test_an_executable_that_is_not_the_noted_one_is_doubt_and_not_the_end(paths: VmPaths, noted: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with process() as identity:
        for launched in (True, False):
            run = run_of(paths, msgspec.structs.replace(identity, executable=noted), launched=launched)
            with pytest.raises(CannotTell, match=str(identity.pid)) as caught:
                recognise(run, paths)
            assert identity.executable in str(caught.value)
        assert identify(identity.pid) == identity  # and nothing was done to it
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_attached_process_in_doubt_is_held_if_it_made_the_monitors_socket(paths: VmPaths) -> None:
    code = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(1); print('up', flush=True); input()"
    with (
        subprocess.Popen(
            [sys.executable, "-c", code, str(paths.monitor_socket)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child,
        socket.socket(socket.AF_UNIX) as connection,
    ):
        assert child.stdout is not None
        child.stdout.readline()
        connection.connect(str(paths.monitor_socket))
        noted = msgspec.structs.replace(identify(child.pid), executable="/opt/old/qemu")
        run = run_of(paths, noted, launched=False)
        with pytest.raises(CannotTell):
            recognise(run, paths)
        assert held(recognise(run, paths, connection)) == child.pid
        child.kill()


def test_a_program_of_another_user_that_may_not_be_read_has_no_executable_and_is_not_gone() -> None:
    _as_nobody("", "Identity")


def test_a_process_that_proc_hides_is_doubt_and_not_the_end() -> None:
    _as_nobody("mount -t proc -o hidepid=2 proc /proc &&", "CannotTell")


def _as_nobody(before: str, wanted: str) -> None:
    """What `identify` of this process says to a user who may not look at it."""
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("setpriv") is None:
        pytest.skip("needs root, unshare and setpriv")
    root = Path(vmloop.__file__).parent.parent
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r})\n"
        "from vmloop.common.process import identify\n"
        f"try: print(repr(identify({os.getpid()})))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    script = f'{before} exec setpriv --reuid 65534 --regid 65534 --clear-groups "$@"'
    argv = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", code]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE, check=False)
    if "permission denied" in result.stderr.lower():
        pytest.skip(f"not possible here: {result.stderr}")
    assert result.stdout.startswith(wanted), result.stdout + result.stderr
    if wanted == "Identity":
        assert "executable=''" in result.stdout


def test_no_pid_at_all_is_gone() -> None:
    for pid in (0, -1, 1 << 31, 1 << 63):
        with pytest.raises(ProcessGone):
            identify(pid)


def test_without_a_free_fd_a_process_is_not_gone(paths: VmPaths) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with process() as identity:
        run = run_of(paths, identity)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                recognise(run, paths)
            with pytest.raises(OSError, match="Too many open files"):
                open_pidfd(identity.pid)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert held(recognise(run, paths)) == identity.pid


# -- launched, and its pid never written down -----------------------------------------------------------------------------


def test_a_launched_qemu_whose_pid_nobody_noted_is_found_by_its_mark(paths: VmPaths) -> None:
    definition = Definition("web1", QemuSection(SIMULATED, []), AgentSection(enabled=False))
    launched = launch(definition, paths, EPOCH, stopped=True, log_bytes=1 << 20)
    try:
        until(lambda: find_there(paths))  # between fork and exec it has our environment
        found = recognise(run_of(paths), paths)
        assert found is not None
        assert found.identity.pid == launched.process.pid
        found.kill()
        until(launched.process.ended)
        found.close()
    finally:
        launched.process.kill()
        until(launched.process.ended)
        launched.process.status()
        launched.process.close()
        launched.monitor.close()
    with pytest.raises(ProcessGone, match="nobody listens"):
        recognise(run_of(paths), paths)


def find_there(paths: VmPaths) -> bool:
    return held(find_marked(mark_of(paths, EPOCH))) is not None


@pytest.mark.parametrize("mark", ["{state}:70", "{state}:", "{state}2:7", "/elsewhere{state}:7", "{state}:7 "])
def test_only_the_exact_mark_counts(paths: VmPaths, listener: socket.socket, mark: str) -> None:
    with process(MONITOR_ARGUMENT, mark=mark.format(state=paths.state)):
        assert recognise(run_of(paths), paths) is None


def test_a_helper_that_inherited_the_mark_is_not_taken_for_qemu(paths: VmPaths, listener: socket.socket) -> None:
    with process("--for", "qemu", mark=mark_of(paths, EPOCH)):
        assert recognise(run_of(paths), paths) is None


def test_of_a_wrapper_and_its_qemu_the_one_that_was_started_is_held(paths: VmPaths) -> None:
    mark = mark_of(paths, EPOCH)
    with (
        process(MONITOR_ARGUMENT, mark=mark) as wrapper,
        process(MONITOR_ARGUMENT, mark=mark) as qemu,
    ):
        assert (wrapper.started, wrapper.pid) < (qemu.started, qemu.pid)
        assert held(recognise(run_of(paths), paths)) == wrapper.pid


def test_where_nobody_is_found_but_somebody_listens_nothing_is_known(paths: VmPaths, listener: socket.socket) -> None:
    assert recognise(run_of(paths), paths) is None


def test_where_nobody_is_found_and_nobody_listens_the_run_is_gone(paths: VmPaths) -> None:
    with pytest.raises(ProcessGone, match="nobody listens"):
        recognise(run_of(paths), paths)
    with socket.socket(socket.AF_UNIX) as bound:  # nor does it where the socket of one that is dead still lies
        bound.bind(str(paths.monitor_socket))
    with pytest.raises(ProcessGone, match="nobody listens"):
        recognise(run_of(paths), paths)


def test_a_missing_socket_is_no_end_while_a_qemu_lives_that_may_be_the_runs(paths: VmPaths) -> None:
    """One that gave up root shows its mark to root alone, and is not held by it."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv")
    for mark, alive in ((mark_of(paths, EPOCH), True), (mark_of(paths, EPOCH + 1), False)):
        with given_up_root(mark):
            if alive:
                assert recognise(run_of(paths), paths) is None
            else:
                with pytest.raises(ProcessGone):
                    recognise(run_of(paths), paths)


@contextlib.contextmanager
def given_up_root(mark: str) -> Iterator[None]:
    """A QEMU as far as its arguments and its mark go, of another user."""
    argv = ["setpriv", "--reuid", "65534", "--clear-groups", *STAYS, MONITOR_ARGUMENT]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, VM_VARIABLE: mark}
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        try:
            yield
        finally:
            child.kill()


def test_a_qemu_that_does_not_show_its_environment_may_be_any_runs(paths: VmPaths) -> None:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv")
    with process(MONITOR_ARGUMENT, mark=mark_of(paths, EPOCH + 1)) as identity:
        root = Path(vmloop.__file__).parent.parent
        code = (
            f"import sys; sys.path.insert(0, {str(root)!r})\n"
            "from vmloop.worker.qemu.recognise import any_may_be, find_marked\n"
            f"print(find_marked({mark_of(paths, EPOCH)!r}), any_may_be({mark_of(paths, EPOCH)!r}))\n"
        )
        argv = ["setpriv", "--reuid", "65534", "--clear-groups", sys.executable, "-c", code]
        result = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE, check=True)
        assert result.stdout == "None True\n"
        assert identify(identity.pid) == identity


# -- launched, and its run.json damaged -------------------------------------------------------------------------------------


def test_a_run_whose_file_was_damaged_is_found_in_whatever_epoch_it_was_launched(paths: VmPaths) -> None:
    run = salvage_run(paths, 0, attached=False)
    assert run.ended is None
    for mark, pid in (
        (mark_of(paths, EPOCH), True),
        (f"{paths.state}2:7", False),
        (f"{mark_of(paths, EPOCH)}x", False),
    ):
        with process(MONITOR_ARGUMENT, mark=mark) as identity:
            if pid:
                assert held(recognise(run, paths)) == identity.pid
            else:
                with pytest.raises(ProcessGone):
                    recognise(run, paths)


def test_of_an_attached_vm_without_a_pid_nothing_is_known(paths: VmPaths) -> None:
    assert recognise(run_of(paths, launched=False), paths) is None
