# SPDX-License-Identifier: Apache-2.0
"""Files written whole: the old one or the new one, never half of either, and nothing left lying about."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest

from vmloop.common.durable import set_aside, sync_directory, write_whole

OLD = b"old" * 50_000
NEW = b"new" * 60_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.json"


def test_a_new_file_is_there_whole_and_private(path: Path) -> None:
    write_whole(path, NEW)
    assert path.read_bytes() == NEW
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == ["run.json"]


@pytest.mark.parametrize("content", [b"", b"x", NEW])
def test_an_old_file_is_replaced(path: Path, content: bytes) -> None:
    write_whole(path, OLD)
    write_whole(path, content)
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["run.json"]


def test_a_reader_that_has_the_old_one_open_keeps_it_whole(path: Path) -> None:
    write_whole(path, OLD)
    with path.open("rb") as reader:
        write_whole(path, NEW)
        assert reader.read() == OLD


def test_a_failed_rename_leaves_what_was_there_and_no_temporary_file(path: Path) -> None:
    (path / "inside").mkdir(parents=True)  # a directory in the way: rename fails
    with pytest.raises(IsADirectoryError):
        write_whole(path, NEW)
    assert os.listdir(path.parent) == ["run.json"]
    assert os.listdir(path) == ["inside"]


def test_a_leftover_of_an_earlier_crash_is_no_obstacle(path: Path) -> None:
    leftover = path.with_name(".run.json.new")
    leftover.write_bytes(b"half of something much longer than the new content")
    write_whole(path, b"short")
    assert path.read_bytes() == b"short"
    assert os.listdir(path.parent) == ["run.json"]


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "none" / "run.json", NEW)


def _write_forever(path: Path, started: int) -> None:
    os.write(started, b"x")
    while True:
        write_whole(path, OLD)
        write_whole(path, NEW)


def test_a_writer_killed_at_any_moment_leaves_one_of_the_two(path: Path) -> None:
    write_whole(path, OLD)
    for _ in range(5):
        reader, writer = os.pipe()
        process = multiprocessing.get_context("fork").Process(target=_write_forever, args=(path, writer))
        process.start()
        assert os.read(reader, 1) == b"x"
        for _ in range(50):
            assert path.read_bytes() in (OLD, NEW)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
        os.close(reader)
        os.close(writer)
        assert path.read_bytes() in (OLD, NEW)
    assert len(os.listdir(path.parent)) <= 2  # five writers leave one temporary file at most
    write_whole(path, NEW)
    assert os.listdir(path.parent) == ["run.json"]


def test_set_aside_keeps_the_content_and_frees_the_name(path: Path) -> None:
    path.write_bytes(b"damaged")
    aside = set_aside(path)
    assert aside.parent == path.parent
    assert aside.name.startswith("run.json.damaged-")
    assert aside.read_bytes() == b"damaged"
    assert not path.exists()


def test_set_aside_twice_keeps_both(path: Path) -> None:
    asides = []
    for number in (1, 2):
        path.write_bytes(b"%d" % number)
        os.utime(path, ns=(number, number))
        asides.append(set_aside(path))
    assert [aside.read_bytes() for aside in asides] == [b"1", b"2"]


def test_sync_directory_wants_a_directory(tmp_path: Path) -> None:
    sync_directory(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        sync_directory(tmp_path / "file")


def test_an_error_of_a_full_disk_names_the_file(tmp_path: Path) -> None:
    """write(2) and fsync(2) do not know its name."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    path = tmp_path / "file"
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_whole(path, b"x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []
