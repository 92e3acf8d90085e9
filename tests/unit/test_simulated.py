# SPDX-License-Identifier: Apache-2.0
"""Each fault of the simulated QEMU, switched on and off; the ways to start it; its Python side.

What it has in common with QEMU is in tests/contract. Here one process serves a directory of VMs, and every test takes the next one.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.worker.qemu.simulated import (
    Faults,
    LaunchError,
    Machine,
    SimulatedHost,
    SimulatedVm,
    machine_from_arguments,
)
from vmloop.worker.qemu.simulated_faults import changed, faults_from_text
from vmloop.worker.qemu.simulated_json import JsonStream

from ..fakes.raw_qmp import DEADLINE, RawClient, negotiated, until

VMS = 60
COMMAND = [sys.executable, "-m", "vmloop.worker.qemu.simulated"]


class Vm:
    """One of the VMs in the directory."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self.monitor_path = directory / f"{name}.qmp"
        self.agent_path = directory / f"{name}.qga"


@pytest.fixture(scope="module")
def vms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[Vm]]:
    directory = tmp_path_factory.mktemp("vms")
    with subprocess.Popen(
        [*COMMAND, "--directory", str(directory), "--count", str(VMS)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"ready {VMS}\n".encode()
        yield (Vm(directory, f"sim-{number:03}") for number in range(VMS))
        process.terminate()
        assert process.wait(DEADLINE) == 0
        assert list(directory.iterdir()) == []


@pytest.fixture
def vm(vms: Iterator[Vm]) -> Vm:
    return next(vms)


@pytest.fixture
def client(vm: Vm) -> Iterator[RawClient]:
    with negotiated(vm.monitor_path) as client:
        yield client


@pytest.fixture
def agent(vm: Vm, client: RawClient) -> Iterator[RawClient]:
    with RawClient(vm.agent_path) as agent:
        yield agent


def simulate(client: RawClient, **changes: Any) -> dict[str, Any]:
    """Switch faults and return those in force; whatever else comes meanwhile is skipped."""
    client.send({"exec-oob": "x-simulate", "arguments": changes, "id": "x-simulate"})
    reply, _ = client.reply("x-simulate")
    result: dict[str, Any] = reply["return"]
    return result


# -- faults of the monitor --


def test_a_slow_vm_takes_its_time_for_each_command_but_not_out_of_band(client: RawClient) -> None:
    simulate(client, slow=0.4)
    client.send({"execute": "query-name", "id": 1})
    client.send({"execute": "query-name", "id": 2})
    client.send({"exec-oob": "query-yank", "id": "oob"})
    assert client.message()["id"] == "oob"
    assert client.quiet(0.2)
    assert [message["id"] for message in client.messages(2)] == [1, 2]
    simulate(client, slow=0)
    client.send({"execute": "query-name", "id": 3})
    assert client.message()["id"] == 3


def test_a_silent_vm_swallows_commands_for_good(client: RawClient) -> None:
    simulate(client, silent=True)
    client.send({"execute": "query-name", "id": "lost"})
    client.send({"exec-oob": "query-yank", "id": "lost too"})
    assert client.quiet()
    simulate(client, silent=False)
    assert client.ask("query-kvm")["return"]["present"] is True


def test_a_frozen_vm_does_nothing_until_it_thaws(vm: Vm, client: RawClient) -> None:
    simulate(client, frozen=True, **{"for": 0.8})
    client.send({"exec-oob": "query-yank", "id": 1})
    client.send({"execute": "stop", "id": 2})
    assert client.quiet()
    oob, stop, reply = client.messages(3)
    assert (oob["id"], stop["event"], reply["id"]) == (1, "STOP", 2)


def test_a_frozen_vm_accepts_nobody(vm: Vm) -> None:
    with negotiated(vm.monitor_path) as client:
        simulate(client, frozen=True, **{"for": 0.8})
    with RawClient(vm.monitor_path) as client:
        assert client.quiet()
        assert "QMP" in client.message()


def test_a_busy_vm_answers_out_of_band_only(client: RawClient) -> None:
    simulate(client, busy=True)
    client.send({"execute": "query-name", "id": 1})
    client.send({"execute": "query-kvm", "id": 2})
    client.send({"exec-oob": "query-yank", "id": 3})
    assert client.message()["id"] == 3
    assert client.quiet()
    simulate_id = {"exec-oob": "x-simulate", "arguments": {"busy": False}, "id": 4}
    client.send(simulate_id)
    assert sorted(message["id"] for message in client.messages(3)) == [1, 2, 4]


@pytest.mark.parametrize(
    "kind",
    [
        "not-json",
        "truncated",
        "not-an-object",
        "unknown-id",
        "no-id",
        "neither",
        "nameless-event",
        "binary",
        "deep",
        "twice",
    ],
)
def test_a_garbled_line_is_of_the_wanted_kind_and_the_next_one_is_good(client: RawClient, kind: str) -> None:
    assert simulate(client, garbled_kind=kind)["garbled_kind"] == kind
    client.send({"exec-oob": "x-simulate", "arguments": {"garbled": 2}})  # its own reply is the first that is hit
    client.send({"execute": "query-name", "id": 5})
    garbled = [client.line() for _ in range(4 if kind == "twice" else 2)][-1]
    good = json.dumps({"return": {"name": client.ask("query-name")["return"]["name"]}, "id": 5}).encode() + b"\r\n"
    if kind == "twice":
        assert garbled == good
    else:
        assert garbled != good
        assert garbled.endswith(b"\r\n")
    client.send({"execute": "query-name", "id": 6})
    assert client.message()["id"] == 6


def test_a_flood_goes_on_until_it_is_stopped(client: RawClient) -> None:
    simulate(client, flooding=2000)
    numbers = [client.event("X_SIMULATED_FLOOD")["data"]["number"] for _ in range(500)]
    assert numbers == list(range(numbers[0], numbers[0] + 500))
    simulate(client, flooding=0)
    client.send({"execute": "query-name", "id": 1})
    client.reply(1)
    assert client.quiet(0.1)


def test_a_big_reply_is_at_least_as_big_and_nothing_is_lost_while_nobody_reads(client: RawClient) -> None:
    size = 3_000_000
    simulate(client, big_reply=size)
    for number in range(5):
        client.send({"execute": "query-name", "id": number})
    client.send({"execute": "human-monitor-command", "arguments": {"command-line": "info name"}})
    client.send({"execute": "query-block"})
    replies = client.messages(7)
    assert [reply.get("id") for reply in replies[:5]] == [*range(5)]
    assert all(len(json.dumps(reply)) > size for reply in replies)


def test_a_schema_can_be_as_big_as_the_real_one(client: RawClient) -> None:
    simulate(client, schema_bytes=207_000)
    client.send({"execute": "query-qmp-schema"})
    assert len(client.line()) > 207_000


def test_without_a_greeting_a_client_waits_until_it_comes(vm: Vm) -> None:
    with negotiated(vm.monitor_path) as client:
        simulate(client, no_greeting=True)
    with RawClient(vm.monitor_path) as client:
        assert client.quiet()
        client.send({"execute": "x-simulate", "arguments": {"no_greeting": False}})
        assert "QMP" in client.message()


def test_events_may_come_before_the_greeting(vm: Vm) -> None:
    with negotiated(vm.monitor_path) as client:
        simulate(client, early_events=3)
    with RawClient(vm.monitor_path) as client:
        messages = client.messages(4)
    assert [list(message)[-1] for message in messages] == ["data", "data", "data", "QMP"]


def test_a_connection_may_end_in_the_middle_of_a_line_once(vm: Vm) -> None:
    with negotiated(vm.monitor_path) as client:
        client.send({"execute": "x-simulate", "arguments": {"close_midline": True}})
        rest = client.rest()
        assert rest.startswith(b'{"return": ')
        assert b"\n" not in rest
    with negotiated(vm.monitor_path) as client:
        assert simulate(client)["close_midline"] is False


# -- faults of the VM --


def test_a_process_may_be_gone_without_a_word(vm: Vm, client: RawClient) -> None:
    simulate(client, exit_after=0.05)
    assert client.rest() == b""
    assert not vm.monitor_path.exists()


def test_an_exit_can_be_called_off(client: RawClient) -> None:
    simulate(client, exit_after=0.2)
    simulate(client, exit_after=0)
    assert client.quiet(0.4)


def test_a_guest_that_ignored_the_power_button_obeys_when_it_is_itself_again(vm: Vm, client: RawClient) -> None:
    simulate(client, ignore_powerdown=True)
    client.send({"execute": "system_powerdown"})
    client.messages(2)
    assert client.quiet()
    client.send({"execute": "x-simulate", "arguments": {"ignore_powerdown": False}})
    assert client.rest_messages()[-1]["data"] == {"guest": True, "reason": "guest-shutdown"}
    assert not vm.monitor_path.exists()
    assert not vm.agent_path.exists()


def test_any_event_can_be_emitted(client: RawClient) -> None:
    client.send({"execute": "x-simulate", "arguments": {"emit": {"event": "ANY", "data": {"a": 1}}, "count": 3}})
    messages = client.messages(4)
    assert [(message["event"], message["data"]) for message in messages[:3]] == [("ANY", {"a": 1})] * 3


@pytest.mark.parametrize(
    "arguments", [{"nope": 1}, {"slow": "fast"}, {"garbled_kind": "nope"}, {"emit": {}}, {"count": []}], ids=str
)
def test_what_is_no_fault_is_refused(client: RawClient, arguments: dict[str, Any]) -> None:
    client.send({"execute": "x-simulate", "arguments": arguments})
    assert client.message()["error"]["class"] == "GenericError"


# -- faults of the agent --


def test_a_silent_agent_swallows_commands(client: RawClient, agent: RawClient) -> None:
    simulate(client, agent_silent=True)
    agent.send({"execute": "guest-ping"})
    assert agent.quiet()
    simulate(client, agent_silent=False)
    assert agent.ask("guest-sync", id=7) == {"return": 7}


def test_a_slow_agent_answers_one_after_another(client: RawClient, agent: RawClient) -> None:
    simulate(client, agent_slow=0.3)
    agent.send({"execute": "guest-sync", "arguments": {"id": 1}})
    agent.send({"execute": "guest-sync", "arguments": {"id": 2}})
    assert agent.quiet(0.15)
    assert agent.messages(2) == [{"return": 1}, {"return": 2}]


def test_a_garbled_agent_recovers(client: RawClient, agent: RawClient) -> None:
    simulate(client, agent_garbled=1)
    agent.send({"execute": "guest-ping"})
    assert agent.line() == b"%%% this is no JSON\n"
    assert agent.ask("guest-ping") == {"return": {}}


def test_an_agent_may_talk_without_being_asked(client: RawClient, agent: RawClient) -> None:
    simulate(client, agent_flood=1000)
    assert agent.messages(100) == [{"return": 0}] * 100
    simulate(client, agent_flood=0)
    agent.send({"execute": "guest-sync", "arguments": {"id": 99}})
    while agent.message() != {"return": 99}:
        pass
    assert agent.quiet(0.1)


def test_an_absent_agent_closes_its_port_and_hears_nothing(client: RawClient, agent: RawClient) -> None:
    client.send({"execute": "x-simulate", "arguments": {"agent_absent": True}})
    closed, _ = client.messages(2)
    assert (closed["event"], closed["data"]) == ("VSERPORT_CHANGE", {"open": False, "id": "channel0"})
    assert client.ask("query-chardev")["return"][1]["frontend-open"] is False
    agent.send({"execute": "guest-sync", "arguments": {"id": 1}})
    assert agent.quiet()
    client.send({"execute": "x-simulate", "arguments": {"agent_absent": False}})
    assert client.event("VSERPORT_CHANGE")["data"] == {"open": True, "id": "channel0"}
    assert agent.ask("guest-sync", id=2) == {"return": 2}


def test_a_guest_that_boots_reads_what_was_sent_before(client: RawClient, agent: RawClient) -> None:
    simulate(client, boot_delay=0.4)
    client.send({"execute": "system_reset"})
    assert [message.get("event") for message in client.messages(3)] == ["VSERPORT_CHANGE", "RESET", None]
    agent.send({"execute": "guest-sync", "arguments": {"id": 1}})
    assert agent.quiet(0.2)
    assert client.event("VSERPORT_CHANGE")["data"]["open"] is True
    assert agent.message() == {"return": 1}


def test_a_paused_guest_answers_when_it_goes_on(client: RawClient, agent: RawClient) -> None:
    client.send({"execute": "stop"})
    client.messages(2)
    agent.send({"execute": "guest-ping"})
    assert agent.quiet()
    client.send({"execute": "cont"})
    assert agent.message() == {"return": {}}


@pytest.mark.parametrize("mode", ["powerdown", "halt"])
def test_the_agent_can_switch_the_machine_off(client: RawClient, agent: RawClient, mode: str) -> None:
    agent.send({"execute": "guest-shutdown", "arguments": {"mode": mode}})
    (event,) = client.rest_messages()
    assert (event["event"], event["data"]) == ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})
    assert agent.rest() == b""


