# SPDX-License-Identifier: Apache-2.0
"""libvirt's daemons for a while, and the domains that libvirt_rig.py makes; like it, for Debian's interpreter and without vmloop."""

from __future__ import annotations

import contextlib
import functools
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator

START_LIMIT = 15.0  # seconds, for a daemon to come up


@contextlib.contextmanager
def daemons() -> Iterator[None]:
    """libvirtd and virtlogd, where they do not run yet; ended after."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        for name, listening in (("virtlogd", "/run/libvirt/virtlogd-sock"), ("libvirtd", "/run/libvirt/libvirt-sock")):
            if not _answers(listening):
                started.append(
                    subprocess.Popen(
                        [name], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                    )
                )
                _wait(functools.partial(_answers, listening), START_LIMIT, f"{name} does not come up")
        yield
    finally:
        for daemon in reversed(started):
            daemon.terminate()
            try:
                daemon.wait(START_LIMIT)
            except subprocess.TimeoutExpired:
                daemon.kill()  # its shared thread hangs, which is what was measured
                daemon.wait()


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


def _wait(condition: Callable[[], bool], seconds: float, complaint: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(complaint)
        select.select([], [], [], 0.05)


def domain_xml(name: str, kernel: str | None = None, initrd: str | None = None) -> str:
    """The VM of tests/system/site.py, or with a kernel the guest of tests/guest."""
    boot = channel = ""
    memory = 64
    if kernel is not None:
        memory = 256
        words = "quiet panic=-1 nokaslr mitigations=off tsc=reliable no_timer_check lpj=4000000 cryptomgr.notests"
        boot = f"<kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{words}</cmdline>"
        channel = (
            "<channel type='unix'><source mode='bind'/>"
            "<target type='virtio' name='org.qemu.guest_agent.0'/></channel><controller type='virtio-serial'/>"
        )
    return f"""<domain type='qemu'><name>{name}</name><memory unit='MiB'>{memory}</memory><vcpu>1</vcpu>
      <os><type arch='x86_64' machine='q35'>hvm</type>{boot}</os><features><acpi/></features>
      <cpu mode='maximum'/><on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>destroy</on_crash>
      <devices><emulator>/usr/bin/qemu-system-x86_64</emulator><controller type='usb' model='none'/>
      <memballoon model='none'/>{channel}</devices><seclabel type='none'/></domain>"""
