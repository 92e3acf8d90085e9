# SPDX-License-Identifier: Apache-2.0
"""guest-file-*: modes, positions, ends and errors, with qemu-ga's own words for what is wrong."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest

from ..fakes.raw_qmp import RawClient, refusal
from .subjects import AgentSubject

MAX_READ = 48 << 20


@pytest.fixture
def client(agent: AgentSubject) -> Iterator[RawClient]:
    with RawClient(agent.path) as client:
        yield client


@pytest.fixture
def path(agent: AgentSubject, client: RawClient, request: pytest.FixtureRequest) -> str:
    """A file of ten digits that no other test uses."""
    path = f"{agent.scratch}/file-{abs(hash(request.node.nodeid))}"
    with File(client, path, "w") as file:
        file.write(b"0123456789")
    return path


class File:
    """A handle; what goes wrong with it is an error reply."""

    def __init__(self, client: RawClient, path: str, mode: str) -> None:
        self.client = client
        self.handle: int = client.ask("guest-file-open", path=path, mode=mode)["return"]

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.ask("close") == {"return": {}}

    def ask(self, what: str, **arguments: Any) -> Any:
        return self.client.ask(f"guest-file-{what}", handle=self.handle, **arguments)

    def write(self, data: bytes) -> None:
        assert self.ask("write", buf_b64=base64.b64encode(data).decode()) == {
            "return": {"count": len(data), "eof": False}
        }

    def read(self, count: int) -> tuple[bytes, bool]:
        got = self.ask("read", count=count)["return"]
        data = base64.b64decode(got["buf-b64"])
        assert got["count"] == len(data)
        return data, got["eof"]

    def seek(self, offset: int, whence: int | str) -> int:
        moved = self.ask("seek", offset=offset, whence=whence)["return"]
        assert moved["eof"] is False
        return int(moved["position"])


def content(client: RawClient, path: str) -> bytes:
    with File(client, path, "r") as file:
        return file.read(4096)[0]


def test_the_end_is_told_by_the_read_that_runs_into_it(client: RawClient, path: str) -> None:
    with File(client, path, "r") as file:
        assert file.read(4) == (b"0123", False)
        assert file.read(6) == (b"456789", False)
        assert file.read(6) == (b"", True)
        assert file.read(0) == (b"", False)
        assert file.read(MAX_READ) == (b"", True)


def test_a_read_takes_4096_bytes_unless_told_otherwise(client: RawClient, path: str) -> None:
    with File(client, path, "w") as file:
        file.write(b"x" * 5000)
    with File(client, path, "r") as file:
        assert file.ask("read")["return"]["count"] == 4096
        assert file.ask("read")["return"] == {
            "count": 904,
            "buf-b64": base64.b64encode(b"x" * 904).decode(),
            "eof": True,
        }


def test_a_position_may_be_set_from_the_start_the_end_and_where_it_is(client: RawClient, path: str) -> None:
    with File(client, path, "r") as file:
        assert file.seek(2, "set") == 2
        assert file.read(3) == (b"234", False)
        assert file.seek(-2, "cur") == 3
        assert file.seek(-2, "end") == 8
        assert file.read(5) == (b"89", True)
        assert file.seek(2, 0) == 2
        assert file.seek(1, 1) == 3
        assert file.seek(0, 2) == 10
        assert file.seek(100, "set") == 100
        assert file.read(5) == (b"", True)


def test_modes_say_what_may_be_done_and_what_becomes_of_the_content(client: RawClient, path: str) -> None:
    with File(client, path, "r+") as file:
        assert file.read(2) == (b"01", False)
        file.write(b"XY")
        assert file.read(2) == (b"45", False)
    assert content(client, path) == b"01XY456789"
    with File(client, path, "a") as file:
        file.seek(0, "set")
        file.write(b"end")
        assert file.seek(0, "cur") == 13
    with File(client, path, "a+") as file:
        assert file.read(3) == (b"01X", False)
        file.write(b"!")
    assert content(client, path) == b"01XY456789end!"
    with File(client, path, "w+") as file:
        assert file.read(3) == (b"", True)
        file.write(b"new")
        assert file.seek(0, "set") == 0
        assert file.read(3) == (b"new", False)
        file.seek(5, "set")
        file.write(b"far")
        assert file.ask("flush") == {"return": {}}
    assert content(client, path) == b"new\0\0far"


@pytest.mark.parametrize("mode", ["rb", "wb", "ab", "rb+", "r+b", "wb+", "w+b", "ab+", "a+b"])
def test_a_b_changes_nothing(client: RawClient, path: str, mode: str) -> None:
    File(client, path, mode).__exit__()


@pytest.mark.parametrize("mode", ["", "x", "rw", "br", "r+x", "+r", "rbb"])
def test_other_modes_are_refused(client: RawClient, path: str, mode: str) -> None:
    assert client.ask("guest-file-open", path=path, mode=mode) == refusal(f"invalid file open mode '{mode}'")


def test_a_handle_that_may_not_is_a_bad_descriptor(client: RawClient, path: str) -> None:
    with File(client, path, "r") as file:
        assert file.ask("write", buf_b64="YQ==") == refusal("failed to write to file: Bad file descriptor")
        assert file.ask("flush") == {"return": {}}
    with File(client, path, "w") as file:
        assert file.ask("read") == refusal("failed to read file: Bad file descriptor")


def test_a_count_may_be_less_than_the_data_but_not_more(client: RawClient, path: str) -> None:
    with File(client, path, "w") as file:
        assert file.ask("write", buf_b64="MDEyMw==", count=3) == {"return": {"count": 3, "eof": False}}
        assert file.ask("write", buf_b64="MDEyMw==", count=0) == {"return": {"count": 0, "eof": False}}
        for count in (5, -1):
            words = f"value '{count}' is invalid for argument count"
            assert file.ask("write", buf_b64="MDEyMw==", count=count) == refusal(words)
            if count < 0:
                assert file.ask("read", count=count) == refusal(words)
        assert file.ask("read", count=MAX_READ + 1) == refusal(f"value '{MAX_READ + 1}' is invalid for argument count")
        assert file.ask("write", buf_b64="") == {"return": {"count": 0, "eof": False}}
        assert file.ask("write", buf_b64="YQ") == {"return": {"count": 0, "eof": False}}
        assert file.ask("write", buf_b64="!!") == refusal("Base64 data contains invalid characters")
    assert content(client, path) == b"012"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"offset": -2, "whence": 0}, "failed to seek file: Invalid argument"),
        ({"offset": 0, "whence": 3}, "invalid whence code 3"),
        ({"offset": 0, "whence": "x"}, "Parameter 'whence' does not accept value 'x'"),
        ({"offset": 0, "whence": None}, "Invalid parameter type for 'whence', expected: GuestFileWhence"),
        ({"offset": 0, "whence": 1.5}, "Invalid parameter type for 'whence', expected: integer"),
        ({"offset": 0}, "Parameter 'whence' is missing"),
        ({}, "Parameter 'offset' is missing"),
    ],
    ids=str,
)
def test_a_wrong_seek_is_refused(client: RawClient, path: str, arguments: dict[str, Any], words: str) -> None:
    with File(client, path, "r") as file:
        assert file.ask("seek", **arguments) == refusal(words)


def test_a_handle_is_a_number_that_is_not_used_again(client: RawClient, path: str) -> None:
    with File(client, path, "r") as first:
        pass
    with File(client, path, "r") as second:
        assert second.handle > first.handle
    gone = refusal(f"handle '{first.handle}' has not been found")
    for what, arguments in (
        *(("close", {}), ("read", {}), ("flush", {}), ("write", {"buf_b64": "YQ=="})),
        ("seek", {"offset": 0, "whence": 0}),
    ):
        assert first.ask(what, **arguments) == gone


def test_what_is_not_there_cannot_be_opened(client: RawClient, agent: AgentSubject) -> None:
    for path, mode in (
        (f"{agent.scratch}/nowhere", "r"),
        (f"{agent.scratch}/nowhere", "r+"),
        ("/no/where", "w"),
        ("", "w"),
    ):
        assert client.ask("guest-file-open", path=path, mode=mode) == refusal(
            f"failed to open file '{path}' (mode: '{mode}'): No such file or directory"
        )
    assert client.ask("guest-file-open", path=agent.scratch, mode="w") == refusal(
        f"failed to open file '{agent.scratch}' (mode: 'w'): Is a directory"
    )


def test_what_is_written_is_what_a_program_reads(client: RawClient, path: str) -> None:
    pid = client.ask("guest-exec", path="/usr/bin/sha256sum", arg=[path], capture_output=True)["return"]["pid"]
    while not (status := client.ask("guest-exec-status", pid=pid)["return"])["exited"]:
        pass  # the test's own deadline bounds it
    digest = b"84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"
    assert base64.b64decode(status["out-data"]) == digest + b"  " + path.encode() + b"\n"
