# SPDX-License-Identifier: Apache-2.0
"""Starting a QEMU: its command line, its log, and a monitor that is there before it is. Used by vm.py.

The worker binds and listens on the monitor's socket itself and hands QEMU the listening fd, so the connection can be made before QEMU
has even started, and there is nothing to retry.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import IO, Final

import msgspec

from ...common.definition import AGENT_ID, MONITOR_ID, SIMULATED, Definition
from ...common.errors import LaunchFailed
from ...common.paths import VmPaths, require_socket_path
from ...common.process import Identity, ProcessGone, identify
from ..memory import unlimited_children
from .process import QemuProcess

LOG_TAIL_BYTES: Final = 4096  # of qemu.log, shown with `launch-failed`
REAP_SECONDS: Final = 1.0  # for a process that was killed right after its start
_RUN_BEGINS: Final = b"--- epoch "  # in qemu.log
_LOOK_BYTES: Final = 64 * 1024  # of qemu.log, looked through at once from its end for the line that begins a run
VM_VARIABLE: Final = "VMLOOP_VM"  # in QEMU's environment: state directory and epoch, to recognise it by


class Launched(msgspec.Struct, frozen=True):
    """A QEMU that has just been started, and the connected monitor."""

    process: QemuProcess
    monitor: socket.socket
    argv: list[str]


def command_line(definition: Definition, *, monitor_fd: int, agent_fd: int | None, stopped: bool) -> list[str]:
    """The whole argv. Pure, but for looking up the binary. Raises `LaunchFailed` if there is none.

    stopped: begin with the guest's CPUs stopped, so that no event is missed before the monitor is negotiated.
    """
    argv = [*_binary(definition.qemu.binary), *definition.qemu.args]
    argv += ["-chardev", f"socket,id={MONITOR_ID},fd={monitor_fd},server=on,wait=off"]
    argv += ["-mon", f"chardev={MONITOR_ID},mode=control"]
    if agent_fd is not None:
        argv += ["-chardev", f"socket,id={AGENT_ID},fd={agent_fd},server=on,wait=off"]
        for device in _agent_devices():
            argv += ["-device", _device(device, in_json=_has_json_devices(definition.qemu.args))]
    if stopped:
        argv.append("-S")
    return argv


def _agent_devices() -> list[dict[str, str]]:
    port = {"bus": f"{AGENT_ID}-bus.0", "chardev": AGENT_ID, "name": "org.qemu.guest_agent.0", "id": f"{AGENT_ID}-port"}
    return [{"driver": "virtio-serial", "id": f"{AGENT_ID}-bus"}, {"driver": "virtserialport", **port}]


def _has_json_devices(args: list[str]) -> bool:
    return any(option in ("-device", "--device") and value.startswith("{") for option, value in pairwise(args))


def _device(properties: dict[str, str], *, in_json: bool) -> str:
    """QEMU plugs in devices in JSON after all others: ours, which take any free slot, must not come before the user's."""
    if in_json:
        return json.dumps(properties, separators=(",", ":"))
    driver, *others = properties.items()
    return ",".join([driver[1], *(f"{key}={value}" for key, value in others)])


def mark_of(paths: VmPaths, epoch: int | None) -> str:
    """What a QEMU has in its environment, so that it can be recognised: of one run of one VM of one root. None: of whichever run it is."""
    return f"{paths.state}:{'' if epoch is None else epoch}"


def launch(definition: Definition, paths: VmPaths, epoch: int, *, stopped: bool, log_bytes: int) -> Launched:
    """Start QEMU in a session of its own, with its output in qemu.log. Raises `LaunchFailed`; then nothing is left behind."""
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(_unlink_sockets, paths)
        monitor_listener = on_failure.enter_context(_listen(paths.monitor_socket))
        agent_listener = on_failure.enter_context(_listen(paths.agent_socket)) if definition.agent.enabled else None
        connection = _connect(paths.monitor_socket)
        on_failure.callback(connection.close)
        directory = _directory(definition, paths)
        agent_fd = agent_listener.fileno() if agent_listener is not None else None
        argv = command_line(definition, monitor_fd=monitor_listener.fileno(), agent_fd=agent_fd, stopped=stopped)
        log = on_failure.enter_context(
            _open_log(paths.qemu_log, log_bytes, _first_line(epoch) + f" {' '.join(argv)}\n".encode())
        )
        try:
            with unlimited_children():
                child = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=[fd for fd in (monitor_listener.fileno(), agent_fd) if fd is not None],
                    env={**os.environ, VM_VARIABLE: mark_of(paths, epoch)},
                    cwd=directory,
                )
        except OSError as error:
            raise LaunchFailed(f"cannot start {argv[0]}: {error.strerror}", log="") from error
        process = _hold(child)
        monitor_listener.close()
        if agent_listener is not None:
            agent_listener.close()
        log.close()
        on_failure.pop_all()
    return Launched(process, connection, argv)


