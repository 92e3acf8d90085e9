# SPDX-License-Identifier: Apache-2.0
"""What a monitor does while its VM lives and dies: states and their events, the request queue, a hung main loop, the end."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from ..fakes.raw_qmp import NEGOTIATION, RawClient, refusal
from .subjects import BLOCKED_ID, Subject, without_timestamp

QUEUE_LENGTH = 8  # requests that wait behind the one that runs, until the monitor stops reading


def status(client: RawClient) -> str:
    answer = client.ask("query-status")["return"]
    assert answer["running"] is (answer["status"] == "running")
    return str(answer["status"])


def shut_down(reason: str, *, guest: bool) -> dict[str, Any]:
    return {"event": "SHUTDOWN", "data": {"guest": guest, "reason": reason}}


# -- states --


def test_the_event_of_a_change_comes_before_the_reply_and_no_change_has_none(subject: Subject) -> None:
    subject.start()
    with subject.client() as client:
        assert status(client) == "prelaunch"
        assert client.ask("stop") == {"return": {}}
        assert status(client) == "prelaunch"
        for command, event, after in (("cont", "RESUME", "running"), ("stop", "STOP", "paused")):
            client.send({"execute": command, "id": 1})
            reply, before = client.reply(1)
            assert reply == {"return": {}, "id": 1}
            assert [without_timestamp(message) for message in before] == [{"event": event}]
            # The firmware of the real one may reset the machine when it starts; such events are not the command's.
            client.send({"execute": command, "id": 2})
            _, before = client.reply(2)
            assert all(message["event"] == "RESET" for message in before)
            client.send({"execute": "query-status", "id": 3})
            assert client.reply(3)[0]["return"]["status"] == after


def test_a_reset_of_a_paused_machine_makes_it_as_good_as_new(subject: Subject) -> None:
    subject.start()
    with subject.client() as client:
        client.send({"execute": "system_reset"})
        event, reply = client.messages(2)
        assert without_timestamp(event) == {
            "event": "RESET",
            "data": {"guest": False, "reason": "host-qmp-system-reset"},
        }
        assert reply == {"return": {}}
        assert status(client) == "prelaunch"


def test_the_power_button_is_an_event_and_a_guest_may_ignore_it(subject: Subject) -> None:
    subject.start()
    with subject.client() as client:
        client.send({"execute": "system_powerdown"})
        event, reply = client.messages(2)
        assert without_timestamp(event) == {"event": "POWERDOWN"}
        assert reply == {"return": {}}
        assert client.quiet()
        assert status(client) == "prelaunch"


def test_the_human_monitor_causes_the_same_events(subject: Subject) -> None:
    subject.start()
    with subject.client() as client:
        client.send({"execute": "human-monitor-command", "arguments": {"command-line": "system_powerdown"}})
        event, reply = client.messages(2)
        assert without_timestamp(event) == {"event": "POWERDOWN"}
        assert reply == {"return": ""}


# -- the end --


def test_quit_says_shutdown_then_answers_then_closes(subject: Subject) -> None:
    subject.start()
    with subject.client() as client:
        client.send({"execute": "quit", "id": 99})
        event, reply = client.rest_messages()
    assert without_timestamp(event) == shut_down("host-qmp-quit", guest=False)
    assert reply == {"return": {}, "id": 99}
    assert subject.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_shuts_down_in_good_order(subject: Subject, number: signal.Signals) -> None:
    subject.start()
    with subject.client() as client:
        subject.signal(number)
        (event,) = client.rest_messages()
    assert without_timestamp(event) == shut_down("host-signal", guest=False)
    assert subject.wait() == 0
    assert f"terminating on signal {number.value}".encode() in subject.printed


def test_a_killed_process_says_nothing(subject: Subject) -> None:
    subject.start()
    with subject.client() as client:
        subject.signal(signal.SIGKILL)
        assert client.rest() == b""
    assert subject.wait() == -signal.SIGKILL


def test_a_client_that_has_not_negotiated_gets_no_events(subject: Subject) -> None:
    subject.start()
    # QEMU greets before it handles signals; once it has answered a command, it does.
    subject.client().close()
    with RawClient(subject.path) as client:
        client.message()
        subject.signal(signal.SIGTERM)
        assert client.rest() == b""
    assert subject.wait() == 0


def test_a_guest_that_switches_off_ends_the_process(subject: Subject) -> None:
    subject.start_self_stopping()
    with subject.client() as client:
        subject.run_to_the_end(client)
        messages = [message for message in client.rest_messages() if "event" in message]
    assert [without_timestamp(message) for message in messages] == [shut_down("guest-shutdown", guest=True)]
    assert subject.wait() == 0


def test_with_no_shutdown_the_process_stays_until_it_is_told_to_quit(subject: Subject) -> None:
    subject.start_self_stopping("-no-shutdown")
    with subject.client() as client:
        subject.run_to_the_end(client)
        assert without_timestamp(client.event("SHUTDOWN")) == shut_down("guest-shutdown", guest=True)
        assert without_timestamp(client.event("STOP")) == {"event": "STOP"}
        assert status(client) == "shutdown"
        assert client.ask("stop") == {"return": {}}
        assert client.ask("cont") == refusal("Resetting the Virtual Machine is required")
        client.send({"execute": "system_reset", "id": 1})
        client.reply(1)
        assert status(client) == "prelaunch"
        client.send({"execute": "quit"})
        assert [message.get("event") for message in client.rest_messages()] == ["SHUTDOWN", None]
    assert subject.wait() == 0


# -- a main loop that hangs --


def test_while_the_main_loop_hangs_in_band_waits_and_out_of_band_is_answered(subject: Subject) -> None:
    subject.start()
    with subject.client() as client:
        subject.block(client)
        client.send({"execute": "query-status", "id": "in-band"})
        client.send(b"[1]")
        client.send({"exec-oob": "query-yank", "id": "oob"})
        assert client.message()["id"] == "oob"
        client.send({"exec-oob": "query-status", "id": "refused"})
        assert client.message()["error"]["desc"] == "The command query-status does not support OOB"
        assert client.quiet()
        subject.unblock()
        blocked, in_band, garbage = client.messages(3)
    assert blocked == {"return": {}, "id": BLOCKED_ID}
    assert in_band["id"] == "in-band"
    assert garbage == refusal("QMP input must be a JSON object")


def test_out_of_band_is_read_as_long_as_the_queue_has_room(subject: Subject) -> None:
    subject.start()
    with subject.client() as client:
        subject.block(client)
        for number in range(QUEUE_LENGTH - 1):
            client.send({"execute": "query-status", "id": number})
        client.send({"exec-oob": "query-yank", "id": "oob"})
        assert client.message()["id"] == "oob"
        subject.unblock()
        assert [message["id"] for message in client.messages(QUEUE_LENGTH)] == [BLOCKED_ID, *range(QUEUE_LENGTH - 1)]


def test_out_of_band_is_not_even_read_once_the_queue_is_full(subject: Subject) -> None:
    subject.start()
    with subject.client() as client:
        subject.block(client)
        for number in range(QUEUE_LENGTH):
            client.send({"execute": "query-status", "id": number})
        client.send({"exec-oob": "query-yank", "id": "oob"})
        assert client.quiet()
        subject.unblock()
        assert client.message()["id"] == BLOCKED_ID
        ids = [message["id"] for message in client.messages(QUEUE_LENGTH + 1)]
    assert sorted(ids, key=str) == sorted([*range(QUEUE_LENGTH), "oob"], key=str)


def test_without_oob_one_command_is_read_at_a_time(subject: Subject) -> None:
    subject.start()
    with RawClient(subject.path) as client:
        client.message()
        client.ask("qmp_capabilities")
        with_oob = {"exec-oob": "query-yank", "id": "unread"}
        client.send({"execute": "query-status"})
        client.message()
        # Blocking the stand-in needs a word of its own, which it obeys out of band or not.
        _block_without_oob(subject, client)
        client.send(with_oob)
        assert client.quiet()
        subject.unblock()
        first, second = client.messages(2)
    assert first == {"return": {}, "id": BLOCKED_ID}
    assert second == {"id": "unread", **refusal("QMP input member 'exec-oob' is unexpected")}


def _block_without_oob(subject: Subject, client: RawClient) -> None:
    if type(subject).__name__ == "SimulatedQemu":
        client.ask("x-simulate", busy=True)
        client.send({"execute": "stop", "id": BLOCKED_ID})
    else:
        subject.block(client)


def test_the_reply_to_a_client_that_left_goes_to_the_next_one(subject: Subject) -> None:
    subject.start()
    client = subject.client()
    subject.block(client)
    client.send({"execute": "query-status", "id": "queued"})
    client.send({"exec-oob": "query-yank", "id": "oob"})
    client.reply("oob")
    client.close()
    with RawClient(subject.path) as successor:
        assert "QMP" in successor.message()  # greeted by the monitor's own thread, though the main loop hangs
        successor.send(NEGOTIATION)
        assert successor.quiet()
        subject.unblock()
        foreign, negotiated = successor.messages(2)
        assert foreign == {"return": {}, "id": BLOCKED_ID}
        assert negotiated == {"return": {}}
        assert status(successor) == "prelaunch"  # and what was queued is forgotten


def test_a_stopped_process_answers_nothing_until_it_goes_on(subject: Subject) -> None:
    subject.start()
    with subject.client() as client:
        subject.suspend()
        client.send({"exec-oob": "query-yank", "id": 1})
        client.send({"execute": "query-status", "id": 2})
        assert client.quiet()
        subject.signal(signal.SIGCONT)
        assert {message["id"] for message in client.messages(2)} == {1, 2}
