# SPDX-License-Identifier: Apache-2.0
"""Guest agents that lie, flood and flap: each gets a coded error or an event, costs its own worker little, and others nothing.

The guests are simulated; tests/system/test_guest.py floods from a real one.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any, Final, NamedTuple

from vmloop.client.session import Host
from vmloop.client.vm import Vm
from vmloop.common.cursor import Cursor
from vmloop.common.errors import AgentAbsent, AgentUnresponsive, TooLarge, VmloopError

from .figures import MIB, answering_as_before, usage_of_worker
from .site import Site, wait_for

TIMEOUT: Final = 0.3  # of the agents
SECONDS: Final = 20.0  # a port that flooded or flapped is left alone for ten
FLOOD: Final = 100_000  # lines per second
FLAP: Final = 100  # times per second
MAX_REPLY: Final = 16 * MIB  # the setting's default


class Lie(NamedTuple):
    """What is asked about meanwhile, and what comes of it."""

    faults: dict[str, Any]
    error: type[VmloopError] | None  # None: it is answered all the same
    peak: int = 2 * MIB  # bytes by which the worker may grow
    timeout: float = TIMEOUT


def garbled(kind: str, error: type[VmloopError] | None = AgentUnresponsive) -> Lie:
    return Lie({"agent_garbled": 1, "garbled_kind": kind}, error)


LIES: Final = {
    "not JSON": garbled("not-json"),
    "half of its JSON": garbled("truncated"),
    "JSON, but no object": garbled("not-an-object"),
    "neither return nor error": garbled("neither"),
    "0xFF in the middle": garbled("stray-ff"),
    "no UTF-8": garbled("binary"),
    "an id that nobody asked with": garbled("unknown-id"),
    "no id, where it had one before": garbled("no-id"),
    "everything twice": garbled("twice", None),
    "well-formed, 10 000 deep": garbled("nested"),
    "100 000 brackets": garbled("deep"),
    "half a line, then silence": Lie({"agent_half_line": True}, AgentUnresponsive),
    "10 MiB": Lie({"agent_big_reply": 10 * MIB}, None, 6 * 10 * MIB, 3.0),
    "20 MiB": Lie({"agent_big_reply": 20 * MIB}, TooLarge, 2 * MAX_REPLY, 3.0),
    "20 MiB without an end": Lie({"agent_big_reply": 40 * MIB, "agent_half_line": True}, TooLarge, 2 * MAX_REPLY, 3.0),
}

OVER: Final[dict[str, Any]] = {
    "agent_garbled": 0,
    "agent_half_line": False,
    "agent_big_reply": 0,
    "agent_flood": 0,
    "agent_flapping": 0,
}


def started(site: Site, host: Host, name: str, *args: str, timeout: float = TIMEOUT) -> Vm:
    site.define(host, name, *args, agent={"enabled": True, "timeout": timeout})
    host.vm(name).start()
    return host.vm(name)


def is_ready(vm: Vm, seconds: float = SECONDS) -> bool:
    return wait_for(lambda: vm.show().agent == "ready", seconds) is True


def agent_reasons(vm: Vm) -> list[str]:
    """Why the agent's state has changed so far, in this run."""
    with vm.events(since=Cursor(vm.cursor().epoch, 0)) as events:
        told = []
        while (event := events.get(0.2)) is not None:
            if event.event == "AGENT_STATE":
                told.append(f"{event.data['new']}: {event.data['reason']}")
    return told


def test_every_lie_is_an_error_of_its_own_vm_and_costs_little(site: Site, host: Host, beside: Vm) -> None:
    for number, (what, lie) in enumerate(LIES.items()):
        vm = started(site, host, f"liar{number}", timeout=lie.timeout)
        assert is_ready(vm), what
        used = usage_of_worker(vm)
        vm.qmp("x-simulate", lie.faults)
        error = asked(vm, lie.timeout)
        assert (type(error) if error is not None else None) == lie.error, (what, error)
        assert used.peak < lie.peak, (what, used.peak)
        vm.qmp("x-simulate", OVER)
        assert is_ready(vm), what
        assert vm.agent("guest-ping") == {}, what
        assert used.kept < 2 * MIB, (what, used.kept)
        assert used.cpu < 0.5, (what, used.cpu)
        assert beside.qmp("query-status", timeout=1.0)["status"] == "running"
        vm.kill()


