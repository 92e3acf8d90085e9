# SPDX-License-Identifier: Apache-2.0
"""docs/handlers.md against the code: its examples are loaded and run, its tables hold what there is."""

from __future__ import annotations

import re
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import vmloop
from vmloop.common.errors import AgentError
from vmloop.testing.fake_vm import FakeVm
from vmloop.worker.events import Event
from vmloop.worker.handlers import AsyncVm, SyncVm
from vmloop.worker.handlers.dispatch import Dispatcher
from vmloop.worker.handlers.naming import TaskNames
from vmloop.worker.handlers.registry import Handler, load_directory

from .test_handlers_dispatch import DEADLINE, RecordingPage, run

ROOT = Path(vmloop.__file__).parent
DOCS = (ROOT / "docs" / "handlers.md").read_text()
MAIL, ALERT, RESUME = re.findall(r"^```python\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)


def loaded(tmp_path: Path, text: str) -> tuple[Handler, ...]:
    directory = tmp_path / "handlers"
    directory.mkdir()
    (directory / "example.py").write_text(text)
    found = load_directory(directory, None, lambda *_: False, TaskNames(RecordingPage()))
    assert found.failures == ()
    return found.handlers


async def happen(vm: FakeVm, handlers: tuple[Handler, ...], event: str, data: dict[str, Any]) -> None:
    dispatcher = Dispatcher(vm, RecordingPage(), handlers, on_replace=print)
    try:
        dispatcher.dispatch(vm.happen(event, data))
        assert await dispatcher.settle(DEADLINE)
    finally:
        await dispatcher.close()
    assert vm.emitted("HANDLER_FAILED") == []


def test_the_first_example_tells_the_disks(tmp_path: Path) -> None:
    async def scene() -> None:
        vm = FakeVm(tmp_path)
        vm.qmp_answers("query-block", [{"device": "vda"}, {"device": "vdb"}])
        await happen(vm, loaded(tmp_path, MAIL), "BLOCK_IO_ERROR", {"device": "vdb"})
        assert vm.emitted("SITE_DISK_FAILED") == [{"device": "vdb", "disks": ["vda", "vdb"]}]

    run(scene)


def test_the_blocking_example_posts_the_news(tmp_path: Path) -> None:
    posted: list[bytes] = []

    class Manager(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Not on standard error."""

    async def scene() -> None:
        text = ALERT.replace("localhost:9/", f"127.0.0.1:{server.server_port}/")
        await happen(FakeVm(tmp_path), loaded(tmp_path, text), "WATCHDOG", {"action": "pause"})

    with HTTPServer(("127.0.0.1", 0), Manager) as server:
        server.timeout = DEADLINE
        serving = Thread(target=server.handle_request)
        serving.start()
        run(scene)
        serving.join(DEADLINE)
    assert len(posted) == 1
    assert b'"event": "WATCHDOG"' in posted[0]


def test_the_acting_example_resumes_and_trims(tmp_path: Path) -> None:
    async def scene() -> None:
        vm = FakeVm(tmp_path)
        vm.qmp_answers("cont", {})
        handlers = loaded(tmp_path, RESUME)
        paused = {"old": "running", "new": "paused", "reason": "ioerror"}
        await happen(vm, handlers, "VM_STATE", paused)
        assert vm.commands() == ["cont"]
        assert vm.emitted("SITE_TRIM_FAILED") == [{"why": "agent-absent"}]
        vm.agent_answers("guest-fstrim", AgentError("not here"))
        await happen(vm, handlers, "VM_STATE", paused)
        assert vm.emitted("SITE_TRIM_REFUSED") == [{"said": "not here"}]
        await happen(vm, handlers, "VM_STATE", {"new": "running"})
        assert vm.commands() == ["cont", "cont"]

    run(scene)


def test_everything_that_a_vm_and_an_event_have_is_in_the_tables() -> None:
    of_vm = set(re.findall(r"`vm\.(\w+)", DOCS))
    public = {name for name in vars(AsyncVm) if not name.startswith("_")}
    assert of_vm == public == {name for name in vars(SyncVm) if not name.startswith("_")}
    assert set(re.findall(r"`event\.(\w+)", DOCS)) == set(Event.__struct_fields__) - {"vm"}


def test_every_reason_of_a_failure_is_in_the_table() -> None:
    documented = set(re.findall(r"^\| `([^`]+)` \|", DOCS.partition("| why |")[2], re.MULTILINE))
    code = "".join(path.read_text() for path in (ROOT / "worker" / "handlers").glob("*.py"))
    told = re.findall(r'\.failed\([^"\n]*, "([a-z]+)", ', code)
    loading = re.findall(r'LoadFailure\(source, "([a-z]+)", ', code)
    assert {*told, *loading, "refused", "killed its worker"} == documented
