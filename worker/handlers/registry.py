# SPDX-License-Identifier: Apache-2.0
"""What a handler is, the decorator `@on` that makes one, and the loading of the operator's files. Used by handlers, loaded by handling.py.

A file of handlers is run once for every run of a VM, in that VM's worker, under a module name that nothing can import by accident; nothing
is written beside it (no __pycache__). What it raises costs that file only, SystemExit and KeyboardInterrupt included.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final, TypeVar

import msgspec

from ...common.errors import ConfigError
from .naming import TaskNames, loading_task
from .report import error_text, trace_text

ANY_EVENT: Final = "*"
MODULE_PREFIX: Final = "_vmloop_handlers_"

# A file of handlers is code that people read; this keeps a wrong file from filling memory.
MAX_SOURCE_BYTES: Final = 1 << 20
MAX_LIMIT: Final = 86400.0  # seconds; as in [handlers] of a definition

_MARK: Final = "__vmloop_on__"
_EVENT = re.compile(r"\*|[A-Z][A-Z0-9_]{0,63}", re.ASCII)

F = TypeVar("F", bound=Callable[..., Any])


class Handler(msgspec.Struct, frozen=True):
    """A function that is called with (vm, event) for some events."""

    name: str  # "file.function"
    events: frozenset[str]  # "*" is every event
    function: Callable[[Any, Any], Any]
    is_async: bool  # runs on the loop; else on the VM's handler thread
    limit: float | None = None  # seconds for one event; the definition's if None
    source: str = ""  # path of its file
    trusted: bool = False  # shipped with vmloop: it gets the VmContext itself


class LoadFailure(msgspec.Struct, frozen=True):
    """A file of handlers that is not in use."""

    source: str
    why: str  # "import": running it failed; "refused": it was not run
    error: str
    traceback: str = ""


class Loaded(msgspec.Struct, frozen=True):
    """What came of the operator's files."""

    handlers: tuple[Handler, ...]
    failures: tuple[LoadFailure, ...]


class _Mark(msgspec.Struct, frozen=True):
    events: frozenset[str]
    limit: float | None


def on(*events: str, limit: float | None = None) -> Callable[[F], F]:
    """Call the function with (vm, event) whenever one of these events happens to a VM; `"*"` is every event.

    An `async def` runs on the event loop of the VM's worker and gets an `AsyncVm`; a plain `def` runs on the VM's handler thread and gets
    a `SyncVm`. `limit`: seconds that it may take for one event, the definition's `handlers.limit` if left out. Raises TypeError or
    ValueError for what cannot be meant.
    """
    if not events or not all(isinstance(event, str) for event in events):
        raise TypeError('@on wants the names of events: @on("BLOCK_IO_ERROR"), or @on("*") for every event')
    for event in events:
        if not _EVENT.fullmatch(event):
            raise ValueError(
                f"@on: {event!r:.80} is no name of an event: they are like BLOCK_IO_ERROR, or '*' for every one"
            )
    if limit is not None and not 0 < limit <= MAX_LIMIT:
        raise ValueError(f"@on: limit is {limit!r}, it must be more than 0 and at most {MAX_LIMIT:g} seconds")
    mark = _Mark(frozenset(events), None if limit is None else float(limit))

    def decorate(function: F) -> F:
        if (
            not inspect.isfunction(function)
            or inspect.isgeneratorfunction(function)
            or inspect.isasyncgenfunction(function)
        ):
            raise TypeError(f"@on is for functions (`def` or `async def`) without yield, not for {function!r:.80}")
        if hasattr(function, _MARK):
            raise TypeError(f"{function.__name__}: give all events to one @on")
        try:
            inspect.signature(function).bind(None, None)
        except TypeError:
            raise TypeError(f"{function.__name__}: a handler is called with two arguments, (vm, event)") from None
        setattr(function, _MARK, mark)
        return function

    return decorate


# -- loading --------------------------------------------------------------------------------------------------------------


