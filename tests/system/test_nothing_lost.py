# SPDX-License-Identifier: Apache-2.0
"""Promise 2 on real processes: whatever of vmloop is killed while a request is under way, it is carried out once and answered once, and no
event is missing from the VM's stream or twice in it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vmloop.client.session import Host
from vmloop.client.stream import Event
from vmloop.client.vm import Vm
from vmloop.common.cursor import Cursor
from vmloop.common.errors import OutcomeUnknown, VmloopError
from vmloop.common.names import vm_name
from vmloop.common.pack import pack
from vmloop.common.wire import Kind, Message, encode

from .doors import door
from .site import Site, kill_process, wait_for
from .test_many import owed, worker_of, zygote_of

SECONDS = 15.0
START = Cursor(0, 0)
SLOW = 0.3  # seconds that QEMU takes for a command here


class Asked:
    """One call in a thread of its own: its outcome."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self.value: Any = None
        self.error: VmloopError | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.value = self._call()
        except VmloopError as error:
            self.error = error

    def result(self) -> Any:
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), "no answer"
        if self.error is not None:
            raise self.error
        return self.value


def started(site: Site, host: Host, *args: str) -> Vm:
    site.define(host, "web1", "-name", "web1", *args)
    host.vm("web1").start()
    return host.vm("web1")


def lose_worker(vm: Vm) -> None:
    """Kill the VM's worker, and wait for the next one."""
    worker = worker_of(vm)
    kill_process(worker)
    assert wait_for(lambda: vm.show().worker == "ready" and vm.show().worker_pid != worker, SECONDS)


def stream_of(vm: Vm, since: Cursor = START) -> list[Event]:
    """All that the journal has, checked: in order, without a gap, nothing twice."""
    with vm._host.events(vm.name, since=since, follow=False) as stream:
        events = list(stream)
    runs: dict[int, list[int]] = {}
    for event in events:
        runs.setdefault(event.epoch, []).append(event.seq)
    for epoch, numbers in runs.items():
        first = since.seq + 1 if epoch == since.epoch else 1
        assert numbers == list(range(first, first + len(numbers))), (epoch, numbers)
    return events


def names_of(events: list[Event], origin: str = "qmp") -> list[str]:
    return [event.event for event in events if event.origin == origin]


def killed_under(site: Site, vm: Vm, call: Callable[[], Any], *, owes: int = 1) -> Any:
    """The result of a call whose worker is killed while QEMU owes an answer."""
    vm.qmp("x-simulate", {"slow": SLOW})
    worker = worker_of(vm)
    asked = Asked(call)
    try:
        assert wait_for(lambda: owed(site, vm.name) == owes)
        kill_process(worker)
        return asked.result()
    finally:
        if vm.show().state != "shutoff":
            vm.qmp("x-simulate", {"slow": 0}, oob=True)


# -- operations of several steps --------------------------------------------------------------------------------------------


def test_a_pause_whose_worker_dies_is_carried_out_once_and_answered(site: Site, host: Host, beside: Vm) -> None:
    vm = started(site, host)
    assert killed_under(site, vm, vm.pause).state == "paused"
    assert names_of(stream_of(vm)).count("STOP") == 1
    assert killed_under(site, vm, vm.resume).state == "running"
    assert names_of(stream_of(vm)).count("RESUME") == 2  # that of the start, and this one


def test_a_reset_whose_worker_dies_is_carried_out_once_and_answered(site: Site, host: Host) -> None:
    vm = started(site, host)
    assert killed_under(site, vm, vm.reset).state == "running"
    assert names_of(stream_of(vm)).count("RESET") == 1


def test_a_stop_whose_worker_dies_ends_with_the_vm_off_and_the_button_pressed_once(site: Site, host: Host) -> None:
    vm = started(site, host, "-simulate", "powerdown_delay=1.0")
    assert killed_under(site, vm, lambda: vm.stop(timeout=10)).reason == "shutdown"
    assert names_of(stream_of(vm)).count("POWERDOWN") == 1


def test_a_stop_whose_workers_die_while_the_guest_takes_its_time_is_answered(site: Site, host: Host) -> None:
    vm = started(site, host, "-simulate", "powerdown_delay=2.0")
    asked = Asked(lambda: vm.stop(timeout=12))
    assert wait_for(lambda: "POWERDOWN" in names_of(stream_of(vm)))
    lose_worker(vm)
    lose_worker(vm)
    assert asked.result().reason == "shutdown"
    assert names_of(stream_of(vm)).count("POWERDOWN") == 1


