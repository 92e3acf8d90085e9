# SPDX-License-Identifier: Apache-2.0
"""What the shipped handlers do for a VM on real QEMU, through broker, zygote and worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vmloop.client.session import Host
from vmloop.common.cursor import Cursor

from ..fakes.boot_sectors import PANIC, PANIC_ARGS, SWITCH_OFF, boots
from .site import REAL_ARGS, Site

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("require_qemu")]


def start(site: Site, host: Host, sector: bytes, *args: str, **handlers: Any) -> None:
    """A VM whose guest is a boot sector."""
    guest = boots(site.root, sector, *args)
    site.define(host, "web1", *REAL_ARGS, *guest, binary="qemu-system-x86_64", handlers=handlers)
    host.vm("web1").start()


def await_event(host: Host, name: str, count: int = 1) -> dict[str, Any]:
    """The data of an event of this run, once it has happened so many times."""
    seen = 0
    with host.events("web1", since=Cursor(1, 0)) as events:
        for event in events:
            seen += event.event == name
            if seen == count:
                return dict(event.data)
    raise AssertionError(f"the stream ended before {name}")


def test_a_guest_that_powers_off_is_restarted(site: Site, host: Host) -> None:
    start(site, host, SWITCH_OFF, on_poweroff="restart")
    await_event(host, "SHUTDOWN", 2)
    assert host.vm("web1").kill().reason == "destroyed"


def test_a_guest_that_powers_off_is_preserved_until_it_is_stopped(site: Site, host: Host) -> None:
    start(site, host, SWITCH_OFF, on_poweroff="preserve")
    vm = host.vm("web1")
    vm.wait("shutdown", timeout=10)
    assert vm.stop(timeout=10).state == "shutoff"


def test_a_panicked_guest_is_destroyed_with_its_reason(site: Site, host: Host) -> None:
    start(site, host, PANIC, *PANIC_ARGS, on_crash="destroy")
    ended = host.vm("web1").wait("shutoff", timeout=10)
    assert ended.reason == "crashed"


def test_a_panicked_guest_is_dumped_and_preserved(site: Site, host: Host) -> None:
    start(site, host, PANIC, *PANIC_ARGS, on_crash="dump")
    told = await_event(host, "DUMP_FINISHED")
    assert Path(told["path"]).stat().st_size == told["bytes"] > 0
    assert "error" not in told
    assert host.list()[0].state == "crashed"


def test_a_panicked_guest_is_preserved_by_default_and_a_reset_begins_again(site: Site, host: Host) -> None:
    start(site, host, PANIC, *PANIC_ARGS)
    vm = host.vm("web1")
    vm.wait("crashed", timeout=10)
    vm.reset()
    vm.wait("paused", timeout=10)
    vm.resume()
    await_event(host, "GUEST_PANICKED", 2)
