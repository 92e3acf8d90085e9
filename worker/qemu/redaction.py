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

_WORDS: Final = "password|passwd|passphrase|cookie|psk|token"
# Members whose value is a secret wherever they stand. `password-secret` and the like name an object that holds one: not hidden.
_SECRET_MEMBER: Final = re.compile(rf"secret|(.*[-_.])?({_WORDS})", re.IGNORECASE)
# Kinds of objects whose `data` is a secret, and members that name a property which is one.
_SECRET_OBJECT: Final = "secret"
_SECRET_PROPERTIES: Final = frozenset({"data"})

# Within a string. https://user:word@host: the last @ before the path ends it, for a word may hold one.
_IN_URL: Final = re.compile(r"(?<=://)([^/@:\s\"]*):[^/\s\"]+(?=@)")
# password=… in a list of options or in the query of a URL
_IN_OPTIONS: Final = re.compile(rf"(?i)(?<![a-z0-9])({_WORDS})=(?:[^,&\s\"']|,,)+")
# rbd:pool/image:id=…:key=…
_IN_RBD: Final = re.compile(r"(?<=:)key=(?:[^:,\\\s\"']|\\.)+")
# "cookie": "…" in a file name that begins with json:, perhaps in another one, so with backslashes; a name may be cut off.
_JSON_STRING: Final = r"(?s)(?<!\\)(\\*)([\"'])({names})\1\2(\s*:\s*)\1\2.*?(?:(?<!\\)\1\2|\Z)"
_IN_JSON: Final = re.compile(_JSON_STRING.format(names=rf"(?i:secret|(?:[a-z0-9]+[-_.])*(?:{_WORDS}))"))

# A line of the human monitor. Values of options hold blanks there, and an object's may be JSON.
_HUMAN_COMMAND: Final = "human-monitor-command"
_HUMAN_PASSWORD: Final = re.compile(r"(?s)^\s*(set_password|change)\b.*$")
_HUMAN_OBJECT: Final = re.compile(r"^\s*object_add\b")
_HUMAN_OPTIONS: Final = re.compile(rf"(?i)(?<![a-z0-9])({_WORDS}|data)=(?:[^,]|,,)+")
_HUMAN_JSON: Final = re.compile(_JSON_STRING.format(names="data"))
_HUMAN_PROPERTY: Final = re.compile(
    r"(?s)^(\s*qom-[gs]et\s+(?:-j\s+)?(?:\"(?:[^\"\\]|\\.)*\"|\S+)\s+\"?([^\s\"]+)\"?)(?:\s+(.*\S))?\s*$"
)


def redacted_command(request: dict[str, Any]) -> dict[str, Any]:
    """A request as it may be written down; the same value if it holds no secret."""
    name = request.get("execute", request.get("exec-oob"))
    arguments = request.get("arguments")
    if not isinstance(arguments, dict):
        return _member(request)
    hidden = _member(arguments)
    if name == _HUMAN_COMMAND and isinstance(arguments.get("command-line"), str):
        hidden = {**hidden, "command-line": _human_line(arguments["command-line"])}
    elif name == "qom-set" and _names_secret(arguments.get("property")) and "value" in arguments:
        hidden = {**hidden, "value": HIDDEN}
    elif name == "change" and arguments.get("target") == "password" and "arg" in arguments:  # of VNC, before QEMU 6.0
        hidden = {**hidden, "arg": HIDDEN}
    return {key: hidden if key == "arguments" else _redacted(value, 1) for key, value in request.items()}


def answers_with_secret(request: dict[str, Any]) -> bool:
    """Whether the reply to this request is a secret itself."""
    arguments = request.get("arguments")
    name = request.get("execute", request.get("exec-oob"))
    if not isinstance(arguments, dict):
        return False
    if name == _HUMAN_COMMAND and isinstance(arguments.get("command-line"), str):
        asked = _HUMAN_PROPERTY.match(arguments["command-line"])
        return asked is not None and _names_secret(asked[2])
    return name == "qom-get" and _names_secret(arguments.get("property"))


def redacted_message(message: dict[str, Any], *, secret: bool = False) -> dict[str, Any]:
    """A line of QEMU's as it may be written down. `secret`: the answer to a request of `answers_with_secret`."""
    hidden = _member(message)
    return {**hidden, "return": HIDDEN} if secret and "return" in hidden else hidden


def _member(value: dict[str, Any]) -> dict[str, Any]:
    redacted: dict[str, Any] = _redacted(value, 0)
    return redacted


def _redacted(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return _text(value)
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
    secret_property = _names_secret(value.get("name"))  # an item of qom-list-get: {"name": "data", "value": …}
    members: dict[str, Any] = {}
    for key, item in value.items():
        secret = (
            _SECRET_MEMBER.fullmatch(key)
            or (secret_object and key in _SECRET_PROPERTIES)
            or (secret_property and key == "value")
        )
        if secret and isinstance(item, str | dict | list):
            members[key] = HIDDEN
        elif secret_object and key == "props" and isinstance(item, dict):  # before QEMU 6.0
            members[key] = {**_redacted(item, depth + 1), **dict.fromkeys(_SECRET_PROPERTIES & item.keys(), HIDDEN)}
        else:
            members[key] = _redacted(item, depth + 1)
    return members


def _names_secret(name: object) -> bool:
    """Whether a property of this name holds a secret."""
    return isinstance(name, str) and (name in _SECRET_PROPERTIES or _SECRET_MEMBER.fullmatch(name) is not None)


def _text(text: str) -> str:
    """A string that is not a secret as a whole."""
    if "://" in text:
        text = _IN_URL.sub(rf"\1:{HIDDEN}", text)
    if "=" in text:
        text = _IN_OPTIONS.sub(rf"\1={HIDDEN}", text)
        if "rbd:" in text:
            text = _IN_RBD.sub(f"key={HIDDEN}", text)
    return _IN_JSON.sub(_hide_in_json, text) if ":" in text else text


def _hide_in_json(found: re.Match[str]) -> str:
    slashes, quote, name, colon = found.groups()
    mark = slashes + quote
    return f"{mark}{name}{mark}{colon}{mark}{HIDDEN}{mark}"


def _human_line(line: str) -> str:
    if found := _HUMAN_PASSWORD.match(line):
        return f"{found[1]} {HIDDEN}"
    if (found := _HUMAN_PROPERTY.match(line)) and _names_secret(found[2]):
        return f"{found[1]} {HIDDEN}" if found[3] else line
    if _HUMAN_OBJECT.match(line):
        line = _HUMAN_JSON.sub(_hide_in_json, line)
    return _text(_HUMAN_OPTIONS.sub(rf"\1={HIDDEN}", line))
