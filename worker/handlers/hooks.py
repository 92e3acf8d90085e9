# SPDX-License-Identifier: Apache-2.0
"""Executables in etc/hooks.d/: handlers in any language. One at a time per VM, in event order. Used by dispatch.py.

    etc/hooks.d/BLOCK_IO_ERROR-mail    called for BLOCK_IO_ERROR: the name begins with an event's, then nothing or `-` and anything
    etc/hooks.d/50-log                 any other name: called for every event

A hook gets the event as one line of JSON on standard input, VMLOOP_VM, VMLOOP_EVENT, VMLOOP_CURSOR and VMLOOP_STATE in its environment
and a session of its own. What it prints goes to the worker's log. Over its limit its process group is killed. A worker that is killed
leaves its hook behind.

asyncio's subprocesses would bring a thread for each child (3.11); a pidfd tells the loop of a child's end without one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Final

import msgspec

from ..events import Event
from .calls import default_limit
from .context import VmContext
from .lane import Stuck
from .naming import TaskNames, call_task
from .registry import unsafe_reason
from .report import Reporter, clean, error_text

log = logging.getLogger(__name__)

LOOK_AGAIN: Final = 1.0  # seconds between two looks into the directory, while events come
KILL_GRACE: Final = 2.0  # seconds that a killed process has to be gone; one in an uninterruptible sleep is not
MAX_HOOKS: Final = 64
KEPT_OUTPUT: Final = 4096  # bytes of each stream, the newest
READ_BYTES: Final = 65536

# What every hook has, whatever the broker was started from.
ENVIRONMENT: Final[Mapping[str, str]] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
}

_OF_EVENT = re.compile(r"([A-Z][A-Z0-9_]*)(?:-.*)?", re.ASCII)


class Hook(msgspec.Struct, frozen=True):
    """One executable."""

    name: str
    path: str
    event: str | None  # None: every event


class HookDirectory:
    """What is in etc/hooks.d/, looked at again when an event comes and the last look is a second old. No directory, no hooks."""

    def __init__(
        self,
        directory: Path,
        quarantined: Callable[[str, Path], bool],
        on_refused: Callable[[str, str], None],
        clock: Callable[[], float],
    ) -> None:
        """`on_refused(name, why)` is told once of an executable that is not safe to run. `clock`: seconds."""
        self._directory = directory
        self._quarantined = quarantined
        self._on_refused = on_refused
        self._clock = clock
        self._told: dict[str, str] = {}
        self._looked = -LOOK_AGAIN
        self._hooks: tuple[Hook, ...] = ()

    def matching(self, event: str) -> list[Hook]:
        """The hooks of an event, in the order of their names. Never raises."""
        now = self._clock()
        if now - self._looked >= LOOK_AGAIN:
            self._looked = now
            self._hooks = self._look()
        return [hook for hook in self._hooks if hook.event is None or hook.event == event]

    def _look(self) -> tuple[Hook, ...]:
        try:
            names = sorted(name for name in os.listdir(self._directory) if name[0] != "." and name[-1] != "~")
        except OSError:
            return ()
        found: list[Hook] = []
        refused: dict[str, str] = {}
        for name in names:
            path = self._directory / name
            try:
                if not os.access(path, os.X_OK) or path.is_dir():
                    continue
                why = unsafe_reason(path)
            except OSError:
                continue  # gone meanwhile
            if not why and len(found) >= MAX_HOOKS:
                why = f"there are more than {MAX_HOOKS}"
            if why:
                refused[name] = why
            elif not self._quarantined(name, path):
                match = _OF_EVENT.fullmatch(name)
                found.append(Hook(name, str(path), match[1] if match else None))
        for name, why in refused.items():
            if self._told.get(name) != why:
                self._on_refused(name, why)
        self._told = refused
        return tuple(found)


class HookCalls:
    """Makes the calls of the hooks' lane."""

    def __init__(
        self,
        context: VmContext,
        names: TaskNames,
        reporter: Reporter,
        on_replace: Callable[[str], None],
        environment: Mapping[str, str] = ENVIRONMENT,
    ) -> None:
        self._context = context
        self._names = names
        self._reporter = reporter
        self._environment = environment
        self._stuck = Stuck("hooks", on_replace)
        self._running: set[_Process] = set()

    async def call(self, hook: Hook, event: Event) -> None:
        """Run one hook for one event; returns when it has ended or was given up."""
        limit = default_limit(self._context)
        try:
            # The child's exec is waited for: on a dead file system it would hold the loop, and the page says in what.
            with self._names.during(call_task("hook", hook.name, event)):
                process = _Process(self._context.loop, hook, {**self._environment, **self._variables(event)}, event)
        except (OSError, ValueError, TypeError, subprocess.SubprocessError) as error:
            self._reporter.failed(hook.name, event, "start", f"it cannot be started: {error_text(error)}")
            return
        self._running.add(process)
        process.ended.add_done_callback(lambda _: self._running.discard(process))
        try:
            await asyncio.wait({process.ended}, timeout=limit)
            late = not process.ended.done()
            if late:
                process.kill()
                await asyncio.wait({process.ended}, timeout=KILL_GRACE)
        except asyncio.CancelledError:
            process.kill()
            raise
        self._tell(hook, event, process, limit if late else None)
        if not process.ended.done():
            self._stuck.add(process.ended)
            await self._stuck.wait_for_room()

    async def close(self, seconds: float) -> None:
        """Kill what runs and wait until it is gone."""
        for process in self._running:
            process.kill()
        if ends := [process.ended for process in self._running]:
            await asyncio.wait(ends, timeout=seconds)

    def _tell(self, hook: Hook, event: Event, process: _Process, over: float | None) -> None:
        output = {stream.name: stream.text() for stream in process.streams if stream.kept}
        for stream, text in output.items():
            log.info("VM %s: hook %s on %s %d: %s: %s", event.vm, hook.name, event.event, event.seq, stream, text)
        stderr = output.get("stderr", "")
        if over is not None:
            gone = process.ended.done()
            text = f"over its limit of {over:g} s; it was killed" + ("" if gone else " and has not ended")
            self._reporter.failed(hook.name, event, "limit", text, limit=over, left_behind=not gone, stderr=stderr)
        elif process.status:
            how = f"exit status {process.status}" if process.status > 0 else f"killed by signal {-process.status}"
            self._reporter.failed(hook.name, event, "exit", how, status=process.status, stderr=stderr)

    def _variables(self, event: Event) -> dict[str, str]:
        return {
            "VMLOOP_VM": event.vm,
            "VMLOOP_EVENT": event.event,
            "VMLOOP_CURSOR": f"{event.epoch}.{event.seq}",
            "VMLOOP_STATE": self._context.state.value,
        }


