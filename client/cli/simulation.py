# SPDX-License-Identifier: Apache-2.0
"""`simulate`: many stand-ins for QEMU in one process, attached through the broker. For trying vmloop out, and its limits."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

import click

from ...common.errors import LaunchFailed, VmloopError
from ...common.names import vm_name, vm_service
from .. import requests
from ..requests import Request
from ..session import Host
from .base import Exit, Invocation, verb
from .output import Output

# Attaches in flight: enough to keep broker and workers busy, few enough that none waits long for its turn.
IN_FLIGHT: Final = 64
# Seconds for the stand-ins to listen, and to end.
READY: Final = 60.0
END: Final = 5.0


@verb("simulate")
@click.option("-n", "count", type=click.IntRange(1, 10_000), required=True, metavar="N", help="How many VMs.")
@click.option("--prefix", default="sim", show_default=True, help="Their names are PREFIX-000, PREFIX-001 …")
@click.option(
    "--directory",
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Where their sockets are; else a temporary one.",
)
@click.option("--once", is_flag=True, help="Detach and end at once.")
def simulate(invocation: Invocation, count: int, prefix: str, directory: str | None, once: bool) -> int:
    """Attach N simulated VMs.

    It stays until Ctrl-C or SIGTERM, then detaches them and ends them.
    """
    vm_name(f"{prefix}-{count}")
    output = invocation.output()
    stop = threading.Event()
    with invocation.host() as host, _stopped_by_signals(stop), _place(directory) as place:
        host.ping()
        with _stand_ins(Path(place), count, prefix) as sockets:
            began = time.monotonic()
            attached, failed = _all(host, output, "attaching", [_attach(path) for path in sockets], stop)
            seconds = time.monotonic() - began
            figures = {"attached": attached, "failed": len(failed), "seconds": round(seconds, 3)}
            summary = f"{attached} simulated VMs attached in {seconds:.1f} s"
            output.result(figures, lambda: output.line(summary + (f", {len(failed)} failed" if failed else "")))
            sys.stdout.flush()
            try:
                if not once and not failed:
                    stop.wait()
            finally:
                detaching = [requests.detach(_service(path)) for path in sockets]
                _all(host, output, "detaching", detaching, threading.Event())
    if failed:
        raise failed[0]
    return Exit.DONE


def _attach(path: Path) -> Request[Any]:
    return requests.attach(path.stem, path, None, None)


def _service(path: Path) -> str:
    return vm_service(vm_name(path.stem))


def _all(
    host: Host, output: Output, what: str, many: list[Request[Any]], stop: threading.Event
) -> tuple[int, list[VmloopError]]:
    """Ask all, with several in flight, until told to stop: how many it was done for, and the errors."""
    done = 0
    failed: list[VmloopError] = []

    def until_stopped() -> Iterator[Request[Any]]:
        for request in many:
            if stop.is_set():
                return
            yield request

    with output.progress(f"{what} {len(many)} VMs", len(many)) as progress:
        for _, answer in host.call_many(until_stopped(), IN_FLIGHT):
            progress.advance()
            if isinstance(answer, VmloopError):
                failed.append(answer)
            else:
                done += 1
    return done, failed


@contextmanager
def _stand_ins(directory: Path, count: int, prefix: str) -> Iterator[list[Path]]:
    """The process that plays the QEMUs; gives the paths of their QMP sockets."""
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "vmloop.worker.qemu.simulated", "--directory", str(directory)]
    # A session of its own: Ctrl-C is for us, who must detach before it ends.
    process = subprocess.Popen(
        [*command, "--count", str(count), "--prefix", prefix], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        _await_ready(process)
        yield [directory / f"{prefix}-{number:03}.qmp" for number in range(count)]
    finally:
        process.terminate()
        try:
            process.wait(END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _await_ready(process: subprocess.Popen[bytes]) -> None:
    watchdog = threading.Timer(READY, process.kill)
    watchdog.start()
    try:
        line = process.stdout.readline() if process.stdout is not None else b""
    finally:
        watchdog.cancel()
    if not line.startswith(b"ready"):
        raise LaunchFailed(f"the simulated VMs did not start within {READY:g} s; their process said {line!r:.100}")


def _place(directory: str | None) -> AbstractContextManager[str]:
    return tempfile.TemporaryDirectory(prefix="vmloop-") if directory is None else nullcontext(directory)


@contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM ask for the orderly end; a second one ends at once, for when that takes too long."""

    def handler(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


COMMANDS = {"simulate": simulate}
