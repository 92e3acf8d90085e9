# SPDX-License-Identifier: Apache-2.0
"""A libvirt domain through the real libvirt into a definition, and that definition on real QEMU. No daemon of libvirt's runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vmloop.client.libvirt.domain_xml import read_domain
from vmloop.client.libvirt.preparation import prepare
from vmloop.client.libvirt.virsh import translate
from vmloop.client.session import Host

from ..conftest import require_binary
from ..fakes import recorded_libvirt
from ..guest.image import COMMAND_LINE, require_guest
from .site import Site

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("require_qemu", "require_libvirt")]

COMMAND = [sys.executable, "-W", "error", "-m", "vmloop.client.cli.main"]
IMPORT_SECONDS = 60.0
AGENT_SECONDS = 60.0


@pytest.fixture
def require_libvirt() -> str:
    """virsh, with its QEMU driver."""
    virsh = require_binary("virsh")
    places = ("lib*/libvirt", "lib/*/libvirt")
    if not any(
        True for place in places for _ in Path("/usr").glob(f"{place}/connection-driver/libvirt_driver_qemu.so")
    ):
        if os.environ.get("CI") == "true":
            pytest.fail("libvirt's QEMU driver is not installed, and CI must have it")
        pytest.skip("libvirt's QEMU driver is not installed")
    return virsh


def guest_domain(site: Site) -> Path:
    """tests/data/libvirt/guest.xml with the files of this machine; the disk's name is one that needs quoting everywhere."""
    image = require_guest()
    disk = site.root / "a, b's.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "16M"], check=True, timeout=30)
    text = recorded_libvirt.domain("guest").decode()
    places = {
        "KERNEL": image.kernel,
        "INITRD": image.initrd,
        "COMMAND_LINE": COMMAND_LINE,
        "CONSOLE": site.root / "console",
    }
    for word, place in {**places, "DISK": disk, "VNC": site.root / "vnc"}.items():
        text = text.replace(f"@{word}@", str(place).replace("'", "&apos;"))
    file = site.root / "guest.xml"
    file.write_text(text)
    return file


def test_a_domain_is_imported_boots_under_vmloop_and_its_agent_answers(site: Site, host: Host) -> None:
    command = [
        *COMMAND,
        "--root",
        str(site.root),
        "--json",
        "import",
        str(guest_domain(site)),
        "--define",
        "--name",
        "web1",
    ]
    done = subprocess.run(command, capture_output=True, timeout=IMPORT_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    left_out = {note["what"] for note in told["left_out"]}
    assert {"description", "seclabel", "vcpu cpuset", "disk vda iotune", "-mon of libvirt", "-S"} <= left_out
    assert told["warnings"] == []
    vm = host.vm("web1")
    with host.events("web1") as events:
        assert vm.start().state == "running"
        while events.wait_for("AGENT_STATE", AGENT_SECONDS).data["new"] != "ready":
            pass  # on its way there
    assert vm.agent("guest-ping") == {}
    blocks = [block["inserted"]["image"]["filename"] for block in vm.qmp("query-block") if "inserted" in block]
    assert blocks == [str(site.root / "a, b's.qcow2")]
    cards = vm.qmp("query-rx-filter")
    assert [card["main-mac"] for card in cards] == ["52:54:00:aa:bb:cc"]
    assert (site.paths.state / "vms" / "web1" / "org.example.0").is_socket()
    vm.kill()


@pytest.mark.parametrize("name", recorded_libvirt.RECORDED)
def test_the_recorded_answers_are_what_libvirt_says(name: str) -> None:
    version = subprocess.run(
        ["virsh", "--version"], capture_output=True, text=True, timeout=30, check=True
    ).stdout.strip()
    if version != "9.0.0":
        pytest.skip(f"they were recorded with libvirt 9.0.0, this is {version}")
    prepared = prepare(read_domain(recorded_libvirt.domain(name), name), name)
    found = translate(prepared.xml, None, name)
    assert not Path(found.own_directory).exists()
    said = found.command_line.replace(found.own_directory, recorded_libvirt.OWN_DIRECTORY)
    assert without_the_moment(said) == without_the_moment(recorded_libvirt.answer(name).command_line)


def without_the_moment(line: str) -> list[str]:
    """The words but for PATH and for the time in a clock."""
    return [re.sub(r"^base=\d.*", "base=NOW", word) for word in shlex.split(line) if not word.startswith("PATH=")]