@pytest.mark.parametrize("after", [0.0, 0.001, 0.003])
def test_a_kill_whose_worker_dies_right_after_it_is_answered_as_done(site: Site, host: Host, after: float) -> None:
    vm = started(site, host)
    pid, worker = vm.show().pid, worker_of(vm)
    assert pid is not None
    with open_process(pid) as qemu, open_process(worker) as pidfd, host.events("web1") as events:
        asked = Asked(vm.kill)
        assert select.select([qemu], [], [], SECONDS)[0]
        wait_for(lambda: False, after)
        with contextlib.suppress(ProcessLookupError):  # it was done with everything
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert asked.result().state == "shutoff"
        assert events.wait_for("VM_STATE", SECONDS).data["new"] == "shutoff"
    assert wait_for(lambda: vm.show().state == "shutoff")
    assert [event.data["new"] for event in stream_of(vm) if event.event == "VM_STATE"].count("shutoff") == 1


@contextlib.contextmanager
def open_process(pid: int) -> Iterator[int]:
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


@pytest.mark.parametrize("after", [0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8])
def test_a_start_whose_worker_dies_at_any_time_ends_with_one_vm_or_with_none(
    site: Site, host: Host, after: float
) -> None:
    site.define(host, "web1", "-simulate", "slow=0.15")
    asked = Asked(lambda: host.vm("web1").start())
    assert wait_for(lambda: host.vm("web1").show().worker_pid is not None)
    worker = worker_of(host.vm("web1"))
    wait_for(lambda: False, after)
    kill_process(worker)
    try:
        begun = asked.result()
    except VmloopError as error:
        assert error.code == "launch-failed", error
        assert wait_for(lambda: host.vm("web1").show().state == "shutoff")
    else:
        assert begun.state == "running"
        assert host.vm("web1").show().pid == begun.pid
    vm = host.vm("web1")
    count = sum("vmloop.worker.qemu.simulated" in command for command in site.processes().values())
    assert count == (1 if vm.show().state == "running" else 0)
    assert names_of(stream_of(vm), "qmp").count("RESUME") == count


def test_a_definition_is_written_although_its_workers_die(site: Site, host: Host) -> None:
    kills = 0
    for number in range(5):
        asked = Asked(lambda: site.define(site.host(), "web1", "-m", "64"))
        if wait_for(lambda: any(vm.worker_pid for vm in host.list()), 1.0):
            pid = host.list()[0].worker_pid
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):  # it has ended already
                    kill_process(pid)
                    kills += 1
        asked.result()
        assert host.vm("web1").show().defined, number
    assert kills > 0


# -- keys ------------------------------------------------------------------------------------------------------------------


def count_of(vm: Vm, event: str) -> int:
    return names_of(stream_of(vm)).count(event)


def emit(vm: Vm, mark: str, key: bytes) -> Any:
    arguments = {"command": "x-simulate", "arguments": {"emit": {"event": mark}}}
    return vm._host.call(f"vm/{vm.name}", "qmp", arguments, key=key)


def test_a_key_is_remembered_by_the_next_worker_and_by_the_next_broker(site: Site, host: Host) -> None:
    vm = started(site, host)
    first = emit(vm, "X_ONCE", b"once")
    kill_process(worker_of(vm))
    assert emit(vm, "X_ONCE", b"once") == first
    site.kill_broker()
    kill_process(vm_worker(site, "web1"))
    site.start_broker()
    assert emit(vm, "X_ONCE", b"once") == first
    assert emit(vm, "X_ONCE", b"another") == first
    assert count_of(vm, "X_ONCE") == 2


def vm_worker(site: Site, name: str) -> int:
    """The worker's pid by its page: without a broker."""
    from vmloop.common.page import Page, Word

    with Page(site.paths.vm(vm_name(name)).page, writable=False) as page:
        return int(page.words[Word.WORKER_PID])


def test_a_client_without_a_key_still_gets_its_one_answer_from_the_next_worker(site: Site, host: Host) -> None:
    vm = started(site, host)
    vm.qmp("x-simulate", {"slow": SLOW})
    with door(site.paths.client_socket) as raw:
        for number, command in enumerate(["stop", "cont", "stop", "cont", "stop"], 1):
            body = pack({"command": command})
            raw.send(encode(Message(Kind.REQUEST, "vm/web1", "qmp", number, body, seconds=SECONDS)))
        assert wait_for(lambda: owed(site, "web1") >= 1)
        kill_process(worker_of(vm))
        answers = [raw.answer() for _ in range(5)]
    assert [(message.id, message.kind) for message, _ in answers] == [(number, Kind.REPLY) for number in range(1, 6)]
    assert (count_of(vm, "STOP"), count_of(vm, "RESUME")) == (3, 3)
    vm.qmp("x-simulate", {"slow": 0}, oob=True)


# -- the stream --------------------------------------------------------------------------------------------------------------


def test_the_events_of_a_vm_that_does_not_run_can_be_read_over_all_its_runs(site: Site, host: Host) -> None:
    vm = started(site, host)
    vm.kill()
    vm.start()
    vm.stop()
    assert wait_for(lambda: vm.show().worker == "absent")
    events = stream_of(vm)
    assert [event.epoch for event in events if event.event == "WORKER_STARTED"] == [1, 2]
    assert events[-1].data["new"] == "shutoff"
    site.kill_broker()
    site.start_broker()
    assert stream_of(vm) == events
    assert vm.cursor() == events[-1].cursor


