# SPDX-License-Identifier: Apache-2.0
"""Real guests with the real agent, for measures."""

from __future__ import annotations

import time
from typing import Final

from vmloop.client.session import Host
from vmloop.tests.guest.image import guest_args, guest_image
from vmloop.tests.system.site import Site

AGENT_SECONDS: Final = 60.0


def define_guest(site: Site, host: Host, name: str) -> None:
    """The test guest, with an agent and without a disk."""
    args = guest_args(guest_image(), console=site.root / f"{name}.console")
    site.define(host, name, *args, binary="qemu-system-x86_64", agent={"enabled": True})


def fresh_agent(site: Site, host: Host, name: str = "fresh") -> float:
    """Seconds from the call of start until the guest's agent has answered a command of ours; the guest is gone after it."""
    define_guest(site, host, name)
    vm = host.vm(name)
    with host.events(name) as events:
        begin = time.perf_counter()
        vm.start()
        while events.wait_for("AGENT_STATE", AGENT_SECONDS).data["new"] != "ready":
            pass  # on its way there
        vm.agent("guest-ping")
        took = time.perf_counter() - begin
    vm.kill()
    return took
