# SPDX-License-Identifier: Apache-2.0
"""What `vmloop run` exits with, and what it makes of its command line; the runs themselves are in tests/system/test_run.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from vmloop.client.cli.foreground import End
from vmloop.client.cli.run import RunCommand, _definition, exit_code, run
from vmloop.common.errors import ConfigError


@pytest.mark.parametrize(
    ("reason", "panicked", "code"),
    [
        ("shutdown", False, 0),
        ("failed", False, 1),
        ("crashed", False, 10),
        ("crashed", True, 11),  # on_crash = destroy
        ("destroyed", True, 11),  # on_crash = preserve, and then Ctrl-C
        ("shutdown", True, 11),  # -action panic=shutdown
        ("destroyed", False, 12),
        ("detached", False, 13),
        ("host-reboot", False, 13),
    ],
)
def test_the_exit_code_tells_how_the_vm_ended(reason: str, panicked: bool, code: int) -> None:
    assert exit_code(End("shutoff", reason, "", panicked)) == code


def test_everything_after_two_dashes_is_qemus() -> None:
    assert isinstance(run, RunCommand)
    with run.make_context("run", ["--events", "--", "--help", "disk.img", "--", "-m"]) as context:
        assert context.params["file"] is None
        assert context.params["shows_events"] is True
        assert list(context.meta.values()) == [["--help", "disk.img", "--", "-m"]]


def values(**qemu: Any) -> dict[str, Any]:
    return {"name": "vm", "qemu": qemu}


def test_qemu_runs_where_the_command_was_called() -> None:
    made = _definition(values(binary="build/qemu"), "x", None).qemu
    assert (made.directory, made.binary) == (os.getcwd(), f"{os.getcwd()}/build/qemu")
    made = _definition(values(binary="qemu", directory="/srv"), "x", None).qemu
    assert (made.directory, made.binary) == ("/srv", "qemu")


def test_a_console_is_added_behind_the_users_arguments() -> None:
    args = _definition(values(args=["-m", "64"]), "x", Path("/r")).qemu.args
    assert args[:2] == ["-m", "64"]
    assert args[-2:] == ["-serial", "chardev:vmloop-console"]
    assert "path=/r/run/vms/vm/console.sock" in args[3]


@pytest.mark.parametrize("args", [["-serial", "null"], ["--serial", "null"], ["-chardev", "null,id=vmloop-console"]])
def test_a_console_beside_a_serial_port_of_the_users_is_refused(args: list[str]) -> None:
    with pytest.raises(ConfigError, match="leave one out"):
        _definition(values(args=args), "x", Path("/r"))


def test_a_definition_that_is_none_is_told_as_everywhere() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'qemu\.args'"):
        _definition(values(arg=[]), "the command line", None)
    with pytest.raises(ConfigError, match="the command line"):
        _definition({"name": "vm", "qemu": 5}, "the command line", None)


@pytest.mark.parametrize(("said", "meant"), [({}, "destroy"), ({"on_crash": "preserve"}, "preserve")])
def test_a_guest_that_panics_is_kept_only_if_the_definition_says_so(said: dict[str, Any], meant: str) -> None:
    assert _definition(values() | {"handlers": said}, "x", None).handlers.on_crash == meant
    assert _definition(values(), "x", None).handlers.on_crash == "destroy"
