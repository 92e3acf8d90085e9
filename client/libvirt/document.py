# SPDX-License-Identifier: Apache-2.0
"""An imported definition as a file for people: TOML, an option a line, with the notes as comments at its head. Used by client/cli."""

from __future__ import annotations

import json

import msgspec

from ...common.definition import definition_to_toml
from .importing import Imported
from .notes import Kind

# As a definition without arguments is written, and with them.
_NO_ARGUMENTS = b"args = []\n"


def document(imported: Imported, origin: str) -> bytes:
    """Reads back as the same definition."""
    definition = imported.definition
    bare = definition_to_toml(
        msgspec.structs.replace(definition, qemu=msgspec.structs.replace(definition.qemu, args=[]))
    )
    head, found, rest = bare.partition(_NO_ARGUMENTS)
    assert found  # definition_to_toml writes every key
    return _comments(imported, origin) + head + _arguments(imported) + rest


def _comments(imported: Imported, origin: str) -> bytes:
    lines = [f"made by vmloop import from {origin}, a domain of libvirt's"]
    for kind in Kind:
        lines += [f"{kind.words}: {note.what}: {note.why}" for note in imported.notes if note.kind is kind]
    return "".join(f"# {_on_one_line(line)}\n" for line in lines).encode(errors="backslashreplace")


def _on_one_line(text: str) -> str:
    """TOML's comments hold no control characters."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def _arguments(imported: Imported) -> bytes:
    lines = [", ".join(_quoted(word) for word in option.words()) for option in imported.options]
    return ("args = [\n" + "".join(f"    {line},\n" for line in lines) + "]\n").encode() if lines else _NO_ARGUMENTS


def _quoted(text: str) -> str:
    """One argument. JSON inside is easier to read in a literal string, which knows no escapes."""
    if '"' in text and "'" not in text and text.isprintable():
        return f"'{text}'"
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # DEL: TOML wants it escaped, JSON does not