def test_the_agent_can_reboot_and_comes_back(client: RawClient, agent: RawClient) -> None:
    agent.send({"execute": "guest-shutdown", "arguments": {"mode": "reboot"}})
    events = [(event["event"], event["data"]) for event in client.messages(3)]
    assert events == [
        ("VSERPORT_CHANGE", {"open": False, "id": "channel0"}),
        ("RESET", {"guest": True, "reason": "guest-reset"}),
        ("VSERPORT_CHANGE", {"open": True, "id": "channel0"}),
    ]
    assert agent.ask("guest-ping") == {"return": {}}


# -- the ways to start it --


def test_a_vm_that_quits_leaves_the_others_alone(vms: Iterator[Vm]) -> None:
    first, second = next(vms), next(vms)
    with negotiated(first.monitor_path) as client, negotiated(second.monitor_path) as other:
        client.send({"execute": "quit"})
        assert client.rest_messages()[0]["event"] == "SHUTDOWN"
        until(lambda: not first.monitor_path.exists() and not first.agent_path.exists())
        assert other.ask("query-name") == {"return": {"name": second.name}}


def test_a_vm_that_cannot_start_says_so_and_ends(tmp_path: Path) -> None:
    ended = subprocess.run(
        [*COMMAND, "-S", "-fail", "no such disk"], capture_output=True, timeout=DEADLINE, check=False
    )
    assert (ended.returncode, ended.stderr) == (1, b"qemu-system-x86_64: no such disk\n")


