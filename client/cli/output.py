# SPDX-License-Identifier: Apache-2.0
"""How results are shown: JSON when asked for, tables and colour on a terminal, else plain aligned lines. Every command prints through it.

Text that comes from QEMU or a guest is hostile: control characters are never sent to a terminal.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from .terminal import Progress

# All but tab and newline: an escape sequence in a guest's text could rewrite the operator's screen.
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with control characters written out."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """The text for a cell of a table or a line of its own."""
    return printable(text).replace("\t", "\\t").replace("\n", "\\n")


def to_json(value: object, indent: int | None = None) -> str:
    """JSON of what came over the wire; bytes become text."""
    import json

    return json.dumps(value, indent=indent, ensure_ascii=False, default=_as_text)


def _as_text(value: object) -> str:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


class Output:
    """Plain output. A terminal's is terminal.TerminalOutput."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def line(self, text: str) -> None:
        """A line of text; with --json use `result` instead."""
        click.echo(printable(text))

    def aside(self, text: str) -> None:
        """A line for people beside the result, on standard error."""
        click.echo(printable(f"vmloop: {text}"), err=True)

    def result(self, value: object, plain: Callable[[], None]) -> None:
        """A command's result: itself as JSON, or what `plain` prints."""
        if self.as_json:
            self.json_line(value)
        else:
            plain()

    def json_line(self, value: object) -> None:
        click.echo(to_json(value).encode(errors="backslashreplace"))

    def value(self, value: object) -> None:
        """Any value, readable."""
        click.echo(printable(to_json(value, indent=2)))

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Aligned columns under a heading."""
        lines = [[name.upper() for name in columns], *([one_line(cell) or "-" for cell in row] for row in rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
        for line in lines:
            padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            click.echo("  ".join(padded).rstrip())

    def facts(self, facts: Mapping[str, str]) -> None:
        """`name: value` lines."""
        for name, text in facts.items():
            self.line(f"{name}: " + text.strip().replace("\n", "\n  "))

    def event(self, at: str, vm: str, cursor: str, event: str, data: str) -> None:
        """One event on one line."""
        click.echo(one_line(f"{at} {vm or '-'} {cursor} {event} {data}".rstrip()))

    def busy(self, what: str) -> AbstractContextManager[None]:
        """Around something that may take longer than a second."""
        del what
        return nullcontext()

    def live(self, text: str) -> AbstractContextManager[Callable[[str], None]]:
        """Around something that lasts; what it gives is called with the line to show from now on."""
        del text
        return nullcontext(_nobody_looks)

    def transfer(self, what: str) -> AbstractContextManager[Callable[[int, int | None], None]]:
        """Around the passing of bytes; what it gives is called with those done and those in all (None: not known)."""
        del what
        return nullcontext(_nobody_looks)

    def progress(self, what: str, total: int) -> AbstractContextManager[Progress]:
        """Around something that comes in steps; call `advance` of what it gives."""
        del what, total
        return nullcontext(NoProgress())


def _nobody_looks(*_: object) -> None:
    return


class NoProgress:
    """Progress that nobody watches."""

    def advance(self) -> None:
        return


def make_output(as_json: bool) -> Output:
    """For this process's standard output."""
    if as_json or not sys.stdout.isatty():
        return Output(as_json)
    from .terminal import TerminalOutput

    return TerminalOutput(colour=not os.environ.get("NO_COLOR"))