def test_a_subscriber_sees_every_event_once_across_the_deaths_of_broker_and_worker(site: Site, host: Host) -> None:
    vm = started(site, host)
    seen: list[Event] = []
    with vm.events(since=Cursor(0, 0)) as stream:
        for number in range(12):
            vm.qmp("x-simulate", {"emit": {"event": f"X_{number}"}, "count": 50})
            if number % 3 == 0:
                lose_worker(vm)
            elif number % 3 == 1:
                site.kill_broker()
                site.start_broker()
            while not seen or seen[-1].event != f"X_{number}" or [e.event for e in seen].count(f"X_{number}") < 50:
                event = stream.get(SECONDS)
                assert event is not None
                seen.append(event)
    assert [event.event for event in seen if event.event.startswith("X_")] == [
        f"X_{number}" for number in range(12) for _ in range(50)
    ]
    assert [event.seq for event in seen] == list(range(1, len(seen) + 1))
    assert seen == stream_of(vm)[: len(seen)]


@pytest.mark.parametrize("longer", [False, True], ids=["shorter", "longer"])
def test_a_follower_sees_all_of_a_vm_that_was_undefined_and_defined_anew(site: Site, host: Host, longer: bool) -> None:
    """Whether its first run has fewer events than the last one of the VM before, or more."""
    vm = started(site, host)
    vm.qmp("x-simulate", {"emit": {"event": "X_OLD"}, "count": 2 if longer else 40})
    old = vm.cursor()
    with host.events("web1", since=START) as stream:
        stream.wait_for("X_OLD", SECONDS)
        vm.kill()
        host.undefine("web1")
        vm = started(site, host)
        vm.qmp("x-simulate", {"emit": {"event": "X_NEW"}, "count": 40 if longer else 2})
        seen: list[Event] = []
        while not seen or seen[-1].cursor < vm.cursor():
            event = stream.get(SECONDS)
            assert event is not None
            seen.append(event)
    new = [event for event in seen if event.epoch > old.epoch]
    assert new == stream_of(vm)
    assert new[0].seq == 1
    assert [event.event for event in new].count("X_NEW") == (40 if longer else 2)
    assert "EVENTS_LOST" not in [event.event for event in seen]


def test_an_attached_vm_that_was_let_go_and_attached_again_counts_on(site: Site, host: Host) -> None:
    """It has no definition: vmloop forgets it in between."""
    started(site, host, "-qmp", f"unix:{site.root}/second.qmp")
    assert host.attach("other", f"{site.root}/second.qmp").epoch == 1
    host.vm("other").detach()
    assert wait_for(lambda: not site.paths.vm(vm_name("other")).run.exists())
    assert not site.paths.vm(vm_name("other")).state.exists()
    assert host.attach("other", f"{site.root}/second.qmp").epoch == 2
    host.vm("other").detach()


def test_the_events_that_came_while_nobody_was_there_are_in_the_stream(site: Site, host: Host) -> None:
    vm = started(site, host)
    vm.qmp("x-simulate", {"flooding": 2000})
    for _ in range(3):
        lose_worker(vm)
    vm.qmp("x-simulate", {"flooding": 0})
    numbers = [event.data["number"] for event in stream_of(vm) if event.event == "X_SIMULATED_FLOOD"]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) > 100


# -- everything that holds the connection is gone ----------------------------------------------------------------------------------


def test_a_connection_that_is_really_lost_is_marked_with_what_changed_meanwhile(site: Site, host: Host) -> None:
    vm = started(site, host, "-qmp", f"unix:{site.root}/second.qmp")
    vm.qmp("x-simulate", {"slow": 1.0})
    mutating = Asked(lambda: site.host().vm("web1").qmp("stop"))
    assert wait_for(lambda: owed(site, "web1") == 1)
    reading = Asked(lambda: vm.qmp("query-name"))
    assert wait_for(lambda: owed(site, "web1") == 2)
    zygote = zygote_of(site)
    assert zygote is not None
    worker = worker_of(vm)
    site.kill_broker()  # so that no worker comes before the VM has changed
    for pid in (zygote, worker):
        kill_process(pid)
    began = time.time()
    wait_for(lambda: False, 2.5)  # QEMU carries out what it has: it stops the CPUs
    site.start_broker()
    assert reading.result() == {"name": "web1"}
    with pytest.raises(OutcomeUnknown):
        mutating.result()
    assert wait_for(lambda: vm.show().state == "paused"), vm.show()
    [lost] = [event for event in stream_of(vm) if event.event == "EVENTS_LOST"]
    assert lost.data["changed"] == {"state": ["running", "paused"]}
    assert lost.data["since"] < began < lost.data["until"] < began + 10
    assert vm.show().epoch == 1
    vm.qmp("x-simulate", {"slow": 0})
