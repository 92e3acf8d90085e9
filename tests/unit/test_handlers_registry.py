# SPDX-License-Identifier: Apache-2.0
"""What `@on` takes, and the loading of files of handlers: the broken ones are told, the others are in use; nothing is left behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from vmloop.common.errors import ConfigError
from vmloop.worker.handlers import on
from vmloop.worker.handlers.naming import TaskNames
from vmloop.worker.handlers.registry import MODULE_PREFIX, Loaded, load_directory

from .test_handlers_dispatch import RecordingPage

GOOD = """
from vmloop.worker.handlers import AsyncVm, Event, SyncVm, on

@on("STOP", "RESUME", limit=5)
async def on_loop(vm: AsyncVm, event: Event) -> None: ...

@on("*")
def on_thread(vm: SyncVm, event: Event) -> None: ...

def no_handler(vm, event): ...
"""


def load(directory: Path, names: Sequence[str] | None = None, held: Sequence[str] = ()) -> Loaded:
    return load_directory(directory, names, lambda name, _: name in held, TaskNames(RecordingPage()))


def write(directory: Path, **files: str) -> None:
    for stem, text in files.items():
        (directory / f"{stem}.py").write_text(text)
        (directory / f"{stem}.py").chmod(0o644)


def test_decorated_functions_become_handlers(tmp_path: Path) -> None:
    write(tmp_path, mail=GOOD)
    loaded = load(tmp_path)
    assert loaded.failures == ()
    one, two = loaded.handlers
    assert (one.name, one.events, one.is_async, one.limit) == ("mail.on_loop", frozenset({"STOP", "RESUME"}), True, 5.0)
    assert (two.name, two.events, two.is_async, two.limit) == ("mail.on_thread", frozenset({"*"}), False, None)
    assert {one.source, two.source} == {str(tmp_path / "mail.py")}
    assert not one.trusted


def test_nothing_is_written_beside_the_files_and_no_module_can_be_imported_by_its_name(tmp_path: Path) -> None:
    write(tmp_path, mail=GOOD)
    path = list(sys.path)
    load(tmp_path)
    assert os.listdir(tmp_path) == ["mail.py"]
    assert sys.path == path
    assert "mail" not in sys.modules
    assert MODULE_PREFIX + "mail" in sys.modules


def test_a_file_may_have_dataclasses(tmp_path: Path) -> None:
    write(
        tmp_path,
        data="from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\n",
    )
    assert load(tmp_path).failures == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def broken(:\n", "SyntaxError"),
        ("import no_such_module_of_anybodys", "ModuleNotFoundError"),
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(3)", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise MemoryError", "MemoryError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("x = '\0'", "null byte"),
        ("from vmloop.worker.handlers import on\n@on('STOP')\ndef f(vm): ...", "two arguments"),
        ("from vmloop.worker.handlers import on\n@on('stop')\ndef f(vm, event): ...", "no name of an event"),
        ("class E(Exception):\n    def __str__(self): raise SystemExit\nraise E", "cannot be made"),
    ],
)
def test_a_file_that_cannot_be_run_is_told_and_the_others_are_loaded(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path, a_good=GOOD, bad=text, c_good=GOOD)
    loaded = load(tmp_path)
    (failure,) = loaded.failures
    assert (failure.source, failure.why) == (str(tmp_path / "bad.py"), "import")
    assert said in failure.error
    assert failure.traceback
    assert [handler.name.split(".")[0] for handler in loaded.handlers] == ["a_good"] * 2 + ["c_good"] * 2
    assert MODULE_PREFIX + "bad" not in sys.modules


def test_the_traceback_shows_the_line_in_the_file(tmp_path: Path) -> None:
    write(tmp_path, bad="def f():\n    raise ValueError('here')\nf()\n")
    (failure,) = load(tmp_path).failures
    assert f'"{tmp_path / "bad.py"}", line 2, in f' in failure.traceback
    assert "raise ValueError('here')" in failure.traceback


def test_files_that_others_may_write_to_are_not_run(tmp_path: Path) -> None:
    write(tmp_path, mail="raise SystemError")
    (tmp_path / "mail.py").chmod(0o666)
    (failure,) = load(tmp_path).failures
    assert (failure.why, "chmod o-w" in failure.error) == ("refused", True)


def test_only_the_named_files_are_loaded_in_the_order_of_the_names(tmp_path: Path) -> None:
    write(tmp_path, a=GOOD, b=GOOD, c="raise SystemError", _private="raise SystemError")
    assert [handler.name for handler in load(tmp_path, ["b", "a", "b"]).handlers] == [
        "b.on_loop",
        "b.on_thread",
        "a.on_loop",
        "a.on_thread",
    ]
    assert load(tmp_path, []).handlers == ()


def test_a_named_file_that_is_missing_is_an_error_with_near_names(tmp_path: Path) -> None:
    write(tmp_path, mailer=GOOD, pager=GOOD)
    with pytest.raises(ConfigError, match="did you mean mailer"):
        load(tmp_path, ["mail"])
    with pytest.raises(ConfigError, match="there are: mailer, pager"):
        load(tmp_path, ["zzz"])
    with pytest.raises(ConfigError, match="none"):
        load(tmp_path / "missing", ["mail"])


def test_no_directory_is_no_handlers(tmp_path: Path) -> None:
    assert load(tmp_path / "missing") == Loaded((), ())


def test_quarantined_files_are_not_run_and_quarantined_handlers_left_out(tmp_path: Path) -> None:
    write(tmp_path, bad="raise SystemError", mail=GOOD)
    loaded = load(tmp_path, held=["bad.py", "mail.on_thread"])
    assert loaded.failures == ()
    assert [handler.name for handler in loaded.handlers] == ["mail.on_loop"]


def test_the_page_names_a_file_before_it_is_run(tmp_path: Path) -> None:
    page = RecordingPage()
    write(tmp_path, bad="raise SystemError", mail=GOOD)
    load_directory(tmp_path, None, lambda *_: False, TaskNames(page))
    assert page.tasks == ["loading handlers/bad.py", "loop", "loading handlers/mail.py", "loop"]


def test_on_refuses_what_cannot_be_meant() -> None:
    async def fine(vm: object, event: object) -> None: ...

    def generator(vm: object, event: object):  # type: ignore[no-untyped-def]
        yield

    with pytest.raises(TypeError, match="names of events"):
        on()
    with pytest.raises(TypeError, match="names of events"):
        on(fine)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="BLOCK_IO_ERROR"):
        on("block-io-error")
    for limit in (0, -1, 1e9, float("nan")):
        with pytest.raises(ValueError, match="limit"):
            on("STOP", limit=limit)
    with pytest.raises(TypeError, match="without yield"):
        on("STOP")(generator)
    with pytest.raises(TypeError, match="one @on"):
        on("STOP")(on("RESUME")(fine))
