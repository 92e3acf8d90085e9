# SPDX-License-Identifier: Apache-2.0
"""What `vmloop run` does about signals, with a VM that answers as it is told; whole runs are in tests/system/test_run.py."""

from __future__ import annotations

import queue
import signal
from collections.abc import Iterator
from typing import Any, Final, cast

import pytest

from vmloop.client.cli.foreground import SIGNALS, Doorbell, End, Foreground
from vmloop.client.embedding import EmbeddedHost
from vmloop.client.stream import Event
from vmloop.client.vm import Vm
from vmloop.common.errors import Busy

SECONDS: Final = 20.0


class FakeVm:
    """Runs until it is killed; refuses to be stopped."""

    name = "web1"

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.events: queue.Queue[Event] = queue.Queue()

    def _move(self, new: str, reason: str) -> None:
        data = {"new": new, "reason": reason}
        self.events.put(Event(vm="web1", epoch=1, seq=1, time=0, event="VM_STATE", data=data, origin="vmloop"))

    def start(self, paused: bool) -> None:
        self.asked.append(f"start paused={paused}")
        self._move("running", "booted")

    def stop(self, timeout: float, force: bool = False) -> None:
        self.asked.append(f"stop timeout={timeout:g} force={force}")
        raise Busy("1024 requests are in flight")

    def kill(self) -> None:
        self.asked.append("kill")
        self._move("shutoff", "destroyed")


class FakeHost:
    """A private broker that does not end."""

    broker_fd = None

    def __init__(self, vm: FakeVm) -> None:
        self._vm = vm

    def events(self, name: str) -> FakeHost:
        assert name == self._vm.name
        return self

    def __enter__(self) -> Iterator[Event]:
        return iter(lambda: self._vm.events.get(timeout=SECONDS), None)

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def signals() -> Iterator[None]:
    """As if nobody ignored any, in whatever the tests were started."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
def test_a_vm_that_cannot_be_stopped_after_sigterm_is_killed() -> None:
    """Under a service manager there is nobody who could press Ctrl-C."""
    vm, said = FakeVm(), list[str]()
    with Doorbell() as bell:
        foreground = Foreground(
            cast(EmbeddedHost, FakeHost(vm)),
            cast(Vm, vm),
            bell,
            None,
            paused=False,
            stop_timeout=7.0,
            say=said.append,
            on_event=_ignore,
            on_running=lambda: signal.raise_signal(signal.SIGTERM),
            on_stopping=lambda: None,
        )
        assert foreground.run() == End("shutoff", "destroyed", "", panicked=False)
    assert vm.asked == ["start paused=False", "stop timeout=7 force=True", "kill"]
    assert said[1:] == ["busy: 1024 requests are in flight", "killing the VM"]


def _ignore(event: Any) -> None:
    """For events that nobody looks at."""
