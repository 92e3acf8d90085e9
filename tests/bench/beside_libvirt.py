# SPDX-License-Identifier: Apache-2.0
"""vmloop and libvirt side by side, on the same machine in the same run: `make bench ARGS=beside_libvirt`.

libvirt_rig.py prints libvirt's figures, each under a name; here vmloop does what has the same name. Where libvirt is not installed, or the
bench does not run as root, its column says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from vmloop.client.session import Host
from vmloop.client.vm import Vm
from vmloop.tests.bench import faults
from vmloop.tests.bench.guests import define_guest, fresh_agent
from vmloop.tests.bench.load import commands_per_second
from vmloop.tests.bench.row import Row, percentile
from vmloop.tests.guest.image import guest_image
from vmloop.tests.system.site import Site, wait_for

COUNT: Final = 600  # commands behind a p50 and p99, as in the rig
RIG: Final = Path(__file__).with_name("libvirt_rig.py")
RIG_SECONDS: Final = 600.0
PYTHON: Final = "/usr/bin/python3"  # the one that Debian's binding belongs to

Figures = dict[str, tuple[float | None, str]]  # what → value and unit; None: not within its limit


def beside_libvirt(site: Site, host: Host) -> list[Row]:
    """Both, row by row. libvirt's daemons are gone before vmloop's turn begins."""
    theirs, why_not = _libvirt()
    ours: Figures = {}
    for measure in (
        _round_trip,
        _throughput,
        _suspend,
        _containment,
        _event_delay,
        _frozen_stats,
        _start_paused,
        _agents,
    ):
        measure(site, host, ours)
    return [
        Row(
            what,
            f"libvirt {_text(theirs.get(what), why_not)}, vmloop {_text(figure, '')}",
            _ratio(theirs.get(what), figure),
        )
        for what, figure in ours.items()
    ]


# -- libvirt ----------------------------------------------------------------------------------------------------------------


def _libvirt() -> tuple[Figures, str]:
    """Its figures, and why there are none."""
    if os.geteuid() != 0:
        return {}, "(not measured: not root)"
    if subprocess.run([PYTHON, "-c", "import libvirt, libvirt_qemu"], capture_output=True, check=False).returncode:
        return {}, "(not installed)"
    image = guest_image()
    program = [PYTHON, str(RIG), "--kernel", str(image.kernel), "--initrd", str(image.initrd)]
    ended = subprocess.run(program, stdout=subprocess.PIPE, text=True, timeout=RIG_SECONDS, check=True)
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    return {line["what"]: (line["value"], line["unit"]) for line in lines}, "(no figure)"


def _text(figure: tuple[float | None, str] | None, why_not: str) -> str:
    if figure is None:
        return why_not
    value, unit = figure
    if value is None:
        return "never within its limit"
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def _ratio(theirs: tuple[float | None, str] | None, ours: tuple[float | None, str]) -> str:
    if theirs is None or not theirs[0] or ours[0] is None:
        return ""
    return f"{ours[0] / theirs[0]:.2g} x libvirt's"


# -- vmloop -----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _running(site: Site, host: Host, *names: str) -> Iterator[list[Vm]]:
    for name in names:
        site.define_real(host, name)
        host.vm(name).start()
    yield [host.vm(name) for name in names]
    for name in names:
        host.vm(name).kill()


def _report(ours: Figures, what: str, times: list[float]) -> None:
    for percent in (50, 99):
        ours[f"{what}, p{percent}"] = (percentile(times, percent) * 1e6, "us")


def _ask(vm: Vm) -> list[float]:
    return [_timed(lambda: vm.qmp("query-status")) for _ in range(COUNT)]


def _timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _round_trip(site: Site, host: Host, ours: Figures) -> None:
    with _running(site, host, "a") as (vm,):
        _report(ours, "qmp round trip", _ask(vm))


def _throughput(site: Site, host: Host, ours: Figures) -> None:
    names = [f"t{number}" for number in range(7)]
    with _running(site, host, *names):
        rate = commands_per_second([["vmloop", str(site.root), name] for name in names * 2])
    ours["commands per second, 14 clients on 7 VMs"] = (rate, "1/s")


def _suspend(site: Site, host: Host, ours: Figures) -> None:
    times = []
    with _running(site, host, "a") as (vm,), vm.events(since=vm.cursor()) as events:
        for _ in range(100):
            begin = time.perf_counter()
            pausing = threading.Thread(target=vm.pause)  # the event may come before the answer
            pausing.start()
            events.wait_for("STOP", 10.0)
            times.append(time.perf_counter() - begin)
            pausing.join()
            vm.resume()
    _report(ours, "suspend call to lifecycle callback", times)


def _containment(site: Site, host: Host, ours: Figures) -> None:
    faults.install_handlers(site)
    what = "another VM's monitor command"
    with _running(site, host, "frozen", "good") as (_, good):
        _report(ours, f"{what}, quiet", _ask(good))
        with faults.frozen(site, host, "frozen"):
            _report(ours, f"{what}, one QEMU frozen", _ask(good))
        with faults.frozen_in_reset(host, "frozen"):
            _report(ours, f"{what}, one QEMU frozen inside a deferred event", _ask(good))
        for victim, name in (("loop-sleeps", "sleeping"), ("loop-spins", "spinning")):
            site.define_real(host, victim)
            host.vm(victim).start(paused=True)
            with faults.in_handler(host, victim):
                _report(ours, f"{what}, a callback {name} in the same client", _ask(good))
            host.vm(victim).kill()
        define_guest(site, host, "guest")
        guest = host.vm("guest")
        guest.start()
        assert wait_for(lambda: guest.show().agent == "ready", 60.0)
        guest.agent("guest-exec", {"path": "/bin/trouble", "arg": ["flood", "15"]})
        assert wait_for(lambda: guest.show().agent != "ready", 10.0)
        _report(ours, f"{what}, one guest agent flooding", _ask(good))
        guest.kill()


def _event_delay(site: Site, host: Host, ours: Figures) -> None:
    """A handler is vmloop's callback: while one VM's holds its loop, another VM's event is on its way to a subscriber."""
    for victim, name in (("loop-sleeps", "sleeps"), ("loop-spins", "spins")):
        site.define_real(host, victim)
        host.vm(victim).start(paused=True)
        with _running(site, host, "good") as (good,), host.events() as everything, faults.in_handler(host, victim):
            begin = time.perf_counter()
            pausing = threading.Thread(target=good.pause)
            pausing.start()
            while (event := everything.get(10.0)) is not None and (event.vm, event.event) != ("good", "STOP"):
                pass  # the victim's own
            late = time.perf_counter() - begin
            pausing.join()
        host.vm(victim).kill()
        ours[f"another VM's event in the same client while a callback {name} for 2 s"] = (late * 1000, "ms")


