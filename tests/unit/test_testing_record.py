# SPDX-License-Identifier: Apache-2.0
"""The recorder between a client and a simulated VM: what passes, what is written down, and how it ends."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import UNSET

from vmloop.common.errors import ConfigError, TooLarge
from vmloop.testing import recording_file
from vmloop.testing.recording_file import RecordingFile
from vmloop.worker.qemu.recording import Entry, read_recording

from ..fakes.raw_qmp import DEADLINE, RawClient, negotiated

SIMULATED = [sys.executable, "-m", "vmloop.worker.qemu.simulated"]
GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 1, "minor": 2, "major": 9}, "package": "p"}, "capabilities": []}}\r\n'
)


class Recorder:
    """The program, started."""

    def __init__(self, directory: Path, qmp: Path) -> None:
        self.listen = directory / "listen.sock"
        self.file = directory / "made.jsonl"
        command = [
            sys.executable,
            "-m",
            "vmloop.testing.record",
            "--qmp",
            str(qmp),
            "--listen",
            str(self.listen),
            "--record",
            str(self.file),
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Tell it to end; its exit status and what it printed as errors."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, errors.decode()

    def messages(self) -> list[Any]:
        """What the client or QEMU said, as it stands in the file: (who, what)."""
        return [told(entry) for entry in read_recording(self.file).entries]


def told(entry: Entry) -> tuple[str, Any]:
    """Who said or did what in a line."""
    [pair] = [(name, value) for name in ("qemu", "client", "closed") if (value := getattr(entry, name)) is not UNSET]
    return pair


@pytest.fixture
def qmp(tmp_path: Path) -> Iterator[Path]:
    """The monitor of a simulated VM."""
    with subprocess.Popen(
        [*SIMULATED, "--directory", str(tmp_path), "--count", "1"], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready 1\n"
        yield tmp_path / "sim-000.qmp"
        process.terminate()
        process.wait(DEADLINE)


@pytest.fixture
def recorder(tmp_path: Path, qmp: Path) -> Iterator[Recorder]:
    made = Recorder(tmp_path, qmp)
    assert made.said == b"ready\n"
    yield made
    made.process.kill()
    made.process.communicate()


def test_a_dialogue_passes_and_stands_in_the_file_in_its_order(recorder: Recorder) -> None:
    with negotiated(recorder.listen) as client:
        client.send({"execute": "stop", "id": 1})
        reply, before = client.reply(1)
        assert (reply, [message["event"] for message in before]) == ({"return": {}, "id": 1}, ["STOP"])
    status, errors = recorder.end()
    assert (status, errors) == (0, "")
    assert not recorder.listen.exists()
    recording = read_recording(recorder.file)
    assert (recording.header.qemu, recording.header.package) == ("7.2.22", "vmloop-simulated")
    assert recorder.file.stat().st_mode & 0o777 == 0o600
    kinds = [who for who, _ in recorder.messages()]
    assert kinds == ["qemu", "client", "qemu", "client", "qemu", "qemu", "closed"]
    assert [entry.at for entry in recording.entries] == sorted(entry.at for entry in recording.entries)
    assert recorder.messages()[3:6] == [("client", {"execute": "stop", "id": 1}), ("qemu", before[0]), ("qemu", reply)]


def test_file_descriptors_pass_with_their_command(recorder: Recorder, tmp_path: Path) -> None:
    with negotiated(recorder.listen) as client, (tmp_path / "passed").open("wb") as file:
        client.send_with_fds({"execute": "getfd", "arguments": {"fdname": "x"}}, [file.fileno()])
        assert client.message() == {"return": {}}
        assert client.ask("closefd", fdname="x") == {"return": {}}
    recorder.end()
    counts = {
        entry.client["execute"]: entry.fds
        for entry in read_recording(recorder.file).entries
        if isinstance(entry.client, dict)
    }
    assert counts == {"qmp_capabilities": 0, "getfd": 1, "closefd": 0}


def test_a_reply_of_megabytes_passes_and_is_written_down(recorder: Recorder) -> None:
    with negotiated(recorder.listen) as client:
        client.send({"execute": "x-simulate", "arguments": {"big_reply": 3_000_000}, "id": 1})
        client.send({"execute": "query-name", "id": 2})
        reply, _ = client.reply(2)
        assert len(json.dumps(reply)) > 3_000_000
    recorder.end()
    assert ("qemu", reply) in recorder.messages()


def test_clients_come_one_after_another(recorder: Recorder) -> None:
    with negotiated(recorder.listen), RawClient(recorder.listen) as second:
        assert second.quiet(0.1)
        # The first one still has QEMU to itself.
    with negotiated(recorder.listen) as third:
        assert third.ask("query-name")["return"] == {"name": "sim-000"}
    assert recorder.end(signal.SIGINT)[0] == 0
    assert [value for who, value in recorder.messages() if who == "closed"][:1] == ["client"]


def test_the_recorder_ends_with_qemu_and_the_last_words_are_in_the_file(recorder: Recorder) -> None:
    with negotiated(recorder.listen) as client:
        client.send({"execute": "quit", "id": 1})
        last = client.rest_messages()
        assert [message.get("event", "reply") for message in last] == ["SHUTDOWN", "reply"]
    assert recorder.wait() == (0, "")
    assert recorder.messages()[-3:] == [*(("qemu", message) for message in last), ("closed", "qemu")]


def test_what_is_no_request_passes_and_is_marked(recorder: Recorder) -> None:
    with negotiated(recorder.listen) as client:
        client.send(b"[1]")
        assert "error" in client.message()
    recorder.end()
    entries = read_recording(recorder.file).entries
    assert [entry.client for entry in entries if entry.client is None] == [None]


def test_a_recording_is_torn_when_the_recorder_is_killed(recorder: Recorder) -> None:
    with negotiated(recorder.listen) as client:
        client.ask("query-name")
        recorder.end(signal.SIGKILL)
    with pytest.raises(ConfigError, match="the last line is not the end of a recording"):
        read_recording(recorder.file)


def test_a_recorder_without_qemu_says_so_when_a_client_comes(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, tmp_path / "nobody.sock")
    with RawClient(recorder.listen) as client:
        assert client.rest() == b""
    status, errors = recorder.wait()
    assert status == 1
    assert "nobody.sock: No such file or directory; is QEMU running, with a QMP socket there?" in errors
    assert not recorder.file.exists()


def test_a_qemu_whose_backlog_is_full_is_told_as_that(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(tmp_path / "q.sock"))
        listener.listen(0)
        first.connect(str(tmp_path / "q.sock"))
        recorder = Recorder(tmp_path, tmp_path / "q.sock")
        with RawClient(recorder.listen) as client:
            assert client.rest() == b""
        status, errors = recorder.wait()
    assert status == 1
    assert "q.sock: Resource temporarily unavailable" in errors


@pytest.mark.parametrize("taken", ["listen.sock", "made.jsonl"])
def test_a_recorder_overwrites_nothing(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_text("mine")
    recorder = Recorder(tmp_path, tmp_path / "q.sock")
    status, errors = recorder.wait()
    assert (recorder.said, status) == (b"", 1)
    assert taken in errors
    assert "config-error" in errors
    assert (tmp_path / taken).read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [taken]


def test_a_client_that_does_not_read_stops_qemu_and_not_the_recorders_memory(recorder: Recorder) -> None:
    with negotiated(recorder.listen) as client:
        client.send({"execute": "x-simulate", "arguments": {"big_reply": 4_000_000}, "id": 1})
        client.reply(1)
        for number in range(20):
            client.send({"execute": "query-name", "id": number})
        select.select([], [], [], 0.5)
        status = Path(f"/proc/{recorder.process.pid}/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0])
        assert peak < 60_000, f"{peak} kB"
        assert client.reply(19)[0]["id"] == 19


# -- the file alone -------------------------------------------------------------------------------------------------------


def test_pieces_make_whole_lines_whatever_they_are(tmp_path: Path) -> None:
    made = RecordingFile(tmp_path / "f")
    for byte in GREETING:
        made.qemu(bytes([byte]))
    for byte in b'{"execute": "stop"}{"execute": "cont"}':
        made.client(bytes([byte]))
    made.close()
    whos = [told(entry)[0] for entry in read_recording(tmp_path / "f").entries]
    assert whos == ["qemu", "client", "client"]


@pytest.mark.parametrize(
    ("client", "qemu"),
    [
        (b'ASK, "id": 1}NAME, "id": 2}', [{"return": "web1", "id": 2}, {"return": "hunter2", "id": 1}]),
        (b"NAME}ASK}", [{"return": "web1"}, {"return": "hunter2"}]),
        (b"[1]ASK}NAME}", [{"error": {}}, {"return": "hunter2"}, {"return": "web1"}]),
        (b'ASK, "id": null}NAME}', [{"return": "web1"}, {"return": "hunter2", "id": None}]),
    ],
    ids=["out of order", "without ids", "after what is no request", "with null for an id"],
)
def test_the_answer_to_a_question_for_a_secret_is_hidden(tmp_path: Path, client: bytes, qemu: list[Any]) -> None:
    ask = b'{"execute": "qom-get", "arguments": {"path": "/objects/s", "property": "data"}'
    made = RecordingFile(tmp_path / "f")
    made.qemu(GREETING)
    made.client(client.replace(b"ASK", ask).replace(b"NAME", b'{"execute": "query-name"'))
    made.qemu(b"".join(json.dumps(line).encode() + b"\n" for line in qemu))
    made.close()
    text = (tmp_path / "f").read_text()
    assert "hunter2" not in text
    assert "web1" in text


def test_a_secret_that_comes_to_the_next_client_is_hidden(tmp_path: Path) -> None:
    made = RecordingFile(tmp_path / "f")
    made.qemu(GREETING)
    made.client(b'{"execute": "qom-get", "arguments": {"path": "/objects/s", "property": "data"}, "id": 1}')
    made.closed("client")
    made.qemu(GREETING + b'{"return": "hunter2", "id": 1}\n')
    made.close()
    assert "hunter2" not in (tmp_path / "f").read_text()


def test_after_a_secret_that_never_came_the_next_ones_are_hidden_still(tmp_path: Path) -> None:
    """Requests without an id: the answer that is missing must not shift the others."""
    ask = b'{"execute": "qom-get", "arguments": {"path": "/objects/s", "property": "data"}}'
    made = RecordingFile(tmp_path / "f")
    made.qemu(GREETING)
    made.client(ask)
    made.closed("client")
    made.qemu(GREETING)
    made.client(b'{"execute": "query-status"}' + ask + b'{"execute": "query-name"}')
    made.qemu(b'{"return": {"status": "running"}}\n{"return": "hunter2"}\n')
    made.closed("client")
    made.qemu(GREETING)
    made.client(ask)
    made.qemu(b'{"return": "hunter2"}\n')
    made.close()
    assert "hunter2" not in (tmp_path / "f").read_text()
    assert '"running"' in (tmp_path / "f").read_text()


def test_the_answer_of_the_human_monitor_to_a_question_for_a_secret_is_hidden(tmp_path: Path) -> None:
    made = RecordingFile(tmp_path / "f")
    made.qemu(GREETING)
    ask = {"execute": "human-monitor-command", "arguments": {"command-line": "qom-get /objects/s data"}}
    made.client(json.dumps(ask).encode())
    made.qemu(b'{"return": "\\"hunter2\\"\\r\\n"}\n')
    made.close()
    assert "hunter2" not in (tmp_path / "f").read_text()


def test_file_descriptors_belong_to_the_request_that_they_came_with_a_piece_of(tmp_path: Path) -> None:
    made = RecordingFile(tmp_path / "f")
    made.qemu(GREETING)
    made.client(b'{"execute": "getfd", ', 1)
    made.client(b'"arguments": {"fdname": "x"}}')
    made.client(b'{"execute": "stop"}')
    made.close()
    assert [entry.fds for entry in read_recording(tmp_path / "f").entries[1:]] == [1, 0]


def test_requests_without_answers_are_bounded(tmp_path: Path) -> None:
    made = RecordingFile(tmp_path / "f")
    made.qemu(GREETING)
    made.client(b'{"execute": "stop"}' * recording_file.MAX_UNANSWERED)
    with pytest.raises(TooLarge, match="1024 requests are unanswered"):
        made.client(b'{"execute": "stop"}')
    made.close()


def test_what_does_not_greet_as_qemu_does_is_not_recorded(tmp_path: Path) -> None:
    made = RecordingFile(tmp_path / "f")
    with pytest.raises(ConfigError, match="does not greet as QEMU does; is it a QMP socket"):
        made.qemu(b'{"hello": 1}\n')
    with pytest.raises(ConfigError, match="nothing was recorded"):
        made.close()
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("who", ["client", "qemu"])
def test_a_line_without_an_end_is_too_large(tmp_path: Path, who: str) -> None:
    limit = recording_file.MAX_REQUEST_BYTES if who == "client" else recording_file.MAX_LINE_BYTES
    made = RecordingFile(tmp_path / "f")
    made.qemu(GREETING)
    piece = b" " * (1 << 20)
    feed = made.client if who == "client" else made.qemu
    for _ in range(limit // len(piece)):
        feed(piece)
    with pytest.raises(TooLarge) as caught:
        feed(piece)
    assert caught.value.fields["limit"] == limit
    made.close()
    assert len(read_recording(tmp_path / "f").entries) == 1


def test_a_disk_that_takes_nothing_is_told(tmp_path: Path) -> None:
    made = RecordingFile(tmp_path / "f")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, made._fd)
    os.close(full)
    with pytest.raises(OSError, match="No space left"):
        made.qemu(GREETING)
    with pytest.raises(ConfigError):
        made.close()
