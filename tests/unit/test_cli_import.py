# SPDX-License-Identifier: Apache-2.0
"""`vmloop import` as a process, with a virsh of the test's own in PATH or none; and that what is started for it always ends."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmloop.client.libvirt.contained import MAX_OUTPUT_BYTES, run
from vmloop.common.errors import DeadlineExceeded, TooLarge
from vmloop.common.pack import unpack_map

from ..fakes.native_broker import NativeBroker
from ..fakes.recorded_libvirt import DATA

COMMAND = [sys.executable, "-W", "error", "-m", "vmloop.client.cli.main"]
SOON = 30.0
REFUSES = "echo '2026: info : noise' >&2; echo \"error: $WHY\" >&2; exit 1"


class Desk:
    """A directory that anybody may look into, for a virsh that is run as nobody."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def virsh(self, script: str) -> None:
        program = self.path / "virsh"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    def run(self, *arguments: str, stdin: bytes = b"", command: str = "import") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*COMMAND, *arguments] if command == "" else [*COMMAND, command, *arguments],
            input=stdin,
            capture_output=True,
            timeout=SOON,
            env={
                **os.environ,
                "PATH": f"{self.path}:/usr/bin:/bin" if (self.path / "virsh").exists() else str(self.path),
            },
            check=False,
        )


@pytest.fixture
def desk() -> Iterator[Desk]:
    path = Path(tempfile.mkdtemp(prefix="vmloop-test-"))
    path.chmod(0o755)
    for file in DATA.iterdir():
        shutil.copy(file, path)
    try:
        yield Desk(path)
    finally:
        shutil.rmtree(path)


def answering(desk: Desk) -> Desk:
    desk.virsh(f"cat {desk.path}/desk.argv")
    return desk


def test_without_libvirt_the_error_says_what_to_install(desk: Desk) -> None:
    done = desk.run(str(DATA / "desk.xml"))
    assert done.returncode == 1
    assert done.stderr.startswith(b"vmloop: config-error: libvirt is not installed")
    assert b"apt-get install" in done.stderr
    assert done.stdout == b""


def test_the_definition_goes_to_standard_output_and_what_was_left_out_to_standard_error(desk: Desk) -> None:
    done = answering(desk).run(str(DATA / "desk.xml"))
    assert done.returncode == 0, done.stderr
    assert tomllib.loads(done.stdout.decode())["name"] == "desk"
    assert b"vmloop: left out: currentMemory: " in done.stderr
    assert b"vmloop: changed: channel of the guest agent: " in done.stderr
    assert b"vmloop: warning: -kernel /srv/sample/vmlinuz: " in done.stderr


def test_with_json_it_is_one_object_and_nothing_is_said_beside(desk: Desk) -> None:
    done = answering(desk).run(str(DATA / "desk.xml"), "--json", "--name", "web2")
    value = json.loads(done.stdout)
    assert list(value) == ["definition", "toml", "left_out", "changed", "warnings"]
    assert value["definition"]["name"] == tomllib.loads(value["toml"])["name"] == "web2"
    assert {
        "what": "memballoon stats",
        "why": next(n["why"] for n in value["left_out"] if n["what"] == "memballoon stats"),
    } in value["left_out"]
    assert done.stderr == b""


