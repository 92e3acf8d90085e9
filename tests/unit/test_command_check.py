# SPDX-License-Identifier: Apache-2.0
"""QMP commands against the recorded QEMU's schema, before they are sent."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.client.command_check import argument_names, argument_values, near, unfit_for_oob, wrong_arguments
from vmloop.common.capabilities import Capabilities, Shape, part_about

from ..fakes.recorded_qemu import load

QEMU = load().document()


def wrong(command: str, /, **arguments: Any) -> list[str]:
    return wrong_arguments(part_about(QEMU, command), command, arguments)


@pytest.mark.parametrize(
    ("command", "arguments", "text"),
    [
        ("device_del", {}, "id is missing"),
        ("device_del", {"id": 5}, "id must be a text, not 5; write id='\"5\"'"),
        ("device_del", {"id": "x", "idd": "y"}, "idd is unknown; did you mean id?"),
        ("query-status", {"a": 1}, "a is unknown; it takes: nothing"),
        ("balloon", {"value": "much"}, 'value must be a whole number, not "much"'),
        ("balloon", {"value": True}, "value must be a whole number, not true"),
        ("set-action", {"reboot": "rest"}, 'reboot must not be "rest"; did you mean reset?'),
        ("blockdev-add", {"driver": "qcow3", "node-name": "x"}, "did you mean qcow"),
        ("blockdev-add", {"driver": "raw"}, "file is missing"),
        (
            "blockdev-add",
            {"driver": "file", "filename": "/x", "read-only": 1},
            "read-only must be true or false, not 1",
        ),
        ("blockdev-add", {"driver": "raw", "file": {"driver": "file"}}, "file.filename is missing"),
        ("blockdev-add", {"driver": "raw", "file": {"driver": "file", "filename": 3}}, "file.filename must be a text"),
        ("blockdev-add", {"driver": "raw", "file": 3}, "file must be a"),
        (
            "migrate-set-capabilities",
            {"capabilities": [{"capability": "evants", "state": True}]},
            "did you mean events",
        ),
        ("migrate-set-capabilities", {"capabilities": {}}, "capabilities must be a list, not {}"),
        ("object-add", {"qom-type": "iothread", "id": "x", "pol-max-ns": 1}, "pol-max-ns is unknown"),
    ],
)
def test_what_is_wrong_is_told(command: str, arguments: dict[str, Any], text: str) -> None:
    found = wrong(command, **arguments)
    assert any(text in line for line in found), found


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("query-status", {}),
        ("device_del", {"id": "x"}),
        ("device_add", {"driver": "virtio-net-pci", "id": "n", "netdev": "n0", "mac": "52:54:00:12:34:56"}),  # open
        ("blockdev-add", {"driver": "raw", "file": {"driver": "file", "filename": "/x"}, "node-name": "a"}),
        ("blockdev-add", {"driver": "raw", "file": "node0"}),
        ("blockdev-add", {"driver": "qcow2", "file": "node0", "backing": None}),
        ("blockdev-add", {"driver": "null-co", "node-name": "x"}),
        ("object-add", {"qom-type": "iothread", "id": "x"}),
        ("netdev_add", {"type": "user", "id": "n"}),
        ("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]}),
        ("qom-set", {"path": "/x", "property": "y", "value": {"any": ["thing", 1]}}),
        ("no-such-command", {"a": 1}),
    ],
)
def test_what_qemu_takes_is_let_through(command: str, arguments: dict[str, Any]) -> None:
    assert wrong(command, **arguments) == []


def test_a_command_of_an_old_qemu_whose_schema_is_not_all_is_open() -> None:
    """netdev_add of 4.2 has type and id in its schema, and takes a backend's options."""
    old = Capabilities(arguments={"netdev_add": Shape(members={"type": "str", "id": "str"})})
    assert wrong_arguments(old, "netdev_add", {"type": "tap", "id": "n", "ifname": "t0"}) == []


def test_only_commands_that_are_described_are_unfit_for_oob() -> None:
    assert unfit_for_oob(QEMU, "query-status")
    assert not unfit_for_oob(QEMU, "query-yank")
    assert not unfit_for_oob(QEMU, "no-such-command")
    assert not unfit_for_oob(Capabilities(commands=["query-status"]), "query-status")


def test_arguments_are_completed_those_first_that_must_be_given() -> None:
    assert argument_names(QEMU, "device_add") == ["driver", "bus", "id"]
    assert {"driver", "node-name", "file", "filename"} <= set(argument_names(QEMU, "blockdev-add"))
    assert argument_names(QEMU, "nosuch") == []


def test_values_are_completed_where_they_are_words() -> None:
    assert argument_values(QEMU, "set-action", "reboot") == ["reset", "shutdown"]
    assert argument_values(QEMU, "blockdev-add", "read-only") == ["true", "false"]
    assert argument_values(QEMU, "device_add", "driver") == []


def test_near_says_nothing_where_nothing_is_near() -> None:
    assert near("query-statu", QEMU.commands).startswith("; did you mean query-status")
    assert near("zzz", QEMU.commands) == ""


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["driver", "file", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.sampled_from(["blockdev-add", "object-add", "migrate-set-capabilities", "device_del", "transaction"]),
    st.dictionaries(st.sampled_from(["driver", "file", "id", "actions", "capabilities", "qom-type", "x"]), values),
)
def test_any_arguments_are_judged(command: str, arguments: dict[str, Any]) -> None:
    assert all(isinstance(text, str) for text in wrong(command, **arguments))


def test_members_of_a_variant_that_is_not_described_are_not_judged() -> None:
    shape = Shape(members={"kind": "str"}, tag="kind", variants={"a": "gone"})
    known = Capabilities(arguments={"c": shape})
    assert wrong_arguments(known, "c", {"kind": "a", "anything": 1}) == []
    assert wrong_arguments(known, "c", {"kind": "b", "anything": 1}) != []  # b has no members of its own


def test_of_an_alternate_that_type_is_judged_by_which_qemu_would_take() -> None:
    types = {
        "either": Shape(kind="alternate", choices=["str", "object"]),
        "str": Shape(kind="json", json="string"),
        "object": Shape(members={"a": "str"}),
    }
    known = Capabilities(arguments={"c": Shape(members={"x": "either"})}, types=types)
    assert wrong_arguments(known, "c", {"x": {}}) == ["x.a is missing"]
    assert wrong_arguments(known, "c", {"x": "text"}) == []
