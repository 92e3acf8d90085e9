# SPDX-License-Identifier: Apache-2.0
"""Names: what is one, what never becomes a path, and the services and topics made of them."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.common.errors import BadRequest
from vmloop.common.names import host_topic, vm_name, vm_of_service, vm_service, vm_topic

GOOD = ["a", "7", "web1", "Web-1.prod_x", "a" * 64, "0.-_"]


@pytest.mark.parametrize("text", GOOD)
def test_a_good_name_is_itself(text: str) -> None:
    assert vm_name(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "-a",
        "_a",
        ".a",
        "a" * 65,
        "a/b",
        "../a",
        "a b",
        "a\n",
        "\na",
        "a\0",
        "ä",
        "a²",
        "٣",
        None,
        7,
        b"a",
    ],
)
def test_anything_else_is_refused(text: object) -> None:
    with pytest.raises(BadRequest):
        vm_name(text)


@given(st.text(max_size=70))
def test_what_is_accepted_is_one_plain_path_component(text: str) -> None:
    try:
        name = vm_name(text)
    except BadRequest as error:
        assert len(str(error)) < 300
        return
    assert re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9._-]*", name)
    assert PurePosixPath("/run") / name == PurePosixPath(f"/run/{name}")
    assert (PurePosixPath("/run") / name).parent == PurePosixPath("/run")


def test_an_overlong_name_is_not_repeated_whole_in_the_error() -> None:
    with pytest.raises(BadRequest) as caught:
        vm_name("x" * 1_000_000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("text", GOOD)
def test_a_service_and_its_name_are_each_others_inverse(text: str) -> None:
    assert vm_of_service(vm_service(vm_name(text))) == text


@pytest.mark.parametrize("service", ["", "vmloop", "vm", "vm/", "VM/a", "vm/../a", "vm/a/b", "vm//a", "host/a"])
def test_other_services_belong_to_no_vm(service: str) -> None:
    with pytest.raises(BadRequest):
        vm_of_service(service)


def test_topics() -> None:
    assert vm_topic(vm_name("web1"), "STOP") == b"vm/web1/STOP"
    assert host_topic("X") == b"host/X"
    assert host_topic() == b"host/"


def test_the_prefix_of_one_vm_does_not_match_its_longer_namesake() -> None:
    assert vm_topic(vm_name("web1")) == b"vm/web1/"
    assert not vm_topic(vm_name("web10"), "STOP").startswith(vm_topic(vm_name("web1")))
