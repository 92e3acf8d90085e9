# SPDX-License-Identifier: Apache-2.0
"""What a monitor says to what it is sent: greeting, negotiation, queries, and QEMU's own words for everything that is wrong."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from vmloop.common.definition import AGENT_ID, MONITOR_ID

from ..fakes.raw_qmp import RawClient, refusal
from .subjects import Subject

UNNEGOTIATED = refusal("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
NOT_AN_OBJECT = refusal("QMP input must be a JSON object")
PRELAUNCH = {"status": "prelaunch", "singlestep": False, "running": False}


def json_error(words: str) -> dict[str, Any]:
    return refusal(f"JSON parse error, {words}")


# -- greeting and negotiation --


def test_the_greeting_offers_oob_and_ends_its_line_with_crlf(shared: Subject) -> None:
    with RawClient(shared.path) as client:
        line = client.line()
    assert line.startswith(b'{"QMP": {"version": {"qemu": {"micro": ')
    assert line.endswith(b'}, "capabilities": ["oob"]}}\r\n')


@pytest.mark.parametrize(
    ("request_bytes", "answer"),
    [
        (b'{"execute": "query-status"}', UNNEGOTIATED),
        (b'{"execute": "no-such-command", "id": 7}', {"id": 7, **UNNEGOTIATED}),
        (b'{"exec-oob": "query-yank"}', refusal("QMP input member 'exec-oob' is unexpected")),
        (
            b'{"execute": "qmp_capabilities", "arguments": {"enable": ["fly"]}}',
            refusal("Parameter 'null' does not accept value 'fly'"),
        ),
        (
            b'{"execute": "qmp_capabilities", "arguments": {"enable": "oob"}}',
            refusal("Invalid parameter type for 'enable', expected: array"),
        ),
        (
            b'{"execute": "qmp_capabilities", "arguments": {"enable": [1]}}',
            refusal("Invalid parameter type for 'enable[0]', expected: string"),
        ),
        (b'{"execute": "qmp_capabilities", "arguments": {"x": 1}}', refusal("Parameter 'x' is unexpected")),
    ],
    ids=[
        "a command too early",
        "an unknown command too early",
        "out of band too early",
        "an unknown capability",
        "capabilities that are no list",
        "a capability that is no string",
        "an unknown argument",
    ],
)
def test_before_negotiation_the_monitor_refuses(shared: Subject, request_bytes: bytes, answer: dict[str, Any]) -> None:
    with RawClient(shared.path) as client:
        client.message()
        client.send(request_bytes)
        assert client.message() == answer
        client.send(b'{"execute": "qmp_capabilities"}')
        assert client.message() == {"return": {}}


def test_negotiation_happens_once(shared: Subject) -> None:
    with shared.client() as client:
        assert client.ask("qmp_capabilities", enable=["oob"]) == refusal(
            "Capabilities negotiation is already complete, command ignored", "CommandNotFound"
        )


def test_each_client_negotiates_anew(shared: Subject) -> None:
    with shared.client() as client:
        assert "return" in client.ask("query-status")
    with RawClient(shared.path) as client:
        client.message()
        assert client.ask("query-status") == UNNEGOTIATED


def test_without_the_capability_there_is_no_out_of_band(shared: Subject) -> None:
    with RawClient(shared.path) as client:
        client.message()
        client.ask("qmp_capabilities")
        client.send({"exec-oob": "query-yank"})
        assert client.message() == refusal("QMP input member 'exec-oob' is unexpected")


# -- one client at a time --


def test_a_second_client_is_greeted_when_the_first_has_left(shared: Subject) -> None:
    first = shared.client()
    with RawClient(shared.path) as second:
        second.send(b'{"execute": "qmp_capabilities"}{"execute": "query-name"}')
        assert second.quiet()
        first.close()
        assert "QMP" in second.message()
        assert second.messages(2) == [{"return": {}}, {"return": {"name": "web1"}}]


def test_a_client_that_closes_its_half_is_gone(shared: Subject) -> None:
    with shared.client() as client:
        client.socket.shutdown(socket.SHUT_WR)
        assert client.rest() == b""


# -- requests --


@pytest.mark.parametrize(
    ("request_bytes", "answer"),
    [
        (
            b'{"execute": "nope", "id": 7}',
            {"id": 7, **refusal("The command nope has not been found", "CommandNotFound")},
        ),
        (
            b'{"exec-oob": "nope", "id": 7}',
            {"id": 7, **refusal("The command nope has not been found", "CommandNotFound")},
        ),
        (b'{"exec-oob": "query-status"}', refusal("The command query-status does not support OOB")),
        (
            b'{"exec-oob": "query-yank", "execute": "stop"}',
            refusal("QMP input member 'execute' clashes with 'exec-oob'"),
        ),
        (b'{"execute": "query-status", "arguments": {"x": 1}}', refusal("Parameter 'x' is unexpected")),
        (b'{"execute": "query-status", "arguments": null}', refusal("QMP input member 'arguments' must be an object")),
        (b'{"execute": "query-status", "control": {}}', refusal("QMP input member 'control' is unexpected")),
        (b'{"execute": 1}', refusal("QMP input member 'execute' must be a string")),
        (b'{"id": 4}', {"id": 4, **refusal("QMP input lacks member 'execute'")}),
        (b'{"execute": "human-monitor-command"}', refusal("Parameter 'command-line' is missing")),
        (
            b'{"execute": "human-monitor-command", "arguments": {"command-line": 1}}',
            refusal("Invalid parameter type for 'command-line', expected: string"),
        ),
        (
            b'{"execute": "remove-fd", "arguments": {"fdset-id": 1.5}}',
            refusal("Invalid parameter type for 'fdset-id', expected: integer"),
        ),
        (b'{"execute": "system_wakeup"}', refusal("Unable to wake up: guest is not in suspended state")),
        (b"[1]", NOT_AN_OBJECT),
        (b'"text"', NOT_AN_OBJECT),
        (b"17 ", NOT_AN_OBJECT),
        (b"garbage\n", json_error("invalid keyword 'garbage'")),
        (b'{"execute": nope}', json_error("invalid keyword 'nope'")),
        (b'{"execute" "stop"}', json_error("missing : in object pair")),
        (b'{"execute": "query-status", "execute": "stop"}', json_error("duplicate key")),
        (b'{"a": 1 "b": 2}', json_error("expected separator in dict")),
        (b"[1 2]", json_error("expected separator in list")),
        (b"{1: 2}", json_error("key is not a string in object")),
        (b'{"a": }', json_error("expecting value")),
        (b'{"a": 1,}', json_error("expecting value")),
        (b"}", json_error("expecting value")),
        (b'["\\q"]', json_error("invalid escape sequence in string")),
        (b'["\\ud800"]', json_error("\\ud800 is not a valid Unicode character")),
        (b'["\xc0\x80\xc3"]', json_error("invalid UTF-8 sequence in string")),
        (b"%", json_error("stray '%'")),
        (b"\xff", json_error("stray '\N{REPLACEMENT CHARACTER}'")),
        (b'["text\xff', json_error("stray '\"text\N{REPLACEMENT CHARACTER}'")),
        (b"[01", json_error("stray '01'")),
    ],
    ids=lambda value: str(value) if isinstance(value, bytes) else "",
)
def test_what_is_wrong_is_refused_in_these_words(shared: Subject, request_bytes: bytes, answer: dict[str, Any]) -> None:
    with shared.client() as client:
        client.send(request_bytes)
        assert client.message() == answer
        client.send(b'\n{"execute": "query-status", "id": "next"}\n')
        assert client.message() == {"return": PRELAUNCH, "id": "next"}


@pytest.mark.parametrize("nested", [b"[" * 1200, b'{"a":' * 1200], ids=["lists", "objects"])
def test_an_input_nested_too_deeply_is_cut_off(shared: Subject, nested: bytes) -> None:
    with shared.client() as client:
        client.send(nested)
        assert client.message() == refusal("JSON nesting depth limit exceeded")


def test_requests_need_nothing_between_them(shared: Subject) -> None:
    with shared.client() as client:
        client.send(b'{"execute": "query-name"}{"execute": "query-uuid"}  {"execute": "query-status", "id": 1}')
        assert client.messages(3) == [
            {"return": {"name": "web1"}},
            {"return": {"UUID": "11111111-2222-3333-4444-555555555555"}},
            {"return": PRELAUNCH, "id": 1},
        ]


def test_a_request_may_come_byte_by_byte_and_over_several_lines(shared: Subject) -> None:
    with shared.client() as client:
        for byte in b'{"execute":\r\n\t"query-status",\n"id": -12}':
            client.send(bytes([byte]))
        assert client.message() == {"return": PRELAUNCH, "id": -12}


def test_single_quotes_are_as_good_as_double_ones(shared: Subject) -> None:
    with shared.client() as client:
        client.send(b"{'execute': 'query-status', 'id': 'say \"so\"'}")
        assert client.message() == {"return": PRELAUNCH, "id": 'say "so"'}


@pytest.mark.parametrize(
    "id_bytes",
    [b"null", b"true", b"0", b"-7", b"18446744073709551615", b"0.5", b'"text"', b"[1, [], {}]", b'{"a": {"b": null}}'],
    ids=bytes.decode,
)
def test_any_value_is_echoed_as_the_id(shared: Subject, id_bytes: bytes) -> None:
    with shared.client() as client:
        client.send(b'{"execute": "query-name", "id": ' + id_bytes + b"}")
        assert client.line() == b'{"return": {"name": "web1"}, "id": ' + id_bytes + b"}\r\n"
        client.send(b'{"execute": "nope", "id": ' + id_bytes + b"}")
        assert client.line().startswith(b'{"id": ' + id_bytes + b', "error": {"class": "CommandNotFound", ')


def test_output_is_ascii_with_upper_case_escapes(shared: Subject) -> None:
    with shared.client() as client:
        client.send('{"execute": "query-name", "id": "é\\\\u00e9 \\u0001 \N{GRINNING FACE}"}'.encode())
        assert client.line().endswith(b'"id": "\\u00E9\\\\u00e9 \\u0001 \\uD83D\\uDE00"}\r\n')


def test_a_client_may_read_as_late_as_it_likes(shared: Subject) -> None:
    count = 2000
    with shared.client() as client:
        client.send(b'{"execute": "query-commands"}' * count + b'{"execute": "query-name", "id": "last"}')
        reply, before = client.reply("last")
        assert reply["return"] == {"name": "web1"}
        assert len(before) == count


# -- queries --


def test_queries_have_the_form_of_qemus(shared: Subject) -> None:
    with shared.client() as client:
        version = client.ask("query-version")["return"]
        assert set(version) == {"qemu", "package"}
        assert set(version["qemu"]) == {"major", "minor", "micro"}
        assert client.ask("query-kvm") == {"return": {"enabled": False, "present": True}}
        assert client.ask("query-block") == {"return": []}
        commands = client.ask("query-commands")["return"]
        assert {"name": "query-status"} in commands
        assert all(set(command) == {"name"} for command in commands)


def test_the_schema_names_commands_events_and_what_is_allowed_out_of_band(shared: Subject) -> None:
    with shared.client() as client:
        entries = client.ask("query-qmp-schema")["return"]
    by_name = {(entry["meta-type"], entry["name"]): entry for entry in entries}
    assert by_name["command", "query-yank"]["allow-oob"] is True
    assert "allow-oob" not in by_name["command", "query-status"]
    for event in ("SHUTDOWN", "POWERDOWN", "RESET", "STOP", "RESUME"):
        assert ("event", event) in by_name
    types = {entry["name"] for entry in entries if entry["meta-type"] not in ("command", "event")}
    assert all(entry["arg-type"] in types for entry in entries if entry["meta-type"] in ("command", "event"))


def test_chardevs_tell_whether_somebody_is_connected_and_the_guest_listens(shared: Subject) -> None:
    with shared.client() as client:
        monitor = {"frontend-open": True, "filename": f"unix:{shared.path},server=on", "label": MONITOR_ID}
        address = f"unix:{shared.agent_path},server=on"
        agent = {"frontend-open": False, "filename": f"disconnected:{address}", "label": AGENT_ID}
        assert client.ask("query-chardev") == {"return": [monitor, agent]}
        with RawClient(shared.agent_path) as host_end:
            host_end.send(b"nobody reads this\n")
            while client.ask("query-chardev") == {"return": [monitor, agent]}:
                pass  # until the connection is accepted; the test's own deadline bounds it
            assert client.ask("query-chardev") == {"return": [monitor, {**agent, "filename": address}]}
        while client.ask("query-chardev") != {"return": [monitor, agent]}:
            pass


def test_yank_instances_are_listed_in_band_and_out_of_band(shared: Subject) -> None:
    instances = [{"type": "chardev", "id": MONITOR_ID}, {"type": "chardev", "id": AGENT_ID}]
    with shared.client() as client:
        assert client.ask("query-yank") == {"return": instances}
        client.send({"exec-oob": "query-yank", "id": 1})
        assert client.message() == {"return": instances, "id": 1}


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("info status", "VM status: paused (prelaunch)\r\n"),
        ("  info   status  ", "VM status: paused (prelaunch)\r\n"),
        ("info uuid", "11111111-2222-3333-4444-555555555555\r\n"),
        ("info name", "web1\r\n"),
        ("info kvm", "kvm support: disabled\r\n"),
        ("", ""),
        ("nope", "unknown command: 'nope'\r\n"),
        ("nope at all", "unknown command: 'nope'\r\n"),
        ("info nope", "unknown command: 'info nope'\r\n"),
        ("stop now", 'stop|s: extraneous characters at the end of line\r\nTry "help stop" for more information\r\n'),
    ],
)
def test_the_human_monitor_answers(shared: Subject, line: str, answer: str) -> None:
    with shared.client() as client:
        assert client.ask("human-monitor-command", command_line=line) == {"return": answer}


# -- file descriptors --


def test_a_descriptor_can_be_kept_under_a_name(shared: Subject) -> None:
    reader, writer = os.pipe()
    with shared.client() as client:
        client.send_with_fds({"execute": "getfd", "arguments": {"fdname": "pipe"}}, [reader])
        assert client.message() == {"return": {}}
        assert client.ask("getfd", fdname="pipe") == refusal("No file descriptor supplied via SCM_RIGHTS")
        assert client.ask("closefd", fdname="pipe") == {"return": {}}
        assert client.ask("closefd", fdname="pipe") == refusal("File descriptor named 'pipe' not found")
        client.send_with_fds({"execute": "getfd", "arguments": {"fdname": "0pipe"}}, [reader])
        assert client.message() == refusal("Parameter 'fdname' expects a name not starting with a digit")
    os.close(reader)
    os.close(writer)


def test_descriptors_can_be_put_into_sets(shared: Subject) -> None:
    reader, writer = os.pipe()
    with shared.client() as client:
        assert client.ask("add-fd") == refusal("No file descriptor supplied via SCM_RIGHTS")
        client.send_with_fds({"execute": "add-fd", "arguments": {"fdset-id": 7, "opaque": "hello"}}, [reader, writer])
        added = client.message()["return"]
        assert added["fdset-id"] == 7
        # The second descriptor of the message is dropped with the command that took the first.
        assert client.ask("add-fd", fdset_id=7) == refusal("No file descriptor supplied via SCM_RIGHTS")
        assert client.ask("query-fdsets") == {
            "return": [{"fds": [{"fd": added["fd"], "opaque": "hello"}], "fdset-id": 7}]
        }
        client.send_with_fds({"execute": "add-fd", "arguments": {"fdset-id": -1}}, [reader])
        assert client.message() == refusal("Parameter 'fdset-id' expects a non-negative value")
        assert client.ask("remove-fd", fdset_id=8) == refusal("File descriptor named 'fdset-id:8' not found")
        assert client.ask("remove-fd", fdset_id=7, fd=9999) == refusal(
            "File descriptor named 'fdset-id:7, fd:9999' not found"
        )
        assert client.ask("remove-fd", fdset_id=7) == {"return": {}}
    os.close(reader)
    os.close(writer)
