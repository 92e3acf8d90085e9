# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the system tests: a broker for a test, and real QEMU where it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vmloop.client.session import Host

from .site import Site


@pytest.fixture
def site() -> Iterator[Site]:
    """A root with a running broker; afterwards nothing of it may be left."""
    made = Site()
    try:
        made.start_broker()
        yield made
    finally:
        made.close()


@pytest.fixture
def host(site: Site) -> Host:
    """A client of that broker."""
    return site.host()