class _Process:
    """One run of a hook. `ended` is done when it is gone and reaped; from then on nothing of it is left in this process."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, hook: Hook, environment: Mapping[str, str], event: Event
    ) -> None:
        """Raises OSError, ValueError or TypeError if it cannot be started."""
        line = msgspec.json.encode(event.to_wire()) + b"\n"
        # A file in memory instead of a pipe: a hook that reads nothing, or slowly, is nobody's concern.
        stdin = os.memfd_create("vmloop-event", os.MFD_CLOEXEC)
        try:
            os.write(stdin, line)
            os.lseek(stdin, 0, os.SEEK_SET)
            self._popen: subprocess.Popen[bytes] = subprocess.Popen(
                [hook.path],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd="/",
                env=dict(environment),
                start_new_session=True,
            )
        finally:
            os.close(stdin)
        self._loop = loop
        self.ended: asyncio.Future[None] = loop.create_future()
        self.streams = [_Stream(loop, "stdout", self._popen.stdout), _Stream(loop, "stderr", self._popen.stderr)]
        self._pidfd = os.pidfd_open(self._popen.pid)
        loop.add_reader(self._pidfd, self._on_end)

    @property
    def status(self) -> int:
        """The exit status, negative for a signal; 0 while it runs."""
        return self._popen.returncode or 0

    def kill(self) -> None:
        """End the whole process group."""
        if not self.ended.done():  # not reaped, so the number is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signal.SIGKILL)

    def _on_end(self) -> None:
        if self._popen.poll() is None:
            return
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        # What else holds the other ends, a daemon that it started, is not waited for.
        for stream in self.streams:
            stream.close()
        if not self.ended.done():
            self.ended.set_result(None)


class _Stream:
    """The newest bytes of what a hook prints."""

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str, pipe: IO[Any] | None) -> None:
        assert pipe is not None
        self.name = name
        self.kept = b""
        self._loop = loop
        self._pipe = pipe
        self._reading = True
        os.set_blocking(pipe.fileno(), False)
        loop.add_reader(pipe.fileno(), self._on_readable)

    def text(self) -> str:
        return clean(self.kept)

    def close(self) -> None:
        """Take what is there, and no more than a pipe holds."""
        for _ in range(16):
            if not self._reading or not self._on_readable():
                break
        self._stop()
        self._pipe.close()

    def _on_readable(self) -> bool:
        """Read once; whether there was something."""
        try:
            data = os.read(self._pipe.fileno(), READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._stop()
            return False
        self.kept = (self.kept + data)[-KEPT_OUTPUT:]
        return True

    def _stop(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._pipe.fileno())
