# SPDX-License-Identifier: Apache-2.0
"""The house rules that a machine can keep, each a function from one source file to what it finds wrong there.

Every rule is tried on a sample that breaks it as well as on the whole tree: a rule that cannot fail keeps nothing. Exceptions stand in the
tables below, each with its reason; an entry that is no longer needed fails too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

import vmloop

ROOT = Path(vmloop.__file__).parent
SKIPPED_FOLDERS = {"build", "dist", "__pycache__"}

MAX_LINES = 450
TESTS_PER_MOCK_LINE = 20
SPDX = "# SPDX-License-Identifier: Apache-2.0"
BANNED_NAMES = {"util", "utils", "helper", "helpers", "misc", "manager", "managers"}

# Which of our packages each may import, besides itself.
MAY_IMPORT = {
    "common": set[str](),
    "broker": {"common"},
    "worker": {"common"},
    "client": {"common"},
    "deploy": {"common", "client"},
    # Doubles of what workers run and clients see: fixtures are clients, and handlers are tried on the worker's own dispatcher.
    "testing": {"common", "client", "worker"},
}

# (file, what it imports beyond that): reason
IMPORT_EXCEPTIONS = {
    ("broker/zygote.py", "worker.entry"): "the zygote forks workers, with their imports done",
    ("client/cli/probe.py", "worker.probe"): "where no broker runs the command probes by itself",
    ("client/cli/broker_process.py", "broker"): "the command `vmloop broker` is the broker",
}

LONG_FILES: dict[str, str] = {}  # file: why it cannot be split

SLEEPING_TESTS: dict[str, str] = {}  # file: why no event, deadline or reader can be waited for instead


@dataclass(frozen=True)
class Source:
    """One Python file, by its path under the repository's root."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @property
    def package(self) -> str:
        """The first folder; empty for a file at the root."""
        return self.path.split("/")[0] if "/" in self.path else ""

    @property
    def in_tests(self) -> bool:
        return self.package == "tests"


def sources() -> list[Source]:
    found = []
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT).parts
        if not any(part in SKIPPED_FOLDERS or part.startswith(".") for part in parts):
            found.append(Source("/".join(parts), file.read_text(encoding="utf-8")))
    return found


SOURCES = sources()


# -- the rules ------------------------------------------------------------------------------------------------------------


def imported(source: Source) -> Iterator[str]:
    """Everything of vmloop's that a file imports, without the leading `vmloop.`: `common.wire`, `common.wire.encode`."""
    folders = source.path.split("/")[:-1]
    for node in source.nodes:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["vmloop", *folders][: len(folders) + 2 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("vmloop."):
                yield name.removeprefix("vmloop.")


def wrong_imports(source: Source) -> Iterator[str]:
    if source.in_tests or not source.package:
        return
    for name in imported(source):
        target = name.split(".")[0]
        if target == source.package or target not in MAY_IMPORT or target in MAY_IMPORT[source.package]:
            continue
        if not any(
            source.path == path and (name == allowed or name.startswith(f"{allowed}."))
            for path, allowed in IMPORT_EXCEPTIONS
        ):
            yield f"{source.package} may not import {name}"


def climbing_test_imports(source: Source) -> Iterator[str]:
    """A relative import out of tests/ would load a second copy of the package under the checkout's folder name."""
    if source.in_tests:
        for node in source.nodes:
            if isinstance(node, ast.ImportFrom) and node.level >= len(source.path.split("/")):
                yield f"line {node.lineno}: import vmloop by its full name"


def missing_docstring(source: Source) -> Iterator[str]:
    if not (ast.get_docstring(source.tree) or "").strip():
        yield "no docstring at the top"


def missing_spdx(source: Source) -> Iterator[str]:
    lines = source.text.splitlines()
    first = lines[1] if len(lines) > 1 and lines[0].startswith("#!") else lines[0] if lines else ""
    if first != SPDX:
        yield f"the first line is not {SPDX!r}"


def banned_name(source: Source) -> Iterator[str]:
    for part in source.path.removesuffix(".py").split("/"):
        if part in BANNED_NAMES:
            yield f"'{part}' says nothing about what is inside"


def too_long(source: Source) -> Iterator[str]:
    lines = len(source.text.splitlines())
    if not source.in_tests and lines > MAX_LINES and source.path not in LONG_FILES:
        yield f"{lines} lines, {MAX_LINES} at most"


def own_zmq_sockets(source: Source) -> Iterator[str]:
    if source.in_tests or source.path == "common/sockets.py":
        return
    for node in source.nodes:
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            # socket.socket() is the standard library's
            if (called.endswith(".socket") and called != "socket.socket") or called == "zmq.Socket":
                yield f"line {node.lineno}: {called}(): sockets are made in common/sockets.py"


def sleeps(source: Source) -> Iterator[str]:
    if source.path in SLEEPING_TESTS:
        return
    for node in source.nodes:
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "time.sleep":
            yield f"line {node.lineno}: time.sleep"
        elif isinstance(node, ast.ImportFrom) and node.module == "time" and any(a.name == "sleep" for a in node.names):
            yield f"line {node.lineno}: from time import sleep"


def zmq_asyncio(source: Source) -> Iterator[str]:
    for node in source.nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        if any(name == "zmq.asyncio" or name.startswith("zmq.asyncio.") for name in names):
            yield f"line {getattr(node, 'lineno', '?')}: zmq.asyncio is several times slower than the FD in the loop"


def swallowed_errors(source: Source) -> Iterator[str]:
    broad = {"Exception", "BaseException"}
    for node in source.nodes:
        if isinstance(node, ast.ExceptHandler):
            caught = {part for part in re.split(r"[^\w.]+", ast.unparse(node.type)) if part} if node.type else set()
            silent = all(
                isinstance(step, ast.Pass | ast.Continue)
                or (isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant))
                for step in node.body
            )
            if node.type is None:
                yield f"line {node.lineno}: bare except"
            elif silent and caught & broad:
                yield f"line {node.lineno}: every error is caught and none is told"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("suppress", "contextlib.suppress"):
            yield from (f"line {node.lineno}: suppress() of every error" for a in node.args if ast.unparse(a) in broad)


