# SPDX-License-Identifier: Apache-2.0
"""The programs of a simulated guest: true, false, echo, cat, sleep, head -c, sha256sum, and a shell that knows these.

Called by simulated_guest for guest-exec. A program is carried out at once as a pure function; what takes time in it is added up, and the
process counts as running until that has passed. No program is run on the host.
"""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from .simulated_files import Files

# What qemu-ga keeps of a process's output, for each of the two streams; one byte more tells that there was more.
MAX_OUTPUT: Final = 16 << 20
_KEPT: Final = MAX_OUTPUT + 1

_DIRECTORIES: Final = ("", "/bin", "/usr/bin")  # a bare name is looked up, as by execvp


class Outcome(NamedTuple):
    """How a program ends, what it has written until then, and how long that takes in seconds."""

    status: int = 0
    out: bytes = b""
    err: bytes = b""
    seconds: float = 0.0
    signal: int | None = None  # that it died of


class Surroundings(NamedTuple):
    """What a program has of the guest."""

    files: Files
    pid: int
    environment: dict[str, str]
    stdin: bytes


def run_program(path: str, arguments: list[str], surroundings: Surroundings) -> Outcome:
    """Carry a program out; `OSError` if there is no such program."""
    program = _PROGRAMS.get(posixpath.basename(path)) if posixpath.dirname(path) in _DIRECTORIES else None
    if program is None:
        number = errno.EACCES if surroundings.files.exists(path) else errno.ENOENT
        raise OSError(number, os.strerror(number))
    return program([path, *arguments], surroundings)


# -- the programs --


def _true(_words: list[str], _: Surroundings) -> Outcome:
    return Outcome()


def _false(_words: list[str], _: Surroundings) -> Outcome:
    return Outcome(1)


def _echo(words: list[str], _: Surroundings) -> Outcome:
    plain = words[1:2] == ["-n"]
    text = " ".join(words[2 if plain else 1 :])
    return Outcome(out=(text if plain else text + "\n").encode(errors="surrogateescape"))


def _cat(words: list[str], surroundings: Surroundings) -> Outcome:
    out, err = bytearray(), bytearray()
    for path in words[1:] or ["-"]:
        try:
            _append(out, surroundings.stdin if path == "-" else surroundings.files.content(path))
        except OSError as error:
            err += f"cat: {path}: {error.strerror}\n".encode()
    return Outcome(1 if err else 0, bytes(out), bytes(err))


def _head(words: list[str], surroundings: Surroundings) -> Outcome:
    option, count, path = [*words[1:4], "", "", ""][:3]
    if option != "-c" or not count.isascii() or not count.isdigit():
        return Outcome(1, err=b"head: only -c BYTES here\n")
    wanted = min(int(count), _KEPT)
    try:
        if path == "/dev/zero":
            return Outcome(out=bytes(wanted))
        return Outcome(out=(surroundings.files.content(path) if path else surroundings.stdin)[:wanted])
    except OSError as error:
        return Outcome(1, err=f"head: cannot open '{path}' for reading: {error.strerror}\n".encode())


def _sleep(words: list[str], _: Surroundings) -> Outcome:
    if len(words) == 1:
        return Outcome(1, err=b"sleep: missing operand\n")
    seconds = 0.0
    for word in words[1:]:
        if re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", word, re.ASCII) is None:
            return Outcome(1, err=f"sleep: invalid time interval '{word}'\n".encode())
        seconds += float(word)
    return Outcome(seconds=seconds)


def _sha256sum(words: list[str], surroundings: Surroundings) -> Outcome:
    out, err = "", ""
    for path in words[1:] or ["-"]:
        try:
            content = surroundings.stdin if path == "-" else surroundings.files.content(path)
            out += f"{hashlib.sha256(content).hexdigest()}  {path}\n"
        except OSError as error:
            err += f"sha256sum: {path}: {error.strerror}\n"
    return Outcome(1 if err else 0, out.encode(), err.encode())


# -- the shell: words, quotes, $NAME and $$, `;`, newline, `&&`, `||`, `>&2` --

_TOKEN: Final = re.compile(
    r"""[ \t]+|(?P<operator>&&|\|\||>&2|;|\n)
    |(?P<word>(?:'[^']*'|"(?:[^"\\]|\\.)*"|\\.|[^\s;&|<>'"\\])+)""",
    re.VERBOSE | re.DOTALL,
)
_PART: Final = re.compile(
    r"""'(?P<plain>[^']*)'|"(?P<quoted>(?:[^"\\]|\\.)*)"|\\(?P<escaped>.)|(?P<bare>[^'"\\]+)""", re.DOTALL
)
_EXPANSION: Final = re.compile(r"\\(?P<escaped>[\\\"$`])|\$(?:\{(?P<braced>\w+)\}|(?P<name>\w+)|(?P<pid>\$))")


