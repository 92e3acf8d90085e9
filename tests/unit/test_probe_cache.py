# SPDX-License-Identifier: Apache-2.0
"""Documents are probed once, kept, found again, and thrown away when what they hang on has changed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from vmloop.common.capabilities import Capabilities
from vmloop.common.errors import BadRequest, DeadlineExceeded, LaunchFailed
from vmloop.worker.probe.arguments import wrong_arguments
from vmloop.worker.probe.asking import Asking
from vmloop.worker.probe.cache import Cache, Cached, decode_document, encode_document
from vmloop.worker.probe.validity import Stamp, stamp_of

from ..fakes.recorded_qemu import binary_that

T = TypeVar("T")

SOON = 10.0


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    """A stand-in that counts how often it is started."""
    return binary_that(tmp_path / "qemu", then=f"echo . >> {tmp_path}/starts")


def starts(binary: Path) -> int:
    """How often it was started; a probe under KVM starts it twice."""
    file = binary.with_name("starts")
    return len(file.read_text().split()) if file.exists() else 0


def asking(work: Callable[[Asking], Awaitable[T]], directory: Path | None) -> T:
    async def scene() -> T:
        asking = Asking(Cache(directory))
        try:
            return await work(asking)
        finally:
            await asking.close()

    return asyncio.run(scene())


def ask(binary: Path, directory: Path | None, *, refresh: bool = False) -> Capabilities:
    async def work(asking: Asking) -> Capabilities:
        return (await asking.known(str(binary), seconds=SOON, refresh=refresh)).capabilities

    return asking(work, directory)


def file_of(binary: Path, directory: Path) -> Path:
    return directory / f"{hashlib.sha256(os.fsencode(binary)).hexdigest()}.json"


def test_the_second_to_ask_finds_the_file(tmp_path: Path, binary: Path) -> None:
    first = ask(binary, tmp_path / "c")
    assert starts(binary) == 2
    assert ask(binary, tmp_path / "c") == first
    assert starts(binary) == 2
    file = file_of(binary, tmp_path / "c")
    assert json.loads(file.read_text())["capabilities"]["binary"] == str(binary)
    assert file.stat().st_mode & 0o777 == 0o600


def test_who_asks_to_refresh_gets_a_new_probe(tmp_path: Path, binary: Path) -> None:
    ask(binary, tmp_path / "c")
    ask(binary, tmp_path / "c", refresh=True)
    assert starts(binary) == 4


def test_many_who_ask_at_once_get_one_probe(tmp_path: Path, binary: Path) -> None:
    async def work(asking: Asking) -> list[Capabilities]:
        known = await asyncio.gather(*(asking.known(str(binary), seconds=SOON) for _ in range(20)))
        return [one.capabilities for one in known]

    found = asking(work, tmp_path / "c")
    assert all(one is found[0] for one in found)
    assert starts(binary) == 2


def test_two_processes_that_ask_at_once_make_one_probe(tmp_path: Path, binary: Path) -> None:
    """Two of them, as far as the lock can tell: each opens its file itself."""

    async def work(one: Asking) -> None:
        other = Asking(Cache(tmp_path / "c"))
        await asyncio.gather(one.known(str(binary), seconds=SOON), other.known(str(binary), seconds=SOON))

    asking(work, tmp_path / "c")
    assert starts(binary) == 2


def test_who_gives_up_waiting_does_not_end_the_probe_for_the_others(tmp_path: Path, binary: Path) -> None:
    async def work(asking: Asking) -> None:
        patient = asyncio.ensure_future(asking.known(str(binary), seconds=SOON))
        with pytest.raises(DeadlineExceeded, match="goes on"):
            await asking.known(str(binary), seconds=0.01)
        assert (await patient).capabilities.version == (7, 2, 22)

    asking(work, tmp_path / "c")
    assert starts(binary) == 2


def test_a_binary_that_hangs_holds_up_no_other(tmp_path: Path, binary: Path) -> None:
    hung = binary_that(tmp_path / "hung", hang=2)

    async def work(asking: Asking) -> None:
        waiting = asyncio.ensure_future(asking.known(str(hung), seconds=SOON))
        assert (await asking.known(str(binary), seconds=SOON)).capabilities.version == (7, 2, 22)
        assert not waiting.done()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    asking(work, tmp_path / "c")


def test_a_probe_that_failed_is_tried_again_and_leaves_no_file(tmp_path: Path) -> None:
    broken = binary_that(tmp_path / "qemu", cut=2, then=f"echo . >> {tmp_path}/starts")
    for count in (1, 2):
        with pytest.raises(LaunchFailed):
            ask(broken, tmp_path / "c")
        assert starts(broken) == count
    assert not file_of(broken, tmp_path / "c").exists()


# -- what a document hangs on -----------------------------------------------------------------------------------------------


def test_a_binary_that_was_replaced_is_probed_again(tmp_path: Path, binary: Path) -> None:
    ask(binary, tmp_path / "c")
    other = tmp_path / "other"
    other.write_bytes(binary.read_bytes())
    other.chmod(0o755)
    os.utime(other, ns=(binary.stat().st_atime_ns, binary.stat().st_mtime_ns))  # same size, same mtime: another inode
    os.rename(other, binary)
    ask(binary, tmp_path / "c")
    assert starts(binary) == 4


def test_memory_is_checked_like_the_disk(tmp_path: Path, binary: Path) -> None:
    async def work(asking: Asking) -> None:
        await asking.known(str(binary), seconds=SOON)
        await asking.known(str(binary), seconds=SOON)
        assert starts(binary) == 2
        os.utime(binary)
        await asking.known(str(binary), seconds=SOON)
        assert starts(binary) == 4

    asking(work, None)


def test_a_document_made_under_other_facts_is_not_used(tmp_path: Path, binary: Path) -> None:
    stamp = stamp_of(str(binary))
    changed = {
        "device": stamp.device + 1,
        "inode": stamp.inode + 1,
        "size": stamp.size + 1,
        "mtime": stamp.mtime + 1,
        "ctime": stamp.ctime + 1,
        "modules": {"/usr/lib/qemu": 1},
        "vmloop": "0.0.0",
        "kvm": not stamp.kvm,
        "kernel": "Linux 2.2",
        "microcode": "0x7",
        "nested": {"/sys/module/kvm/parameters/nested": "Y?"},
    }
    assert set(changed) == set(Stamp.__struct_fields__) - {"path"}
    cache = Cache(tmp_path / "c")
    for field, value in changed.items():
        cache.write(msgspec.structs.replace(stamp, **{field: value}), Capabilities(binary=str(binary)))
        assert cache.read(stamp) is None, field
    cache.write(stamp, Capabilities(binary=str(binary)))
    assert cache.read(stamp) is not None


def test_the_directory_of_modules_beside_a_binary_counts(tmp_path: Path) -> None:
    binary = binary_that(tmp_path / "qemu")
    (tmp_path / "bin").mkdir()
    (tmp_path / "lib" / "qemu").mkdir(parents=True)
    os.rename(binary, tmp_path / "bin" / "qemu")
    before = stamp_of(str(tmp_path / "bin" / "qemu"))
    (tmp_path / "lib" / "qemu" / "accel-tcg.so").touch()
    assert stamp_of(str(tmp_path / "bin" / "qemu")) != before


def test_the_names_alone_are_those_of_the_document(tmp_path: Path, binary: Path) -> None:
    whole = ask(binary, tmp_path / "c")
    stamp = stamp_of(str(binary))
    names = Cache(tmp_path / "c").read_names(stamp)
    assert names is not None
    for field in ("binary", "version", "target", "machines", "cpus", "device_types", "accelerators", "device_aliases"):
        assert getattr(names, field) == getattr(whole, field), field
    assert whole.tcg is not None
    assert names.tcg == {"cpus": whole.tcg["cpus"]}
    everything = ["-machine", "q36", "-device", "virtio-nett", "-cpu", "nosuch", "-accel", "tgc"]
    assert wrong_arguments(names, everything) == wrong_arguments(whole, everything)
    assert Cache(tmp_path / "c").read_names(msgspec.structs.replace(stamp, kernel="x")) is None


# -- a disk that is no good -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"stamp": null, "capabilities": {"format": 99}}', b"\xff" * 100]
)
def test_a_file_that_makes_no_sense_is_set_aside_and_the_binary_probed(
    tmp_path: Path, binary: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file = file_of(binary, tmp_path / "c")
    file.parent.mkdir()
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert ask(binary, tmp_path / "c").version == (7, 2, 22)
    assert "damaged" in caplog.text
    assert [aside.read_bytes() for aside in file.parent.glob("*.damaged-*")] == [content]
    assert ask(binary, tmp_path / "c").version == (7, 2, 22)
    assert starts(binary) == 2


def test_a_torn_file_is_no_document(binary: Path) -> None:
    whole = encode_document(Cached(stamp_of(str(binary)), Capabilities(binary=str(binary))))
    assert decode_document(whole).capabilities.binary == str(binary)
    for cut in range(0, len(whole) - 1, 37):
        with pytest.raises(BadRequest):
            decode_document(whole[:cut])


def test_a_disk_that_takes_no_file_is_done_without(
    tmp_path: Path, binary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        assert ask(binary, tmp_path / "file" / "c").version == (7, 2, 22)
    assert "cannot be written" in caplog.text


def test_without_a_directory_nothing_is_written(tmp_path: Path, binary: Path) -> None:
    before = set(tmp_path.iterdir())
    ask(binary, None)
    assert {path.name for path in set(tmp_path.iterdir()) - before} == {"starts"}