def _frozen_stats(site: Site, host: Host, ours: Figures) -> None:
    with _running(site, host, "frozen", "good"):
        quiet = statistics.median(_timed(host.stats) for _ in range(5))
        ours["stats of all VMs, quiet, median of 5"] = (quiet * 1000, "ms")
        with faults.frozen(site, host, "frozen"):
            ours["stats of all VMs, one frozen"] = (_timed(host.stats), "s")
            ours["destroy of a frozen VM"] = (_timed(host.vm("frozen").kill), "s")
        host.vm("frozen").start()


def _start_paused(site: Site, host: Host, ours: Figures) -> None:
    site.define_real(host, "p")
    times = []
    for _ in range(5):
        times.append(_timed(lambda: host.vm("p").start(paused=True)))
        host.vm("p").kill()
    ours["create --paused of a 64 MiB VM, median of 5"] = (statistics.median(times), "s")


def _agents(site: Site, host: Host, ours: Figures) -> None:
    ours["agent of a fresh guest usable, quiet"] = (fresh_agent(site, host), "s")
    with _running(site, host, "bad"), faults.frozen_in_reset(host, "bad"):
        seconds = fresh_agent(site, host)
    ours["agent of a fresh guest usable, another VM frozen inside a deferred event"] = (seconds, "s")
