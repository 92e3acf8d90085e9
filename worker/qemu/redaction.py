# SPDX-License-Identifier: Apache-2.0
"""What a recording of a monitor must not hold: passwords, the data of secret objects, cookies. Pure.

Used where a dialogue is written down (testing/recording_file.py) and where a recorded one is played (simulated_script): a command is hidden
the same way before it is looked for, so that one with another password is found all the same.
"""

from __future__ import annotations

import re
from typing import Any, Final

HIDDEN: Final = "(hidden)"

MAX_DEPTH: Final = 512  # levels of a value; what lies deeper is hidden unseen. QEMU itself reads 1024

# Members whose value is a secret wherever they stand. `password-secret` and the like name an object that holds one: not hidden.
_SECRET_MEMBER: Final = re.compile(r"secret|(.*[-_.])?(password|passwd|passphrase|cookie|psk|token)", re.IGNORECASE)
# Kinds of objects whose `data` is a secret, and members that name a property which is one.
_SECRET_OBJECT: Final = "secret"
_SECRET_PROPERTIES: Final = frozenset({"data"})
# https://user:word@host
_IN_URL: Final = re.compile(r"(?<=://)([^/@:\s\"']*):[^/@\s\"']+(?=@)")
# A line of the human monitor, or a string of options: password=…, data=… of an object_add; words after set_password.
_IN_OPTIONS: Final = re.compile(
    r"(?i)\b((?:[a-z]+[-_.])*(?:password|passwd|passphrase|cookie|psk|token|data))=(?:[^,\s]|,,)+"
)
_HUMAN_COMMAND: Final = "human-monitor-command"
_HUMAN_SECRET: Final = re.compile(r"(?is)^\s*(set_password|change)\b(.*)$")


def redacted_command(request: dict[str, Any]) -> dict[str, Any]:
    """A request as it may be written down; the same value if it holds no secret."""
    name = request.get("execute", request.get("exec-oob"))
    arguments = request.get("arguments")
    if not isinstance(arguments, dict):
        return _member(request)
    hidden = _member(arguments)
    if name == _HUMAN_COMMAND and isinstance(hidden.get("command-line"), str):
        hidden = {**hidden, "command-line": _human_line(hidden["command-line"])}
    elif name == "qom-set" and _names_secret(arguments):
        hidden = {**hidden, "value": HIDDEN}
    return {key: hidden if key == "arguments" else _redacted(value, 1) for key, value in request.items()}


def answers_with_secret(request: dict[str, Any]) -> bool:
    """Whether the reply to this request is a secret itself."""
    arguments = request.get("arguments")
    name = request.get("execute", request.get("exec-oob"))
    return name == "qom-get" and isinstance(arguments, dict) and _names_secret(arguments)


def redacted_message(message: dict[str, Any], *, secret: bool = False) -> dict[str, Any]:
    """A line of QEMU's as it may be written down. `secret`: the answer to a request of `answers_with_secret`."""
    hidden = _member(message)
    return {**hidden, "return": HIDDEN} if secret and "return" in hidden else hidden


def _member(value: dict[str, Any]) -> dict[str, Any]:
    redacted: dict[str, Any] = _redacted(value, 0)
    return redacted


def _redacted(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return _IN_URL.sub(rf"\1:{HIDDEN}", value) if "://" in value else value
    if not isinstance(value, dict | list):
        return value
    if depth >= MAX_DEPTH:
        return HIDDEN
    if isinstance(value, list):
        items = []
        for item in value:  # no comprehension: it costs Python another frame a level
            items.append(_redacted(item, depth + 1))  # noqa: PERF401
        return items
    secret_object = str(value.get("qom-type", "")).startswith(_SECRET_OBJECT)
    members = {}
    for key, item in value.items():
        secret = _SECRET_MEMBER.fullmatch(key) or (secret_object and key in _SECRET_PROPERTIES)
        members[key] = HIDDEN if secret and isinstance(item, str | dict | list) else _redacted(item, depth + 1)
    return members


def _names_secret(arguments: dict[str, Any]) -> bool:
    name = str(arguments.get("property", ""))
    return name in _SECRET_PROPERTIES or _SECRET_MEMBER.fullmatch(name) is not None


def _human_line(line: str) -> str:
    if found := _HUMAN_SECRET.match(line):
        return f"{found[1]} {HIDDEN}"
    return _IN_OPTIONS.sub(rf"\1={HIDDEN}", line)
