# SPDX-License-Identifier: Apache-2.0
"""What a real guest with the real qemu-ga does behind a plain QEMU, without vmloop: the ground that agent, handlers and fakes stand on.

Few boots, many facts: a boot takes two to three seconds under TCG, so each test below is a story of one guest's life.
"""

from __future__ import annotations

import base64
import select
from collections.abc import Iterator

import pytest

from ..fakes.raw_qmp import refusal
from ..fakes.real_guest import RealGuest

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("require_qemu")]

STRAY_FF = refusal("JSON parse error, stray '\N{REPLACEMENT CHARACTER}'")
THROTTLE = 1.0  # seconds; VSERPORT_CHANGE of one port comes at most this often


@pytest.fixture
def guest(request: pytest.FixtureRequest) -> Iterator[RealGuest]:
    """A guest that has opened its port; the parameter is what QEMU is started with besides."""
    with RealGuest(*getattr(request, "param", ["-no-shutdown"])) as guest:
        guest.boot()
        yield guest


def microseconds(event: dict[str, dict[str, int]]) -> int:
    stamp = event["timestamp"]
    return stamp["seconds"] * 1_000_000 + stamp["microseconds"]


def test_an_agent_works_freezes_falls_silent_goes_and_comes_back(guest: RealGuest) -> None:
    # The byte that resets the parser is itself answered with an error, before the sync.
    assert guest.synchronise(1) == [STRAY_FF]
    assert guest.synchronise(2) == [STRAY_FF]
    programs_and_files(guest)
    a_frozen_file_system_shuts_most_commands_off(guest)
    a_stopped_agent_answers_late(guest)
    a_new_connection_inherits_what_the_old_one_left(guest)
    an_agent_that_restarts_closes_its_port_for_a_moment(guest)
    a_port_that_flaps_is_reported_once_a_second(guest)
    a_flood_fills_the_host_and_ends_when_the_agent_is_back(guest)
    a_suspended_guest_closes_its_port_and_wakes_with_the_same_agent(guest)
    # The story ends here: after S3 this machine neither powers off ("reboot: Power down", and no event) nor hears the power button.


def programs_and_files(guest: RealGuest) -> None:
    assert guest.run("/bin/sh", "-c", "echo hello; exit 3") == (3, "hello\n")
    handle = guest.ask("guest-file-open", path="/data/f", mode="w")
    assert guest.ask("guest-file-write", handle=handle, buf_b64=base64.b64encode(b"abc").decode())["count"] == 3
    guest.ask("guest-file-close", handle=handle)
    code, printed = guest.run("/bin/sha256sum", "/data/f")
    assert (code, printed[:8]) == (0, "ba7816bf")


def a_frozen_file_system_shuts_most_commands_off(guest: RealGuest) -> None:
    assert guest.ask("guest-fsfreeze-freeze") == 1  # file systems, of which there is one
    assert guest.ask("guest-fsfreeze-status") == "frozen"
    for allowed in ("guest-ping", "guest-info"):
        guest.ask(allowed)
    for command in ("guest-exec", "guest-file-open", "guest-shutdown", "guest-fsfreeze-freeze"):
        # The class is that of a command that does not exist: only the text tells.
        words = f"Command {command} has been disabled: the agent is in frozen state"
        assert guest.agent.ask(command) == refusal(words, "CommandNotFound")
    assert guest.ask("guest-fsfreeze-thaw") == 1
    assert guest.ask("guest-fsfreeze-thaw") == 0  # again: no error
    assert guest.ask("guest-fsfreeze-status") == "thawed"


def a_stopped_agent_answers_late(guest: RealGuest) -> None:
    guest.trouble("stopped", "1")
    guest.agent.quiet(0.2)  # until it is stopped
    guest.agent.send({"execute": "guest-ping", "id": "late"})
    assert guest.agent.quiet()
    # Its port stays open: no event. The late reply comes before what the sync is answered with.
    assert guest.synchronise(3) == [{"return": {}, "id": "late"}, STRAY_FF]


