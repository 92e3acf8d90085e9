# SPDX-License-Identifier: Apache-2.0
"""A QEMU that says on its monitor exactly what a test wants said. Run by the worker as a definition's binary (see `install`).

It greets, answers every command with {} by its id, and carries out one command of its own:

    x-say {text, fill?, reply?, close?}     write `text` (latin-1) as it is, but for `fill` letters in the place of each @; then `reply`
                                            to the command (default true); then `close` the connection

and takes the next connection when one is closed. Arguments of the definition change how it begins:

    greet=TEXT      this instead of a greeting
    hang-up         close each connection at once
    refuse          answer qmp_capabilities with an error
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import sys
from pathlib import Path

import vmloop

GREETING = (
    '{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}\n'
)


def install(directory: Path) -> str:
    """An executable that is this program; its path."""
    path = directory / "scripted-qemu"
    root = Path(vmloop.__file__).parent.parent
    path.write_text(f'#!/bin/sh\nPYTHONPATH={root}:$PYTHONPATH exec {sys.executable} {Path(__file__)} "$@"\n')
    path.chmod(0o755)
    return str(path)


def main(arguments: list[str]) -> None:
    found = re.search(r"fd=(\d+)", " ".join(arguments))
    assert found is not None
    greeting = next((text.removeprefix("greet=") for text in arguments if text.startswith("greet=")), GREETING)
    with socket.socket(fileno=int(found.group(1))) as listener:
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):  # it may be left at any time
                if "hang-up" not in arguments:
                    serve(connection, greeting, refuses="refuse" in arguments)


def serve(connection: socket.socket, greeting: str, *, refuses: bool) -> None:
    """One client, until it leaves or is left."""
    connection.sendall(greeting.encode("latin-1"))
    for line in connection.makefile("rb"):
        command = json.loads(line)
        name = command.get("execute") or command.get("exec-oob")
        wanted = command.get("arguments", {}) if name == "x-say" else {}
        if "text" in wanted:
            connection.sendall(wanted["text"].replace("@", "x" * wanted.get("fill", 0)).encode("latin-1"))
        if wanted.get("reply", True):
            answer = {"error": {"class": "GenericError", "desc": "not today"}} if refuses else {"return": _of(name)}
            connection.sendall(json.dumps({**answer, "id": command["id"]}).encode() + b"\r\n")
        if wanted.get("close"):
            return
        if name == "quit":
            sys.exit(0)


def _of(name: str) -> object:
    return {"status": "running", "running": True} if name == "query-status" else {}


if __name__ == "__main__":
    main(sys.argv[1:])
