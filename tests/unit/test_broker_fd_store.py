# SPDX-License-Identifier: Apache-2.0
"""The service manager's copy of the connections, against a manager that keeps the protocol: nothing twice, nothing stale, never waiting."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import pytest

from vmloop.broker.fd_store import RETRY_SECONDS, FdStore, Stored, take_stored
from vmloop.common.names import VmName
from vmloop.common.systemd import Notifier

from ..fakes.service_manager import ServiceManager

WEB1, WEB2 = VmName("web1"), VmName("web2")


class Me:
    """This process, as a manager's main process."""

    pid = os.getpid()


class Bench:
    """A store, its manager, and connections to put in."""

    def __init__(self, store_max: int = 64, *, deaf: bool = False) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="vml-")
        self.manager = ServiceManager(Path(self._directory.name), store_max, deaf=deaf)
        self.manager.main = cast("subprocess.Popen[bytes]", Me())
        self.now = 0.0
        self.store = FdStore(Notifier({"NOTIFY_SOCKET": str(self.manager.path)}), lambda: self.now)
        self._pairs: list[socket.socket] = []

    def connection(self) -> int:
        """One end; the store's."""
        mine, peer = socket.socketpair()
        self._pairs.append(peer)
        return mine.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.store.close()
        self.manager.close()
        for peer in self._pairs:
            peer.close()
        self._directory.cleanup()


@pytest.fixture
def bench() -> Iterator[Bench]:
    before = len(os.listdir("/proc/self/fd"))
    with Bench() as made:
        yield made
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_kept_is_stored_under_its_name_and_removed_with_it(bench: Bench) -> None:
    bench.store.keep(WEB1, "monitor", bench.connection())
    bench.store.keep(WEB1, "agent", bench.connection())
    bench.store.keep(WEB2, "monitor", bench.connection())
    assert bench.manager.wait_for(["vmloop.agent.web1", "vmloop.monitor.web1", "vmloop.monitor.web2"])
    bench.store.drop(WEB1, "agent")
    assert bench.manager.wait_for(["vmloop.monitor.web1", "vmloop.monitor.web2"])
    bench.store.drop(WEB1)
    assert bench.manager.wait_for(["vmloop.monitor.web2"])
    assert bench.manager.refused == []


def test_another_connection_takes_the_place_of_the_one_before_and_the_same_is_told_once(bench: Bench) -> None:
    first = bench.connection()
    bench.store.keep(WEB1, "monitor", os.dup(first))
    bench.store.keep(WEB1, "monitor", first)
    bench.store.keep(WEB1, "monitor", bench.connection())
    bench.store.keep(WEB2, "monitor", bench.connection())
    assert bench.manager.wait_for(["vmloop.monitor.web1", "vmloop.monitor.web2"])


def test_a_manager_that_is_slow_is_told_later_and_nothing_waits_for_it() -> None:
    room = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())  # systemd makes it 512
    names = [VmName(f"vm{number}") for number in range(room + 30)]
    with Bench(len(names), deaf=True) as bench:
        for name in names:
            bench.store.keep(name, "monitor", bench.connection())
        bench.store.drop(names[0])
        bench.store.drop(names[-1])
        assert bench.store.next_due() == RETRY_SECONDS
        bench.manager.listen()
        while (due := bench.store.next_due()) is not None:
            bench.now = due
            bench.store.on_tick(bench.now)
        assert bench.manager.wait_for([f"vmloop.monitor.{name}" for name in names[1:-1]])


def test_a_full_store_refuses_and_the_rest_goes_on() -> None:
    with Bench(store_max=1) as bench:
        bench.store.keep(WEB1, "monitor", bench.connection())
        assert bench.manager.wait_for(["vmloop.monitor.web1"])
        bench.store.keep(WEB2, "monitor", bench.connection())
        bench.store.drop(WEB1)
        assert bench.manager.wait_for([])
        assert len(bench.manager.refused) == 1


def test_a_manager_that_is_gone_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    store = FdStore(Notifier({"NOTIFY_SOCKET": "/nowhere/at/all"}), lambda: 0.0)
    for _ in range(3):
        store.keep(WEB1, "monitor", os.open("/dev/null", os.O_RDONLY))
    assert store.next_due() is None
    assert len(caplog.records) == 1


def test_without_a_manager_nothing_is_held() -> None:
    before = os.listdir("/proc/self/fd")
    store = FdStore(Notifier({}), lambda: 0.0)
    store.keep(WEB1, "monitor", os.open("/dev/null", os.O_RDONLY))
    store.drop(WEB1)
    assert store.next_due() is None
    assert os.listdir("/proc/self/fd") == before


def test_of_what_was_passed_only_the_wanted_is_taken(bench: Bench) -> None:
    passed = [
        (name, bench.connection())
        for name in ("vmloop.monitor.web1", "vmloop.monitor.web2", "stored", "", "vmloop..web1", "vmloop.x.-")
    ]
    bench.store.keep(WEB2, "monitor", os.dup(passed[1][1]))
    assert bench.manager.wait_for(["vmloop.monitor.web2"])
    taken = take_stored(passed, bench.store, {WEB1}.__contains__)
    assert taken == [Stored(WEB1, "monitor", passed[0][1])]
    assert bench.manager.wait_for([]), "a VM that is gone"
    bench.store.keep(WEB1, "monitor", os.dup(passed[0][1]))
    bench.store.keep(WEB2, "monitor", bench.connection())
    assert bench.manager.wait_for(["vmloop.monitor.web2"]), "of web1 the manager has this one already"
    os.close(passed[0][1])


@pytest.mark.parametrize(
    ("vm", "slot"),
    [
        ("web1\nFDSTOREREMOVE=1", "monitor"),
        ("web1", "monitor\nREADY=1"),
        ("web1", "a:b"),
        ("../x", "monitor"),
        ("web1", ""),
    ],
)
def test_a_name_that_would_be_more_than_a_name_is_not_told_to_the_manager(bench: Bench, vm: str, slot: str) -> None:
    bench.store.keep(vm, slot, bench.connection())
    bench.store.drop(vm, slot)
    bench.store.keep("web2", "monitor", bench.connection())
    assert bench.manager.wait_for(["vmloop.monitor.web2"])
    assert (bench.manager.said, bench.manager.refused) == ([], [])
