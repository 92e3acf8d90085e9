# SPDX-License-Identifier: Apache-2.0
"""Executables in etc/hooks.d, end to end: what they get, in which order, and what is told of one that fails or hangs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Final

from vmloop.client.session import Host
from vmloop.client.subscription import Events
from vmloop.client.vm import Vm

from .site import Site, wait_for

SECONDS: Final = 15.0
LIMIT: Final = 1.0  # seconds for one hook


def hook(site: Site, name: str, script: str, mode: int = 0o755) -> None:
    directory = site.paths.etc / "hooks.d"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(mode)


def started(site: Site, host: Host) -> Vm:
    site.define(host, "web1", handlers={"limit": LIMIT})
    host.vm("web1").start()
    return host.vm("web1")


def emit(vm: Vm, name: str, **data: Any) -> None:
    """Let QEMU say something."""
    vm.qmp("x-simulate", {"emit": {"event": name, "data": data}})


def failed(events: Events) -> dict[str, Any]:
    return dict(events.wait_for("HANDLER_FAILED", SECONDS).data)


def lines_of(path: Path, count: int) -> list[str]:
    """The lines of a file, once there are so many."""
    assert wait_for(lambda: path.exists() and path.read_text().count("\n") >= count, SECONDS)
    return path.read_text().splitlines()


def test_hooks_get_their_event_as_json_in_order_and_by_name(site: Site, host: Host, beside: Vm) -> None:
    out = site.root / "out"
    hook(site, "20-all", f'echo "all $VMLOOP_EVENT" >>{out}.order')
    hook(site, "X_GO-json", f'cat >>{out}.json; echo "$VMLOOP_VM $VMLOOP_CURSOR $VMLOOP_STATE $HOME" >>{out}.variables')
    hook(site, "X_GO-slow", f'sleep 0.2; echo "slow $VMLOOP_EVENT" >>{out}.order')
    hook(site, "X_OTHER", f'echo "other $VMLOOP_EVENT" >>{out}.order')
    hook(site, "X_GO-plain-file", f"echo never >>{out}.order", mode=0o644)
    vm = started(site, host)
    with vm.events() as events:
        for number in range(2):
            emit(vm, "X_GO", number=number, text="ä\n")
        emit(vm, "X_OTHER")
        told = [events.wait_for("X_GO", SECONDS) for _ in range(2)]
    given = [json.loads(line) for line in lines_of(Path(f"{out}.json"), 2)]
    assert [event["data"] for event in given] == [{"number": number, "text": "ä\n"} for number in range(2)]
    assert [(event["vm"], event["epoch"], event["seq"], event["event"], event["origin"]) for event in given] == [
        ("web1", event.epoch, event.seq, "X_GO", "qmp") for event in told
    ]
    assert [line.rstrip() for line in lines_of(Path(f"{out}.variables"), 2)] == [
        f"web1 {event.cursor} running" for event in told
    ]
    # In the order of events; of each event, in the order of the names.
    assert wait_for(lambda: "other X_OTHER" in Path(f"{out}.order").read_text(), SECONDS)
    of_ours = [line for line in Path(f"{out}.order").read_text().splitlines() if "X_" in line]
    assert of_ours == ["all X_GO", "slow X_GO", "all X_GO", "slow X_GO", "all X_OTHER", "other X_OTHER"]
    assert beside.qmp("query-status")["status"] == "running"


def test_a_hook_that_fails_hangs_or_cannot_be_run_is_told_of_and_costs_the_vm_nothing(site: Site, host: Host) -> None:
    pids = site.root / "pids"
    hook(site, "X_EXIT-bad", "echo sorry >&2; exit 3")
    hook(site, "X_HANG-bad", f"echo $$ >{pids}; sleep 600 & echo $! >>{pids}; trap '' TERM; wait; sleep 600")
    hook(site, "X_HANG-next", "exit 4")
    hook(site, "X_DIE-bad", "kill -9 $$")
    hook(site, "X_START-bad", "")
    (site.paths.etc / "hooks.d" / "X_START-bad").write_text("#!/nowhere/sh\n")
    vm = started(site, host)
    worker = vm.show().worker_pid
    with vm.events() as events:
        emit(vm, "X_EXIT")
        told = failed(events)
        assert (told["handler"], told["event"], told["why"]) == ("X_EXIT-bad", "X_EXIT", "exit")
        assert (told["status"], told["stderr"]) == (3, "sorry\n")
        emit(vm, "X_DIE")
        assert (failed(events)["status"], vm.show().worker_pid) == (-9, worker)
        emit(vm, "X_START")
        assert failed(events)["why"] == "start"

        began = time.monotonic()
        emit(vm, "X_HANG")
        group = [int(line) for line in lines_of(pids, 2)]
        assert vm.qmp("query-status", timeout=1.0)["status"] == "running"  # its VM does not wait for it
        told = failed(events)
        assert (told["handler"], told["why"], told["limit"], told["left_behind"]) == (
            "X_HANG-bad",
            "limit",
            LIMIT,
            False,
        )
        assert LIMIT * 0.9 < time.monotonic() - began < LIMIT + 3.0
        assert wait_for(lambda: not any(_runs(pid) for pid in group)), "its whole group is killed"
        assert failed(events)["handler"] == "X_HANG-next"  # it had to wait, and then had its turn
    assert (vm.show().worker_pid, host.list()[0].blocked) == (worker, 0.0)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