def test_faults_on_the_command_line_hold_from_the_start_and_a_signal_ends_them(tmp_path: Path) -> None:
    path = tmp_path / "m.sock"
    arguments = ["-qmp", f"unix:{path},server=on,wait=off", "-name", "guest=web1,debug-threads=on"]
    with subprocess.Popen([*COMMAND, *arguments, "-simulate", "no_greeting,slow=0.1"]) as process:
        until(path.exists)
        with RawClient(path) as client:
            assert client.quiet()
            process.send_signal(signal.SIGUSR1)
            assert "QMP" in client.message()
            client.ask("qmp_capabilities")
            assert client.ask("query-name") == {"return": {"name": "web1"}}
            assert simulate_defaults(client)
            client.send({"execute": "quit"})
        assert process.wait(DEADLINE) == 0


def simulate_defaults(client: RawClient) -> bool:
    """True if no fault is in force."""
    return msgspec.convert(client.ask("x-simulate")["return"], Faults) == Faults()


def test_a_process_that_exits_by_itself_has_a_status_like_a_crash(tmp_path: Path) -> None:
    ended = subprocess.run([*COMMAND, "-simulate", "exit_after=0.05"], timeout=DEADLINE, check=False)
    assert ended.returncode == 1


# -- command lines --


def test_a_command_line_of_qemus_is_read_as_far_as_it_matters() -> None:
    machine = machine_from_arguments(
        [
            *("-machine", "q35", "-S", "-no-shutdown"),
            *("-chardev", "socket,id=m,path=/a,,b,server=on", "-mon", "m,mode=control"),
            *("-chardev", "file,id=log,path=/x"),
            *("-device", "virtserialport,chardev=m,name=org.qemu.guest_agent.0,id=p"),
        ]
    )
    assert (machine.paused, machine.actions.shutdown, machine.monitors) == (True, "pause", ["m"])
    assert machine.chardevs["m"]["path"] == "/a,b"
    assert (machine.agent, machine.agent_port_id) == ("m", "p")
    assert machine_from_arguments([]) == Machine()


