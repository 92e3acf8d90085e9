# SPDX-License-Identifier: Apache-2.0
"""The guest's calls of the blocking client, against a guest on a scripted broker."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenacity import RetryCallState, Retrying

from vmloop.client import connect, requests
from vmloop.client.guest_exec import GuestExit, _pauses
from vmloop.client.guest_files import PIECE, GuestCopy, read_file, write_file
from vmloop.client.steps import drive
from vmloop.client.vm import Vm
from vmloop.common.errors import (
    AgentAbsent,
    AgentError,
    AgentUnresponsive,
    BadRequest,
    Busy,
    DeadlineExceeded,
    OutcomeUnknown,
    VmloopError,
    WorkerLost,
)
from vmloop.common.pack import MAX_MESSAGE_BYTES, unpack_map

from ..fakes.guest_on_wire import Ended, GuestOnWire
from ..fakes.native_broker import NativeBroker

SOON = 10.0
CONTENT = bytes(range(256)) * (PIECE // 256 * 2) + b"the rest"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[NativeBroker]:
    with NativeBroker(tmp_path) as broker:
        yield broker


@pytest.fixture
def guest(broker: NativeBroker) -> GuestOnWire:
    return GuestOnWire(broker)


@pytest.fixture
def vm(broker: NativeBroker, guest: GuestOnWire) -> Iterator[Vm]:
    with connect(broker.endpoint, timeout=SOON) as host:
        yield host.vm("web1")


class Once:
    """Does something the first time that a command comes."""

    def __init__(self, command: str, error: BaseException) -> None:
        self.command = command
        self.error: BaseException | None = error

    def __call__(self, command: str, arguments: dict[str, Any]) -> None:
        if command == self.command and self.error is not None:
            error, self.error = self.error, None
            raise error


# -- commands -------------------------------------------------------------------------------------------------------------


def test_a_command_goes_as_it_is_and_its_answer_comes_as_it_is(vm: Vm, broker: NativeBroker) -> None:
    assert vm.agent("guest-ping", timeout=3.0) == {}
    (asked,) = broker.seen
    assert (unpack_map(asked.body), asked.reading, asked.seconds) == ({"command": "guest-ping"}, True, 3.0)
    with pytest.raises(AgentError) as refused:
        vm.agent("nosuch", {"a": 1})
    assert refused.value.fields["kind"] == "unknown"
    assert not broker.seen[-1].reading
    vm.agent("guest-fsfreeze-thaw", reading=True)
    assert broker.seen[-1].reading


@pytest.mark.parametrize(
    "command",
    [
        "guest-ping",
        "guest-info",
        "guest-sync",
        "guest-sync-delimited",
        "guest-get-osinfo",
        "guest-get-vcpus",
        "guest-network-get-interfaces",
        "guest-ssh-get-authorized-keys",
        "guest-fsfreeze-status",
    ],
)
def test_what_only_looks_may_be_sent_twice(command: str) -> None:
    assert requests.agent("vm/web1", command).reading


@pytest.mark.parametrize(
    "command",
    [
        "guest-exec",
        "guest-exec-status",  # tells the end of a process once
        "guest-file-read",  # moves the file's position
        "guest-file-open",
        "guest-fsfreeze-thaw",
        "guest-set-time",
        "guest-shutdown",
        "guest-ssh-add-authorized-keys",
        "my-get-rich-quick",
    ],
)
def test_what_does_something_is_not_sent_twice(command: str) -> None:
    assert not requests.agent("vm/web1", command).reading


# -- programs -------------------------------------------------------------------------------------------------------------


def test_a_program_is_followed_to_its_end(vm: Vm, guest: GuestOnWire) -> None:
    guest.programs["/bin/x"] = lambda got: Ended(
        3, out=repr((got.args, got.env, got.given)).encode(), err=b"\xff", truncated=True, looks=3
    )
    ended = vm.guest_exec("/bin/x", ["-l", ""], env={"A": "b=c"}, input=b"\x00in")
    assert ended == GuestExit(3, None, b"(['-l', ''], ['A=b=c'], b'\\x00in')", b"\xff", True, True)
    assert guest.commands == ["guest-exec"] + ["guest-exec-status"] * 4


def test_the_pauses_between_looks_grow(vm: Vm, guest: GuestOnWire) -> None:
    guest.programs["x"] = lambda got: Ended(0, looks=1000)
    with pytest.raises(DeadlineExceeded, match=r"process 4711 in web1 has not ended within 0\.5 s; it runs on") as late:
        vm.guest_exec("x", timeout=0.5)
    assert late.value.fields["pid"] == 4711
    assert 3 <= len(guest.commands) - 1 <= 7  # 0, 20, 60, 140, 300 ms, and at the end


def test_no_pause_is_longer_than_what_is_left() -> None:
    state = RetryCallState(Retrying(), None, (), {})
    pauses = _pauses(1000.0)["wait"]
    grown = []
    for state.attempt_number in range(1, 10):
        grown.append(pauses(state))
    assert grown == pytest.approx([0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 1.0, 1.0])
    assert 0 < _pauses(0.5)["wait"](state) <= 0.5


def test_nobody_to_ask_until_the_end_is_said(vm: Vm, guest: GuestOnWire) -> None:
    guest.programs["x"] = lambda got: Ended(0)

    def full(command: str, arguments: dict[str, Any]) -> None:
        if command == "guest-exec-status":
            raise Busy("full")

    guest.before = full
    with pytest.raises(DeadlineExceeded, match=r"nobody could be asked at last \(full\)"):
        vm.guest_exec("x", timeout=0.1)


def test_a_hold_longer_than_the_wire_allows_is_refused_here(vm: Vm, broker: NativeBroker) -> None:
    with pytest.raises(BadRequest, match="at most 3600"), vm.frozen(limit=3600):
        pytest.fail("not frozen")
    assert not broker.seen


def test_details_of_old_brokers_and_new_ones(vm: Vm, broker: NativeBroker) -> None:
    for sent, expected in (({}, {}), ({"facts": {"a": 1}}, {"a": 1}), ({"facts": None}, None)):
        broker.answer_with("vm/web1", "show", {"name": "web1", "state": "running", **sent})
        assert vm.show().facts == expected


def test_without_capture_there_is_no_output(vm: Vm, guest: GuestOnWire) -> None:
    guest.programs["x"] = lambda got: Ended(0, out=b"lost")
    assert vm.guest_exec("x", capture=False) == GuestExit(0, None)


def test_a_signal_is_told_as_such(vm: Vm, guest: GuestOnWire) -> None:
    guest.programs["x"] = lambda got: Ended(None, 9)
    assert vm.guest_exec("x") == GuestExit(None, 9)


@pytest.mark.parametrize(
    "error", [Busy("full"), WorkerLost("nothing was done"), AgentUnresponsive("paused"), AgentAbsent("not yet")]
)
def test_a_look_that_did_not_take_place_is_repeated(vm: Vm, guest: GuestOnWire, error: VmloopError) -> None:
    guest.programs["x"] = lambda got: Ended(0)
    guest.before = Once("guest-exec-status", error)
    assert vm.guest_exec("x").exitcode == 0


def test_an_end_that_was_told_to_others_is_unknown_rather_than_a_bad_pid(vm: Vm, guest: GuestOnWire) -> None:
    guest.programs["x"] = lambda got: Ended(0)

    def told_to_others(command: str, arguments: dict[str, Any]) -> None:
        if command == "guest-exec-status":
            guest._processes.clear()

    guest.before = told_to_others
    with pytest.raises(OutcomeUnknown, match=r"process 4711 in web1 has ended .*'pid'"):
        vm.guest_exec("x")


def test_a_program_that_is_not_there_or_not_allowed(vm: Vm, guest: GuestOnWire) -> None:
    with pytest.raises(AgentError, match="No such file"):
        vm.guest_exec("/bin/nosuch")
    guest.disabled.add("guest-exec")
    with pytest.raises(AgentError) as refused:
        vm.guest_exec("/bin/nosuch")
    assert refused.value.fields["kind"] == "disabled"


@pytest.mark.parametrize(
    ("command", "lie"),
    [
        ("guest-exec", {"pid": "x"}),
        ("guest-exec", []),
        ("guest-exec-status", {"exited": 1}),
        ("guest-exec-status", {}),
        ("guest-exec-status", {"exited": True, "out-data": "!"}),
        ("guest-exec-status", {"exited": True, "exitcode": 1.5}),
    ],
)
def test_an_answer_that_makes_no_sense_is_the_guests_fault(
    vm: Vm, guest: GuestOnWire, command: str, lie: object
) -> None:
    guest.programs["x"] = lambda got: Ended(0)
    guest.lies[command] = lambda truth: lie
    with pytest.raises(AgentError, match=f"web1 gave {command} an answer that makes no sense"):
        vm.guest_exec("x")


# -- files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, len(CONTENT)])
def test_a_file_goes_in_and_comes_out_again(vm: Vm, guest: GuestOnWire, broker: NativeBroker, size: int) -> None:
    content = CONTENT[:size]
    told: list[tuple[int, int | None]] = []
    into = io.BytesIO()
    wrote = vm.write_guest_file("/f", io.BytesIO(content), lambda *n: told.append(n), total=size)
    assert guest.files["/f"] == content
    read = vm.read_guest_file("/f", into, lambda *n: told.append(n))
    assert into.getvalue() == content
    assert wrote == read == GuestCopy(size, hashlib.sha256(content).hexdigest())
    assert told[-1] == (size, size or None)
    assert not guest.handles
    assert max(len(message.body) for message in broker.seen) < MAX_MESSAGE_BYTES // 32


def test_an_agent_that_takes_little_at_once_is_given_the_rest(vm: Vm, guest: GuestOnWire) -> None:
    guest.accepts = 100_000
    vm.write_guest_file("/f", io.BytesIO(CONTENT))
    assert guest.files["/f"] == CONTENT


@pytest.mark.parametrize("error", [OutcomeUnknown("lost"), WorkerLost("lost")])
@pytest.mark.parametrize("command", ["guest-file-read", "guest-file-write"])
@pytest.mark.parametrize("carried_out", [False, True])
def test_a_piece_whose_outcome_is_unknown_is_asked_for_again_at_its_place(
    vm: Vm, guest: GuestOnWire, command: str, carried_out: bool, error: VmloopError
) -> None:
    guest.files["/in"] = CONTENT
    once = Once(command, error)
    if carried_out:

        def lost_on_the_way(truth: Any) -> Any:
            once(command, {})
            return truth

        guest.lies[command] = lost_on_the_way
    else:
        guest.before = once
    into = io.BytesIO()
    assert vm.read_guest_file("/in", into).sha256 == SHA256
    assert into.getvalue() == CONTENT
    assert vm.write_guest_file("/out", io.BytesIO(CONTENT)).sha256 == SHA256
    assert guest.files["/out"] == CONTENT
    assert once.error is None


def test_a_copy_waits_for_the_new_worker_to_find_the_agent(vm: Vm, guest: GuestOnWire) -> None:
    guest.files["/in"] = CONTENT
    errors: dict[str, list[VmloopError]] = {
        "guest-file-read": [OutcomeUnknown("killed")],
        "guest-file-seek": [AgentAbsent("not found yet"), AgentUnresponsive("not in step"), WorkerLost("killed again")],
    }

    def fail(command: str, arguments: dict[str, Any]) -> None:
        if errors.get(command):
            raise errors[command].pop(0)

    guest.before = fail
    assert vm.read_guest_file("/in", io.BytesIO()).sha256 == SHA256
    assert not any(errors.values())


def test_a_file_that_fails_midway_is_closed_and_said_to_be_incomplete(vm: Vm, guest: GuestOnWire) -> None:
    guest.size_limit = PIECE
    with pytest.raises(AgentError, match=rf"No space left.*; /f in web1 is incomplete: {PIECE} bytes") as failed:
        vm.write_guest_file("/f", io.BytesIO(CONTENT))
    assert failed.value.fields["written"] == PIECE
    assert failed.value.fields["class"] == "GenericError"
    assert not guest.handles


def test_a_flush_that_fails_is_a_failure(vm: Vm, guest: GuestOnWire) -> None:
    guest.before = Once("guest-file-flush", AgentError("No space left on device"))
    with pytest.raises(AgentError, match=r"No space left.*incomplete"):
        vm.write_guest_file("/f", io.BytesIO(b"x"))
    assert not guest.handles


class Full(io.BytesIO):
    """A file on a full disk."""

    def write(self, data: object) -> int:
        raise OSError(28, "No space left on device")


def test_a_failure_on_this_side_closes_the_file_in_the_guest(vm: Vm, guest: GuestOnWire) -> None:
    guest.files["/f"] = CONTENT
    with pytest.raises(OSError, match="No space left"):
        vm.read_guest_file("/f", Full())
    assert not guest.handles

    def impatient(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vm.read_guest_file("/f", io.BytesIO(), impatient)
    assert not guest.handles
    with pytest.raises(KeyboardInterrupt):
        vm.write_guest_file("/g", io.BytesIO(CONTENT), impatient)
    assert not guest.handles


def test_a_close_that_fails_too_does_not_hide_the_first_error(
    vm: Vm, guest: GuestOnWire, caplog: pytest.LogCaptureFixture
) -> None:
    guest.files["/f"] = CONTENT
    guest.before = Once("guest-file-close", AgentAbsent("gone"))
    with pytest.raises(OSError, match="No space left"):
        vm.read_guest_file("/f", Full())
    assert "stays open in the guest web1 (handle 1000): gone" in caplog.text


def test_an_interrupted_open_is_found_out_and_closed(vm: Vm, guest: GuestOnWire) -> None:
    """The same key brings the first answer, so the handle that nobody heard of is known after all."""
    guest.files["/f"] = CONTENT
    interrupted = [KeyboardInterrupt()]

    def ask(request: requests.Request[Any]) -> Any:
        answer = vm._ask(request)
        if interrupted:
            raise interrupted.pop()
        return answer

    with pytest.raises(KeyboardInterrupt):
        drive(ask, read_file("vm/web1", "/f", io.BytesIO(), None))
    assert guest.commands == ["guest-file-open", "guest-file-close"]
    assert not guest.handles


def test_the_kernels_files_have_no_size_and_are_read_all_the_same(vm: Vm, guest: GuestOnWire) -> None:
    guest.files["/proc/x"] = b"text"
    guest.before = Once("guest-file-seek", AgentError("failed to seek file: Illegal seek"))
    told: list[tuple[int, int | None]] = []
    assert vm.read_guest_file("/proc/x", io.BytesIO(), lambda *n: told.append(n)).bytes == 4
    assert told == [(4, None)]


@pytest.mark.parametrize(
    ("command", "lie"),
    [
        ("guest-file-open", "x"),
        ("guest-file-read", {"count": 1, "buf-b64": "", "eof": True}),
        ("guest-file-read", {"count": 0, "buf-b64": "", "eof": False}),
        ("guest-file-read", {"count": 1, "buf-b64": "?", "eof": True}),
        ("guest-file-read", {"count": PIECE + 3, "buf-b64": "AAAA" * (PIECE // 3 + 1), "eof": True}),
        ("guest-file-read", None),
        ("guest-file-seek", {"position": {}}),
    ],
)
def test_a_lying_guest_cannot_make_us_loop_or_take_more_than_we_asked_for(
    vm: Vm, guest: GuestOnWire, command: str, lie: object
) -> None:
    guest.files["/f"] = b"x"
    guest.lies[command] = lambda truth: lie
    with pytest.raises(AgentError, match=f"web1 gave {command} an answer that makes no sense"):
        vm.read_guest_file("/f", io.BytesIO(), lambda done, total: None)
    assert not guest.handles or command == "guest-file-open"


@pytest.mark.parametrize("count", [0, -1, 2])
def test_a_guest_that_miscounts_what_it_wrote_is_found_out(vm: Vm, guest: GuestOnWire, count: int) -> None:
    guest.lies["guest-file-write"] = lambda truth: {"count": count, "eof": False}
    with pytest.raises(AgentError, match="bytes written"):
        vm.write_guest_file("/f", io.BytesIO(b"x"))
    assert not guest.handles


@given(cut=st.integers(1, 12), error=st.sampled_from([AgentAbsent("x"), DeadlineExceeded("x"), KeyboardInterrupt()]))
def test_wherever_a_conversation_is_cut_the_file_is_closed(cut: int, error: BaseException) -> None:
    """An agent without a wire. An error says that it was not opened; an interruption says nothing, and the handle is there."""
    open_handles: set[int] = set()
    asked = 0

    def ask(request: requests.Request[Any]) -> Any:
        nonlocal asked
        asked += 1
        assert request.arguments is not None
        command, arguments = request.arguments["command"], request.arguments["arguments"]
        interrupted = isinstance(error, KeyboardInterrupt)
        if command == "guest-file-open" and (interrupted or asked != cut):
            open_handles.add(1000)
        if command == "guest-file-close":
            open_handles.discard(arguments["handle"])
        elif asked == cut:
            raise error
        answers = {
            "guest-file-open": 1000,
            "guest-file-write": {"count": len(base64.b64decode(arguments.get("buf-b64", "")))},
        }
        return answers.get(command, {})

    source = io.BytesIO(CONTENT)  # three pieces: open, write, write, write, flush, close
    if cut < 6:
        with pytest.raises(type(error)):
            drive(ask, write_file("vm/web1", "/f", source, None, None))
    else:
        assert drive(ask, write_file("vm/web1", "/f", source, None, None)) == GuestCopy(len(CONTENT), SHA256)
    assert not open_handles


# -- frozen file systems --------------------------------------------------------------------------------------------------


def test_file_systems_are_frozen_for_the_length_of_a_with(vm: Vm, guest: GuestOnWire, broker: NativeBroker) -> None:
    with vm.frozen(limit=20.0) as count:
        assert count == 3
        assert vm.agent("guest-fsfreeze-status") == "frozen"
    assert vm.agent("guest-fsfreeze-status") == "thawed"
    asked = broker.seen[0]
    assert unpack_map(asked.body) == {"command": "guest-fsfreeze-freeze", "hold": True, "limit": 20.0}
    assert (asked.key, asked.seconds) == (b"", 80.0)


def test_the_definitions_limit_is_the_workers_affair(vm: Vm, guest: GuestOnWire, broker: NativeBroker) -> None:
    with vm.frozen():
        pass
    assert unpack_map(broker.seen[0].body) == {"command": "guest-fsfreeze-freeze", "hold": True}


def test_an_error_inside_thaws_and_comes_out(vm: Vm, guest: GuestOnWire) -> None:
    with pytest.raises(ZeroDivisionError), vm.frozen():
        _ = 1 / 0
    assert guest.hold is None
    guest.before = Once("guest-fsfreeze-thaw", AgentAbsent("no thaw for you"))
    with pytest.raises(KeyboardInterrupt), vm.frozen():
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("why", "error"),
    [("limit", DeadlineExceeded), ("deadline", DeadlineExceeded), ("by another client", OutcomeUnknown)],
)
def test_a_hold_that_ended_before_its_with_is_an_error(
    vm: Vm, guest: GuestOnWire, why: str, error: type[VmloopError]
) -> None:
    with pytest.raises(error, match=r"web1 were thawed .*before you were done"), vm.frozen():
        guest.end_hold(why)


def test_a_guest_without_file_systems_is_as_good_as_frozen(vm: Vm, guest: GuestOnWire) -> None:
    guest.file_systems = 0
    with vm.frozen() as count:
        assert count == 0
    assert guest.commands == ["guest-fsfreeze-freeze"]


def test_what_cannot_be_frozen_needs_no_thaw(vm: Vm, guest: GuestOnWire) -> None:
    guest.disabled.add("guest-fsfreeze-freeze")
    with pytest.raises(AgentError, match="disabled"), vm.frozen():
        pytest.fail("not frozen")
    assert guest.commands == ["guest-fsfreeze-freeze"]


def test_what_was_never_sent_needs_no_thaw(vm: Vm, guest: GuestOnWire) -> None:
    guest.before = Once("guest-fsfreeze-freeze", DeadlineExceeded("not sent in time", sent=False))
    with pytest.raises(DeadlineExceeded), vm.frozen():
        pytest.fail("not frozen")
    assert guest.commands == ["guest-fsfreeze-freeze"]


@pytest.mark.parametrize("error", [OutcomeUnknown("x"), DeadlineExceeded("x")])
def test_what_may_have_been_frozen_is_thawed(vm: Vm, guest: GuestOnWire, error: VmloopError) -> None:
    guest.before = Once("guest-fsfreeze-freeze", error)
    with pytest.raises(type(error)), vm.frozen():
        pytest.fail("not frozen")
    assert guest.commands == ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]
