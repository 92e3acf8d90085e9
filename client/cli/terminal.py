# SPDX-License-Identifier: Apache-2.0
"""Output on a terminal: tables, colour, spinners and progress bars. Imported by output.py when standard output is one.

rich is imported when something is shown with it, not before.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Final, Protocol

from .output import NoProgress, Output, one_line, printable, to_json

if TYPE_CHECKING:
    from rich.console import Console

# What is done sooner needs no spinner.
PATIENCE: Final = 1.0

STYLES: Final = {
    "running": "green",
    "ready": "green",
    "paused": "yellow",
    "starting": "yellow",
    "busy": "yellow",
    "connecting": "yellow",
    "unknown": "bold red",
    "crashed": "bold red",
    "frozen": "bold red",
    "lost": "red",
    "unresponsive": "red",
    "shutoff": "dim",
    "absent": "dim",
}


class Progress(Protocol):
    """Something that counts steps."""

    def advance(self) -> None: ...


class TerminalOutput(Output):
    """For people."""

    def __init__(self, colour: bool) -> None:
        super().__init__(as_json=False)
        self._colour = colour

    def value(self, value: object) -> None:
        from rich.json import JSON

        self._console().print(JSON(printable(to_json(value))))

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            cells = zip(columns, row, strict=True)
            table.add_row(*(Text(one_line(cell), _style(column, cell)) for column, cell in cells))
        self._console().print(table)

    def facts(self, facts: Mapping[str, str]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        for name, text in facts.items():
            table.add_row(Text(name, "bold"), Text(printable(text), _style(name, text)))
        self._console().print(table)

    def event(self, at: str, vm: str, cursor: str, event: str, data: str) -> None:
        from rich.text import Text

        parts = ((at, "dim"), (vm or "-", "bold"), (cursor, "dim"), (event, "cyan"), (data, ""))
        line = Text(" ").join(Text(one_line(text), style) for text, style in parts)
        self._console().print(line, soft_wrap=True)

    def busy(self, what: str) -> AbstractContextManager[None]:
        return _spinner(lambda: self._console(stderr=True), what) if sys.stderr.isatty() else nullcontext()

    def progress(self, what: str, total: int) -> AbstractContextManager[Progress]:
        return _bar(self._console(stderr=True), what, total) if sys.stderr.isatty() else nullcontext(NoProgress())

    def live(self, text: str) -> AbstractContextManager[Callable[[str], None]]:
        return _status(self._console(stderr=True), text) if sys.stderr.isatty() else super().live(text)

    def transfer(self, what: str) -> AbstractContextManager[Callable[[int, int | None], None]]:
        return _transfer(self._console(stderr=True), what) if sys.stderr.isatty() else super().transfer(what)

    def _console(self, stderr: bool = False) -> Console:
        from rich.console import Console

        return Console(stderr=stderr, no_color=not self._colour, highlight=False, markup=False, emoji=False)


def _style(name: str, text: str) -> str:
    """The colour of a state. A reason has none: `unknown` is no alarm there."""
    return "" if name.lower() == "reason" else STYLES.get(text, "")


@contextmanager
def _spinner(console: Callable[[], Console], what: str) -> Iterator[None]:
    done = threading.Event()

    def spin() -> None:
        if not done.wait(PATIENCE):
            with console().status(what):
                done.wait()

    thread = threading.Thread(target=spin, name="spinner", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def _bar(console: Console, what: str, total: int) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with RichProgress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)

        class Bar:
            def advance(self) -> None:
                progress.advance(task)

        yield Bar()


@contextmanager
def _status(console: Console, text: str) -> Iterator[Callable[[str], None]]:
    from rich.text import Text

    with console.status(Text(one_line(text))) as status:
        yield lambda text: status.update(Text(one_line(text)))


@contextmanager
def _transfer(console: Console, what: str) -> Iterator[Callable[[int, int | None], None]]:
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(one_line(what), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