def test_a_domain_from_standard_input_goes_into_a_file(desk: Desk) -> None:
    output = desk.path / "desk.toml"
    done = answering(desk).run("-", "--output", str(output), stdin=(DATA / "desk.xml").read_bytes())
    assert done.stdout == f"desk: written to {output}\n".encode()
    assert output.read_text().startswith("# made by vmloop import from standard input")
    done = desk.run(str(DATA / "desk.xml"), "--output", str(desk.path / "no" / "where"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(b"vmloop: config-error: cannot write ")


def test_it_is_defined_where_that_is_asked_for(desk: Desk, tmp_path: Path) -> None:
    with NativeBroker(tmp_path) as broker:
        broker.answer_with("vmloop", "define", {"name": "desk"})
        done = answering(desk).run(
            "--connect", broker.endpoint, "import", str(DATA / "desk.xml"), "--define", command=""
        )
        assert done.stdout == b"desk: defined\n", done.stderr
        sent = broker.requests.get_nowait()
        assert unpack_map(sent.body)["definition"]["agent"]["enabled"] is True


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_was_left_out_is_told_also_if_it_cannot_be_written_or_defined(desk: Desk, options: list[str]) -> None:
    desk_xml = str(DATA / "desk.xml")
    words = ["--connect", "ipc:///nosuch/broker", *options, "import", desk_xml, "--define"]
    done = answering(desk).run(*words, command="")
    assert done.stdout == b""
    assert done.returncode == 3
    assert b"vmloop: left out: currentMemory: " in done.stderr
    assert done.stderr.splitlines()[-1].startswith(b"vmloop: ")
    done = desk.run(desk_xml, "--output", "/nosuch/a.toml")
    assert done.returncode == 1
    assert b"vmloop: left out: currentMemory: " in done.stderr


@pytest.mark.parametrize(
    ("why", "advice"),
    [
        ("unsupported configuration: Emulator '/usr/bin/qemu' does not support virt type 'kvm'", "/dev/kvm"),
        ("Failed to connect socket to '/x/virtsecretd-sock': No such file or directory", "--connect qemu:///system"),
        ("no connection driver available for qemu:///embed", "libvirt-daemon-driver-qemu"),
        ("unsupported configuration: CPU mode 'host-passthrough' for x86_64 qemu domain on", "mode='maximum'"),
        ("unsupported configuration: No emulator found for arch 'aarch64'", "qemu-system-arm"),
        ("operation failed: Unable to find any firmware to satisfy 'efi'", "ovmf"),
        ("unsupported configuration: something new", ""),
    ],
)
def test_what_libvirt_refuses_is_told_in_its_words_with_advice(desk: Desk, why: str, advice: str) -> None:
    desk.virsh(f'WHY="{why}"\n{REFUSES}')
    done = desk.run(str(DATA / "desk.xml"))
    assert done.returncode == 1
    text = done.stderr.decode()
    assert text.startswith(f"vmloop: config-error: {DATA / 'desk.xml'}: libvirt refuses it: {why}")
    assert advice in text
    assert "noise" not in text


def test_a_virsh_that_cannot_be_run_is_named(desk: Desk) -> None:
    program = desk.path / "virsh"
    program.write_text("#!/nosuch/interpreter\n")
    program.chmod(0o755)
    done = desk.run(str(DATA / "desk.xml"))
    assert done.stderr == f"vmloop: config-error: cannot run {program}: No such file or directory\n".encode()


def test_libvirt_gets_a_directory_of_its_own_which_is_gone_afterwards(desk: Desk) -> None:
    desk.virsh(f'WHY="$HOME $3 $(id -u) $(cat "$HOME/domain.xml" | wc -l)"\n{REFUSES}')
    text = desk.run(str(DATA / "desk.xml")).stderr.decode()
    home, uri, user, lines = text.partition("refuses it: ")[2].split()
    assert uri == f"qemu:///embed?root={home}"
    assert not Path(home).exists()
    assert int(lines) > 10
    assert (int(user) != 0) or os.geteuid() != 0  # for root it runs as nobody


def test_a_daemon_that_was_named_is_asked_as_the_user_that_we_are(desk: Desk) -> None:
    desk.virsh(f'WHY="$* $(id -u)"\n{REFUSES}')
    text = desk.run(str(DATA / "desk.xml"), "--connect", "qemu:///system").stderr.decode()
    assert "--connect qemu:///system domxml-to-native qemu-argv /" in text
    assert text.split()[-1] == str(os.geteuid())


def test_a_domain_that_libvirt_knows_brings_what_its_xml_does_not_say(desk: Desk) -> None:
    desk.virsh(
        f"""case "$*" in
        *dumpxml*--inactive*"--domain web 1"*) cat {desk.path}/desk.xml ;;
        *dominfo*"--domain web 1"*) printf 'Id: 1\\nState:  running\\nAutostart:   enable\\nManaged save:  yes\\n' ;;
        *) cat {desk.path}/desk.argv ;;
        esac"""
    )
    done = desk.run("--domain", "web 1")
    assert done.returncode == 0, done.stderr
    assert tomllib.loads(done.stdout.decode())["autostart"] is True
    assert b"vmloop: warning: the domain runs: " in done.stderr
    assert b"vmloop: left out: managed save: " in done.stderr


@pytest.mark.parametrize("arguments", [[], ["a.xml", "--domain", "b"], ["a.xml", "--name", "a b"]])
def test_a_wrong_command_line_is_one(desk: Desk, arguments: list[str]) -> None:
    assert desk.run(*arguments).returncode == 2


def test_a_file_that_is_not_there_is_named(desk: Desk) -> None:
    done = answering(desk).run("nosuch.xml")
    assert done.stderr == b"vmloop: config-error: cannot read nosuch.xml: No such file or directory\n"


# -- what it starts, ends ---------------------------------------------------------------------------------------------------


def test_a_program_that_does_not_end_is_ended_with_what_it_has_begun(desk: Desk) -> None:
    desk.virsh("setsid sleep 600 &\necho begun > $HOME/begun\nexec sleep 600")
    with pytest.raises(DeadlineExceeded, match=rf"{re.escape(str(desk.path))}/virsh qemu-argv x: not done within"):
        run(
            [str(desk.path / "virsh"), "qemu-argv", "x"],
            1.0,
            environment={"PATH": "/usr/bin:/bin", "HOME": str(desk.path)},
            mark=str(desk.path),
        )
    assert (desk.path / "begun").exists()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            assert f"HOME={desk.path}".encode() not in environ.read_bytes(), environ
        except OSError:
            continue  # gone meanwhile


def test_a_program_that_prints_without_end_is_ended() -> None:
    with pytest.raises(TooLarge) as refused:
        run(["/usr/bin/yes"], SOON, environment={})
    assert refused.value.fields["limit"] == MAX_OUTPUT_BYTES
    assert str(refused.value).startswith("/usr/bin/yes printed more than")


def test_a_link_stays_one_and_a_pipe_is_written_to(desk: Desk) -> None:
    target, link, pipe = desk.path / "made.toml", desk.path / "link.toml", desk.path / "pipe"
    link.symlink_to(target)
    assert answering(desk).run(str(DATA / "desk.xml"), "-o", str(link)).returncode == 0
    assert link.is_symlink()
    made = target.read_bytes()
    assert tomllib.loads(made.decode())["name"]
    os.mkfifo(pipe)
    with open(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
        assert desk.run(str(DATA / "desk.xml"), "-o", str(pipe)).returncode == 0
        assert reader.read() == made
    assert pipe.is_fifo()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_ends_what_it_has_started_and_takes_its_directory_away(
    desk: Desk, number: signal.Signals, status: int
) -> None:
    begun = desk.path / "begun"
    os.mkfifo(begun)
    begun.chmod(0o666)  # for the user that libvirt is run as
    desk.virsh(f'trap "" TERM HUP INT\necho "$HOME $$" > {begun}\nexec sleep 600')
    with (
        open(os.open(begun, os.O_RDONLY | os.O_NONBLOCK), "rb") as reader,
        subprocess.Popen(
            ["/usr/bin/env", "--default-signal", *COMMAND, "import", str(DATA / "desk.xml")],  # ours may be ignored
            env={**os.environ, "PATH": f"{desk.path}:/usr/bin:/bin"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as command,
    ):
        assert select.select([reader], [], [], SOON)[0]
        home, pid = reader.read().split()
        assert Path(os.fsdecode(home)).is_dir()
        command.send_signal(number)
        assert command.wait(SOON) == status
    assert not Path(os.fsdecode(home)).exists()
    assert not Path(f"/proc/{int(pid)}").exists()
