# SPDX-License-Identifier: Apache-2.0
"""What systemd is told, on a real datagram socket by path or by abstract name; and that nobody there, or nobody reading, stops nothing."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator

import pytest

from vmloop.broker.systemd import take_passed_fds
from vmloop.common.systemd import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, str]]:
    """The service manager's socket, and what NOTIFY_SOCKET says of it."""
    with (
        tempfile.TemporaryDirectory(prefix="vml-") as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as at,
    ):
        at.settimeout(5.0)
        path, name = f"{directory}/notify", f"vmloop-test-{os.getpid()}"
        at.bind(path if request.param == "path" else "\0" + name)
        yield at, path if request.param == "path" else "@" + name


def test_ready_and_stopping_are_told_with_a_status(manager: tuple[socket.socket, str]) -> None:
    listening, address = manager
    notifier = Notifier({"NOTIFY_SOCKET": address})
    notifier.ready("3 VMs known")
    assert listening.recv(4096) == b"READY=1\nSTATUS=3 VMs known"
    notifier.stopping("ended by request")
    assert listening.recv(4096) == b"STOPPING=1\nSTATUS=ended by request"


def test_a_manager_that_does_not_read_does_not_stop_the_broker(manager: tuple[socket.socket, str]) -> None:
    listening, address = manager
    notifier = Notifier({"NOTIFY_SOCKET": address})
    for _ in range(2000):
        notifier.ready("again")
    listening.setblocking(False)
    assert listening.recv(4096) == b"READY=1\nSTATUS=again"


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}])
def test_without_a_manager_nothing_happens(environ: dict[str, str]) -> None:
    notifier = Notifier(environ)
    notifier.ready("nobody listens")
    assert not notifier.there


@pytest.mark.parametrize("address", ["/nowhere/at/all", "@vmloop-nobody-there", "/" + "x" * 300, "@" + "x" * 300])
def test_a_manager_that_is_gone_is_no_error(address: str) -> None:
    Notifier({"NOTIFY_SOCKET": address}).stopping("nobody listens")


def test_the_managers_address_is_not_left_to_children(manager: tuple[socket.socket, str]) -> None:
    environ = {"NOTIFY_SOCKET": manager[1], "PATH": "/bin"}
    assert Notifier(environ).there
    assert environ == {"PATH": "/bin"}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "-1"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0", "LISTEN_FDNAMES": ""},
    ],
)
def test_what_was_passed_to_another_process_or_makes_no_sense_is_nothing(environ: dict[str, str]) -> None:
    assert take_passed_fds(environ, os.getpid()) == []
    assert environ == {}