def log_tail(paths: VmPaths, epoch: int) -> str:
    """The end of what QEMU printed in the run of this epoch; "" if that is not the newest one in the log: it never came to a QEMU."""
    try:
        with paths.qemu_log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(_newest_begins(file, size))
            if not file.readline().startswith(_first_line(epoch)):
                return ""
            file.seek(max(file.tell(), size - LOG_TAIL_BYTES))
            return file.read(LOG_TAIL_BYTES).decode("utf-8", "replace").strip()
    except OSError as error:
        return f"(qemu.log cannot be read: {error.strerror})"


def _first_line(epoch: int) -> bytes:
    """How the line begins that stands before what a run's QEMU prints."""
    return b"%s%d:" % (_RUN_BEGINS, epoch)


def _newest_begins(file: IO[bytes], size: int) -> int:
    """Where the newest run begins in a log; 0 if no run does."""
    for at in range(size - size % _LOOK_BYTES, -1, -_LOOK_BYTES):
        file.seek(at)
        found = file.read(_LOOK_BYTES + len(_RUN_BEGINS)).rfind(_RUN_BEGINS)  # one may stand across the border
        if found >= 0:
            return at + found
    return 0


def _binary(name: str) -> list[str]:
    if name == SIMULATED:
        return [sys.executable, "-m", "vmloop.worker.qemu.simulated"]
    found = shutil.which(name)
    if found is None:
        raise LaunchFailed(f"there is no executable {name!r}; install QEMU or name another qemu.binary", log="")
    return [found]


def _directory(definition: Definition, paths: VmPaths) -> Path:
    """Where QEMU runs, and its relative paths begin."""
    if definition.qemu.directory is None:
        return paths.state
    directory = Path(definition.qemu.directory)
    if not directory.is_dir():
        raise LaunchFailed(f"qemu.directory: {directory} is no directory; make it, or name another", log="")
    return directory


def _listen(path: Path) -> socket.socket:
    """A listening unix socket; one that an earlier run left behind is replaced (the VM's lock is held)."""
    require_socket_path(path)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(os.fspath(path))
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise LaunchFailed(f"cannot listen on {path}: {error.strerror}", log="") from error
    return listener


def _unlink_sockets(paths: VmPaths) -> None:
    for path in (paths.monitor_socket, paths.agent_socket):
        with contextlib.suppress(OSError):  # the error that brought us here is the one to tell
            path.unlink()


def _connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(os.fspath(path))  # the backlog has room: this neither fails nor waits
    connection.setblocking(False)
    return connection


def _open_log(path: Path, max_bytes: int, first_line: bytes) -> IO[bytes]:
    """qemu.log, with the line that begins a run. Raises `LaunchFailed`: a disk that takes no line takes no run.json either."""
    try:
        if path.exists() and path.stat().st_size > max_bytes:
            path.rename(path.with_name(path.name + ".1"))
        log = path.open("ab", buffering=0)
        try:
            log.write(first_line)
        except BaseException:
            log.close()
            raise
    except OSError as error:
        raise LaunchFailed(f"cannot write {path}: {error.strerror}", log="") from error
    return log


def _hold(child: subprocess.Popen[bytes]) -> QemuProcess:
    """The new process. Raises `LaunchFailed` if it cannot be held (no free fds): one that nobody could watch is not left running."""
    try:
        return QemuProcess(_identity_of(child), child)
    except OSError as error:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # then it ends later, as a child of the zygote
            child.wait(REAP_SECONDS)
        raise LaunchFailed(f"pid {child.pid} was started and cannot be watched: {error.strerror}", log="") from error


def _identity_of(child: subprocess.Popen[bytes]) -> Identity:
    try:
        return identify(child.pid)
    except ProcessGone:  # it ended at once; as our unreaped child it keeps its pid until `status`
        return Identity(child.pid, 0, "")
