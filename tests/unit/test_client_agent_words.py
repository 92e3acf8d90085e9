# SPDX-License-Identifier: Apache-2.0
"""The fake guest says what qemu-ga says: a conversation recorded from qemu-ga 7.2.22, held with it again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmloop.client import connect
from vmloop.common.errors import AgentError

from ..fakes.guest_on_wire import Ended, GuestOnWire
from ..fakes.native_broker import NativeBroker

GENERIC = "GenericError"
NOT_FOUND = "CommandNotFound"

# (command, arguments, `return` or (class, desc)), in this order. The file /f held b"hello world"; guest-fstrim was blocked.
RECORDED: list[tuple[str, dict[str, Any], Any]] = [
    ("guest-ping", {}, {}),
    ("nosuch", {}, (NOT_FOUND, "The command nosuch has not been found")),
    ("guest-fstrim", {}, (NOT_FOUND, "Command guest-fstrim has been disabled")),
    ("guest-file-open", {"path": "/f"}, 1000),
    ("guest-file-read", {"handle": 1000, "count": 5}, {"count": 5, "buf-b64": "aGVsbG8=", "eof": False}),
    ("guest-file-read", {"handle": 1000, "count": 0}, {"count": 0, "buf-b64": "", "eof": False}),
    ("guest-file-read", {"handle": 1000}, {"count": 6, "buf-b64": "IHdvcmxk", "eof": True}),
    ("guest-file-read", {"handle": 1000}, {"count": 0, "buf-b64": "", "eof": True}),
    ("guest-file-read", {"handle": 1000, "count": -1}, (GENERIC, "value '-1' is invalid for argument count")),
    (
        "guest-file-read",
        {"handle": 1000, "count": 50331649},
        (GENERIC, "value '50331649' is invalid for argument count"),
    ),
    ("guest-file-seek", {"handle": 1000, "offset": 0, "whence": 2}, {"position": 11, "eof": False}),
    ("guest-file-seek", {"handle": 1000, "offset": 0, "whence": 0}, {"position": 0, "eof": False}),
    (
        "guest-file-write",
        {"handle": 1000, "buf-b64": "eA=="},
        (GENERIC, "failed to write to file: Bad file descriptor"),
    ),
    ("guest-file-flush", {"handle": 1000}, {}),
    ("guest-file-close", {"handle": 1000}, {}),
    ("guest-file-close", {"handle": 1000}, (GENERIC, "handle '1000' has not been found")),
    (
        "guest-file-open",
        {"path": "/x", "mode": "r"},
        (GENERIC, "failed to open file '/x' (mode: 'r'): No such file or directory"),
    ),
    ("guest-file-open", {"path": "/f", "mode": "zz"}, (GENERIC, "invalid file open mode 'zz'")),
    ("guest-file-open", {"path": "/g", "mode": "wb"}, 1001),
    ("guest-file-write", {"handle": 1001, "buf-b64": "YWJj"}, {"count": 3, "eof": False}),
    ("guest-file-write", {"handle": 1001, "buf-b64": ""}, {"count": 0, "eof": False}),
    ("guest-file-write", {"handle": 1001, "buf-b64": "@@"}, (GENERIC, "Base64 data contains invalid characters")),
    ("guest-file-read", {"handle": 1001}, (GENERIC, "failed to read file: Bad file descriptor")),
    ("guest-file-close", {"handle": 1001}, {}),
    (
        "guest-exec",
        {"path": "/nonexistent"},
        (
            GENERIC,
            "Guest agent command failed, error was "
            "'Failed to execute child process \u201c/nonexistent\u201d (No such file or directory)'",
        ),
    ),
    ("guest-exec", {"path": "/bin/echo", "arg": ["hi"], "capture-output": True}, {"pid": 4711}),
    ("guest-exec-status", {"pid": 4711}, {"exited": False}),
    ("guest-exec-status", {"pid": 4711}, {"exitcode": 0, "out-data": "aGkK", "out-truncated": False, "exited": True}),
    ("guest-exec-status", {"pid": 4711}, (GENERIC, "Invalid parameter 'pid'")),
    ("guest-exec", {"path": "/bin/echo", "arg": ["hi"]}, {"pid": 4712}),
    ("guest-exec-status", {"pid": 4712}, {"exited": False}),
    ("guest-exec-status", {"pid": 4712}, {"exitcode": 0, "exited": True}),
    ("guest-fsfreeze-status", {}, "thawed"),
    ("guest-fsfreeze-thaw", {}, 0),
]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[NativeBroker]:
    with NativeBroker(tmp_path) as broker:
        yield broker


def test_the_fake_guest_says_what_was_recorded(broker: NativeBroker) -> None:
    guest = GuestOnWire(broker, files={"/f": b"hello world"}, disabled={"guest-fstrim"})
    guest.programs["/bin/echo"] = lambda got: Ended(out=" ".join(got.args).encode() + b"\n", looks=1)
    said = []
    with connect(broker.endpoint) as host:
        for command, arguments, _ in RECORDED:
            try:
                said.append((command, arguments, host.vm("web1").agent(command, arguments)))
            except AgentError as error:
                said.append((command, arguments, (error.fields["class"], error.fields["desc"])))
    assert said == RECORDED
