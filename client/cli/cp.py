# SPDX-License-Identifier: Apache-2.0
"""`cp`: a file into a guest or out of it, with its checksum compared."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import click
import msgspec

from ...common.errors import AgentError, DeadlineExceeded
from .base import Invocation, verb
from .local_file import STREAM, appearing, reading
from .output import Output, one_line, to_json

if TYPE_CHECKING:
    from ..guest_files import GuestCopy, Progress
    from ..vm import Vm

# NAME:PATH. A local path with a colon has a slash before it: ./a:b
_IN_GUEST: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63}):(.+)", re.DOTALL)
_SHA256: Final = re.compile(rb"\\?([0-9a-f]{64})\b")  # the backslash: there is one in the file's name, too

# Seconds for sha256sum in the guest; a disk image takes minutes.
CHECKSUM_TIMEOUT: Final = 600.0

BY_PROGRAM: Final = "sha256sum in the guest"
BY_READING_BACK: Final = "read back"
BY_READING_TWICE: Final = "read twice"


class Place(NamedTuple):
    """One side of a copy: a path in a VM's guest, or on the host (`vm` is empty)."""

    vm: str
    path: str

    def __str__(self) -> str:
        return f"{self.vm}:{self.path}" if self.vm else self.path


class Checked(NamedTuple):
    """How a copy was compared with the guest's file; `by` is empty if it was not, and `why_not` says why."""

    by: str
    why_not: str = ""


class Copied(msgspec.Struct, frozen=True):
    """The result. `verified` is null if nothing was compared; `reason` says why."""

    bytes: int
    sha256: str
    verified: str | None
    seconds: float
    reason: str | None = None


@verb("cp")
@click.argument("source")
@click.argument("target")
@click.option("--verify", is_flag=True, help="Out of a guest without sha256sum: read the file twice to compare.")
def cp(invocation: Invocation, source: str, target: str, verify: bool) -> None:
    """Copy a file into a guest or out of it, through the guest agent.

    One side is NAME:PATH, the other a path here, or - for standard input or output. A local path with a colon is written ./a:b. A TARGET
    that ends in / keeps the file's name, as a local directory does.
    """
    output = invocation.output()
    began = time.monotonic()
    origin, goal = places(source, target)
    with invocation.host() as host:
        if goal.vm:
            copy, checked = _copy_in(host.vm(goal.vm), origin.path, goal, output)
        else:
            copy, checked = _copy_out(host.vm(origin.vm), origin, goal.path, verify, output)
    seconds = round(time.monotonic() - began, 3)
    copied = Copied(copy.bytes, copy.sha256, checked.by or None, seconds, checked.why_not or None)
    _report(output, origin, goal, copied)


def places(source: str, target: str) -> tuple[Place, Place]:
    """The two sides; a target that is a directory has the source's name added. `UsageError` unless exactly one is in a guest."""
    origin, goal = _place(source), _place(target)
    if bool(origin.vm) == bool(goal.vm):
        raise click.UsageError("exactly one of SOURCE and TARGET is NAME:PATH; write ./a:b for a local a:b")
    if goal.path.endswith("/") or (not goal.vm and goal.path != STREAM and Path(goal.path).is_dir()):
        name = re.split(r"[/\\]" if origin.vm else "/", origin.path)[-1]
        if origin.path == STREAM and not origin.vm:
            raise click.UsageError(f"standard input has no name: give one after {goal}")
        if name in ("", ".", ".."):
            raise click.UsageError(f"{origin} is no file")
        goal = Place(goal.vm, goal.path.rstrip("/") + "/" + name)
    return origin, goal


def _place(text: str) -> Place:
    found = _IN_GUEST.fullmatch(text)
    return Place(found[1], found[2]) if found else Place("", text)


# -- copying -------------------------------------------------------------------------------------------------------------


