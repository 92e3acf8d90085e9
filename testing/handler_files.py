# SPDX-License-Identifier: Apache-2.0
"""A test's handlers as files in a broker's etc/handlers: copies of the user's files, and files that import the user's functions.

Called by plugin. One more file is always loaded beside them: it says when the handlers before it have come to their end (double, `settle`).
"""

from __future__ import annotations

import inspect
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from ..common.errors import ConfigError
from ..worker.handlers.registry import handler_of

Source = str | Path | Callable[..., Any]

SETTLE: Final = "TESTING_SETTLE"  # an event of the simulated VM's: everything before it is to be handled
SETTLED: Final = "TESTING_SETTLED"  # each of the two lanes of handlers has come to it
LANES: Final = ("async", "thread")

_SETTLE_STEM: Final = "testing_settle"
_SETTLE_FILE: Final = f'''"""Made by vmloop.testing: in each lane calls are made one at a time, so this one comes after all before it."""

from vmloop.worker.handlers import on


@on("{SETTLE}")
async def settled_async(vm, event):
    vm.emit("{SETTLED}", {{"lane": "async", "number": event.data["number"]}})


@on("{SETTLE}")
def settled_thread(vm, event):
    vm.emit("{SETTLED}", {{"lane": "thread", "number": event.data["number"]}})
'''
_FUNCTION_FILE: Final = '''"""Made by vmloop.testing: the worker that loads this finds {name} where the test has it."""

import sys

sys.path.extend(path for path in {path!r} if path not in sys.path)
from {module} import {name}  # noqa: E402, F401
'''
_STEM = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}", re.ASCII)


def install(directory: Path, sources: Sequence[Source]) -> list[str]:
    """Put handlers into etc/handlers; the names for `handlers.load`. Raises `ConfigError` for what can be no handler there."""
    stems = [
        _install_file(directory, Path(source))
        if isinstance(source, str | Path)
        else _install_function(directory, source)
        for source in sources
    ]
    _write(directory, _SETTLE_STEM, _SETTLE_FILE)
    return [*dict.fromkeys(stems), _SETTLE_STEM]


def _install_file(directory: Path, path: Path) -> str:
    if path.suffix != ".py" or not _STEM.fullmatch(path.stem) or path.stem.startswith("_"):
        raise ConfigError(
            f"{path} is no file of handlers: its name must be that of a Python module and begin with a letter"
        )
    target = directory / path.name
    try:
        text = path.read_text(encoding="utf-8")
        if target.exists() and target.read_text(encoding="utf-8") != text:
            raise ConfigError(f"another {path.name} is loaded by a VM of this broker already; rename one of them")
        shutil.copyfile(path, target)  # a copy: it belongs to whoever runs the tests, so the worker trusts it
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the handlers in {path} cannot be read: {error}") from error
    return path.stem


def _install_function(directory: Path, function: Callable[..., Any]) -> str:
    module, name = require_handler(function)
    found = sys.modules.get(module)
    if module == "__main__" or getattr(found, name, None) is not function:
        raise ConfigError(
            f"{name} is made inside of {inspect.unwrap(function).__qualname__.rpartition('.')[0] or module}: the VM's worker is another"
            " process and imports it by its name; move it to the top of its module, or use handler_bench"
        )
    stem = re.sub(r"\W", "_", f"function_{module}_{name}")[-64:].lstrip("_0123456789")
    _write(
        directory, stem, _FUNCTION_FILE.format(name=name, module=module, path=[str(path) for path in sys.path if path])
    )
    return stem


def require_handler(function: Callable[..., Any]) -> tuple[str, str]:
    """Module and name of a handler. Raises `ConfigError` if it is none."""
    name = getattr(function, "__name__", repr(function))
    module = getattr(function, "__module__", "")
    if handler_of(function, name, module) is None:
        raise ConfigError(f"{name} is no handler: decorate it with @on(EVENT) of vmloop.worker.handlers")
    return module, name


def _write(directory: Path, stem: str, text: str) -> None:
    (directory / f"{stem}.py").write_text(text, encoding="utf-8")
