# SPDX-License-Identifier: Apache-2.0
"""Numbers of runs: never given twice for one name, however its VMs came and went; files that make no sense are named and set aside."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.common.names import vm_name
from vmloop.common.paths import VmPaths, paths_under
from vmloop.worker import epochs
from vmloop.worker.epochs import MAX_EPOCH, MAX_NAMES, epoch_left, leave_epoch, next_epoch
from vmloop.worker.runfile import Run


@pytest.fixture
def paths(tmp_path: Path) -> VmPaths:
    paths = paths_under(tmp_path)
    paths.create()
    return paths.vm(vm_name("web1"))


def test_a_name_that_nobody_had_counts_from_1(paths: VmPaths) -> None:
    assert next_epoch(paths, None, 0) == 1
    assert leave_epoch(paths, None, 0)
    assert not paths.epoch.parent.exists()  # a request for a VM that never was leaves nothing


@pytest.mark.parametrize(("run", "newest", "following"), [(Run(epoch=7), 3, 8), (None, 9, 10), (Run(epoch=2), 2, 3)])
def test_a_forgotten_vms_name_counts_on(paths: VmPaths, run: Run | None, newest: int, following: int) -> None:
    assert leave_epoch(paths, run, newest)
    assert next_epoch(paths, None, 0) == following
    assert paths.epoch.stat().st_mode & 0o777 == 0o600
    assert os.listdir(paths.epoch.parent) == ["web1"]


def test_a_name_counts_on_through_any_number_of_vms(paths: VmPaths) -> None:
    given_out: list[int] = []
    for _ in range(5):
        for _ in range(2):
            given_out.append(next_epoch(paths, None, given_out[-1] if given_out else 0))
        leave_epoch(paths, Run(epoch=given_out[-1]), 0)
        leave_epoch(paths, None, 0)  # a worker that came for nothing does not set it back
        assert next_epoch(paths, None, 0) == given_out[-1] + 1
    assert given_out == list(range(1, 11))


@pytest.mark.parametrize("content", [b"", b"\n", b"-1\n", b"1.5", b"0x10", b" 7", b"7\n\n", b"\xd9\xa3", b"9" * 5000])
def test_a_file_that_makes_no_sense_is_set_aside_and_named(
    paths: VmPaths, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    paths.epoch.parent.mkdir()
    paths.epoch.write_bytes(content)
    with caplog.at_level(logging.ERROR):
        assert next_epoch(paths, None, 4) == 5
    (aside,) = paths.epoch.parent.iterdir()
    assert aside.name.startswith("web1.damaged-")
    assert aside.read_bytes() == content
    assert str(aside) in caplog.text


@given(st.binary(max_size=40))
def test_whatever_the_file_holds_the_number_is_one_that_a_run_can_have(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("epochs") / "web1"
    path.write_bytes(content)
    assert 0 <= epoch_left(path) <= MAX_EPOCH


def test_the_largest_number_is_taken_and_one_more_is_not(paths: VmPaths) -> None:
    paths.epoch.parent.mkdir()
    for number, following in ((MAX_EPOCH, MAX_EPOCH + 1), (MAX_EPOCH + 1, 1)):
        paths.epoch.write_bytes(b"%d" % number)
        assert next_epoch(paths, None, 0) == following


def test_a_number_that_cannot_be_kept_is_said_so_and_no_error(paths: VmPaths, caplog: pytest.LogCaptureFixture) -> None:
    (paths.epoch / "in the way").mkdir(parents=True)
    with caplog.at_level(logging.ERROR):
        assert not leave_epoch(paths, Run(epoch=7), 7)
    assert str(paths.epoch) in caplog.text


def test_of_too_many_names_the_oldest_are_removed(paths: VmPaths) -> None:
    directory = paths.epoch.parent
    directory.mkdir()
    for number in range(MAX_NAMES + 2):
        path = directory / f"vm{number}"
        path.write_bytes(b"1\n")
        os.utime(path, ns=(number, number))
    leave_epoch(paths, Run(epoch=7), 7)
    left = set(os.listdir(directory))
    assert len(left) == MAX_NAMES
    assert {"web1", f"vm{MAX_NAMES + 1}", "vm3"} <= left
    assert not {"vm0", "vm1", "vm2"} & left
    assert epochs.epoch_left(directory / "vm0") == 0
