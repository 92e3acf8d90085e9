# SPDX-License-Identifier: Apache-2.0
"""run.json: comes back as it was written; a torn or foreign one is set aside and named, and what is in a run's directory is cleared."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.common.process import Identity, boot_id
from vmloop.worker.runfile import (
    MAX_BYTES,
    Run,
    RunEnd,
    RunFile,
    clear_run_directory,
    read_run,
    remove_directory,
    write_run,
)

FULL = Run(
    epoch=7,
    boot_id="b00t",
    started=1.5,
    process=Identity(4711, 99, "/usr/bin/qemu-system-x86_64"),
    monitor="/run/vms/web1/monitor.sock",
    agent="/run/vms/web1/agent.sock",
    launched=True,
    may_kill=True,
    binary="qemu-system-x86_64",
    argv=["qemu-system-x86_64", "-name", "grün"],
    oob=True,
    qemu_version="7.2.19",
    definition={"name": "web1", "qemu": {"args": ["-m", "64"]}},
    ended=RunEnd("shutoff", "destroyed", 2.5),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.json"


@pytest.mark.parametrize("run", [FULL, Run(epoch=1)], ids=["full", "bare"])
def test_a_run_comes_back_as_it_was_written(path: Path, run: Run) -> None:
    write_run(path, run)
    assert read_run(path) == run


def test_the_newest_run_replaces_the_one_before(path: Path) -> None:
    write_run(path, FULL)
    write_run(path, Run(epoch=8))
    assert read_run(path) == Run(epoch=8)
    assert os.listdir(path.parent) == ["run.json"]


def test_where_there_was_no_run_there_is_none(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_run(path) is None
    assert caplog.records == []


TORN = {
    "empty": b"",
    "cut": b'{"epoch":7,"boot_id":"b0',
    "no JSON": b"\0\xff",
    "another thing": b"[1, 2]",
    "no epoch": b"{}",
    "a wrong type": b'{"epoch": "seven"}',
    "deep": b"[" * 100_000,
    "too large": b'{"epoch": 7, "binary": "%s"}' % (b"x" * MAX_BYTES),
}


@pytest.mark.parametrize("content", TORN.values(), ids=TORN.keys())
def test_a_damaged_file_is_set_aside_and_named(path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert read_run(path) is None
    (aside,) = path.parent.iterdir()
    assert aside.name.startswith("run.json.damaged-")
    assert aside.read_bytes() == content
    assert str(path) in caplog.text
    assert str(aside) in caplog.text
    write_run(path, FULL)
    assert read_run(path) == FULL


@given(st.integers(0, 1 << 12))
def test_a_file_cut_anywhere_is_read_whole_or_not_at_all(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    path = tmp_path_factory.mktemp("run") / "run.json"
    write_run(path, FULL)
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    assert read_run(path) == (FULL if length >= len(whole) else None)


def test_what_a_later_version_adds_is_no_damage(path: Path) -> None:
    path.write_bytes(b'{"epoch": 3, "from_the_future": [1]}')
    assert read_run(path) == Run(epoch=3)


def test_the_boot_id_is_one_and_the_same_until_the_next_boot() -> None:
    assert boot_id() == boot_id()
    assert len(boot_id()) == 36


def test_the_end_of_a_run_leaves_the_lock_and_the_page(tmp_path: Path) -> None:
    for name in ("monitor.sock", "agent.sock", "carry.0", "carry.1", "agent-carry.0", "agent-carry.1", "lock", "page"):
        (tmp_path / name).touch()
    clear_run_directory(tmp_path)
    clear_run_directory(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["lock", "page"]


def test_a_directory_is_removed_with_its_files_but_not_with_another_directory(tmp_path: Path) -> None:
    directory = tmp_path / "web1"
    (directory / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="inside"):
        remove_directory(directory)
    (directory / "inside").rmdir()
    (directory / "file").touch()
    remove_directory(directory)
    assert not directory.exists()
    remove_directory(directory)


# -- written again ----------------------------------------------------------------------------------------------------------


def hinder(path: Path) -> Path:
    """A directory where the new file would be made: no write succeeds while it is there, for root neither."""
    hindrance = path.with_name(f".{path.name}.new")
    hindrance.mkdir()
    return hindrance


def test_what_the_disk_did_not_take_is_written_again_and_the_newest_wins(path: Path) -> None:
    async def main() -> None:
        told: list[str | None] = []
        again = asyncio.Event()

        def tell(trouble: str | None) -> None:
            told.append(trouble)
            if trouble is None:
                again.set()

        file = RunFile(asyncio.get_running_loop(), path, tell)
        hindrance = hinder(path)
        file.write_or_retry(Run(epoch=1))
        file.write_or_retry(Run(epoch=2))
        assert read_run(path) is None
        hindrance.rmdir()
        async with asyncio.timeout(5.0):
            await again.wait()
        assert read_run(path) == Run(epoch=2)
        assert told[-1] is None
        assert all(trouble is not None and str(path) in trouble for trouble in told[:-1])
        file.close()

    asyncio.run(main())


def test_a_write_that_succeeds_in_the_meantime_is_not_overwritten_by_an_older_one(path: Path) -> None:
    async def main() -> None:
        file = RunFile(asyncio.get_running_loop(), path, lambda trouble: None)
        hindrance = hinder(path)
        file.write_or_retry(Run(epoch=1))
        hindrance.rmdir()
        file.write(Run(epoch=3))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert read_run(path) == Run(epoch=3)
        file.close()

    asyncio.run(main())


def test_a_write_that_cannot_wait_raises_and_leaves_the_old_file(path: Path) -> None:
    async def main() -> None:
        file = RunFile(asyncio.get_running_loop(), path, lambda trouble: None)
        file.write(Run(epoch=1))
        hindrance = hinder(path)
        with pytest.raises(OSError, match=r"run\.json"):
            file.write(Run(epoch=2))
        hindrance.rmdir()
        assert read_run(path) == Run(epoch=1)

    asyncio.run(main())


def test_after_close_nothing_is_tried_again(path: Path) -> None:
    async def main() -> None:
        file = RunFile(asyncio.get_running_loop(), path, lambda trouble: None)
        hindrance = hinder(path)
        file.write_or_retry(Run(epoch=1))
        file.close()
        hindrance.rmdir()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1
        assert read_run(path) is None

    asyncio.run(main())