def test_a_device_may_be_in_json_as_libvirt_writes_it() -> None:
    port = '{"driver":"virtserialport","nr":1,"chardev":"m","name":"org.qemu.guest_agent.0","id":"p"}'
    machine = machine_from_arguments(
        ["-chardev", "socket,id=m,path=/a", "-device", port, "-device", '{"driver":"VGA"}']
    )
    assert (machine.agent, machine.agent_port_id) == ("m", "p")


@pytest.mark.parametrize(
    "arguments",
    [["-mon", "chardev=nope,mode=control"], ["-simulate", "nope=1"], ["-simulate", "slow=fast"], ["-device", "{"]],
    ids=str,
)
def test_a_command_line_that_cannot_work_is_refused(arguments: list[str]) -> None:
    with pytest.raises(LaunchError):
        machine_from_arguments(arguments)


def test_faults_are_read_from_text_and_names_may_have_dashes() -> None:
    faults = faults_from_text("busy,slow=0.5,garbled=3,garbled-kind=deep,frozen=false")
    assert faults == Faults(busy=True, slow=0.5, garbled=3, garbled_kind="deep")
    assert changed(faults, {"busy": False, "slow": 0, "garbled": 0, "garbled_kind": "not-json"}) == Faults()


# -- JSON as QEMU reads it --


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_inputs_do_not_depend_on_how_they_are_cut(size: int) -> None:
    data = b'{"a": 1}{"b": "x:y"}\n[1, {"c": null}] 17 "t" nope {"d": -1.5e3}\xff{"e": "\\u00e9\\\\"}\n'
    stream = JsonStream()
    found: list[Any] = []
    for start in range(0, len(data), size):
        stream.feed(data[start : start + size])
        while (item := stream.take()) is not None:
            found.append(item.error or item.value)
    assert found == [
        {"a": 1},
        {"b": "x:y"},
        [1, {"c": None}],
        17,
        "t",
        "JSON parse error, invalid keyword 'nope'",
        {"d": -1500},
        "JSON parse error, stray '\N{REPLACEMENT CHARACTER}'",
        {"e": "é\\"},
    ]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=10,
)