def _copy_in(vm: Vm, source: str, goal: Place, output: Output) -> tuple[GuestCopy, Checked]:
    with reading(source) as (file, total):
        passed = _Passed(output)
        with passed.showing(f"to {goal}") as progress:
            try:
                copy = vm.write_guest_file(goal.path, file, progress, total=total)
            except (KeyboardInterrupt, OSError):
                output.aside(f"{goal} is incomplete: {passed.bytes} bytes of it were written")
                raise
    by = BY_PROGRAM
    found, _ = _sha256_by_program(vm, goal.path, output)
    if not found:
        by = BY_READING_BACK
        found = _sha256_by_reading(vm, goal.path, f"reading {goal} back", output)
    _require_same(copy.sha256, found, by, f"{goal} was written wrong, or others write to it")
    return copy, Checked(by)


def _copy_out(vm: Vm, origin: Place, target: str, verify: bool, output: Output) -> tuple[GuestCopy, Checked]:
    with appearing(target) as file:
        with _Passed(output).showing(f"from {origin}") as progress:
            copy = vm.read_guest_file(origin.path, file, progress)
        found, why_not = _sha256_by_program(vm, origin.path, output)
        by = BY_PROGRAM
        if not found and verify:
            by = BY_READING_TWICE
            found = _sha256_by_reading(vm, origin.path, f"reading {origin} again", output)
        if not found:
            return copy, Checked("", why_not)
        there = "" if target == STREAM else f"; nothing was put at {target}"
        _require_same(copy.sha256, found, by, f"{origin} has changed meanwhile, or was read wrong{there}")
    return copy, Checked(by)


class _Passed:
    """What has passed so far: shown, and remembered for who is interrupted."""

    def __init__(self, output: Output) -> None:
        self.bytes = 0
        self._output = output

    @contextlib.contextmanager
    def showing(self, what: str) -> Iterator[Progress]:
        with self._output.transfer(what) as show:

            def progress(done: int, total: int | None) -> None:
                self.bytes = done
                show(done, total)

            yield progress


# -- comparing -----------------------------------------------------------------------------------------------------------


def _sha256_by_program(vm: Vm, path: str, output: Output) -> tuple[str, str]:
    """What sha256sum in the guest says, and "" for why not; or "" and why it does not say."""
    arguments = ["--", path] if path.startswith("-") else [path]
    try:
        with output.busy(f"sha256sum of {vm.name}:{path}"):
            ended = vm.guest_exec("sha256sum", arguments, timeout=CHECKSUM_TIMEOUT)
    except AgentError as error:
        return "", f"sha256sum in the guest: {error.fields.get('desc') or error.message}"
    except DeadlineExceeded:
        return "", f"sha256sum in the guest took longer than {CHECKSUM_TIMEOUT:g} s"
    found = _SHA256.match(ended.out) if ended.exitcode == 0 else None
    if found is None:
        said = (ended.err or ended.out).decode(errors="backslashreplace").partition("\n")[0]
        return "", f"sha256sum in the guest failed: {said:.200}"
    return found[1].decode(), ""


def _sha256_by_reading(vm: Vm, path: str, what: str, output: Output) -> str:
    """The checksum of the guest's file, read once more."""
    with Path(os.devnull).open("wb") as nowhere, _Passed(output).showing(what) as progress:
        return vm.read_guest_file(path, nowhere, progress).sha256


def _require_same(passed: str, found: str, by: str, why: str) -> None:
    if passed != found:
        raise AgentError(f"the checksums differ: {passed} passed, {found} is there ({by}): {why}", kind="mismatch")


# -- telling -------------------------------------------------------------------------------------------------------------


def _report(output: Output, origin: Place, goal: Place, copied: Copied) -> None:
    """The result; beside the file itself, on standard error, if that went to standard output."""
    how = f"verified: {copied.verified}" if copied.verified else f"not verified ({copied.reason})"
    lines = (
        f"{origin} -> {goal}: {copied.bytes} bytes in {copied.seconds:.1f} s",
        f"sha256 {copied.sha256}  {how}",
    )
    value = msgspec.to_builtins(copied)
    if goal == Place("", STREAM):
        for line in [to_json(value)] if output.as_json else lines:
            click.echo(one_line(line), err=True)
    else:
        output.result(value, lambda: output.line("\n".join(map(one_line, lines))))


COMMANDS = {"cp": cp}
