# SPDX-License-Identifier: Apache-2.0
"""What a guest agent says to what it is sent: synchronisation, harmless queries, and its words for what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ..fakes.raw_qmp import RawClient, refusal
from .subjects import AgentSubject


@pytest.fixture
def client(agent: AgentSubject) -> Iterator[RawClient]:
    """A connection in which nothing of an earlier one is left."""
    with RawClient(agent.path) as client:
        client.send(b'\xff{"execute": "guest-sync-delimited", "arguments": {"id": 1}}\n')
        client.line(end=b"\xff")
        assert client.message() == {"return": 1}
        yield client


def test_a_ping_is_answered_with_nothing_on_a_line_that_ends_with_lf(client: RawClient) -> None:
    client.send(b'{"execute": "guest-ping"}\n')
    assert client.line() == b'{"return": {}}\n'


def test_requests_need_no_newline(client: RawClient) -> None:
    client.send(b'{"execute": "guest-ping", "id": 1}{"execute": "guest-ping", "id": [2]}')
    assert client.messages(2) == [{"return": {}, "id": 1}, {"return": {}, "id": [2]}]


@pytest.mark.parametrize("number", [0, 1, 2**63 - 1, -(2**63)])
def test_a_sync_returns_its_number(client: RawClient, number: int) -> None:
    assert client.ask("guest-sync", id=number) == {"return": number}


def test_a_delimited_sync_is_answered_after_a_byte_that_json_never_has(client: RawClient) -> None:
    client.send(b'{"execute": "guest-sync-delimited", "arguments": {"id": 42}}')
    assert client.line() == b'\xff{"return": 42}\n'


@pytest.mark.parametrize("left_over", [b'{"execute": "gue', b'{"execute": [[[[', b'{"a": "'], ids=bytes.decode)
def test_that_byte_ends_whatever_was_begun(client: RawClient, left_over: bytes) -> None:
    client.send(left_over + b'\xff{"execute": "guest-sync-delimited", "arguments": {"id": 42}}')
    assert client.message()["error"]["desc"].startswith("JSON parse error, stray ")
    assert client.line() == b'\xff{"return": 42}\n'


@pytest.mark.parametrize(
    ("request_bytes", "answer"),
    [
        (
            b'{"execute": "nope", "id": 3}',
            {"id": 3, **refusal("The command nope has not been found", "CommandNotFound")},
        ),
        (b'{"exec-oob": "guest-ping"}', refusal("QMP input member 'exec-oob' is unexpected")),
        (b'{"execute": "guest-ping", "x": 1}', refusal("QMP input member 'x' is unexpected")),
        (b'{"execute": "guest-ping", "arguments": {"x": 1}}', refusal("Parameter 'x' is unexpected")),
        (b'{"execute": "guest-sync"}', refusal("Parameter 'id' is missing")),
        (
            b'{"execute": "guest-sync", "arguments": {"id": "1"}}',
            refusal("Invalid parameter type for 'id', expected: integer"),
        ),
        (
            b'{"execute": "guest-sync", "arguments": {"id": 9223372036854775808}}',
            refusal("Invalid parameter type for 'id', expected: integer"),
        ),
        (b'{"id": 4}', {"id": 4, **refusal("QMP input lacks member 'execute'")}),
        (b"[]", refusal("QMP input must be a JSON object")),
        (b"garbage\n", refusal("JSON parse error, invalid keyword 'garbage'")),
        (b"}", refusal("JSON parse error, expecting value")),
    ],
    ids=lambda value: str(value) if isinstance(value, bytes) else "",
)
def test_what_is_wrong_is_refused_in_these_words(
    client: RawClient, request_bytes: bytes, answer: dict[str, Any]
) -> None:
    client.send(request_bytes)
    assert client.message() == answer
    assert client.ask("guest-ping") == {"return": {}}


def test_the_agent_lists_what_it_can_do(client: RawClient) -> None:
    info = client.ask("guest-info")["return"]
    assert isinstance(info["version"], str)
    by_name = {command["name"]: command for command in info["supported_commands"]}
    assert by_name["guest-ping"] == {"enabled": True, "name": "guest-ping", "success-response": True}
    assert by_name["guest-shutdown"]["success-response"] is False


def test_the_guests_system_is_described_by_strings(client: RawClient) -> None:
    described = client.ask("guest-get-osinfo")["return"]
    assert {"id", "name", "pretty-name", "version", "version-id", "kernel-release", "machine"} <= set(described)
    assert all(isinstance(value, str) for value in described.values())


def test_the_guests_clock_is_in_nanoseconds(client: RawClient) -> None:
    assert client.ask("guest-get-time")["return"] > 1_700_000_000 * 10**9


def test_a_second_client_waits_for_the_first_to_leave(agent: AgentSubject, client: RawClient) -> None:
    with RawClient(agent.path) as second:
        second.send(b'{"execute": "guest-ping"}\n')
        assert second.quiet()
        client.close()
        assert second.message() == {"return": {}}
