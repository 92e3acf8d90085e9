# SPDX-License-Identifier: Apache-2.0
"""vmloop attached through the recorder, to a real QEMU and to the stand-in; then to what was recorded: it sees the same VM."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from vmloop.client.vm import Vm
from vmloop.common.errors import OutcomeUnknown
from vmloop.testing.plugin import ReplayedVm
from vmloop.testing.private_broker import PrivateBroker
from vmloop.worker.qemu.recording import read_recording

from ..contract.subjects import MONITORS, Subject
from .site import END_SECONDS, kill_process


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.qemu) if name == "qemu" else name for name in MONITORS])
def qemu(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    made = MONITORS[request.param](tmp_path)
    made.start()
    yield made
    made.stop()


def use(vm: Vm) -> tuple[list[Any], list[str]]:
    """A client's session with a VM that has just been attached: what commands returned, and QEMU's events."""
    start = vm.cursor()
    returned = [vm.qmp("query-version"), vm.show().state]
    vm.resume()
    vm.wait("running", timeout=10)
    returned.append(vm.qmp("query-name"))
    vm.pause()
    returned.append(vm.wait("paused", timeout=10).reason)
    with suppress(OutcomeUnknown):  # through the recorder its answer may come after the end of its process was seen
        vm.qmp("quit")
    vm.wait("shutoff", timeout=10)
    with vm.events(since=start) as stream:
        events = iter(lambda: stream.get(10), None)
        seen = []
        for event in events:
            seen.append(event)
            if event.event == "VM_STATE" and event.data["new"] == "shutoff":
                break
    return returned, [event.event for event in seen if event.origin == "qmp" and event.event != "RESET"]


def test_what_was_recorded_is_the_same_vm_to_vmloop(
    broker: PrivateBroker, qemu: Subject, replayed_vm: ReplayedVm, tmp_path: Path
) -> None:
    assert qemu.process is not None
    listen, file = tmp_path / "r.sock", tmp_path / "made.jsonl"
    command = [
        sys.executable,
        "-m",
        "vmloop.testing.record",
        "--qmp",
        str(qemu.path),
        "--listen",
        str(listen),
        "--record",
        str(file),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as recorder:
        try:
            assert recorder.stdout is not None
            assert recorder.stdout.readline() == b"ready\n"
            broker.host.attach("real", listen, pid=qemu.process.pid)
            told = use(broker.host.vm("real"))
            assert recorder.wait(END_SECONDS) == 0
        finally:
            if recorder.poll() is None:
                kill_process(recorder.pid)
    assert read_recording(file).header.qemu == "7.2.22"
    assert told[1][:2] == ["RESUME", "STOP"]
    assert use(replayed_vm(file)) == told