def load_directory(
    directory: Path,
    names: Sequence[str] | None,
    quarantined: Callable[[str, Path], bool],
    tasks: TaskNames,
) -> Loaded:
    """Run the files `directory`/*.py, or those of `names` (without .py), in the order of their names; never raises for what they do.

    `quarantined(name, file)` is asked for every file ("mail.py") and every handler ("mail.on_error"); what it holds is left out.
    Files that begin with `_` or `.` are no handlers. Raises `ConfigError` if one of `names` is missing, or for the directory.
    """
    handlers: list[Handler] = []
    failures: list[LoadFailure] = []
    for file in _files(directory, names):
        if quarantined(file.name, file):
            continue
        with tasks.during(loading_task(file.name)):
            found = _load_file(file)
        if isinstance(found, LoadFailure):
            failures.append(found)
        else:
            handlers += (handler for handler in found if not quarantined(handler.name, file))
    return Loaded(tuple(handlers), tuple(failures))


def unsafe_reason(path: Path) -> str:
    """Why nobody should run this file's content as the worker's user; "" if it is fine. Raises OSError."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        return "it is no regular file"
    if status.st_mode & stat.S_IWOTH:
        return "everybody may write to it (chmod o-w)"
    if status.st_uid not in (0, os.geteuid()):
        return f"it belongs to uid {status.st_uid}, neither to root nor to you"
    return ""


def _files(directory: Path, names: Sequence[str] | None) -> list[Path]:
    try:
        present = {path.stem: path for path in directory.iterdir() if path.suffix == ".py" and path.name[0] not in "._"}
    except (FileNotFoundError, NotADirectoryError):
        present = {}
    except OSError as error:
        raise ConfigError(f"{directory} cannot be listed: {error.strerror}") from error
    if names is None:
        return [present[stem] for stem in sorted(present)]
    for name in names:
        if name not in present:
            near = difflib.get_close_matches(name, present, n=3, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(sorted(present)) or 'none'}"
            )
            raise ConfigError(f"handlers.load: there is no {directory / name}.py; {hint}")
    return [present[name] for name in dict.fromkeys(names)]


def _load_file(file: Path) -> list[Handler] | LoadFailure:
    source = str(file)
    try:
        if reason := unsafe_reason(file):
            return LoadFailure(source, "refused", f"{file} is not loaded: {reason}")
        with file.open("rb") as opened:
            text = opened.read(MAX_SOURCE_BYTES + 1)
    except OSError as error:
        return LoadFailure(source, "refused", f"{file} cannot be read: {error.strerror}")
    if len(text) > MAX_SOURCE_BYTES:
        return LoadFailure(source, "refused", f"{file} has over {MAX_SOURCE_BYTES} bytes")
    module = ModuleType(MODULE_PREFIX + file.stem)
    module.__file__ = source
    # dataclasses, pickle and typing look a class's module up there.
    sys.modules[module.__name__] = module
    try:
        exec(compile(text, source, "exec", dont_inherit=True), vars(module))
        return list(_marked(module, file))
    except BaseException as error:  # noqa: BLE001 - whatever an operator's file raises is told as its failure
        sys.modules.pop(module.__name__, None)
        return LoadFailure(source, "import", error_text(error), trace_text(error))


def _marked(module: ModuleType, file: Path) -> Iterator[Handler]:
    seen: set[int] = set()
    for name, value in vars(module).items():
        handler = handler_of(value, f"{file.stem}.{name}", str(file))
        if handler is not None and id(value) not in seen:
            seen.add(id(value))
            yield handler


def handler_of(value: object, name: str, source: str) -> Handler | None:
    """The handler that `@on` has made of a function; None if it has not."""
    mark = getattr(value, _MARK, None)
    if not inspect.isfunction(value) or not isinstance(mark, _Mark):
        return None
    is_async = inspect.iscoroutinefunction(value)
    return Handler(name=name, events=mark.events, function=value, is_async=is_async, limit=mark.limit, source=source)
