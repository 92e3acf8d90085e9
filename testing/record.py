# SPDX-License-Identifier: Apache-2.0
"""Records the dialogue with a real monitor: a proxy that any QMP client can be pointed at. docs/testing.md is the guide.

    python -m vmloop.testing.record --qmp SOCKET --listen SOCKET --record FILE

`--qmp` is QEMU's socket, `--listen` the one that clients connect to, one at a time as at QEMU's own. Bytes are passed on as they are, with
file descriptors, and only when they are in the file; an end that does not read stops the other one. It prints `ready` when it listens, and
ends when QEMU hangs up, with SIGTERM and with SIGINT; then FILE is whole.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Final, Literal

from ..common.errors import ConfigError, VmloopError
from ..common.paths import require_socket_path
from .recording_file import RecordingFile

CHUNK_BYTES: Final = 64 << 10  # one read; all that is held of a direction
MAX_FDS: Final = 16  # of one message; QEMU's own limit
BACKLOG: Final = 8  # clients that wait for their turn
PROGRAM: Final = "python -m vmloop.testing.record"

Who = Literal["qemu", "client"]


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status: 0 the recording is whole, 1 it is not."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Record the dialogue with a QMP monitor.")
    parser.add_argument("--qmp", type=Path, required=True, metavar="SOCKET", help="QEMU's QMP socket")
    parser.add_argument(
        "--listen", type=Path, required=True, metavar="SOCKET", help="where the client connects instead"
    )
    parser.add_argument(
        "--record", type=Path, required=True, metavar="FILE", help="where the recording goes; it must not be there yet"
    )
    options = parser.parse_args(argv)
    try:
        asyncio.run(_record(options.qmp, options.listen, options.record))
    except VmloopError as error:
        print(f"vmloop: {error.code}: {error}", file=sys.stderr)  # noqa: T201 - it is this program's way to say so
        return 1
    except OSError as error:
        print(f"vmloop: internal: {options.record}: {error}", file=sys.stderr)  # noqa: T201 - likewise
        return 1
    return 0


async def _record(qmp: Path, listen: Path, path: Path) -> None:
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    listener = _listening(listen)
    try:
        file = RecordingFile(path)
        try:
            print("ready", flush=True)  # noqa: T201 - whoever started this waits for the line
            await _until(told, Proxy(qmp, listener, file).run())
        except BaseException:
            with contextlib.suppress(ConfigError):  # that nothing was recorded: why is the error to tell
                file.close()
            raise
        file.close()
    finally:
        listener.close()
        listen.unlink(missing_ok=True)


async def _until(told: asyncio.Event, work: Coroutine[None, None, None]) -> None:
    """Do the work to its end, or until told to stop."""
    stop = asyncio.ensure_future(told.wait())
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({stop, task}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stop.cancel()
        task.cancel()
        await asyncio.wait({stop, task})
    if not task.cancelled():
        task.result()


class Proxy:
    """Between one client after another and one QEMU."""

    def __init__(self, qmp: Path, listener: socket.socket, file: RecordingFile) -> None:
        """`listener`: a listening, non-blocking socket, the caller's to close."""
        self._qmp = qmp
        self._listener = listener
        self._file = file
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """Serve clients until QEMU hangs up. Raises the error tree's members, and OSError if the file cannot be written."""
        while True:
            client, _ = await self._loop.sock_accept(self._listener)
            with client:
                if await self._serve(client) == "qemu":
                    return

    async def _serve(self, client: socket.socket) -> Who:
        """One client, to its end; who ended it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as qemu:
            qemu.setblocking(False)
            try:
                qemu.connect(os.fspath(self._qmp))  # a unix socket: at once or not at all, and EAGAIN is not at all
            except OSError as error:
                raise ConfigError(
                    f"{self._qmp}: {error.strerror}; is QEMU running, with a QMP socket there?"
                ) from error
            to_client = asyncio.ensure_future(self._pass(qemu, client, lambda data, _: self._file.qemu(data)))
            to_qemu = asyncio.ensure_future(self._pass(client, qemu, self._file.client))
            both = {to_client, to_qemu}
            who: Who | None = None
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if not to_client.done() and not to_qemu.result():
                    # QEMU takes nothing any more: it has hung up, and what it said before that is still to be read.
                    await asyncio.wait({to_client})
                who = "qemu" if to_client.done() and to_client.result() else "client"
            finally:
                for task in both:
                    task.cancel()
                try:
                    await asyncio.wait(both)
                finally:  # the recorder may be told to end just now
                    self._file.closed(who or "client")
            for task in both:
                if not task.cancelled():
                    task.result()
            return who

    async def _pass(self, source: socket.socket, target: socket.socket, note: Callable[[bytes, int], None]) -> bool:
        """Pass on what comes until its end (True), or until the other side takes nothing any more (False)."""
        while True:
            data, fds = await self._receive(source)
            try:
                if not data:
                    return True
                note(data, len(fds))
                await self._send(target, data, fds)
            except (BrokenPipeError, ConnectionResetError):
                return False
            finally:
                for fd in fds:
                    os.close(fd)

    async def _receive(self, source: socket.socket) -> tuple[bytes, list[int]]:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(source, CHUNK_BYTES, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                await _ready(self._loop.add_reader, self._loop.remove_reader, source)
            except ConnectionResetError:  # it closed with something unread: an end as good as any
                return b"", []
            else:
                return data, fds

    async def _send(self, target: socket.socket, data: bytes, fds: list[int]) -> None:
        while fds:
            try:
                data = data[socket.send_fds(target, [data], fds) :]
                fds = []
            except BlockingIOError:
                await _ready(self._loop.add_writer, self._loop.remove_writer, target)
        if data:
            await self._loop.sock_sendall(target, data)


async def _ready(add: Callable[..., None], remove: Callable[[int], object], end: socket.socket) -> None:
    """Wait until a socket can be read, or written."""
    ready = asyncio.get_running_loop().create_future()
    fd = end.fileno()
    add(fd, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        remove(fd)


def _listening(path: Path) -> socket.socket:
    """A new listening socket, for its owner alone. Raises `ConfigError`; what is there already is not removed."""
    require_socket_path(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(os.fspath(path))
        os.chmod(path, 0o600)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {path}: {error.strerror}") from error
    return listener


if __name__ == "__main__":
    sys.exit(main())