def asked(vm: Vm, timeout: float) -> VmloopError | None:
    """Ask the agent something; the error that comes, which must come in time and say whether the command has left."""
    began = time.monotonic()
    try:
        vm.agent("guest-info")
    except VmloopError as error:
        assert time.monotonic() - began < timeout + 0.7
        assert error.fields["sent"] is True
        assert "guest-info" in error.message
        return error
    return None


def test_an_agent_that_lies_from_the_beginning_is_asked_again_until_it_answers(
    site: Site, host: Host, beside: Vm
) -> None:
    del beside
    kinds = ("not-json", "truncated", "stray-ff", "unknown-id", "deep")
    liars = {kind: started(site, host, kind, "-simulate", f"agent_garbled=2,garbled_kind={kind}") for kind in kinds}
    for kind, vm in liars.items():
        assert is_ready(vm), kind
        reasons = agent_reasons(vm)
        # An answer to the sync that has lost its id is still an answer to it: the number in it cannot be guessed.
        if kind != "unknown-id":
            assert f"unresponsive: the guest agent has not answered a sync for {TIMEOUT:g} s" in reasons, kind
        assert reasons[-1] == "ready: the agent answers", kind
        assert vm.agent("guest-ping") == {}, kind


def test_floods_and_flapping_ports_cost_little_and_pass(site: Site, host: Host, beside: Vm) -> None:
    flooding, flapping = started(site, host, "flooding"), started(site, host, "flapping")
    directory, (name,) = site.simulate(1)
    host.attach("theirs", directory / f"{name}.qmp", directory / f"{name}.qga")
    theirs = host.vm("theirs")
    assert all(is_ready(vm) for vm in (flooding, flapping, theirs))

    used = usage_of_worker(flooding)
    began = time.monotonic()
    with answering_as_before(beside, 3.0, 500):
        flooding.qmp("x-simulate", {"agent_flood": FLOOD})
        assert wait_for(lambda: not answers(flooding))  # it does until the allowance is spent
        for _ in range(3):
            assert not answers(flooding)
    assert any(reason.startswith("unresponsive") for reason in agent_reasons(flooding))
    assert flooding.qmp("query-status")["status"] == "running"
    lasted = time.monotonic() - began
    flooding.qmp("x-simulate", OVER)
    assert used.cpu < 0.1 + 0.2 * lasted  # what may be spent at once, and what answering us costs

    shaking = {vm: usage_of_worker(vm) for vm in (flapping, theirs)}
    with answering_as_before(beside, 3.0, 500):
        for vm in shaking:
            vm.qmp("x-simulate", {"agent_flapping": FLAP})
        for vm in shaking:
            assert wait_for(partial(is_left_alone, vm), SECONDS)
    for vm in shaking:
        vm.qmp("x-simulate", OVER)

    for vm in (flooding, flapping, theirs):
        # Not `ready` at once: what may be spent on reading a guest that flooded comes back bit by bit.
        assert wait_for(partial(answers, vm), SECONDS), vm.name
        assert is_ready(vm), vm.name
    assert used.peak < 4 * MIB
    for vm, spent in shaking.items():
        assert spent.cpu < 1.0, vm.name
        assert spent.peak < 4 * MIB, vm.name
        assert len(agent_reasons(vm)) < 30, "each opening is not told while it flaps"


def answers(vm: Vm) -> bool:
    """Whether its agent answers in time."""
    try:
        return bool(vm.agent("guest-ping") == {})
    except (AgentAbsent, AgentUnresponsive):
        return False


def is_left_alone(vm: Vm) -> bool:
    """Whether its port flaps so much that it is not opened for a while."""
    try:
        vm.agent("guest-ping")
    except AgentAbsent as absent:
        return "flapping" in absent.message
    except VmloopError:
        return False  # it was there for a moment
    return False
