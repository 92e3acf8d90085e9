# SPDX-License-Identifier: Apache-2.0
"""What the broker sees without asking: a VM's status page, read anew when there is a new one, and figures of processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmloop.broker.looker import ProcLooker
from vmloop.common.names import VmName
from vmloop.common.page import Page, Word
from vmloop.common.paths import Paths

WEB1 = VmName("web1")
SECOND = 1_000_000_000


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    made = Paths(tmp_path / "run", tmp_path / "state", tmp_path / "etc")
    made.vm(WEB1).run.mkdir(parents=True)
    return made


@pytest.fixture
def looker(paths: Paths) -> Iterator[ProcLooker]:
    made = ProcLooker(paths)
    yield made
    made.close()


@pytest.fixture
def page(paths: Paths) -> Iterator[Page]:
    with Page(paths.vm(WEB1).page, writable=True) as made:
        yield made


def busy_since(page: Page, seconds: float) -> None:
    page.words[Word.WORKER_PID] = 77
    page.words[Word.BUSY_SINCE] = time.monotonic_ns() - int(seconds * SECOND)


def test_a_vm_without_a_page_is_not_held_up(looker: ProcLooker) -> None:
    assert looker.blocked(WEB1, 77) == 0.0
    assert looker.blocked(VmName("nobody"), 77) == 0.0


@pytest.mark.parametrize("content", [b"", b"foreign", bytes(4096)])
def test_a_damaged_page_is_no_error(paths: Paths, looker: ProcLooker, content: bytes) -> None:
    paths.vm(WEB1).page.write_bytes(content)
    assert looker.blocked(WEB1, 77) == 0.0


def test_a_loop_is_held_up_for_as_long_as_it_has_been_in_one_turn(looker: ProcLooker, page: Page) -> None:
    busy_since(page, 12.0)
    assert 12.0 <= looker.blocked(WEB1, 77) < 20.0
    page.idle()
    assert looker.blocked(WEB1, 77) == 0.0


def test_what_an_earlier_worker_left_on_the_page_is_not_held_against_the_next_one(
    looker: ProcLooker, page: Page
) -> None:
    busy_since(page, 12.0)
    assert looker.blocked(WEB1, 78) == 0.0
    assert looker.blocked(WEB1, None) == 0.0


def test_a_loop_at_work_is_not_held_up(looker: ProcLooker, page: Page) -> None:
    page.busy("a short step")
    assert looker.blocked(WEB1, 77) == 0.0


def test_a_page_that_comes_later_is_seen(paths: Paths, looker: ProcLooker) -> None:
    assert looker.blocked(WEB1, 77) == 0.0
    with Page(paths.vm(WEB1).page, writable=True) as page:
        busy_since(page, 5.0)
        assert looker.blocked(WEB1, 77) >= 5.0


def test_a_new_page_is_seen_once_the_old_one_is_forgotten(paths: Paths, looker: ProcLooker, page: Page) -> None:
    busy_since(page, 5.0)
    assert looker.blocked(WEB1, 77) >= 5.0
    paths.vm(WEB1).page.unlink()
    with Page(paths.vm(WEB1).page, writable=True):
        looker.forget(WEB1)
        assert looker.blocked(WEB1, 77) == 0.0
    looker.forget(WEB1)
    looker.forget(VmName("nobody"))


def test_pages_are_opened_once_and_closed_at_the_end(paths: Paths, page: Page) -> None:
    looker = ProcLooker(paths)
    before = mappings()
    for _ in range(10):
        looker.blocked(WEB1, 77)
    assert mappings() == before + 1
    looker.close()
    assert mappings() == before


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count(f"vms/{WEB1}/page")


def test_a_process_is_told_with_its_figures(looker: ProcLooker) -> None:
    figures = looker.process(os.getpid())
    assert figures is not None
    assert set(figures) == {"pid", "cpu_seconds", "rss_bytes", "threads"}
    assert figures["pid"] == os.getpid()
    assert figures["cpu_seconds"] > 0
    assert figures["rss_bytes"] > 1_000_000
    assert figures["threads"] >= 1


def test_no_process_has_no_figures(looker: ProcLooker) -> None:
    assert looker.process(None) is None


@pytest.mark.parametrize("pid", [2**22 + 1, 2**31, 2**63, 2**64 - 1, -1, 0])
def test_a_pid_of_nobody_has_no_figures(looker: ProcLooker, pid: int) -> None:
    assert looker.process(pid) is None


def test_a_process_that_has_ended_has_no_figures(looker: ProcLooker) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert looker.process(child.pid) is None
