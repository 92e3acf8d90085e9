# SPDX-License-Identifier: Apache-2.0
"""The shipped handlers against events with anything in them and a QEMU that answers anything: nothing but a `VmloopError` may come out."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmloop.common.definition import Definition, HandlersSection
from vmloop.common.errors import MonitorLost, QmpError, VmloopError
from vmloop.common.pack import pack
from vmloop.common.states import VmState
from vmloop.testing.fake_vm import FakeVm
from vmloop.worker.handlers import fields, power
from vmloop.worker.handlers.shipped import TABLE, Shipped

PATIENCE = 1.0  # seconds

# Every member that a handler looks at, so that wrong types stand where they are looked for.
KEYS = st.sampled_from(
    [
        "action",
        "actual",
        "base-memory",
        "completed",
        "connected",
        "current-progress",
        "data",
        "device",
        "error",
        "formats",
        "gid-status",
        "guest",
        "id",
        "info",
        "interface-id",
        "io-status",
        "main-mac",
        "memdev",
        "msg",
        "name",
        "netdev",
        "node-name",
        "nospace",
        "operation",
        "path",
        "ready",
        "reason",
        "running",
        "size",
        "source",
        "status",
        "subnet-prefix",
        "total",
        "total-progress",
        "type",
        "unicast-table",
        "vlan",
        "vlan-table",
    ]
)
WORDS = st.sampled_from(
    [
        "pause",
        "run",
        "reset",
        "poweroff",
        "guest-shutdown",
        "completed",
        "failed",
        "concluded",
        "active",
        "none",
        "kdump-zlib",
        "all",
        "running",
        "shutdown",
        "vmloop-agent-port",
    ]
)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), WORDS)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=5)),
    max_leaves=15,
)
DATA = st.dictionaries(KEYS, JSON, max_size=6)
ANSWER = st.one_of(JSON, st.just(QmpError("x", **{"class": "GenericError", "desc": "x"})), st.just(MonitorLost("gone")))
COMMANDS = [
    "query-status",
    "query-jobs",
    "query-block-jobs",
    "query-memory-devices",
    "query-balloon",
    "query-rx-filter",
    "query-pr-managers",
    "query-dump",
    "system_reset",
    "cont",
    "query-memory-size-summary",
    "query-dump-guest-memory-capability",
    "dump-guest-memory",
    "set-action",
    "migrate-set-capabilities",
]
POLICY = st.builds(
    HandlersSection,
    on_crash=st.sampled_from(["preserve", "destroy", "restart", "dump"]),
    on_watchdog=st.sampled_from(["none", "dump"]),
    on_poweroff=st.sampled_from(["off", "restart", "preserve"]),
)


@pytest.mark.parametrize(("name", "function"), TABLE, ids=[name for name, _ in TABLE])
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.lists(DATA, min_size=1, max_size=2),
    answers=st.fixed_dictionaries(dict.fromkeys(COMMANDS, ANSWER)),
    policy=POLICY,
    state=st.sampled_from([VmState.RUNNING, VmState.PAUSED, VmState.CRASHED, VmState.SHUTDOWN]),
    attached=st.booleans(),
)
def test_nothing_but_an_error_of_the_tree_comes_out(
    name: str,
    function: Shipped,
    data: list[dict[str, Any]],
    answers: dict[str, Any],
    policy: HandlersSection,
    state: VmState,
    attached: bool,
) -> None:
    async def play(directory: Path) -> None:
        vm = FakeVm(directory, definition=Definition("web1", handlers=policy), state=state)
        if attached:
            vm.definition = None
        for command, answer in answers.items():
            vm.qmp_answers(command, answer)
        for members in data:
            # Members that the real stream would have cut are let through: a handler must not lean on that.
            event = msgspec.structs.replace(vm.happen(name), data=members)
            task = asyncio.ensure_future(function(vm, event))
            _, waiting = await asyncio.wait({task}, timeout=PATIENCE)
            if waiting:  # for a dump that stays active: the dispatcher would end it at its limit
                task.cancel()
                await asyncio.wait({task})
            else:
                with contextlib.suppress(VmloopError):
                    task.result()
        with contextlib.suppress(VmloopError):
            await power.prepare(vm)

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(play(Path(directory)))


@given(JSON)
def test_what_is_plain_can_be_packed(value: Any) -> None:
    pack(fields.plain(value))