def mock_lines(source: Source) -> list[str]:
    if not source.in_tests or source.path == "tests/unit/test_architecture.py":
        return []
    pattern = re.compile(r"\b(mock|[A-Za-z]*Mock|mocker|monkeypatch)\b")
    return [f"{source.path}:{n}" for n, line in enumerate(source.text.splitlines(), 1) if pattern.search(line)]


def count_tests(source: Source) -> int:
    functions = (node for node in source.nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return sum(function.name.startswith("test_") for function in functions) if source.in_tests else 0


Rule = Callable[[Source], Iterator[str]]

RULES: list[Rule] = [
    wrong_imports,
    climbing_test_imports,
    missing_docstring,
    missing_spdx,
    banned_name,
    too_long,
    own_zmq_sockets,
    sleeps,
    zmq_asyncio,
    swallowed_errors,
]


# -- the tree keeps them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps_the_rule(rule: Rule) -> None:
    findings = [f"{source.path}: {finding}" for source in SOURCES for finding in rule(source)]
    assert not findings, "\n" + "\n".join(findings)


def test_the_tree_was_found() -> None:
    paths = {source.path for source in SOURCES}
    assert {"__init__.py", "common/wire.py", "broker/__init__.py", "tests/unit/test_architecture.py"} <= paths


def test_mocks_are_rare() -> None:
    mocks = [line for source in SOURCES for line in mock_lines(source)]
    tests = sum(count_tests(source) for source in SOURCES)
    assert len(mocks) * TESTS_PER_MOCK_LINE <= tests, f"{len(mocks)} lines of mocks for {tests} tests: {mocks}"


def test_every_exception_that_applies_is_still_needed() -> None:
    by_path = {source.path: source for source in SOURCES}
    for path, allowed in IMPORT_EXCEPTIONS:
        if path in by_path:
            assert any(f"{name}.".startswith(f"{allowed}.") for name in imported(by_path[path])), (path, allowed)
    for path in LONG_FILES:
        assert len(by_path[path].text.splitlines()) > MAX_LINES, path
    for path in SLEEPING_TESTS:
        assert path.startswith("tests/"), path
        assert "sleep" in by_path[path].text, path


# -- and each rule can fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (wrong_imports, "common/x.py", "from ..broker import core"),
        (wrong_imports, "common/x.py", "from .. import worker"),
        (wrong_imports, "common/x.py", "import vmloop.client.session"),
        (wrong_imports, "broker/x.py", "from ..worker.entry import run"),
        (wrong_imports, "broker/x.py", "def f():\n    from ..client import aio"),
        (wrong_imports, "broker/zygote.py", "from ..worker.app import run"),
        (wrong_imports, "worker/qmp/x.py", "from ...broker.core import Core"),
        (wrong_imports, "worker/x.py", "from vmloop.broker import core"),
        (wrong_imports, "client/cli/x.py", "from ...broker import loop"),
        (climbing_test_imports, "tests/unit/x.py", "from ...common import wire"),
        (climbing_test_imports, "tests/x.py", "from ..common import wire"),
        (missing_docstring, "common/x.py", "import os\n'''late'''"),
        (missing_docstring, "common/x.py", ""),
        (missing_spdx, "common/x.py", '"""doc"""\n' + SPDX),
        (missing_spdx, "common/x.py", ""),
        (banned_name, "common/utils.py", ""),
        (banned_name, "client/helpers/x.py", ""),
        (too_long, "common/x.py", "x = 1\n" * (MAX_LINES + 1)),
        (own_zmq_sockets, "broker/x.py", "context.socket(zmq.DEALER)"),
        (own_zmq_sockets, "broker/x.py", "zmq.Context.instance().socket(zmq.DEALER)"),
        (own_zmq_sockets, "broker/x.py", "zmq.Socket(context, zmq.DEALER)"),
        (sleeps, "worker/x.py", "import time\ntime.sleep(1)"),
        (sleeps, "tests/x.py", "from time import sleep"),
        (zmq_asyncio, "client/x.py", "import zmq.asyncio"),
        (zmq_asyncio, "client/x.py", "from zmq import asyncio"),
        (zmq_asyncio, "client/x.py", "from zmq.asyncio import Context"),
        (swallowed_errors, "x.py", "try:\n    f()\nexcept:\n    g()"),
        (swallowed_errors, "x.py", "try:\n    f()\nexcept Exception:\n    pass"),
        (swallowed_errors, "x.py", "try:\n    f()\nexcept (OSError, BaseException) as e:\n    ..."),
        (swallowed_errors, "x.py", "with contextlib.suppress(Exception):\n    f()"),
    ],
)
def test_a_rule_finds_what_breaks_it(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(path, text)))


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (wrong_imports, "common/x.py", "from .errors import BadRequest\nfrom . import wire\nimport os"),
        (wrong_imports, "broker/x.py", "from ..common.wire import encode\nfrom .core import Core"),
        (wrong_imports, "broker/x.py", "from .. import __version__"),
        (wrong_imports, "broker/zygote.py", "from ..worker.entry import run"),
        (wrong_imports, "broker/zygote.py", "from ..worker import entry"),
        (wrong_imports, "worker/qmp/x.py", "from ...common import wire\nfrom ..vm import Vm\nfrom .framing import f"),
        (wrong_imports, "tests/x.py", "from vmloop.broker import core\nfrom vmloop.client import aio"),
        (climbing_test_imports, "tests/unit/x.py", "from ..fakes import qemu\nfrom vmloop.common import wire"),
        (missing_spdx, "deploy/x.py", f"#!/usr/bin/env python3\n{SPDX}\n"),
        (own_zmq_sockets, "worker/x.py", "socket.socket(socket.AF_UNIX)"),
        (own_zmq_sockets, "worker/x.py", "def f(s: zmq.Socket[bytes]) -> None: ..."),
        (sleeps, "worker/x.py", "await asyncio.sleep(1)"),
        (swallowed_errors, "x.py", "try:\n    f()\nexcept OSError:\n    pass"),
        (swallowed_errors, "x.py", "try:\n    f()\nexcept Exception:\n    log.exception('edge')"),
    ],
)
def test_a_rule_lets_through_what_keeps_it(rule: Rule, path: str, text: str) -> None:
    assert not list(rule(Source(path, text)))


def test_mock_lines_and_tests_are_counted() -> None:
    source = Source("tests/x.py", "from unittest import mock\ndef test_a(monkeypatch): ...\nasync def test_b(): ...\n")
    assert (len(mock_lines(source)), count_tests(source)) == (2, 2)