class _Line(NamedTuple):
    """A simple command, with the operator before it."""

    operator: str
    words: list[str]
    to_stderr: bool


class _ShellError(Exception):
    """The script is none that this shell knows."""


def _sh(words: list[str], surroundings: Surroundings) -> Outcome:
    name = words[0]
    if words[1:2] != ["-c"]:
        return Outcome(2, err=f"{name}: 0: only -c SCRIPT here\n".encode())
    if len(words) < 3:
        return Outcome(2, err=f"{name}: 0: -c requires an argument\n".encode())
    out, err = bytearray(), bytearray()
    status, seconds = 0, 0.0
    try:
        for line in _lines(words[2], surroundings):
            if (line.operator == "&&" and status) or (line.operator == "||" and not status):
                continue
            if line.words[0] == "exit":
                status = _exit_status(line.words, status)
                break
            if line.words[0] == "kill" and line.words[2:] == [str(surroundings.pid)]:
                return Outcome(0, bytes(out), bytes(err), seconds, _signal(line.words[1]))
            try:
                done = run_program(line.words[0], line.words[1:], surroundings)
            except OSError:
                done = Outcome(127, err=f"{name}: 1: {line.words[0]}: not found\n".encode())
            _append(err if line.to_stderr else out, done.out)
            _append(err, done.err)
            status, seconds = done.status, seconds + done.seconds
            if line.words[0] == "cat":
                surroundings = surroundings._replace(stdin=b"")  # it has read it
    except _ShellError as error:
        _append(err, f"{name}: 1: Syntax error: {error}\n".encode())
        status = 2
    return Outcome(status, bytes(out), bytes(err), seconds)


def _exit_status(words: list[str], last: int) -> int:
    if len(words) == 1:
        return last
    if not words[1].isascii() or not words[1].isdigit():
        raise _ShellError(f"Illegal number: {words[1]}")
    return int(words[1]) & 255


def _signal(option: str) -> int:
    if re.fullmatch("-[0-9]{1,2}", option, re.ASCII) is None:
        raise _ShellError(f"no such signal: {option}")
    return int(option[1:])


def _lines(script: str, surroundings: Surroundings) -> Iterator[_Line]:
    operator, words, to_stderr = ";", list[str](), False
    for following, word in _tokens(script):
        if word is not None:
            words.append(_expanded(word, surroundings))
        elif following == ">&2":
            to_stderr = True
        else:
            if words:
                yield _Line(operator, words, to_stderr)
            elif following != "\n":
                raise _ShellError(f'"{following}" unexpected')
            operator, words, to_stderr = following, [], False
    if words:
        yield _Line(operator, words, to_stderr)


def _tokens(script: str) -> Iterator[tuple[str, str | None]]:
    """Operators, and words with an empty operator."""
    position = 0
    while position < len(script):
        match = _TOKEN.match(script, position)
        if match is None:
            quoted = script[position] in "'\""
            raise _ShellError("Unterminated quoted string" if quoted else f"no '{script[position]}' in this shell")
        position = match.end()
        if match.lastgroup is not None:
            yield match["operator"] or "", match["word"]


def _expanded(word: str, surroundings: Surroundings) -> str:
    def value(match: re.Match[str]) -> str:
        if match["escaped"] is not None:
            return str(match["escaped"])
        if match["pid"] is not None:
            return str(surroundings.pid)
        return surroundings.environment.get(match["braced"] or match["name"], "")

    text = ""
    for part in _PART.finditer(word):
        literal = part["plain"] if part["plain"] is not None else part["escaped"]
        text += literal if literal is not None else _EXPANSION.sub(value, part["quoted"] or part["bare"] or "")
    return text


def _append(output: bytearray, data: bytes) -> None:
    output += data[: max(0, _KEPT - len(output))]


_PROGRAMS: Final[dict[str, Callable[[list[str], Surroundings], Outcome]]] = {
    "true": _true,
    "false": _false,
    "echo": _echo,
    "cat": _cat,
    "head": _head,
    "sleep": _sleep,
    "sha256sum": _sha256sum,
    "sh": _sh,
}
