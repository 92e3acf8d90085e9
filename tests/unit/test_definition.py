# SPDX-License-Identifier: Apache-2.0
"""Definitions: what is accepted, what is refused by name, and that the TOML written reads back the same."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vmloop
from vmloop.common.definition import (
    AgentSection,
    Definition,
    HandlersSection,
    QemuSection,
    definition_from_mapping,
    definition_from_toml,
    definition_to_toml,
)
from vmloop.common.errors import ConfigError

SAMPLE = Path(vmloop.__file__).parent / "deploy" / "web1.toml"

ON_CRASH: list[Literal["preserve", "destroy", "restart", "dump"]] = ["preserve", "destroy", "restart", "dump"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
DEFINITIONS = st.builds(
    Definition,
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
    qemu=st.builds(
        QemuSection,
        binary=TEXT.filter(bool),
        args=st.lists(TEXT, max_size=5),
        directory=st.none() | TEXT.map("/{}".format),
    ),
    agent=st.builds(AgentSection, enabled=st.booleans(), timeout=st.floats(1e-300, 3600)),
    handlers=st.builds(HandlersSection, limit=st.floats(1e-9, 86400), on_crash=st.sampled_from(ON_CRASH)),
)


def with_args(*args: str) -> Definition:
    return definition_from_mapping({"name": "web1", "qemu": {"args": list(args)}}, "x")


def test_a_name_is_enough() -> None:
    assert definition_from_toml(b'name = "web1"', "x") == Definition("web1")


def test_the_shipped_sample_is_accepted_and_named_after_its_file() -> None:
    sample = definition_from_toml(SAMPLE.read_bytes(), str(SAMPLE))
    assert sample.name == SAMPLE.stem
    assert sample.agent.enabled


def test_the_shipped_sample_mentions_every_field() -> None:
    text = SAMPLE.read_text()
    for section, values in msgspec.to_builtins(Definition("web1")).items():
        for key in values if isinstance(values, dict) else [section]:
            assert f"\n{key} = " in text or f"\n# {key} = " in text


@given(DEFINITIONS)
def test_what_is_written_reads_back_the_same(definition: Definition) -> None:
    try:
        definition_from_mapping(msgspec.to_builtins(definition), "x")
    except ConfigError:
        return  # refused arguments are never written
    assert definition_from_toml(definition_to_toml(definition), "x") == definition


@pytest.mark.parametrize(
    "argument",
    [
        "",
        '"quoted" and \\ back\\\\slash',
        "tab\tnewline\nreturn\r\b\f",
        "\x01\x1f\x7f\x80\x9f",
        "'''\"\"\"",
        "# no comment",
        "\u2028\u2029\ufeff\ufffe\uffff",
        "😀 ä",
        "\\u0041",
    ],
)
def test_odd_strings_read_back_the_same(argument: str) -> None:
    definition = with_args("-name", argument)
    assert definition_from_toml(definition_to_toml(definition), "x") == definition


# -- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, "name"),
        ({"name": ""}, "name: '' is no VM name"),
        ({"name": "../x"}, "no VM name"),
        ({"name": 7}, "name"),
        ({"name": "a", "qmu": {}}, "did you mean 'qemu'"),
        ({"name": "a", "qemu": {"arg": []}}, "did you mean 'qemu.args'"),
        ({"name": "a", "qemu": {"args": "-S"}}, "qemu.args"),
        ({"name": "a", "qemu": {"directory": "images"}}, "qemu.directory"),
        ({"name": "a", "qemu": {"directory": ""}}, "qemu.directory"),
        ({"name": "a", "qemu": {"directory": "/a\0b"}}, "qemu.directory"),
        ({"name": "a", "qemu": {"args": [1]}}, "qemu.args"),
        ({"name": "a", "qemu": {"args": ["-S"] * 4097}}, "qemu.args"),
        ({"name": "a", "qemu": {"args": ["x" * 65537]}}, "qemu.args"),
        ({"name": "a", "qemu": {"binary": ""}}, "qemu.binary"),
        ({"name": "a", "agent": {"timeout": 0}}, "agent.timeout"),
        ({"name": "a", "agent": {"timeout": float("nan")}}, "agent.timeout"),
        ({"name": "a", "agent": {"enabled": 1}}, "agent.enabled"),
        ({"name": "a", "handlers": {"limit": 86401}}, "handlers.limit"),
        ({"name": "a", "handlers": {"on_crash": "explode"}}, "handlers.on_crash"),
    ],
)
def test_wrong_values_are_refused_by_their_key(data: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        definition_from_mapping(data, "web1.toml")
    assert says in str(caught.value)
    assert str(caught.value).startswith("web1.toml: ")


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["-daemonize"], "-daemonize"),
        (["-S", "--daemonize"], "-daemonize"),
        (["-nographic"], "-nographic"),
        (["--nographic"], "-nographic"),
        (["-qmp", "stdio"], "-qmp stdio"),
        (["--qmp-pretty", "stdio"], "-qmp-pretty stdio"),
        (["-monitor", "stdio"], "-monitor stdio"),
        (["-serial", "mon:stdio"], "-serial mon:stdio"),
        (["-serial", "stdio,logfile=x"], "-serial stdio"),
        (["-chardev", "null,id=vmloop-monitor"], "vmloop-monitor"),
        (["-mon", "mode=control,chardev=vmloop-monitor"], "vmloop-monitor"),
        (["-device", "virtserialport,id=vmloop-agent"], "vmloop-agent"),
        (["-device", "virtserialport,chardev=vmloop-agent"], "vmloop-agent"),
        (["-device", '{"driver":"virtserialport","chardev":"vmloop-agent"}'], "vmloop-agent"),
        (["-object", '{"qom-type":"iothread","id":"vmloop-monitor"}'], "vmloop-monitor"),
        (["a\0b"], "zero byte"),
    ],
)
def test_clashing_arguments_are_refused_by_name(args: list[str], names: str) -> None:
    with pytest.raises(ConfigError, match=r"^x: qemu\.args") as caught:
        with_args("-m", "64", *args)
    assert names in str(caught.value)


@pytest.mark.parametrize(
    "args",
    [
        ["-qmp", "unix:/tmp/q,server=on,wait=off"],
        ["-monitor", "none", "-serial", "file:x.log"],
        ["-monitor", "telnet:127.0.0.1:4444,server=on,wait=off"],
        ["-chardev", "socket,id=mine,path=/tmp/x", "-mon", "chardev=mine,mode=control"],
        ["-device", "virtserialport,id=vmloop-agent2"],
        ["-device", '{"driver":"virtserialport","id":"vmloop-agent2","addr":{"id":"vmloop-agent"}}'],
        ["-device", "{"],
        ["-name", "stdio"],
        ["-serial"],
    ],
)
def test_the_users_own_monitors_and_ports_are_fine(args: list[str]) -> None:
    assert with_args(*args).qemu.args == args
