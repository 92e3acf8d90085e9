# SPDX-License-Identifier: Apache-2.0
"""Measures libvirt where it is installed, for the table beside vmloop's own figures; prints a JSON line for each figure.

    /usr/bin/python3 tests/bench/libvirt_rig.py [--kernel FILE --initrd FILE] [MEASURE …]

A program of its own, started as root by the bench: libvirt's Python binding belongs to Debian's interpreter, so nothing of vmloop's is
imported here. A figure is `{"what": …, "value": …, "unit": …}`; value is null where nothing came within the limit in the `note`. Without
kernel and initrd (tests/guest/image.py makes them) the rows with an agent are left out. Domains, files and daemons are gone at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt  # type: ignore[import-not-found]  # Debian's, not in our venv
import libvirt_qemu  # type: ignore[import-not-found]
from libvirt_host import START_LIMIT, daemons, domain_xml  # type: ignore[import-not-found]  # beside this script

URI = "qemu:///system"
PREFIX = "vmloop-rig-"
QUERY_STATUS = '{"execute":"query-status"}'
COUNT = 600  # commands behind a p50 and p99
SECONDS = 3.0  # of work behind a rate
AGENT_LIMIT = 60.0  # for the agent of a fresh guest to answer
SLOW_LIMIT = 45.0  # for a call that waits for a frozen VM: libvirt gives up after 30 s


class Rig:
    """A connection, the domains made through it, and what the agent rows boot."""

    def __init__(self, directory: Path, kernel: str | None, initrd: str | None) -> None:
        self.directory = directory
        self.kernel, self.initrd = kernel, initrd
        self.host = libvirt.open(URI)

    def create(self, name: str, *, paused: bool = False) -> libvirt.virDomain:
        """The VM of tests/system/site.py (REAL_ARGS): 64 MiB, no devices, CPUs that run the firmware."""
        return self.host.createXML(domain_xml(PREFIX + name), libvirt.VIR_DOMAIN_START_PAUSED if paused else 0)

    def create_guest(self, name: str) -> libvirt.virDomain:
        """A Linux guest with qemu-ga."""
        return self.host.createXML(domain_xml(PREFIX + name, kernel=self.kernel, initrd=self.initrd), 0)

    def destroy(self, *domains: libvirt.virDomain) -> None:
        for domain in domains:
            with contextlib.suppress(libvirt.libvirtError):  # gone by itself
                domain.destroy()

    @contextlib.contextmanager
    def running(self, *names: str) -> Iterator[list[libvirt.virDomain]]:
        """VMs for a measurement, destroyed after it."""
        domains: list[libvirt.virDomain] = []
        try:
            domains.extend(self.create(name) for name in names)
            yield domains
        finally:
            self.destroy(*domains)

    @contextlib.contextmanager
    def frozen(self, domain: libvirt.virDomain, *, in_event: bool = False) -> Iterator[None]:
        """Stop a VM's QEMU for a while; in_event: right after a reset, whose event libvirt handles on the thread that all VMs share."""
        pid = _qemu_pid(domain.name())
        if in_event:
            libvirt_qemu.qemuMonitorCommand(domain, '{"execute":"system_reset"}', 0)
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


# -- measures -------------------------------------------------------------------------------------------------------------


def round_trip(rig: Rig) -> None:
    """One client, one VM."""
    with rig.running("a") as (domain,):
        _report("qmp round trip", _times(lambda: _ask(domain), COUNT))


