# SPDX-License-Identifier: Apache-2.0
"""The faults of the simulated agent and what its guest can do, as far as no real agent can be asked for it: freezing, sleep, lies, floods.

What it has in common with qemu-ga is in tests/contract. One process serves a directory of VMs, and every test takes the next one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.worker.qemu.simulated_faults import Faults, faults_from_text
from vmloop.worker.qemu.simulated_files import MAX_BYTES, Files
from vmloop.worker.qemu.simulated_programs import Surroundings, run_program

from ..fakes.raw_qmp import DEADLINE, RawClient, negotiated, refusal, until

VMS = 30
FROZEN = "the agent is in frozen state"


class Site:
    """A process with simulated VMs, and the number of the next one."""

    def __init__(self, directory: Path, process: psutil.Process) -> None:
        self.directory = directory
        self.process = process
        self.names = iter(f"sim-{number:03}" for number in range(VMS))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("vms")
    command = [sys.executable, "-m", "vmloop.worker.qemu.simulated", "--directory", str(directory), "--count", str(VMS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield Site(directory, psutil.Process(process.pid))
        process.terminate()
        assert process.wait(DEADLINE) == 0


@pytest.fixture
def name(site: Site) -> str:
    return next(site.names)


@pytest.fixture
def client(site: Site, name: str) -> Iterator[RawClient]:
    with negotiated(site.directory / f"{name}.qmp") as client:
        yield client
        client.send({"exec-oob": "x-simulate", "arguments": {"agent_flood": 0, "agent_flapping": 0}, "id": "over"})
        client.reply("over")


@pytest.fixture
def agent(site: Site, name: str, client: RawClient) -> Iterator[RawClient]:
    with RawClient(site.directory / f"{name}.qga") as agent:
        yield agent


def simulate(client: RawClient, **changes: Any) -> list[Any]:
    """Switch faults; returns what came before the reply."""
    client.send({"exec-oob": "x-simulate", "arguments": changes, "id": "x-simulate"})
    reply, before = client.reply("x-simulate")
    assert "return" in reply, reply
    return before


# -- freezing and sleep --


def test_file_systems_freeze_and_thaw_and_are_counted(agent: RawClient) -> None:
    assert agent.ask("guest-fsfreeze-freeze") == {"return": 2}
    for command in ("guest-exec", "guest-fsfreeze-freeze", "guest-file-open", "guest-shutdown"):
        assert agent.ask(command) == refusal(f"Command {command} has been disabled: {FROZEN}", "CommandNotFound")
    assert agent.ask("guest-fsfreeze-thaw") == {"return": 2}
    assert agent.ask("guest-fsfreeze-thaw") == {"return": 0}
    assert agent.ask("guest-fsfreeze-freeze-list", mountpoints=["/home", "/nowhere"]) == {"return": 1}
    assert agent.ask("guest-fsfreeze-thaw") == {"return": 1}
    assert agent.ask("guest-fsfreeze-freeze-list", mountpoints=["/nowhere"]) == {"return": 0}
    assert agent.ask("guest-fsfreeze-status") == {"return": "thawed"}


def test_a_reset_thaws_and_forgets_handles_but_not_files(client: RawClient, agent: RawClient) -> None:
    handle = agent.ask("guest-file-open", path="/tmp/x", mode="w")["return"]
    assert agent.ask("guest-fsfreeze-freeze") == {"return": 2}
    client.send({"execute": "system_reset"})
    assert [message.get("event") for message in client.messages(4)].count("VSERPORT_CHANGE") == 2
    assert agent.ask("guest-fsfreeze-status") == {"return": "thawed"}
    assert agent.ask("guest-file-close", handle=handle) == refusal(f"handle '{handle}' has not been found")
    assert agent.ask("guest-file-open", path="/tmp/x") == {"return": handle + 1}


def test_an_agent_that_sleeps_answers_when_it_is_woken(client: RawClient, agent: RawClient) -> None:
    agent.send({"execute": "guest-suspend-ram"})
    assert client.event("SUSPEND")
    agent.send({"execute": "guest-ping", "id": 1})
    assert agent.quiet()
    client.send({"execute": "system_wakeup"})
    assert client.message()["event"] == "WAKEUP"
    assert agent.message() == {"return": {}, "id": 1}


def test_a_guest_that_hibernates_is_gone_after_two_events(site: Site) -> None:
    name = next(site.names)
    with negotiated(site.directory / f"{name}.qmp") as client, RawClient(site.directory / f"{name}.qga") as agent:
        agent.send({"execute": "guest-suspend-disk"})
        assert client.event("SUSPEND_DISK")
        (event,) = client.rest_messages()
        assert (event["event"], event["data"]) == ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})
        assert agent.rest() == b""


def test_the_guest_tells_its_interfaces_and_file_systems(agent: RawClient) -> None:
    interfaces = agent.ask("guest-network-get-interfaces")["return"]
    assert [interface["name"] for interface in interfaces] == ["lo", "eth0"]
    mounted = agent.ask("guest-get-fsinfo")["return"]
    assert {entry["mountpoint"] for entry in mounted} == {"/", "/home"}
    trimmed = agent.ask("guest-fstrim", minimum=4096)["return"]["paths"]
    assert trimmed[0] == {"path": "/", "minimum": 4096, "trimmed": 0}


# -- lies --


def test_an_old_agent_sends_no_ids(client: RawClient, agent: RawClient) -> None:
    simulate(client, agent_idless=True)
    agent.send({"execute": "guest-ping", "id": 1})
    assert agent.message() == {"return": {}}
    agent.send({"execute": "nope", "id": 1})
    assert "id" not in agent.message()


@pytest.mark.parametrize("kind", ["not-json", "stray-ff", "unknown-id", "no-id", "nested", "deep", "twice", "binary"])
def test_a_garbled_line_is_of_the_wanted_kind_and_the_next_is_good(
    client: RawClient, agent: RawClient, kind: str
) -> None:
    simulate(client, agent_garbled=1, garbled_kind=kind)
    agent.send({"execute": "guest-sync", "arguments": {"id": 5}, "id": 1})
    agent.send({"execute": "guest-sync", "arguments": {"id": 6}, "id": 2})
    good = b'{"return": 5, "id": 1}\n'
    line = agent.line()
    match kind:
        case "stray-ff":
            assert line == good[:11] + b"\xff" + good[11:]
        case "nested":
            assert line == b'{"return": ' + b"[" * 10_000 + b"]" * 10_000 + b', "id": 1}\n'
        case "twice":
            assert (line, agent.line()) == (good, good)
        case _:
            assert line != good
    assert agent.message() == {"return": 6, "id": 2}


def test_a_reply_of_20_mib_comes_whole_but_syncs_stay_small(client: RawClient, agent: RawClient) -> None:
    size = 20 << 20
    simulate(client, agent_big_reply=size)
    assert agent.ask("guest-sync", id=3) == {"return": 3}
    agent.send({"execute": "guest-ping"})
    agent.send({"execute": "guest-get-time"})
    assert len(agent.line()) == size + len('{"return": {"x-padding": ""}}\n')
    assert len(agent.line()) > size


def test_half_a_line_is_the_last_that_is_heard(client: RawClient, agent: RawClient) -> None:
    simulate(client, agent_half_line=True)
    agent.send({"execute": "guest-ping"})
    agent.send({"execute": "guest-ping"})
    until(lambda: not agent.quiet(0.01))
    simulate(client, agent_half_line=False)
    agent.send(b'\xff{"execute": "guest-sync-delimited", "arguments": {"id": 7}}\n')
    half, _, rest = agent.line(end=b"\xff").partition(b'{"error"')
    assert half == b'{"return":'[: len(b'{"return": {}}\n') // 2]
    assert b"stray" in rest
    assert agent.message() == {"return": 7}


def test_late_replies_come_in_order_while_later_commands_are_carried_out(client: RawClient, agent: RawClient) -> None:
    simulate(client, agent_late=0.5)
    handle = {"path": "/tmp/late", "mode": "w"}
    for number in range(3):
        agent.send({"execute": "guest-file-open", "arguments": handle, "id": number})
    begun = time.monotonic()
    assert agent.quiet(0.3)
    assert [message["id"] for message in agent.messages(3)] == [0, 1, 2]
    assert 0.3 < time.monotonic() - begun < 1.2
    agent.send({"execute": "guest-ping"})
    simulate(client, agent_late=0)
    assert agent.message() == {"return": {}}


def test_commands_may_be_disabled_and_come_back(client: RawClient, agent: RawClient) -> None:
    simulate(client, agent_disabled=["guest-ping", "guest-exec"])
    assert agent.ask("guest-ping") == refusal("Command guest-ping has been disabled", "CommandNotFound")
    simulate(client, agent_disabled=[])
    assert agent.ask("guest-ping") == {"return": {}}
    assert faults_from_text("agent_disabled=guest-a+guest-b") == Faults(agent_disabled=("guest-a", "guest-b"))


# -- floods --


def test_a_flood_of_100_000_lines_a_second_is_one(client: RawClient, agent: RawClient) -> None:
    simulate(client, agent_flood=100_000)
    line = b'{"return": 0}\n'
    received, begun = 0, time.monotonic()
    while received < 100_000 * len(line):
        received += len(agent.socket.recv(1 << 20))
        assert time.monotonic() - begun < DEADLINE
    assert 0.7 < time.monotonic() - begun < 3.0  # a busy machine may fall behind


def test_a_flood_that_is_not_read_takes_no_memory(site: Site, client: RawClient, agent: RawClient) -> None:
    before = site.process.memory_info().rss
    simulate(client, agent_flood=1_000_000, **{"for": 1.0})
    assert not agent.quiet(0.5)
    while simulate(client) or client.ask("x-simulate")["return"]["agent_flood"]:
        assert client.quiet(0.05)
    assert site.process.memory_info().rss - before < 40 << 20


def test_replies_that_are_not_read_hold_up_the_agent(site: Site, client: RawClient, agent: RawClient) -> None:
    before = site.process.memory_info().rss
    simulate(client, agent_big_reply=1 << 20)
    agent.send(b'{"execute": "guest-ping"}\n' * 200)
    assert client.ask("query-name")
    assert site.process.memory_info().rss - before < 40 << 20
    simulate(client, agent_big_reply=0)
    assert len(agent.messages(200)) == 200


def test_a_port_may_open_and_close_100_times_a_second(client: RawClient, agent: RawClient) -> None:
    simulate(client, agent_flapping=100)
    begun = time.monotonic()
    opens = [client.event("VSERPORT_CHANGE")["data"]["open"] for _ in range(200)]
    assert 0.7 < time.monotonic() - begun < 3.0
    assert opens == [False, True] * 100
    before = simulate(client, agent_flapping=0)
    agent.send({"execute": "guest-sync", "arguments": {"id": 9}})
    assert agent.message() == {"return": 9}
    assert all(message["event"] == "VSERPORT_CHANGE" for message in before)


# -- the machine --


def test_a_dump_that_takes_its_time_tells_how_far_it_is(client: RawClient, tmp_path: Path) -> None:
    simulate(client, dump_seconds=0.6)
    arguments = {"paging": False, "protocol": f"file:{tmp_path / 'core'}", "detach": True}
    client.send({"execute": "dump-guest-memory", "arguments": arguments})
    assert client.message()["event"] == "STOP"
    assert client.message() == {"return": {}}
    assert client.ask("query-status")["return"]["status"] == "save-vm"
    for command in ("stop", "cont"):
        assert client.ask(command) == refusal("There is a dump in process, please wait.")
    assert client.quiet(0.2)
    told = client.ask("query-dump")["return"]
    assert told["status"] == "active"
    assert 0 < told["completed"] < told["total"]
    assert [client.message()["event"] for _ in range(2)] == ["DUMP_COMPLETED", "RESUME"]


def test_a_dump_that_is_waited_for_holds_up_all_but_out_of_band(client: RawClient, tmp_path: Path) -> None:
    simulate(client, dump_seconds=0.5)
    arguments = {"paging": False, "protocol": f"file:{tmp_path / 'core'}"}
    client.send({"execute": "dump-guest-memory", "arguments": arguments, "id": "dump"})
    client.send({"execute": "query-name", "id": "waits"})
    client.send({"exec-oob": "query-yank", "id": "oob"})
    told = [message.get("event") or message["id"] for message in client.messages(6)]
    assert told == ["STOP", "oob", "DUMP_COMPLETED", "RESUME", "dump", "waits"]


def test_a_reset_in_the_middle_of_a_dump_kills_it_as_it_kills_qemu(
    client: RawClient, site: Site, tmp_path: Path
) -> None:
    name = next(site.names)
    with negotiated(site.directory / f"{name}.qmp") as doomed:
        simulate(doomed, dump_seconds=5)
        arguments = {"paging": False, "protocol": f"file:{tmp_path / 'core'}", "detach": True}
        doomed.send({"execute": "dump-guest-memory", "arguments": arguments})
        doomed.messages(2)
        doomed.send({"execute": "system_reset"})
        assert b"DUMP_COMPLETED" not in doomed.rest()


def test_jobs_and_the_details_of_a_panic_are_as_they_were_given(client: RawClient) -> None:
    job = {"id": "j", "type": "backup", "status": "running", "current-progress": 1, "total-progress": 2}
    simulate(client, jobs=[job], block_jobs=[{"device": "d"}])
    assert client.ask("query-jobs") == {"return": [job]}
    assert client.ask("query-block-jobs") == {"return": [{"device": "d"}]}
    client.ask("set-action", panic="pause")
    info = {"type": "hyper-v", "arg1": 1}
    (panicked, stop) = simulate(client, panic=info)
    assert (panicked["data"], stop["event"]) == ({"action": "pause", "info": info}, "STOP")
    client.send({"execute": "x-simulate", "arguments": {"watchdog": True}})
    assert client.message() == refusal("The guest does not run: guest-panicked")


def test_vms_that_nobody_talks_to_cost_nothing(site: Site) -> None:
    before = sum(site.process.cpu_times()[:2])
    with RawClient(site.directory / f"{next(site.names)}.qmp") as bystander:
        bystander.message()
        assert bystander.quiet(1.0)
    assert sum(site.process.cpu_times()[:2]) - before < 0.03


# -- files and programs, from Python --


def test_all_files_together_have_a_bound() -> None:
    files = Files()
    handle = files.open("/tmp/big", "w")
    files.write(handle, bytes(MAX_BYTES - 1))
    files.write(files.open("/tmp/small", "w"), b"x")
    with pytest.raises(OSError, match="No space left"):
        files.write(handle, b"x")
    files.seek(handle, 1 << 40, 0)
    with pytest.raises(OSError, match="No space left"):
        files.write(handle, b"x")
    files.open("/tmp/big", "w")
    assert files.size() == 1


@given(st.text(), st.lists(st.text(), max_size=3))
def test_no_script_breaks_the_shell(script: str, arguments: list[str]) -> None:
    outcome = run_program("/bin/sh", ["-c", script, *arguments], Surroundings(Files(), 1, {}, b""))
    assert 0 <= outcome.status <= 255
    json.dumps(outcome.err.decode(errors="replace"))
