# SPDX-License-Identifier: Apache-2.0
"""The error tree: its codes are the design's, each crosses the wire, and no error body from a peer is too odd."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.common import errors, majordomo, wire
from vmloop.common.errors import BadRequest, Internal, VmloopError, error_from_wire, type_of_code
from vmloop.common.pack import pack, unpack

# Design, section 8. A code is never renamed and never used again for something else: this list only grows.
CODES = [
    "bad-request",
    "no-such-vm",
    "vm-exists",
    "not-running",
    "already-running",
    "denied",
    "busy",
    "too-large",
    "deadline",
    "outcome-unknown",
    "worker-lost",
    "monitor-lost",
    "monitor-frozen",
    "qmp-error",
    "agent-absent",
    "agent-unresponsive",
    "agent-error",
    "launch-failed",
    "config-error",
    "internal",
]
CLIENTS_OWN = ["no-broker"]

every_type = pytest.mark.parametrize("error_type", type_of_code.values(), ids=list(type_of_code))


def test_the_codes_are_the_designs() -> None:
    assert sorted(type_of_code) == sorted(CODES + CLIENTS_OWN)


def test_no_two_classes_share_a_code_but_a_class_and_what_refines_it() -> None:
    assert len(set(type_of_code.values())) == len(type_of_code)
    for code, error_type in type_of_code.items():
        assert error_type.code == code
    assert wire.BadFrame.code == majordomo.BadMajordomo.code == "bad-request"
    assert type_of_code["bad-request"] is BadRequest


def test_the_tree_in_the_docstring_shows_every_class_and_code() -> None:
    assert errors.__doc__ is not None
    drawn = {
        tuple(line.split("── ")[1].split()[:2])
        for line in errors.__doc__.splitlines()
        if "├──" in line or "└──" in line
    }
    assert drawn == {(error_type.__name__, code) for code, error_type in type_of_code.items()}


@every_type
def test_an_error_crosses_the_wire_whole(error_type: type[VmloopError]) -> None:
    error = error_type("web1: it broke", limit=7, desc="QEMU's words")
    back = error_from_wire(unpack(pack(error.to_wire())))
    assert type(back) is error_type
    assert str(back) == back.message == "web1: it broke"
    assert back.fields == {"limit": 7, "desc": "QEMU's words"}


@every_type
def test_every_class_says_what_it_means(error_type: type[VmloopError]) -> None:
    assert error_type.__doc__


def test_qemus_class_is_a_field_although_python_has_the_word() -> None:
    body = {"code": "qmp-error", "message": "m", "class": "GenericError", "desc": "d"}
    assert error_from_wire(body).fields == {"class": "GenericError", "desc": "d"}
    assert error_from_wire(body).to_wire() == body


def test_code_and_message_win_over_fields_of_the_same_name() -> None:
    error = BadRequest("the message", code="busy", message="another")
    assert error.to_wire() == {"code": "bad-request", "message": "the message"}


def test_an_unknown_code_becomes_internal_and_keeps_its_text() -> None:
    error = error_from_wire({"code": "made-up", "message": "it broke", "more": 1})
    assert type(error) is Internal
    assert "it broke" in str(error)
    assert "made-up" in str(error)
    assert error.fields == {"more": 1}


@pytest.mark.parametrize("body", [None, [], "text", 7, b"\xff", ["x" * 100_000]])
def test_a_body_that_is_no_map_becomes_internal(body: object) -> None:
    error = error_from_wire(body)
    assert type(error) is Internal
    assert len(str(error)) < 300


@pytest.mark.parametrize("field", ["self", "message", "code", "cls", "fields", "args", "", "a b"])
def test_a_field_of_any_name_is_only_a_field(field: str) -> None:
    body = {"code": "busy", "message": "m", field: "x"}
    if field == "code":
        assert type(error_from_wire(body)) is Internal
    else:
        assert error_from_wire(body).code == "busy"


BODIES = st.dictionaries(
    st.sampled_from(["code", "message", "self", "desc"]) | st.text() | st.integers() | st.binary(),
    st.sampled_from(CODES) | st.none() | st.integers() | st.lists(st.text()),
)


@given(BODIES)
def test_any_map_becomes_an_error(body: dict[Any, Any]) -> None:
    error = error_from_wire(body)
    assert isinstance(error, VmloopError)
    assert error.to_wire()["code"] == error.code
