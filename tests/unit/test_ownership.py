# SPDX-License-Identifier: Apache-2.0
"""What a private broker is told at its start, and what it reports: that it serves, and how it has ended."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.common.errors import BadRequest, ConfigError, Denied, VmloopError
from vmloop.common.ownership import (
    MAX_REPORT_BYTES,
    MAX_STOP_TIMEOUT,
    Ownership,
    ownership_from_argument,
    ownership_to_argument,
    read_farewell,
    read_report,
    send_farewell,
    send_report,
)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


@given(
    st.builds(
        Ownership,
        owner_fd=st.integers(3, 1 << 20),
        report_fd=st.integers(3, 1 << 20),
        vms=st.sampled_from(["stop", "kill", "leave"]),
        stop_timeout=st.floats(0, MAX_STOP_TIMEOUT, exclude_min=True),
        temporary=st.booleans(),
    )
)
def test_an_ownership_comes_back_as_it_went_in(ownership: Ownership) -> None:
    assert ownership_from_argument(ownership_to_argument(ownership)) == ownership


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[" * 10_000,
        "\udcff",
        '{"owner_fd": 0, "report_fd": 4, "vms": "stop", "stop_timeout": 1}',
        '{"owner_fd": 3, "report_fd": 4, "vms": "perhaps", "stop_timeout": 1}',
        '{"owner_fd": 3, "report_fd": 4, "vms": "stop", "stop_timeout": 0}',
        '{"owner_fd": 3, "report_fd": 4, "vms": "stop", "stop_timeout": 1, "more": 1}',
    ],
)
def test_what_is_no_ownership_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="--owned"):
        ownership_from_argument(text)


@pytest.mark.parametrize("error", [None, Denied("taken", pid=7), ConfigError("x" * (2 * MAX_REPORT_BYTES))])
def test_a_report_says_that_it_serves_or_why_not(
    ends: tuple[socket.socket, socket.socket], error: VmloopError | None
) -> None:
    ours, theirs = ends
    send_report(theirs, error)
    told = read_report(ours.recv(MAX_REPORT_BYTES))
    assert type(told) is type(error)
    if isinstance(error, Denied):
        assert (str(told), told.fields if told else None) == ("taken", {"pid": 7})


def test_an_owner_that_is_gone_need_not_be_told(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    ours.close()
    send_report(theirs, None)
    send_farewell(theirs, all_ended=True)


@pytest.mark.parametrize("all_ended", [True, False])
def test_a_farewell_says_whether_all_has_ended(ends: tuple[socket.socket, socket.socket], all_ended: bool) -> None:
    ours, theirs = ends
    send_farewell(theirs, all_ended=all_ended)
    assert read_farewell(ours.recv(MAX_REPORT_BYTES)) is all_ended


@given(st.binary(max_size=200))
def test_any_farewell_is_one_or_a_config_error(body: bytes) -> None:
    try:
        told = read_farewell(body)
    except ConfigError:
        return
    assert isinstance(told, bool)


@given(st.binary(max_size=200))
def test_any_report_is_one_or_a_config_error(body: bytes) -> None:
    try:
        told = read_report(body)
    except ConfigError:
        return
    assert told is None or isinstance(told, VmloopError)