@given(st.lists(JSON_VALUES, min_size=1, max_size=4), st.booleans(), st.data())
def test_any_json_is_read_as_python_reads_it(values: list[Any], ascii_only: bool, data: st.DataObject) -> None:
    text = " ".join(json.dumps(value, ensure_ascii=ascii_only) for value in values).encode() + b"\n"
    cut = data.draw(st.integers(0, len(text)))
    stream = JsonStream()
    found: list[Any] = []
    for part in (text[:cut], text[cut:]):
        stream.feed(part)
        while (item := stream.take()) is not None:
            assert item.error is None
            found.append(item.value)
    assert found == values


@given(st.lists(st.binary(max_size=50), max_size=5))
def test_no_bytes_break_the_reader(chunks: list[bytes]) -> None:
    stream = JsonStream()
    for chunk in [*chunks, b'\n\xff\n{"after": 1}']:
        stream.feed(chunk)
        last = None
        while (item := stream.take()) is not None:
            last = item
    assert last is not None
    assert last.value == {"after": 1}


# -- from Python --


def test_faults_can_be_switched_from_python_while_a_client_looks_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        host = SimulatedHost(tmp_path)
        vm = host.add("web1", paused=True)
        reader, writer = await asyncio.open_unix_connection(str(host.monitor_path("web1")))
        assert b"QMP" in await reader.readline()
        vm.change_faults(frozen=True)
        writer.write(b'{"execute": "qmp_capabilities"}')
        vm.emit("UNSEEN")
        vm.change_faults(frozen=False)
        assert await reader.readline() == b'{"return": {}}\r\n'
        vm.cont()
        assert b"RESUME" in await reader.readline()
        host.close()
        assert vm.ended
        assert host.vms == {}
        writer.close()

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE))
    assert list(tmp_path.iterdir()) == []


def test_a_vm_ends_once_and_tells_its_owner(tmp_path: Path) -> None:
    ends: list[int] = []

    async def scenario() -> None:
        vm = SimulatedVm("web1", Faults(busy=True), on_end=lambda _, status: ends.append(status))
        vm.start()
        vm.shutdown(guest=False, reason="host-signal")
        await asyncio.sleep(0)
        assert not vm.ended  # a main loop that hangs sees no signal
        vm.change_faults(busy=False)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        vm.end(5)

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE))
    assert ends == [0]


def test_descriptors_that_a_client_passed_are_closed_with_the_vm(tmp_path: Path) -> None:
    reader, writer = os.pipe()

    async def scenario() -> None:
        host = SimulatedHost(tmp_path)
        host.add("web1")
        loop = asyncio.get_running_loop()
        client = await loop.run_in_executor(None, negotiated, host.monitor_path("web1"))
        client.send_with_fds({"execute": "getfd", "arguments": {"fdname": "pipe"}}, [writer])
        os.close(writer)
        assert await loop.run_in_executor(None, client.message) == {"return": {}}
        host.close()
        client.close()

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE))
    assert os.read(reader, 1) == b""  # the last writer is gone
    os.close(reader)
