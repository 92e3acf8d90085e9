# SPDX-License-Identifier: Apache-2.0
"""Logging never ends a process: not on a full disk, and not when a worker lets go of the log that it was forked with."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmloop.common.log import log_to_file


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    root.handlers = []
    yield
    root.handlers, logging.raiseExceptions = handlers, raising
    root.setLevel(level)


def test_a_log_on_a_full_disk_is_written_to_and_left_for_another_without_an_error(tmp_path: Path) -> None:
    log = logging.getLogger("test")
    log_to_file(Path("/dev/full"), "info", 1 << 20)
    log.error("this goes nowhere")
    log_to_file(tmp_path / "log", "info", 1 << 20)
    log.error("this is written")
    assert "this is written" in (tmp_path / "log").read_text()
    for handler in logging.getLogger().handlers:
        handler.close()


def test_a_log_that_cannot_be_opened_costs_only_its_lines(tmp_path: Path) -> None:
    log_to_file(tmp_path / "nowhere" / "log", "info", 1 << 20)
    logging.getLogger("test").error("this goes nowhere")
