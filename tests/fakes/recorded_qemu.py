# SPDX-License-Identifier: Apache-2.0
"""A recorded dialogue of a probe: made from a real QEMU, replayed without one, or by a stand-in for its binary that can be broken.

    python -m vmloop.tests.fakes.recorded_qemu record BINARY FILE

A file holds {"greeting": …, "runs": {MACHINE: [{"name", "execute", "arguments", "return" or "error"}]}} as JSON, compressed.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

from vmloop.common.capabilities import Capabilities
from vmloop.worker.probe.conversation import Conversation
from vmloop.worker.probe.document import document
from vmloop.worker.probe.probing import ANY, TCG, find_binary
from vmloop.worker.probe.questions import PROBE, PROBE_TCG, Question, Reply, due, kvm_enabled
from vmloop.worker.probe.throwaway import Throwaway

DATA: Final = Path(__file__).parent.parent / "data" / "probe"
QEMU_7_2: Final = DATA / "qemu-7.2.22-x86_64.json.gz"


class Recording(NamedTuple):
    """One file."""

    greeting: dict[str, Any]
    runs: dict[str, list[dict[str, Any]]]

    def reply(self, machine: str, command: str, arguments: dict[str, Any] | None) -> dict[str, Any]:
        """What was answered; to what was not asked then, CommandNotFound."""
        for entry in self.runs.get(machine, []):
            if entry["execute"] == command and entry.get("arguments") == arguments:
                return {key: entry[key] for key in ("return", "error") if key in entry}
        return {"error": {"class": "CommandNotFound", "desc": f"The command {command} has not been found"}}

    def replay(self, machine: str, table: tuple[Question, ...]) -> dict[str, Reply]:
        """The answers to a table's questions, as a conversation would collect them."""
        replies: dict[str, Reply] = {}
        while questions := due(table, replies):
            for question in questions:
                message = self.reply(machine, question.command, question.arguments)
                error = message.get("error")
                replies[question.name] = (
                    Reply(error=f"{error['class']}: {error['desc']}") if error else Reply(message["return"])
                )
        return replies

    def document(self, binary: str = "/usr/bin/qemu-system-x86_64") -> Capabilities:
        return document(binary, self.replay(ANY, PROBE), self.replay(TCG, PROBE_TCG) if TCG in self.runs else None)


def load(path: Path = QEMU_7_2) -> Recording:
    with gzip.open(path) as file:
        return Recording(**json.load(file))


# -- the stand-in -----------------------------------------------------------------------------------------------------------


def binary_that(
    path: Path, *, cut: int = -1, hang: int = -1, errors: bool = False, prints: str = "", then: str = ""
) -> Path:
    """An executable that answers as the recorded QEMU did.

    `cut`: after so many answers it ends; `hang`: after so many it says nothing more; `errors`: every answer is one; `prints`: on standard
    output, first; `then`: a line of shell to run before it.
    """
    root = Path(__file__).parent.parent.parent
    options = json.dumps({"cut": cut, "hang": hang, "errors": errors, "prints": prints})
    path.write_text(
        f"#!/bin/sh\n{then}\nexec '{sys.executable}' -c 'from vmloop.tests.fakes.recorded_qemu import play; play()' '{options}' \"$@\"\n"
    )
    path.chmod(0o755)
    assert root.is_dir()
    return path


def play() -> None:
    """Be the stand-in. Arguments: the options as JSON, then a QEMU's."""
    options = json.loads(sys.argv[1])
    arguments = sys.argv[2:]
    sys.stdout.write(options["prints"])
    sys.stdout.flush()
    machine = arguments[arguments.index("-machine") + 1]
    chardev = arguments[arguments.index("-chardev") + 1]
    fd = next(int(part.removeprefix("fd=")) for part in chardev.split(",") if part.startswith("fd="))
    recording = load()
    with socket.socket(fileno=fd) as listener, listener.accept()[0] as connection, connection.makefile("rwb") as stream:
        stream.write(json.dumps({"QMP": recording.greeting}).encode() + b"\r\n")
        stream.flush()
        for count, line in enumerate(stream):
            if count == options["cut"]:
                os._exit(7)
            if count == options["hang"]:
                stream.read()
            request = json.loads(line)
            stream.write(
                json.dumps(_answer(recording, machine, request, options) | {"id": request["id"]}).encode() + b"\r\n"
            )
            stream.flush()


def _answer(recording: Recording, machine: str, request: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    if request["execute"] == "qmp_capabilities":
        return {"return": {}}
    if options["errors"]:
        return {"error": {"class": "GenericError", "desc": "not today"}}
    return recording.reply(machine, request["execute"], request.get("arguments"))


# -- recording --------------------------------------------------------------------------------------------------------------


async def _record(binary: str) -> Recording:
    runs = {}
    replies: dict[str, Reply] = {}
    greeting: dict[str, Any] = {}
    for machine, table in ((ANY, PROBE), (TCG, PROBE_TCG)):
        if machine == TCG and not kvm_enabled(replies):
            break
        async with Throwaway(binary, machine) as qemu:
            reader, writer = await asyncio.open_unix_connection(sock=qemu.monitor, limit=1 << 24)
            conversation = _Listening(reader, writer)
            await conversation.open()
            replies = await conversation.ask_all(table)
            greeting = conversation.greeting
            writer.close()
        by_name = {question.name: question for question in table}
        runs[machine] = [_entry(by_name[name], reply) for name, reply in replies.items()]
    return Recording(greeting, runs)


class _Listening(Conversation):
    greeting: dict[str, Any]

    async def _line(self, what: str, seconds: float) -> dict[str, Any]:
        message = await super()._line(what, seconds)
        if "QMP" in message:
            self.greeting = message["QMP"]
        return message


def _entry(question: Question, reply: Reply) -> dict[str, Any]:
    asked: dict[str, Any] = {"name": question.name, "execute": question.command}
    if question.arguments:
        asked["arguments"] = question.arguments
    kind, _, desc = reply.error.partition(": ")
    return asked | ({"error": {"class": kind, "desc": desc}} if reply.error else {"return": reply.value})


if __name__ == "__main__":
    _, _, asked_of, target = sys.argv
    recorded = asyncio.run(_record(find_binary(asked_of)))
    Path(target).write_bytes(gzip.compress(json.dumps(recorded._asdict()).encode(), mtime=0))
