# SPDX-License-Identifier: Apache-2.0
"""A VM's whole life through Majordomo, as a program in another language would speak it: plain ZeroMQ sockets, MDP/0.1 and MDP/0.2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import zmq

from vmloop.client.vm import Vm
from vmloop.common.majordomo import Dialect

from .doors import Majordomo, door
from .site import Site

DEFINITION = {"name": "web1", "qemu": {"binary": "simulated", "args": ["-name", "web1"]}}
# REQ puts the empty frame before each request by itself, and takes it off each answer.
CLIENTS = [
    (zmq.REQ, Dialect.V01, False),
    (zmq.DEALER, Dialect.V01, True),
    (zmq.DEALER, Dialect.V01, False),
    (zmq.DEALER, Dialect.V02, True),
    (zmq.DEALER, Dialect.V02, False),
]


@pytest.fixture
def clients(site: Site, beside: Vm) -> Iterator[list[Majordomo]]:
    """One of each kind, all at once."""
    with ExitStack() as stack:
        yield [
            Majordomo(stack.enter_context(door(site.paths.client_socket, kind)), dialect, delimited=delimited)
            for kind, dialect, delimited in CLIENTS
        ]


def ask(client: Majordomo, service: str, op: str, arguments: object = None, **header: Any) -> Any:
    """The result of an operation that must succeed."""
    *_, (head, body) = client.ask(service, op, arguments, **header)
    assert head["ok"] is True, body
    assert head["ms"] >= 0
    return body


def refused(client: Majordomo, service: str, op: str, arguments: object = None, **header: Any) -> dict[str, Any]:
    """The error of an operation that must fail."""
    *_, (head, body) = client.ask(service, op, arguments, **header)
    assert head["ok"] is False
    assert {"code", "message"} <= set(body)
    return dict(body)


def test_a_vm_lives_and_dies_by_majordomo_alone(clients: list[Majordomo]) -> None:
    for epoch, client in enumerate(clients, 1):  # numbers of runs are never given twice
        assert ask(client, "vmloop", "define", {"definition": DEFINITION}) == {"name": "web1"}
        started = ask(client, "vmloop", "start", {"name": "web1"}, id="s1", timeout=20)
        assert (started["state"], started["epoch"]) == ("running", epoch)
        assert ask(client, "vm/web1", "qmp", {"command": "query-name"}, reading=True) == {"name": "web1"}
        assert ask(client, "vm/web1", "hmp", {"line": "info status"}) == "VM status: running\r\n"
        assert ask(client, "vm/web1", "pause")["state"] == "paused"
        assert ask(client, "vm/web1", "wait", {"for": "paused"})["state"] == "paused"
        assert {vm["name"]: vm["state"] for vm in ask(client, "vmloop", "list")} == {
            "beside": "running",
            "web1": "paused",
        }
        assert ask(client, "vm/web1", "kill") == {"state": "shutoff", "reason": "destroyed"}
        assert ask(client, "vmloop", "undefine", {"name": "web1"}) == {"name": "web1"}
        assert refused(client, "vm/web1", "show")["code"] == "no-such-vm"


def test_id_and_cursor_come_with_the_answer(clients: list[Majordomo]) -> None:
    for client in clients:
        for client_id in (0, 5, 2**63, -1, "text", b"bytes", 1.5, [1, {"a": None}], ""):
            ((head, _),) = client.ask("vm/beside", "qmp", {"command": "query-status"}, id=client_id)
            assert head["id"] == client_id
            assert head["cursor"].startswith("1.")
        ((head, _),) = client.ask("vmloop", "ping")
        assert set(head) == {"ok", "ms"}


def test_events_come_as_parts_where_the_dialect_has_them(clients: list[Majordomo]) -> None:
    for client in clients:
        parts = client.ask("vm/beside", "events", {"since": "1.0"})
        *events, (_, end) = parts
        assert end["count"] > 3
        if client.dialect is Dialect.V01:
            assert events == []
            continue
        assert [event["seq"] for _, event in events] == list(range(1, end["count"] + 1))
        assert all(head["ok"] for head, _ in parts)
        assert end["cursor"] == f"1.{end['count']}"
        states = [event["data"]["new"] for _, event in events if event["event"] == "VM_STATE"]
        assert states == ["starting", "paused", "running"]


def test_errors_come_with_code_message_and_fields(clients: list[Majordomo]) -> None:
    for client in clients:
        assert refused(client, "vm/nobody", "kill")["code"] == "no-such-vm"
        assert refused(client, "nothing", "ping")["code"] == "bad-request"
        assert refused(client, "vmloop", "start", {"name": "beside"})["code"] == "already-running"
        error = refused(client, "vm/beside", "qmp", {"command": "no-such-command"}, id=3)
        assert (error["code"], error["class"]) == ("qmp-error", "CommandNotFound")
        assert "no-such-command" in error["desc"]
        error = refused(client, "vm/beside", "wait", {"for": "crashed"}, timeout=0.1)
        assert error["code"] == "deadline"


def test_a_key_makes_a_blind_repeat_safe(clients: list[Majordomo]) -> None:
    for client in clients:
        ask(client, "vmloop", "define", {"definition": DEFINITION})
        ask(client, "vmloop", "start", {"name": "web1"})
        emit = {"command": "x-simulate", "arguments": {"emit": {"event": "ONCE"}}}
        first = ask(client, "vm/web1", "qmp", emit, key="again")
        assert ask(client, "vm/web1", "qmp", emit, key=b"again") == first
        assert ask(client, "vm/web1", "events", {"since": "1.0", "names": ["ONCE"]})["count"] == 1
        ask(client, "vm/web1", "kill")
        ask(client, "vmloop", "undefine", {"name": "web1"})