def a_new_connection_inherits_what_the_old_one_left(guest: RealGuest) -> None:
    guest.trouble("stopped", "0.6")
    guest.agent.quiet(0.2)
    guest.agent.send({"execute": "guest-ping", "id": "of the first"})
    guest.agent.send(b'{"execute": "guest-pi')
    guest.connect()  # the guest is not told: no event, its agent reads on where it was
    assert guest.synchronise(4)[0] == {"return": {}, "id": "of the first"}


def an_agent_that_restarts_closes_its_port_for_a_moment(guest: RealGuest) -> None:
    guest.trouble("restart")
    guest.port(is_open=False)
    closed = guest.events[-1]
    guest.port(is_open=True)
    # It was open again after some 0.1 s; the event waits until a second after the one before, and so says it late.
    assert microseconds(guest.events[-1]) - microseconds(closed) < 1_500_000
    assert guest.synchronise(5) == [STRAY_FF]  # the host's connection has outlived the agent


def a_port_that_flaps_is_reported_once_a_second(guest: RealGuest) -> None:
    select.select([guest.monitor.socket], [], [], THROTTLE)
    before = len(guest.events)
    guest.trouble("flap", "50")
    guest.port(is_open=False)
    guest.port(is_open=True)
    assert len(guest.events) - before <= 5  # of a hundred changes; the last state is always told
    guest.synchronise(6)


def a_flood_fills_the_host_and_ends_when_the_agent_is_back(guest: RealGuest) -> None:
    guest.trouble("flood", "0.5")
    received = 0
    while not guest.agent.quiet(1.0):
        received += len(guest.agent.socket.recv(1 << 20))
    assert received > 1 << 20
    # What is sent while somebody else has the port open is lost with them: so not before it is quiet.
    guest.synchronise(7)


def a_suspended_guest_closes_its_port_and_wakes_with_the_same_agent(guest: RealGuest) -> None:
    select.select([guest.monitor.socket], [], [], THROTTLE)
    guest.agent.send({"execute": "guest-suspend-ram"})  # never answered, not even after waking up
    guest.event("SUSPEND")
    assert guest.qmp("query-status")["status"] == "suspended"
    guest.qmp("system_wakeup")
    if "WAKEUP" not in guest.names():
        guest.event("WAKEUP")
    guest.port(is_open=True)
    assert guest.qmp("query-status")["status"] == "running"
    assert guest.synchronise(8) == [STRAY_FF]


@pytest.mark.parametrize("guest", [[]], indirect=True)
def test_a_guest_told_to_shut_down_gives_events_and_no_reply(guest: RealGuest) -> None:
    guest.qmp("set-action", shutdown="pause")  # what -no-shutdown sets, at run time
    guest.agent.send({"execute": "guest-shutdown", "arguments": {"mode": "powerdown"}})
    assert guest.event("SHUTDOWN")["data"] == {"guest": True, "reason": "guest-shutdown"}
    guest.event("STOP")
    assert guest.agent.quiet()
    assert guest.qmp("query-status")["status"] == "shutdown"


@pytest.mark.parametrize("guest", [[]], indirect=True)
def test_without_no_shutdown_the_shutdown_event_is_the_last_word(guest: RealGuest) -> None:
    guest.qmp("system_powerdown")  # the power button, which the guest obeys
    assert guest.event("SHUTDOWN")["data"] == {"guest": True, "reason": "guest-shutdown"}
    assert "POWERDOWN" in guest.names()
    assert guest.monitor.rest() == b""  # no STOP
    assert guest.process is not None
    assert guest.process.wait(10.0) == 0


@pytest.mark.parametrize("guest", [["-device", "i6300esb", "-watchdog-action", "pause"]], indirect=True)
def test_a_watchdog_that_is_not_fed_pauses_then_a_guest_panics(guest: RealGuest) -> None:
    guest.qmp("set-action", shutdown="pause", panic="pause")
    guest.trouble("watchdog")
    assert guest.event("WATCHDOG")["data"] == {"action": "pause"}
    guest.event("STOP")
    assert guest.qmp("query-status")["status"] == "watchdog"
    guest.qmp("set-action", watchdog="none")
    guest.qmp("cont")
    guest.synchronise(1)
    guest.trouble("panic")
    assert guest.event("GUEST_PANICKED")["data"] == {"action": "pause"}
    guest.event("STOP")
    assert guest.qmp("query-status")["status"] == "guest-panicked"
