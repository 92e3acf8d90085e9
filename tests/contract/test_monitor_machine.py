# SPDX-License-Identifier: Apache-2.0
"""What becomes of a VM whose guest panics, sleeps, resets or forgets its watchdog, as the actions say; dumps; absent devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ..fakes.raw_qmp import RawClient, refusal
from .subjects import Subject, without_timestamp

MEMORY = 64 << 20  # bytes, as the subjects are started
FIRMWARE = 256 << 10  # bytes that a dump has beside the memory
STOP = {"event": "STOP"}
RESUME = {"event": "RESUME"}


def status(client: RawClient) -> str:
    client.send({"execute": "query-status", "id": "status"})
    return str(client.reply("status")[0]["return"]["status"])


def panicked(action: str) -> dict[str, Any]:
    return {"event": "GUEST_PANICKED", "data": {"action": action}}


def watchdog(action: str) -> dict[str, Any]:
    return {"event": "WATCHDOG", "data": {"action": action}}


def shut_down(reason: str, *, guest: bool = True) -> dict[str, Any]:
    return {"event": "SHUTDOWN", "data": {"guest": guest, "reason": reason}}


def happened(client: RawClient, deed: str, subject: Subject, count: int) -> list[dict[str, Any]]:
    """The first events after the guest began to run; those of the firmware, which resets the machine as it likes, are left out."""
    subject.run_for(deed, client)
    events: list[dict[str, Any]] = []
    while len(events) < count:
        message = client.message()
        if "event" in message and (events or message["event"] != "RESET"):
            events.append(without_timestamp(message))
    return events


def to_the_end(client: RawClient, deed: str, subject: Subject) -> list[dict[str, Any]]:
    """The events until the process is gone."""
    subject.run_for(deed, client)
    events = [without_timestamp(message) for message in client.rest_messages() if "event" in message]
    return [event for event in events if event["event"] != "RESET"]


# -- actions --


@pytest.mark.parametrize(
    ("actions", "events", "exit_status"),
    [
        ({}, [panicked("poweroff"), shut_down("guest-panic")], 0),
        ({"panic": "exit-failure"}, [panicked("poweroff"), shut_down("guest-panic")], 1),
    ],
    ids=str,
)
def test_a_panic_ends_the_process_unless_told_otherwise(
    subject: Subject, actions: dict[str, str], events: list[dict[str, Any]], exit_status: int
) -> None:
    subject.start_for("panic")
    with subject.client() as client:
        assert client.ask("set-action", **actions) == {"return": {}}
        assert to_the_end(client, "panic", subject) == events
    assert subject.wait() == exit_status


@pytest.mark.parametrize(
    ("deed", "actions", "events", "after"),
    [
        ("panic", {"panic": "pause"}, [panicked("pause"), STOP], "guest-panicked"),
        ("panic", {"panic": "shutdown", "shutdown": "pause"}, [panicked("pause"), STOP], "guest-panicked"),
        (
            "panic",
            {"panic": "exit-failure", "shutdown": "pause"},
            [panicked("poweroff"), shut_down("guest-panic"), STOP],
            "shutdown",
        ),
        ("panic", {"panic": "none"}, [panicked("run")], "running"),
        ("crashloaded", {}, [{"event": "GUEST_CRASHLOADED", "data": {"action": "run"}}], "running"),
        ("watchdog", {"watchdog": "pause"}, [watchdog("pause"), STOP], "watchdog"),
        ("watchdog", {"watchdog": "none"}, [watchdog("none")], "running"),
        ("watchdog", {"watchdog": "debug"}, [watchdog("debug")], "running"),
        ("watchdog", {"watchdog": "inject-nmi"}, [watchdog("inject-nmi")], "running"),
        ("watchdog", {"watchdog": "shutdown"}, [watchdog("shutdown"), {"event": "POWERDOWN"}], "running"),
        (
            "watchdog",
            {"watchdog": "reset", "reboot": "shutdown", "shutdown": "pause"},
            [watchdog("reset"), shut_down("guest-reset"), STOP],
            "shutdown",
        ),
        ("switch_off", {"shutdown": "pause"}, [shut_down("guest-shutdown"), STOP], "shutdown"),
        (
            "hibernate",
            {"shutdown": "pause"},
            [{"event": "SUSPEND_DISK"}, shut_down("guest-shutdown"), STOP],
            "shutdown",
        ),
    ],
    ids=str,
)
def test_what_the_guest_does_has_the_events_and_the_state_that_the_actions_say(
    subject: Subject, deed: str, actions: dict[str, str], events: list[dict[str, Any]], after: str
) -> None:
    subject.start_for(deed)
    with subject.client() as client:
        # Without a reset, which the firmware of the real one brings on when it starts a second time.
        assert client.ask("set-action", **actions) == {"return": {}}
        assert happened(client, deed, subject, len(events)) == events
        assert status(client) == after


def test_a_watchdog_that_resets_says_so_and_the_vm_runs_on(subject: Subject) -> None:
    subject.start_for("watchdog")
    with subject.client() as client:
        reset = {"event": "RESET", "data": {"guest": True, "reason": "guest-reset"}}
        assert happened(client, "watchdog", subject, 2) == [watchdog("reset"), reset]
        assert status(client) == "running"


def test_a_watchdog_that_powers_off_ends_the_process_without_shutdown(subject: Subject) -> None:
    subject.start_for("watchdog", "-no-shutdown")
    with subject.client() as client:
        client.ask("set-action", watchdog="poweroff")
        assert to_the_end(client, "watchdog", subject) == [watchdog("poweroff")]
    assert subject.wait() == 0


def test_a_vm_that_was_shut_down_and_stayed_is_revived_by_a_reset_and_cont(subject: Subject) -> None:
    subject.start_for("switch_off", "-action", "shutdown=pause")
    with subject.client() as client:
        assert happened(client, "switch_off", subject, 2) == [shut_down("guest-shutdown"), STOP]
        client.send({"execute": "cont", "id": "no"})
        assert client.reply("no")[0]["error"]["desc"] == "Resetting the Virtual Machine is required"
        client.send({"execute": "system_reset", "id": "reset"})
        client.reply("reset")
        assert status(client) == "prelaunch"
        client.send({"execute": "cont", "id": "cont"})
        reply, before = client.reply("cont")
        assert (reply["return"], without_timestamp(before[-1])) == ({}, RESUME)


def test_a_vm_that_panicked_may_go_on(subject: Subject) -> None:
    subject.start_for("panic", "-action", "panic=pause")
    with subject.client() as client:
        happened(client, "panic", subject, 2)
        client.send({"execute": "cont", "id": "cont"})
        reply, before = client.reply("cont")
        assert (reply["return"], without_timestamp(before[-1])) == ({}, RESUME)


def test_a_reset_of_a_paused_vm_is_a_shutdown_that_changes_nothing_if_the_actions_say_so(subject: Subject) -> None:
    subject.start("-no-shutdown", "-no-reboot")
    with subject.client() as client:
        client.send({"execute": "system_reset"})
        event, reply = client.messages(2)
        assert without_timestamp(event) == shut_down("host-qmp-system-reset", guest=False)
        assert reply == {"return": {}}
        assert status(client) == "prelaunch"
        client.send({"execute": "quit"})  # which nothing keeps from ending it
        client.rest()
    assert subject.wait() == 0


# -- sleep --


def test_a_guest_that_sleeps_is_woken_by_wakeup_alone(subject: Subject) -> None:
    subject.start_for("suspend")
    with subject.client() as client:
        assert happened(client, "suspend", subject, 1) == [{"event": "SUSPEND"}]
        for command in ("stop", "cont"):
            client.send({"execute": command, "id": command})
            reply, before = client.reply(command)
            assert reply["return"] == {}
            assert not [message for message in before if message.get("event") in ("STOP", "RESUME")]
            assert status(client) == "suspended"
        client.send({"execute": "system_wakeup"})
        event, reply = client.messages(2)
        assert (without_timestamp(event), reply) == ({"event": "WAKEUP"}, {"return": {}})


def test_a_reset_ends_sleep_but_leaves_the_machine_stopped(subject: Subject) -> None:
    subject.start_for("suspend")
    with subject.client() as client:
        happened(client, "suspend", subject, 1)
        client.send({"execute": "system_reset", "id": 1})
        client.reply(1)
        assert status(client) == "prelaunch"


# -- dumps --


def completed(total: int = MEMORY + FIRMWARE) -> dict[str, Any]:
    return {"event": "DUMP_COMPLETED", "data": {"result": {"total": total, "status": "completed", "completed": total}}}


@pytest.mark.parametrize(
    ("detach", "order"),
    [(False, ["STOP", "DUMP_COMPLETED", "RESUME", "reply"]), (True, ["STOP", "reply", "DUMP_COMPLETED", "RESUME"])],
    ids=["waited for", "detached"],
)
def test_a_dump_pauses_the_vm_and_lets_it_go_on(
    subject: Subject, tmp_path: Path, detach: bool, order: list[str]
) -> None:
    subject.start()
    target = tmp_path / "core"
    with subject.client() as client:
        client.send({"execute": "cont"})
        client.event("RESUME")
        client.message()
        assert client.ask("query-dump") == {"return": {"total": 0, "status": "none", "completed": 0}}
        arguments = {"paging": False, "protocol": f"file:{target}", "detach": detach}
        client.send({"execute": "dump-guest-memory", "arguments": arguments})
        messages: list[Any] = []
        while len(messages) < len(order):
            message = client.message()
            if message.get("event") != "RESET":  # the firmware's
                messages.append(message)
        assert [message.get("event", "reply") for message in messages] == order
        assert without_timestamp(messages[order.index("DUMP_COMPLETED")]) == completed()
        client.send({"execute": "query-dump", "id": 1})
        assert client.reply(1)[0]["return"] == completed()["data"]["result"]
    assert target.read_bytes().startswith(b"\x7fELF")


def test_a_dump_that_fails_says_why_twice(subject: Subject) -> None:
    subject.start()
    words = "dump: failed to write elf header: No space left on device"
    with subject.client() as client:
        client.send({"execute": "dump-guest-memory", "arguments": {"paging": False, "protocol": "file:/dev/full"}})
        event, reply = client.messages(2)
        result = {"total": MEMORY + FIRMWARE, "status": "failed", "completed": 0}
        assert without_timestamp(event)["data"] == {"result": result, "error": words}
        assert reply == refusal(words)
        assert client.ask("query-dump") == {"return": result}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "Parameter 'paging' is missing"),
        ({"paging": False}, "Parameter 'protocol' is missing"),
        ({"paging": 1, "protocol": "x"}, "Invalid parameter type for 'paging', expected: boolean"),
        ({"paging": False, "protocol": "x"}, "Invalid parameter 'protocol'"),
        ({"paging": False, "protocol": "file:"}, "Could not open '': No such file or directory"),
        ({"paging": False, "protocol": "file:/no/where"}, "Could not open '/no/where': No such file or directory"),
        ({"paging": False, "protocol": "x", "format": "x"}, "Parameter 'format' does not accept value 'x'"),
        ({"paging": False, "protocol": "x", "format": "kdump-lzo"}, "kdump-lzo is not available now"),
        (
            {"paging": True, "protocol": "x", "format": "kdump-zlib"},
            "kdump-compressed format doesn't support paging or filter",
        ),
        ({"paging": False, "protocol": "x", "begin": 0}, "Parameter 'length' is missing"),
        ({"paging": False, "protocol": "x", "length": 1}, "Parameter 'begin' is missing"),
    ],
    ids=str,
)
def test_a_dump_that_cannot_begin_is_refused(shared: Subject, arguments: dict[str, Any], words: str) -> None:
    with shared.client() as client:
        client.send({"execute": "dump-guest-memory", "arguments": arguments})
        assert client.message() == refusal(words)


# -- queries --


@pytest.mark.parametrize(
    ("command", "arguments", "answer"),
    [
        ("query-memory-size-summary", {}, {"return": {"base-memory": MEMORY, "plugged-memory": 0}}),
        ("query-memory-devices", {}, {"return": []}),
        ("query-balloon", {}, refusal("No balloon device has been activated", "DeviceNotActive")),
        ("balloon", {"value": 1}, refusal("No balloon device has been activated", "DeviceNotActive")),
        ("query-jobs", {}, {"return": []}),
        ("query-block-jobs", {}, {"return": []}),
        ("query-rx-filter", {}, {"return": []}),
        ("query-rx-filter", {"name": "net0"}, refusal("invalid net client name: net0")),
        ("query-pr-managers", {}, {"return": []}),
        ("query-named-block-nodes", {}, {"return": []}),
        (
            "query-named-block-nodes",
            {"flat": 1},
            refusal("Invalid parameter type for 'flat', expected: boolean"),
        ),
        ("query-iothreads", {}, {"return": []}),
        ("query-migrate", {}, {"return": {}}),
        ("query-current-machine", {}, {"return": {"wakeup-suspend-support": True}}),
        ("query-dump-guest-memory-capability", {}, {"return": {"formats": ["elf", "kdump-zlib", "win-dmp"]}}),
        ("set-action", {}, {"return": {}}),
        ("set-action", {"panic": "x"}, refusal("Parameter 'panic' does not accept value 'x'")),
        ("set-action", {"panic": 1}, refusal("Invalid parameter type for 'panic', expected: string")),
        ("set-action", {"reboot": "none"}, refusal("Parameter 'reboot' does not accept value 'none'")),
        ("set-action", {"x": 1}, refusal("Parameter 'x' is unexpected")),
        ("watchdog-set-action", {"action": "x"}, refusal("Parameter 'action' does not accept value 'x'")),
    ],
    ids=str,
)
def test_the_machine_answers(shared: Subject, command: str, arguments: dict[str, Any], answer: dict[str, Any]) -> None:
    with shared.client() as client:
        assert client.ask(command, **arguments) == answer
