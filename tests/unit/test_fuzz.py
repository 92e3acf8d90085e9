# SPDX-License-Identifier: Apache-2.0
"""The fuzz targets for a moment each: over all that is known to be worth a try, and over some more; and that no parser is without one."""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vmloop

from ..fuzz.choices import MAX_STEPS, Choices, piece, script
from ..fuzz.inputs import KEPT, any_input, known_inputs
from ..fuzz.table import NO_TARGET, TARGETS, Target

ROOT: Final = Path(vmloop.__file__).parent
EXAMPLES: Final = 60  # of each target beside the known ones; `make fuzz` makes millions

every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """Parsers log what they drop: thousands of lines that nobody reads."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


# -- the targets ----------------------------------------------------------------------------------------------------------


@every_target
def test_every_known_input_keeps_the_targets_promises(target: Target) -> None:
    inputs = known_inputs(target)
    assert inputs
    for data in inputs:
        target.run(data)


@every_target
def test_some_more_inputs_keep_the_targets_promises(target: Target) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(any_input(target))
    def keeps(data: bytes) -> None:
        target.run(data)

    keeps()


def test_an_input_that_breaks_a_promise_is_found() -> None:
    def run(data: bytes) -> None:
        assert data != b"{}" + b"\xff", "broken"

    target = Target("broken", run, lambda: [b"{}"], ())

    @settings(max_examples=20_000, deadline=None, database=None, derandomize=True)
    @given(any_input(target))
    def keeps(data: bytes) -> None:
        target.run(data)

    with pytest.raises(AssertionError, match="broken"):
        keeps()


def test_every_kept_input_belongs_to_a_target() -> None:
    if KEPT.exists():
        assert {path.name for path in KEPT.iterdir()} <= set(TARGETS)


@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=20)), max_size=MAX_STEPS))
def test_a_script_is_read_as_it_was_written(steps: list[tuple[int, bytes]]) -> None:
    assert list(Choices(script(*steps)).steps()) == steps


@given(st.binary())
def test_any_bytes_are_a_script_that_ends(data: bytes) -> None:
    steps = list(Choices(data).steps())
    assert len(steps) <= MAX_STEPS
    assert sum(len(content) for _, content in steps) <= len(data)
    assert Choices(piece(data)).piece() == data


# -- no parser without one ------------------------------------------------------------------------------------------------

_DECODERS: Final = {
    "Decoder",
    "b64decode",
    "convert",
    "decode",
    "from_bytes",
    "fromhex",
    "loads",
    "parse_toml",
    "unpack",
    "unpack_from",
    "unpack_map",
    "unpackb",
    "read_toml",
}


def decoders(source: str) -> set[str]:
    """What a module calls that turns bytes, or what was made of them, into something else. The definition alone is no call."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in _DECODERS:
                found.add(name)
    return found


def modules_that_decode() -> set[str]:
    packages = ("common", "broker", "worker", "client", "testing")
    files = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    return {str(path.relative_to(ROOT)) for path in files if decoders(path.read_text())}


def test_every_module_that_decodes_has_a_target_or_a_reason() -> None:
    covered = {module for target in TARGETS.values() for module in target.covers}
    assert modules_that_decode() - covered - set(NO_TARGET) == set()


def test_no_reason_is_given_for_what_needs_none() -> None:
    covered = {module for target in TARGETS.values() for module in target.covers}
    assert set(NO_TARGET) - modules_that_decode() == set()
    assert set(NO_TARGET) & covered == set()
    assert all(len(reason) > 20 for reason in NO_TARGET.values())


def test_what_a_target_covers_is_there() -> None:
    for target in TARGETS.values():
        assert target.covers
        assert [module for module in target.covers if not (ROOT / module).is_file()] == []


@pytest.mark.parametrize(
    "source",
    [
        "msgspec.json.decode(line)",
        "msgspec.msgpack.Decoder(Packet)",
        "x = HEADER.unpack_from(frame)",
        "tomllib.loads(text)",
        "unpack_map(body)",
        "data.decode()",
    ],
)
def test_a_call_that_decodes_is_seen(source: str) -> None:
    assert decoders(source)


def test_what_only_encodes_is_not_seen() -> None:
    assert decoders("msgspec.json.encode(x)\npack(x)\ntext.encode()\ndef decode(): ...") == set()
