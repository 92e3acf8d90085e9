# SPDX-License-Identifier: Apache-2.0
"""Targets for the files that outlive a worker and grow record by record: the journal and the answers."""

from __future__ import annotations

import os

from vmloop.common.cursor import Cursor
from vmloop.common.pack import pack
from vmloop.worker.answers import Answers
from vmloop.worker.journal.frames import frame, frames
from vmloop.worker.journal.record import Record, encode_batch
from vmloop.worker.journal.segments import MAGIC
from vmloop.worker.journal.store import EventStore

from .file_targets import directory

EVENT = pack({"vm": "web1", "epoch": 1, "seq": 1, "time": 5, "event": "STOP", "data": {}, "origin": "qmp"})
NAME = "0000000001-00000000000000000001.journal"


def journal(data: bytes) -> None:
    """Any bytes as the newest segment, with its magic and without: what is good is read, nothing raises, and it goes on behind that."""
    for content in (data, MAGIC + data):
        with directory() as root:
            (root / NAME).write_bytes(content)
            store = EventStore(root)
            try:
                assert store.problem == ""
                page = store.read(Cursor(0, 0), 1000, 1 << 20)
                last = store.last
                assert page.last <= last
                if last < Cursor((1 << 32) - 1, 0):
                    following = Record(last.epoch + 1, 1, 0, EVENT)
                    assert store.append([following])
                    assert store.read(last, 10, 1 << 20).bodies == [EVENT]
            finally:
                store.close()


def segments() -> list[bytes]:
    batches = [encode_batch([Record(1, seq, 7, EVENT)]) for seq in (1, 2, 3)]
    pair = encode_batch([Record(2, 1, 0, EVENT), Record(2, 2, 0, EVENT)])
    whole = b"".join(batches) + pair
    return [
        b"",
        whole,
        whole[:-5],
        b"".join(batches) + pair[: len(pair) // 2],
        batches[0] + b"\xff" * 40 + batches[1],
        batches[1] + batches[0],
        whole + bytes(64),
    ]


def answers(data: bytes) -> None:
    """Any bytes as the file of answers: the good beginning is known, and what is written behind it is known to the next worker."""
    with directory() as root:
        path = root / "answers"
        path.write_bytes(data)
        first = Answers(path)
        first.finish(77, b"fuzz", 2, b"body")
        first.close()
        second = Answers(path)
        known = second.known(0, b"fuzz")
        assert known is not None
        assert known.body == b"body"
        second.close()
        assert sorted(os.listdir(root)) == ["answers"]
    for payload, end in frames(data):
        assert data[:end].endswith(frame(payload))


def answer_files() -> list[bytes]:
    made = []
    with directory() as root:
        writer = Answers(root / "answers")
        writer.begun(5, b"k", "stop", Cursor(1, 2))
        writer.step(5, "system_powerdown")
        writer.stepped(5, "system_powerdown", {"code": "qmp-error", "message": "no"})
        writer.finish(6, b"", 4, b"\x80")
        writer.close()
        made.append((root / "answers").read_bytes())
    return [b"", *made, made[0][:-3], frame(b"\x93\xa4Step\x01\xc0"), frame(b"\xc1"), b"\xff" * 30]
