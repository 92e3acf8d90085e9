# SPDX-License-Identifier: Apache-2.0
"""`vmloop cp` against a guest on a scripted broker: both directions, checksums, and what is left when it fails."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.client.cli.cp import Place, places
from vmloop.common.errors import AgentAbsent, AgentError

from ..fakes.guest_on_wire import Ended, GuestOnWire
from ..fakes.native_broker import NativeBroker
from .test_cli_agent import COMMAND, SOON, Run, Terminal, broker, guest, run, start

__all__ = ["broker", "guest", "run"]  # fixtures

CONTENT = bytes(range(256)) * 3000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Path]:
    """A directory to copy to; nothing but what tests put there may be left in it."""
    directory = tmp_path / "here"
    directory.mkdir()
    yield directory
    assert not list(directory.glob(".vmloop-*"))


# -- which side is which --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("web1:/a/b", "c", (("web1", "/a/b"), ("", "c"))),
        ("web1:/a/b", "c/", (("web1", "/a/b"), ("", "c/b"))),
        ("web1:/a/b", "/", (("web1", "/a/b"), ("", "/b"))),
        ("web1:/a/b", "/tmp", (("web1", "/a/b"), ("", "/tmp/b"))),
        ("web1:/a/b", "-", (("web1", "/a/b"), ("", "-"))),
        ("web1:C:\\a\\b", "d/", (("web1", "C:\\a\\b"), ("", "d/b"))),
        ("a/b", "web1:/c", (("", "a/b"), ("web1", "/c"))),
        ("a/b", "web1:/c/", (("", "a/b"), ("web1", "/c/b"))),
        ("./a:b", "web1:/", (("", "./a:b"), ("web1", "/a:b"))),
        ("-", "web1:/c", (("", "-"), ("web1", "/c"))),
        ("/a:b", "web1:c", (("", "/a:b"), ("web1", "c"))),
    ],
)
def test_sides(source: str, target: str, expected: Any) -> None:
    assert places(source, target) == expected


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("a", "b"),
        ("x:/a", "y:/b"),
        ("-", "-"),
        ("web1:", "b"),
        ("-", "web1:/c/"),
        ("web1:/a/", "b/"),
        ("web1:/a/..", "/tmp"),
    ],
)
def test_sides_that_make_no_copy(source: str, target: str) -> None:
    with pytest.raises(click.UsageError):
        places(source, target)


@given(path=st.text(min_size=1))
def test_a_local_path_with_a_slash_first_is_never_taken_for_a_guests(path: str) -> None:
    origin, _ = places(f"./{path}", "web1:x")
    assert origin == Place("", f"./{path}")


# -- into the guest -------------------------------------------------------------------------------------------------------


def test_a_file_goes_in_and_is_compared_in_the_guest(run: Run, guest: GuestOnWire, here: Path) -> None:
    (here / "f").write_bytes(CONTENT)
    ran = run("cp", str(here / "f"), "web1:/srv/")
    first, second = ran.out.decode().splitlines()
    assert (ran.code, ran.err) == (0, "")
    assert first.startswith(f"{here}/f -> web1:/srv/f: {len(CONTENT)} bytes in ")
    assert second == f"sha256 {SHA256}  verified: sha256sum in the guest"
    assert guest.files == {"/srv/f": CONTENT}
    result = run("cp", str(here / "f"), "web1:/srv/f", "--json").json
    assert result.pop("seconds") >= 0
    assert result == {
        "bytes": len(CONTENT),
        "sha256": SHA256,
        "verified": "sha256sum in the guest",
        "reason": None,
    }


def test_names_that_sha256sum_writes_in_its_own_way(run: Run, guest: GuestOnWire, here: Path) -> None:
    (here / "f").write_bytes(CONTENT)
    for path in ("/a\\b", "-c"):
        assert b"verified: sha256sum in the guest" in run("cp", str(here / "f"), f"web1:{path}").out


@pytest.mark.parametrize("without", ["disabled", "absent", "failing", "babbling"])
def test_without_sha256sum_what_went_in_is_read_back(run: Run, guest: GuestOnWire, here: Path, without: str) -> None:
    (here / "f").write_bytes(CONTENT)
    leave_without_sha256sum(guest, without)
    ran = run("cp", str(here / "f"), "web1:/f")
    assert ran.code == 0
    assert ran.out.decode().endswith(f"sha256 {SHA256}  verified: read back\n")


def leave_without_sha256sum(guest: GuestOnWire, how: str) -> None:
    if how == "disabled":
        guest.disabled.add("guest-exec")
    elif how == "absent":
        del guest.programs["sha256sum"]
    elif how == "failing":
        guest.programs["sha256sum"] = lambda got: Ended(1, err=b"sha256sum: I/O error\nmore")
    else:
        guest.programs["sha256sum"] = lambda got: Ended(0, out=b"what?\n")


@pytest.mark.parametrize("allowed", [True, False])
def test_what_arrives_changed_is_an_error(run: Run, guest: GuestOnWire, here: Path, allowed: bool) -> None:
    (here / "f").write_bytes(CONTENT)

    def damage(command: str, arguments: dict[str, Any]) -> None:
        if command == "guest-file-close" and len(guest.files["/f"]) == len(CONTENT):
            guest.files["/f"] = CONTENT[:-1]

    guest.before = damage
    if not allowed:
        guest.disabled.add("guest-exec")
    ran = run("cp", str(here / "f"), "web1:/f")
    assert (ran.code, ran.out) == (1, b"")
    assert ran.err.startswith(f"vmloop: agent-error: the checksums differ: {SHA256} passed")


def test_a_copy_in_that_fails_midway_says_so(run: Run, guest: GuestOnWire, here: Path) -> None:
    (here / "f").write_bytes(CONTENT)
    guest.size_limit = 300_000
    ran = run("cp", str(here / "f"), "web1:/f")
    assert ran.code == 1
    assert "No space left on device; /f in web1 is incomplete: 262144 bytes of it were written" in ran.err
    assert not guest.handles


def test_standard_input_goes_in(broker: NativeBroker, guest: GuestOnWire) -> None:
    command = [*COMMAND, "--connect", broker.endpoint, "cp", "-", "web1:/f"]
    ran = subprocess.run(command, input=CONTENT, capture_output=True, timeout=SOON, check=True)
    assert guest.files["/f"] == CONTENT
    assert ran.stdout.startswith(b"- -> web1:/f: 768000 bytes in ")


@pytest.mark.parametrize("name", ["nosuch", ""])
def test_a_local_file_that_cannot_be_read(run: Run, guest: GuestOnWire, here: Path, name: str) -> None:
    ran = run("cp", str(here / name), "web1:/f")
    assert ran.code == 1
    assert ran.err.startswith(f"vmloop: bad-request: cannot read {here}")
    assert not guest.commands


# -- out of the guest -----------------------------------------------------------------------------------------------------


def test_a_file_comes_out_and_is_compared_in_the_guest(run: Run, guest: GuestOnWire, here: Path) -> None:
    guest.files["/etc/f"] = CONTENT
    assert run("cp", "web1:/etc/f", str(here)).out.decode().endswith("verified: sha256sum in the guest\n")
    assert (here / "f").read_bytes() == CONTENT
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((here / "f").stat().st_mode) == 0o666 & ~mask


def test_what_is_there_is_replaced_with_its_mode_and_through_its_link(run: Run, guest: GuestOnWire, here: Path) -> None:
    guest.files["/f"] = CONTENT
    (here / "old").write_bytes(b"old")
    (here / "old").chmod(0o640)
    (here / "link").symlink_to("old")
    assert run("cp", "web1:/f", str(here / "link")).code == 0
    assert (here / "link").is_symlink()
    assert (here / "old").read_bytes() == CONTENT
    assert stat.S_IMODE((here / "old").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("without", "reason"),
    [
        ("disabled", "sha256sum in the guest: Command guest-exec has been disabled"),
        ("failing", "sha256sum in the guest failed: sha256sum: I/O error"),
    ],
)
def test_without_sha256sum_it_is_said_or_read_twice(
    run: Run, guest: GuestOnWire, here: Path, without: str, reason: str
) -> None:
    guest.files["/f"] = CONTENT
    leave_without_sha256sum(guest, without)
    assert run("cp", "web1:/f", f"{here}/").out.decode().endswith(f"sha256 {SHA256}  not verified ({reason})\n")
    result = run("cp", "web1:/f", f"{here}/", "--json").json
    assert (result["verified"], result["reason"]) == (None, reason)
    assert run("cp", "web1:/f", f"{here}/", "--verify").out.decode().endswith("verified: read twice\n")


@pytest.mark.parametrize("allowed", [True, False])
def test_a_file_that_changes_meanwhile_is_not_put_in_place(
    run: Run, guest: GuestOnWire, here: Path, allowed: bool
) -> None:
    guest.files["/f"] = CONTENT
    (here / "f").write_bytes(b"old")

    def grow(command: str, arguments: dict[str, Any]) -> None:
        if command == "guest-file-close":
            guest.files["/f"] += b"x"

    guest.before = grow
    if not allowed:
        guest.disabled.add("guest-exec")
    ran = run("cp", "web1:/f", str(here), "--verify")
    assert (ran.code, ran.out) == (1, b"")
    assert "the checksums differ" in ran.err
    assert "nothing was put at" in ran.err
    assert (here / "f").read_bytes() == b"old"


def test_what_fails_leaves_the_old_file(run: Run, guest: GuestOnWire, here: Path) -> None:
    (here / "f").write_bytes(b"old")
    assert run("cp", "web1:/nosuch", str(here / "f")).err.count("No such file or directory") == 1
    guest.files["/f"] = CONTENT

    def end(command: str, arguments: dict[str, Any]) -> None:
        if command == "guest-exec":
            raise AgentAbsent("the agent went away")

    guest.before = end
    assert run("cp", "web1:/f", str(here / "f")).err == "vmloop: agent-absent: the agent went away\n"
    assert (here / "f").read_bytes() == b"old"


def test_devices_and_standard_output_are_written_to_as_they_are(run: Run, guest: GuestOnWire) -> None:
    guest.files["/f"] = CONTENT
    assert run("cp", "web1:/f", "/dev/null").code == 0
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    ran = run("cp", "web1:/f", "-")
    assert (ran.code, ran.out) == (0, CONTENT)
    assert ran.err.endswith("verified: sha256sum in the guest\n")
    ran = run("cp", "web1:/f", "-", "--json")
    assert (ran.out, json.loads(ran.err)["sha256"]) == (CONTENT, SHA256)


def test_a_full_disk_is_said_and_the_guests_file_closed(run: Run, guest: GuestOnWire) -> None:
    guest.files["/f"] = CONTENT
    assert (
        run("cp", "web1:/f", "/dev/full").err
        == "vmloop: bad-request: cannot write /dev/full: No space left on device\n"
    )
    assert not guest.handles


def test_a_directory_that_is_not_there(run: Run, guest: GuestOnWire, here: Path) -> None:
    guest.files["/f"] = b"x"
    assert "cannot write" in run("cp", "web1:/f", str(here / "no" / "f")).err
    assert not guest.commands


@pytest.mark.parametrize("into", [True, False])
def test_ctrl_c_closes_the_guests_file_and_leaves_nothing_here(
    broker: NativeBroker, guest: GuestOnWire, here: Path, into: bool
) -> None:
    guest.files["/f"] = CONTENT
    (here / "f").write_bytes(CONTENT)
    sides = (str(here / "f"), "web1:/g") if into else ("web1:/f", str(here / "g"))
    stuck = broker.requests  # the piece after the first is never answered

    def no_answer(command: str, arguments: dict[str, Any]) -> None:
        if command in ("guest-file-read", "guest-file-write") and guest.commands.count(command) == 2:
            raise StuckError

    answer = guest._serve

    def serve(request: Any) -> Any:
        try:
            return answer(request)
        except StuckError:
            return []

    guest.before = no_answer
    broker.answer("vm/web1", "agent", serve)
    with start(broker, "cp", *sides) as process:
        while True:
            stuck.get(timeout=SOON)
            if max(guest.commands.count(command) for command in ("guest-file-read", "guest-file-write")) == 2:
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=SOON)
    assert process.returncode == 130
    assert err == ("vmloop: web1:/g is incomplete: 262144 bytes of it were written\n" if into else "")
    assert guest.commands[-1] == "guest-file-close"
    assert not guest.handles
    assert not (here / "g").exists()


class StuckError(Exception):
    """The agent says nothing."""


def test_a_terminal_sees_bytes_pass(broker: NativeBroker, guest: GuestOnWire, here: Path) -> None:
    guest.files["/f"] = CONTENT * 10
    terminal = Terminal(broker, "cp", "web1:/f", str(here))
    assert terminal.end() == 0
    assert "from web1:/f" in terminal.text
    assert "verified: sha256sum in the guest" in terminal.text


def test_an_error_class_is_kept(run: Run, guest: GuestOnWire, here: Path) -> None:
    """What the library adds to an error leaves its code alone."""
    (here / "f").write_bytes(CONTENT)

    def refuse(command: str, arguments: dict[str, Any]) -> None:
        if command == "guest-file-write":
            raise AgentError("no", **{"class": "GenericError", "desc": "no writing here"})

    guest.before = refuse
    assert run("cp", str(here / "f"), "web1:/f").err == (
        "vmloop: agent-error: no; /f in web1 is incomplete: 0 bytes of it were written\n"
        "  class: GenericError\n  desc: no writing here\n"
    )
