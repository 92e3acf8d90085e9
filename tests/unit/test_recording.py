# SPDX-License-Identifier: Apache-2.0
"""Recorded dialogues as files: what is read back, what is refused and how, what is hidden before it is written."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.common.errors import ConfigError
from vmloop.worker.qemu.recording import (
    MAX_NESTING,
    Entry,
    Header,
    Recording,
    decode_recording,
    encode_end,
    encode_line,
)
from vmloop.worker.qemu.redaction import (
    HIDDEN,
    MAX_DEPTH,
    answers_with_secret,
    redacted_command,
    redacted_message,
)

HEADER = Header(1, "2026-11-26T01:20:00Z", "7.2.22", "Debian")

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(max_size=8), plain, max_size=4)
entries = st.one_of(
    st.builds(lambda at, value: Entry(at, qemu=value), st.integers(0, 1000), objects),
    st.builds(
        lambda at, value, fds: Entry(at, client=value, fds=fds),
        st.integers(0, 9),
        st.none() | objects,
        st.integers(0, 16),
    ),
    st.builds(lambda at, who: Entry(at, closed=who), st.integers(0, 9), st.sampled_from(["qemu", "client"])),
)
recordings = st.lists(entries, max_size=6)


def encoded(lines: list[Entry]) -> bytes:
    return b"".join((encode_line(HEADER), *map(encode_line, lines), encode_end(len(lines))))


# -- reading --------------------------------------------------------------------------------------------------------------


@given(recordings)
def test_a_recording_comes_back_as_it_was_written(lines: list[Entry]) -> None:
    assert decode_recording(encoded(lines), "f") == Recording("f", HEADER, tuple(lines))


@given(recordings, st.data())
def test_a_recording_that_is_cut_anywhere_is_refused_by_its_name(lines: list[Entry], data: st.DataObject) -> None:
    whole = encoded(lines)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(ConfigError, match=r"^f(:| is no recording)"):
        decode_recording(cut, "f")


@given(st.lists(entries, min_size=1, max_size=6), st.data())
def test_a_recording_with_a_line_missing_is_refused(lines: list[Entry], data: st.DataObject) -> None:
    parts = encoded(lines).splitlines(keepends=True)
    del parts[data.draw(st.integers(0, len(parts) - 1))]
    with pytest.raises(ConfigError):
        decode_recording(b"".join(parts), "f")


@given(st.binary(max_size=200))
def test_other_bytes_are_no_recording(data: bytes) -> None:
    with pytest.raises(ConfigError, match=r"f is no recording of a monitor|f: line 1: "):
        decode_recording(data, "f")


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([b'{"at":0,"qemu":{},"closed":"qemu"}'], "line 2: one of qemu, client and closed is expected"),
        ([b'{"at":0}'], "line 2: one of qemu, client and closed is expected"),
        ([b'{"at":0,"closed":"nobody"}'], "line 2: Invalid enum value 'nobody'"),
        ([b'{"at":0,"closed":"qemu"}', b'{"at":-1,"closed":"qemu"}'], "line 3: Expected `float` >= 0"),
        ([b'{"at":0,"qemu":[]}'], "line 2: Expected `object`"),
        ([b'{"at":0,"guest":{}}'], "line 2: Object contains unknown field `guest`"),
        ([b'{"at":0,"qemu":' + b'{"a":' * 600 + b"1" + b"}" * 601], f"line 2: over {MAX_NESTING} levels of nesting"),
        ([b"not json"], "line 2: JSON is malformed"),
    ],
    ids=[
        "two kinds",
        "no kind",
        "closed by nobody",
        "before its time",
        "no object",
        "unknown member",
        "too deep",
        "no JSON",
    ],
)
def test_a_line_that_is_wrong_is_named(lines: list[bytes], why: str) -> None:
    text = encode_line(HEADER) + b"\n".join(lines) + b"\n" + encode_end(len(lines))
    with pytest.raises(ConfigError, match=f"^f: {why}"):
        decode_recording(text, "f")


def test_another_format_says_what_to_do() -> None:
    text = encode_line(Header(2, "", "9.9.9")) + encode_end(0)
    with pytest.raises(ConfigError, match="a recording of format 2, this vmloop reads 1: record it again"):
        decode_recording(text, "f")


def test_a_line_that_is_cut_off_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^f: line 3 is cut off: the recorder was killed"):
        decode_recording(encoded([Entry(0.0, qemu={"QMP": {}})])[:-1], "f")


def test_a_recording_without_its_end_says_how_to_use_it_all_the_same() -> None:
    text = encoded([Entry(0.0, qemu={"QMP": {}})])
    torn = text.removesuffix(encode_end(1))
    with pytest.raises(ConfigError, match=r'add the line \{"end": 1\}'):
        decode_recording(torn, "f")
    assert decode_recording(torn + b'{"end": 1}\n', "f").entries


# -- what is hidden -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "arguments", "hidden"),
    [
        (
            "object-add",
            {"qom-type": "secret", "id": "s", "data": "w"},
            {"qom-type": "secret", "id": "s", "data": HIDDEN},
        ),
        (
            "object-add",
            {"qom-type": "secret_keyring", "id": "s", "data": "w"},
            {"qom-type": "secret_keyring", "id": "s", "data": HIDDEN},
        ),
        ("object-add", {"qom-type": "rng", "id": "r", "data": "w"}, None),
        ("set_password", {"protocol": "vnc", "password": "w"}, {"protocol": "vnc", "password": HIDDEN}),
        ("sev-inject-launch-secret", {"packet-header": "h", "secret": "w"}, {"packet-header": "h", "secret": HIDDEN}),
        ("change-vnc-password", {"password": "w"}, {"password": HIDDEN}),
        ("blockdev-add", {"driver": "luks", "key-secret": "s", "file": {"proxy-password-secret": "p"}}, None),
        (
            "blockdev-add",
            {"driver": "https", "url": "https://me:w@host/x", "cookie": "c"},
            {"driver": "https", "url": f"https://me:{HIDDEN}@host/x", "cookie": HIDDEN},
        ),
        (
            "qom-set",
            {"path": "/s", "property": "data", "value": "w"},
            {"path": "/s", "property": "data", "value": HIDDEN},
        ),
        ("qom-set", {"path": "/s", "property": "size", "value": "w"}, None),
        ("human-monitor-command", {"command-line": "set_password vnc w"}, {"command-line": f"set_password {HIDDEN}"}),
        (
            "human-monitor-command",
            {"command-line": "object_add secret,id=s,data=a,,b,format=raw"},
            {"command-line": f"object_add secret,id=s,data={HIDDEN},format=raw"},
        ),
        (
            "human-monitor-command",
            {"command-line": "object_add secret,id=s,data=two words,format=raw"},
            {"command-line": f"object_add secret,id=s,data={HIDDEN},format=raw"},
        ),
        (
            "human-monitor-command",
            {"command-line": 'object_add {"qom-type": "secret", "data": "a\\"b", "id": "s"}'},
            {"command-line": f'object_add {{"qom-type": "secret", "data": "{HIDDEN}", "id": "s"}}'},
        ),
        (
            "human-monitor-command",
            {"command-line": "qom-set /objects/s data two words"},
            {"command-line": f"qom-set /objects/s data {HIDDEN}"},
        ),
        (
            "human-monitor-command",
            {"command-line": 'qom-set -j "/objects/s" "data" "w"'},
            {"command-line": f'qom-set -j "/objects/s" "data" {HIDDEN}'},
        ),
        ("human-monitor-command", {"command-line": "qom-set /objects/s size 7"}, None),
        ("human-monitor-command", {"command-line": "qom-get /objects/s data"}, None),
        ("human-monitor-command", {"command-line": "info status"}, None),
        (
            "object-add",  # QEMU before 6.0
            {"qom-type": "secret", "id": "s", "props": {"data": "w", "format": "raw"}},
            {"qom-type": "secret", "id": "s", "props": {"data": HIDDEN, "format": "raw"}},
        ),
        (
            "change",  # likewise
            {"device": "vnc", "target": "password", "arg": "w"},
            {"device": "vnc", "target": "password", "arg": HIDDEN},
        ),
        ("change", {"device": "ide0", "target": "a.iso", "arg": "raw"}, None),
        ("blockdev-add", {"url": "https://me:p@s'w@host/x@y"}, {"url": f"https://me:{HIDDEN}@host/x@y"}),
        ("blockdev-add", {"url": "https://host/x?a=1&token=w&b=2"}, {"url": f"https://host/x?a=1&token={HIDDEN}&b=2"}),
        ("blockdev-add", {"file": "rbd:pool/i:id=me:key=AQ==:x=y"}, {"file": f"rbd:pool/i:id=me:key={HIDDEN}:x=y"}),
        (
            "blockdev-add",
            {"file": 'json:{"file.cookie": "w", "file": "json:{\\"password\\": \\"w\\"}", "id": "i"}'},
            {
                "file": f'json:{{"file.cookie": "{HIDDEN}", "file": "json:{{\\"password\\": \\"{HIDDEN}\\"}}",'
                ' "id": "i"}'
            },
        ),
        ("blockdev-add", {"file": 'json:{"cookie": "w'}, {"file": f'json:{{"cookie": "{HIDDEN}"'}),
        ("blockdev-add", {"file": 'json:{"password-secret": "s", "data": "d"}'}, None),
        ("stop", {}, None),
    ],
)
def test_a_secret_in_a_command_is_hidden_and_nothing_else(
    command: str, arguments: dict[str, Any], hidden: dict[str, Any] | None
) -> None:
    request = {"execute": command, "arguments": arguments, "id": 7}
    assert redacted_command(request) == {**request, "arguments": arguments if hidden is None else hidden}
    assert list(redacted_command(request)) == list(request)
    assert redacted_command(redacted_command(request)) == redacted_command(request)


def test_the_reply_that_is_a_secret_itself_is_hidden() -> None:
    asked = {"execute": "qom-get", "arguments": {"path": "/objects/s", "property": "data"}}
    assert answers_with_secret(asked)
    assert not answers_with_secret({"execute": "qom-get", "arguments": {"path": "/objects/s", "property": "type"}})
    for line, secret in [
        ("qom-get /objects/s data", True),
        ('qom-get "/objects/s" "data"', True),
        ("qom-get /s id", False),
    ]:
        human = {"execute": "human-monitor-command", "arguments": {"command-line": line}}
        assert answers_with_secret(human) is secret
    assert redacted_message({"return": "w", "id": 1}, secret=True) == {"return": HIDDEN, "id": 1}
    assert redacted_message({"return": "w", "id": 1}) == {"return": "w", "id": 1}
    assert redacted_message({"error": {"class": "x"}}, secret=True) == {"error": {"class": "x"}}


def test_a_property_in_a_list_of_them_is_hidden() -> None:
    said = {"return": [{"properties": [{"name": "data", "value": "w"}, {"name": "id", "value": "s"}]}]}
    hidden = {"return": [{"properties": [{"name": "data", "value": HIDDEN}, {"name": "id", "value": "s"}]}]}
    assert redacted_message(said) == hidden
    assert redacted_message({"return": [{"name": "data", "type": "str"}]}) == {
        "return": [{"name": "data", "type": "str"}]
    }


@pytest.mark.parametrize("piece", ["\\", "://", '"cookie":"', "a-", "qom-get ", "://a:", "key=\\"])
def test_no_text_takes_long_to_look_at(piece: str) -> None:
    """A megabyte takes milliseconds, unless a pattern goes back and forth in it: then it takes hours."""
    text = "rbd: = object_add " + piece * ((1 << 20) // len(piece))
    began = time.process_time()
    redacted_command({"execute": "human-monitor-command", "arguments": {"command-line": text}})
    assert time.process_time() - began < 10


def test_what_lies_too_deep_to_look_at_is_hidden() -> None:
    value: Any = {"password": "w"}
    for _ in range(MAX_DEPTH):
        value = [value]
    assert "w" not in repr(redacted_message({"return": value}))


@given(objects)
def test_what_holds_no_secret_is_left_as_it_is(arguments: dict[str, Any]) -> None:
    assert redacted_message({"return": arguments}) == {"return": arguments}