def throughput(rig: Rig) -> None:
    """14 client processes, two on each of 7 VMs."""
    names = [f"t{number}" for number in range(7)]
    with rig.running(*names):
        clients = [
            subprocess.Popen(
                [sys.executable, __file__, "--client", PREFIX + name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for name in names * 2
        ]
        try:
            for client in clients:
                _line(client, START_LIMIT)
            for client in clients:
                assert client.stdin is not None
                client.stdin.write("go\n")
                client.stdin.flush()
            total = sum(int(_line(client, SECONDS * 10)) for client in clients)
        finally:
            for client in clients:
                client.kill()
                client.communicate()
    _figure("commands per second, 14 clients on 7 VMs", total / SECONDS, "1/s")


def suspend_to_callback(rig: Rig) -> None:
    """From the call of suspend until the client's lifecycle callback runs."""
    with rig.running("a") as (domain,), _Events(rig.host) as events:
        times = []
        for _ in range(100):
            events.clear()
            begin = time.perf_counter()
            domain.suspend()
            times.append(events.wait(libvirt.VIR_DOMAIN_EVENT_SUSPENDED) - begin)
            domain.resume()
    _report("suspend call to lifecycle callback", times)


def containment(rig: Rig) -> None:
    """Another VM's monitor command, quiet and beside a VM or a callback in trouble."""
    with rig.running("bad", "good") as (bad, good):

        def beside(what: str) -> None:
            _report(f"another VM's monitor command, {what}", _times(lambda: _ask(good), COUNT))

        beside("quiet")
        with rig.frozen(bad):
            beside("one QEMU frozen")
        rig.destroy(bad)
        bad = rig.create("bad")
        with rig.frozen(bad, in_event=True):
            beside("one QEMU frozen inside a deferred event")
        rig.destroy(bad)
        for what, body in (("sleeping", lambda: threading.Event().wait(0.2)), ("spinning", lambda: _spin(0.2))):
            _in_callback(rig, good, what, body)


def callback_delay(rig: Rig) -> None:
    """How late another VM's event reaches the same client while the callback of one VM's event takes 2 s."""
    for what, body in (("sleeps", lambda: threading.Event().wait(2.0)), ("spins", lambda: _spin(2.0))):
        with rig.running("bad", "good") as (bad, good), _Events(rig.host) as events:
            events.on[bad.name()] = body
            bad.suspend()
            select.select([], [], [], 0.1)
            events.clear()
            begin = time.perf_counter()
            good.suspend()
            late = events.wait(libvirt.VIR_DOMAIN_EVENT_SUSPENDED, good.name()) - begin
        _figure(f"another VM's event in the same client while a callback {what} for 2 s", late * 1000, "ms")


def frozen_stats(rig: Rig) -> None:
    """domstats of all, and destroy, with one frozen VM on which a command already waits."""
    with rig.running("bad", "good") as (bad, _good):
        _ask(bad)
        quiet = statistics.median(_timed(rig.host.getAllDomainStats) for _ in range(5))
        _figure("stats of all VMs, quiet, median of 5", quiet * 1000, "ms")
        with rig.frozen(bad):
            stuck = threading.Thread(target=_quietly, args=(lambda: _ask(bad),), daemon=True)
            stuck.start()
            select.select([], [], [], 0.2)  # until it holds the VM's job
            _limited("stats of all VMs, one frozen", rig.host.getAllDomainStats)
            _limited("destroy of a frozen VM", bad.destroy)


def start_paused(rig: Rig) -> None:
    """create --paused of a 64 MiB VM."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        domain = rig.create("p", paused=True)
        times.append(time.perf_counter() - begin)
        rig.destroy(domain)
    _figure("create --paused of a 64 MiB VM, median of 5", statistics.median(times), "s")


def agent(rig: Rig) -> None:
    """A fresh guest's agent from create to the first answer, alone and beside a VM frozen in a deferred event; and a flood."""
    _need_guest(rig)
    _fresh_agent(rig, "agent of a fresh guest usable, quiet")
    with rig.running("bad") as (bad,), rig.frozen(bad, in_event=True):
        _fresh_agent(rig, "agent of a fresh guest usable, another VM frozen inside a deferred event")


def flood(rig: Rig) -> None:
    """Another VM's monitor command while a guest writes into its agent port as fast as it is read."""
    _need_guest(rig)
    guest = rig.create_guest("guest")
    try:
        if _until_agent(guest) is None:
            _figure(
                "another VM's monitor command, one guest agent flooding, p50", None, "us", "the agent never came up"
            )
            return
        started = '{"execute":"guest-exec","arguments":{"path":"/bin/trouble","arg":["flood","15"]}}'
        libvirt_qemu.qemuAgentCommand(guest, started, 5, 0)
        select.select([], [], [], 1.5)  # the port closes, opens, and VSERPORT_CHANGE comes at most once a second
        with rig.running("good") as (good,):
            _report("another VM's monitor command, one guest agent flooding", _times(lambda: _ask(good), COUNT))
    finally:
        rig.destroy(guest)


MEASURES: list[Callable[[Rig], None]] = [
    round_trip, throughput, suspend_to_callback, containment, callback_delay, frozen_stats, start_paused, agent, flood,
]  # fmt: skip


# -- how ------------------------------------------------------------------------------------------------------------------


class _Events:
    """Lifecycle events of all VMs in this client, on libvirt's event loop thread: the nearest it has to a handler."""

    def __init__(self, host: libvirt.virConnect) -> None:
        self.on: dict[str, Callable[[], object]] = {}  # what the callback does on an event of a VM
        self._host = host
        self._seen: list[tuple[str, int, float]] = []
        self._changed = threading.Condition()

    def __enter__(self) -> _Events:
        self._id = self._host.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._callback, None)
        return self

    def __exit__(self, *_: object) -> None:
        self._host.domainEventDeregisterAny(self._id)

    def clear(self) -> None:
        with self._changed:
            self._seen.clear()

    def wait(self, event: int, name: str | None = None) -> float:
        """When the callback ran."""

        def found() -> float | None:
            return next((at for who, what, at in self._seen if what == event and name in (None, who)), None)

        with self._changed:
            if not self._changed.wait_for(lambda: found() is not None, 20.0):
                raise RuntimeError("no lifecycle event came within 20 s")
            at = found()
        assert at is not None
        return at

    def _callback(self, _host: object, domain: libvirt.virDomain, event: int, _detail: int, _opaque: object) -> None:
        with self._changed:
            self._seen.append((domain.name(), event, time.perf_counter()))
            self._changed.notify_all()
        if body := self.on.get(domain.name()):
            body()


def _in_callback(rig: Rig, good: libvirt.virDomain, what: str, body: Callable[[], object]) -> None:
    """Commands of a client whose callback is at it all the time: the events of a VM that another thread suspends and resumes feed it."""
    done = threading.Event()
    with rig.running("bad") as (bad,), _Events(rig.host) as events:
        events.on[bad.name()] = body

        def feed() -> None:
            while not done.is_set():
                bad.suspend()
                bad.resume()
                done.wait(0.2)

        feeder = threading.Thread(target=feed)
        feeder.start()
        try:
            _report(
                f"another VM's monitor command, a callback {what} in the same client", _times(lambda: _ask(good), COUNT)
            )
        finally:
            done.set()
            feeder.join()


def _ask(domain: libvirt.virDomain) -> None:
    libvirt_qemu.qemuMonitorCommand(domain, QUERY_STATUS, 0)


def _spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def _until_agent(guest: libvirt.virDomain) -> float | None:
    """Ask until it answers; the seconds that took."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < AGENT_LIMIT:
        try:
            libvirt_qemu.qemuAgentCommand(guest, '{"execute":"guest-ping"}', 2, 0)
        except libvirt.libvirtError:
            select.select([], [], [], 0.1)
        else:
            return time.perf_counter() - begin
    return None


def _fresh_agent(rig: Rig, what: str) -> None:
    begin = time.perf_counter()
    guest = rig.create_guest("guest")
    created = time.perf_counter() - begin
    try:
        took = _until_agent(guest)
        _figure(
            what,
            None if took is None else created + took,
            "s",
            f"not within {AGENT_LIMIT:.0f} s" if took is None else "",
        )
    finally:
        rig.destroy(guest)


def _need_guest(rig: Rig) -> None:
    if rig.kernel is None or rig.initrd is None:
        raise RuntimeError("needs --kernel and --initrd")


def _times(call: Callable[[], object], count: int) -> list[float]:
    """Times of calls; fewer when they are slow."""
    times: list[float] = []
    end = time.perf_counter() + SLOW_LIMIT
    while len(times) < count and time.perf_counter() < end:
        times.append(_timed(call))
    return times


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _limited(what: str, call: Callable[[], object]) -> None:
    """The time of a call that may fail, or never come back: libvirt waits without a limit for a monitor that does not answer."""
    thread = threading.Thread(target=_quietly, args=(call,), daemon=True)
    begin = time.perf_counter()
    thread.start()
    thread.join(SLOW_LIMIT)
    took = time.perf_counter() - begin
    _figure(
        what, None if thread.is_alive() else took, "s", f"not within {SLOW_LIMIT:.0f} s" if thread.is_alive() else ""
    )


def _quietly(call: Callable[[], object]) -> None:
    with contextlib.suppress(libvirt.libvirtError):  # that it gave up, and when, is what is measured
        call()


def _report(what: str, times: list[float]) -> None:
    ordered = sorted(times)
    for percent in (50, 99):
        at = min(len(ordered) - 1, len(ordered) * percent // 100)
        _figure(f"{what}, p{percent}", ordered[at] * 1e6, "us", f"{len(ordered)} times")


def _figure(what: str, value: float | None, unit: str, note: str = "") -> None:
    line = {"what": what, "value": None if value is None else round(value, 3), "unit": unit}
    print(json.dumps(line | ({"note": note} if note else {})), flush=True)


def _line(child: subprocess.Popen[str], seconds: float) -> str:
    assert child.stdout is not None
    if not select.select([child.stdout], [], [], seconds)[0]:
        raise RuntimeError(f"{child.args!r} said nothing within {seconds} s")
    return child.stdout.readline()


def _client(name: str) -> None:
    """One of many clients: says that it is ready, waits for a line, works, says how much it did."""
    domain = libvirt.open(URI).lookupByName(name)
    _ask(domain)
    print("ready", flush=True)
    sys.stdin.readline()
    count, end = 0, time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        _ask(domain)
        count += 1
    print(count, flush=True)


def _qemu_pid(name: str) -> int:
    return int(Path(f"/run/libvirt/qemu/{name}.pid").read_text())


def _pump() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


def main() -> int:
    """Run the named measures, or all; exit code 0 even if one cannot be made: it says so on standard error."""
    args = sys.argv[1:]
    if args[:1] == ["--client"]:
        _client(args[1])
        return 0
    named = {option: args.pop(args.index(option) + 1) for option in ("--kernel", "--initrd") if option in args}
    wanted = [word for word in args if not word.startswith("--")]
    chosen = [measure for measure in MEASURES if not wanted or measure.__name__ in wanted]
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        print("needs root and libvirtd (libvirt-daemon-system)", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what follows is cleaned up
    libvirt.registerErrorHandler(lambda *_: None, None)
    libvirt.virEventRegisterDefaultImpl()
    directory = Path(tempfile.mkdtemp(prefix="vmloop-rig-", dir="/var/lib/libvirt/qemu"))
    directory.chmod(0o755)
    threading.Thread(target=_pump, daemon=True).start()
    try:
        # QEMU runs as libvirt's own user, who may read neither /boot everywhere nor a checkout.
        copies = {option: str(shutil.copy(path, directory / option[2:])) for option, path in named.items()}
        with daemons():
            rig = Rig(directory, copies.get("--kernel"), copies.get("--initrd"))
            try:
                for measure in chosen:
                    begin = time.monotonic()
                    try:
                        measure(rig)
                    except (libvirt.libvirtError, RuntimeError) as error:
                        print(f"{measure.__name__}: {error}", file=sys.stderr, flush=True)
                    print(f"{measure.__name__}: {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
            finally:
                rig.destroy(*(domain for domain in rig.host.listAllDomains() if domain.name().startswith(PREFIX)))
                rig.host.close()
    finally:
        shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
