# SPDX-License-Identifier: Apache-2.0
"""A worker is killed with commands of the guest agent's under way: the next one goes on with the same connection and answers them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from vmloop.client.session import Host
from vmloop.client.vm import Vm
from vmloop.common.errors import AgentAbsent, AgentUnresponsive, NotRunning, OutcomeUnknown

from .figures import agent_owes
from .site import Site, kill_process, signal_process, wait_for

SECONDS = 15.0
SLOW = 0.5  # seconds that the agent takes for a command


@pytest.fixture
def vm(site: Site, host: Host) -> Vm:
    return started(host, site)


def started(host: Host, site: Site, *args: str) -> Vm:
    site.define(host, "odd", *args, agent={"enabled": True, "timeout": 5.0})
    vm = host.vm("odd")
    vm.start()
    assert wait_for(lambda: vm.show().agent == "ready", SECONDS)
    return vm


@pytest.fixture
def beside() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def worker_of(vm: Vm) -> int:
    pid = vm.show().worker_pid
    assert pid is not None
    return pid


def simulate(vm: Vm, **faults: Any) -> None:
    vm.qmp("x-simulate", faults)


def exec_in(vm: Vm) -> Any:
    return vm.agent("guest-exec", {"path": "/bin/echo", "arg": ["x"], "capture-output": True}, timeout=SECONDS)


def on_the_wire(beside: ThreadPoolExecutor, site: Site, command: Callable[[], Any]) -> Future[Any]:
    """Give a command, and wait until the page says that the agent owes its answer."""
    future = beside.submit(command)
    assert wait_for(lambda: agent_owes(site, "odd"), SECONDS)
    return future


@pytest.mark.parametrize("args", [(), ("-simulate", "agent_idless")], ids=["ids", "no ids"])
def test_a_command_in_flight_is_answered_by_the_next_worker(
    site: Site, host: Host, beside: ThreadPoolExecutor, args: tuple[str, ...]
) -> None:
    vm = started(host, site, *args)
    simulate(vm, agent_slow=SLOW)
    with vm.events() as events:
        for _ in range(3):
            answer = on_the_wire(beside, site, lambda: exec_in(vm))
            kill_process(worker_of(vm))
            assert answer.result(SECONDS)["pid"] > 0
            events.wait_for("WORKER_LOST", SECONDS)
        simulate(vm, agent_slow=0.0)
        assert vm.agent("guest-ping") == {}
        assert wait_for(lambda: vm.show().agent == "ready", SECONDS)


def test_an_answer_that_comes_while_no_worker_lives_is_given(site: Site, vm: Vm, beside: ThreadPoolExecutor) -> None:
    simulate(vm, agent_slow=SLOW)
    answer = on_the_wire(beside, site, lambda: exec_in(vm))
    worker = worker_of(vm)
    assert site.broker is not None
    signal_process(site.broker.pid, signal.SIGSTOP)  # nobody makes the next worker
    try:
        kill_process(worker)
        answered_at = time.monotonic() + 2 * SLOW
        assert wait_for(lambda: time.monotonic() > answered_at, SECONDS)
    finally:
        signal_process(site.broker.pid, signal.SIGCONT)
    assert answer.result(SECONDS)["pid"] > 0


@pytest.mark.parametrize("args", [(), ("-simulate", "agent_idless")], ids=["ids", "no ids"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_commands_in_line_are_each_carried_out_once_by_whichever_worker(
    site: Site, host: Host, beside: ThreadPoolExecutor, how: signal.Signals, args: tuple[str, ...]
) -> None:
    vm = started(host, site, *args)
    first = exec_in(vm)["pid"]
    simulate(vm, agent_slow=SLOW)
    answers = [on_the_wire(beside, site, lambda: exec_in(vm)) for _ in range(4)]
    assert wait_for(lambda: host.stats("odd")[0].in_flight == 4, SECONDS)
    assert not any(answer.done() for answer in answers)  # one on the wire, three behind it
    signal_process(worker_of(vm), how)
    pids = sorted(answer.result(SECONDS)["pid"] for answer in answers)
    simulate(vm, agent_slow=0.0)
    last = exec_in(vm)["pid"]
    assert len({first, *pids, last}) == 6
    assert last - first == 5, "a command was carried out twice"


def test_a_worker_that_leaves_in_order_hands_the_command_on(site: Site, vm: Vm, beside: ThreadPoolExecutor) -> None:
    simulate(vm, agent_slow=SLOW)
    answer = on_the_wire(beside, site, lambda: exec_in(vm))
    worker = worker_of(vm)
    signal_process(worker, signal.SIGTERM)
    assert answer.result(SECONDS)["pid"] > 0
    assert wait_for(lambda: vm.show().worker_pid not in (None, worker), SECONDS)


def test_a_qemu_that_ends_meanwhile_ends_the_command_as_unknown(site: Site, vm: Vm, beside: ThreadPoolExecutor) -> None:
    simulate(vm, agent_silent=True)
    answer = on_the_wire(beside, site, lambda: exec_in(vm))
    reading = beside.submit(lambda: vm.agent("guest-ping", timeout=SECONDS))
    qemu, worker = vm.show().pid, worker_of(vm)
    assert qemu is not None
    signal_process(worker, signal.SIGSTOP)
    kill_process(qemu)
    kill_process(worker)
    assert isinstance(answer.exception(SECONDS), OutcomeUnknown)
    assert isinstance(reading.exception(SECONDS), (AgentAbsent, AgentUnresponsive, NotRunning))
    assert vm.wait("shutoff", timeout=SECONDS).state == "shutoff"


def test_a_worker_killed_between_two_commands_asks_for_no_sync(vm: Vm) -> None:
    with vm.events() as events:
        worker = worker_of(vm)
        kill_process(worker)
        events.wait_for("WORKER_LOST", SECONDS)
        reasons: list[tuple[str, str]] = []
        while not reasons or reasons[-1][0] != "ready":
            data = events.wait_for("AGENT_STATE", SECONDS).data
            reasons.append((data["new"], data["reason"]))
    assert reasons[-2:] == [("syncing", "connection taken over"), ("ready", "in step since an earlier worker")]


def test_the_guests_end_that_an_earlier_worker_asked_for_is_told(
    site: Site, vm: Vm, beside: ThreadPoolExecutor
) -> None:
    simulate(vm, agent_slow=SLOW)
    answer = on_the_wire(beside, site, lambda: vm.agent("guest-shutdown", timeout=SECONDS))
    kill_process(worker_of(vm))
    assert answer.result(SECONDS) == {}
