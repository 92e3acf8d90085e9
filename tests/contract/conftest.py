# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the contract tests: every test runs once for the real thing and once for the stand-in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .subjects import AGENTS, MONITORS, AgentSubject, Subject

_MONITORS = [pytest.param(name, marks=pytest.mark.qemu) if name == "qemu" else name for name in MONITORS]
_AGENTS = [pytest.param(name, marks=pytest.mark.qemu) if name == "qemu-ga" else name for name in AGENTS]


@pytest.fixture(params=_MONITORS)
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    """A VM that the test starts itself."""
    subject = MONITORS[request.param](tmp_path)
    yield subject
    subject.stop()


@pytest.fixture(params=_MONITORS, scope="module")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    """A paused VM that many tests look at, each on a connection of its own. No test changes its state."""
    subject = MONITORS[request.param](tmp_path_factory.mktemp("shared"))
    subject.start()
    yield subject
    subject.stop()


@pytest.fixture(params=_AGENTS, scope="module")
def agent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentSubject]:
    """An agent that answers."""
    subject = AGENTS[request.param](tmp_path_factory.mktemp("agent"))
    subject.start()
    yield subject
    subject.stop()


@pytest.fixture(params=_AGENTS)
def unstarted_agent(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AgentSubject]:
    """An agent that the test starts itself, as it wants it."""
    subject = AGENTS[request.param](tmp_path)
    yield subject
    subject.stop()
