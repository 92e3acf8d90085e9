# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin as its users have it: their test files, run by a pytest of their own, with what it says and what it leaves."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

pytest_plugins = ["pytester"]

RUN_SECONDS: Final = 100.0

HANDLERS: Final = """
from vmloop.worker.handlers import AsyncVm, Event, SyncVm, on

@on("BLOCK_IO_ERROR")
async def disk_failed(vm: AsyncVm, event: Event) -> None:
    await vm.qmp("query-block")
    vm.emit("SITE_DISK_FAILED", {"device": event.data["device"]})

@on("WATCHDOG")
def divide(vm: SyncVm, event: Event) -> None:
    1 / 0
"""

USER: Final = (
    HANDLERS
    + """
import pytest

def test_a_vm(simulated_vm):
    assert simulated_vm.vm.qmp("query-status")["status"] == "running"

def test_a_broker(broker):
    assert broker.host.list() == []

def test_a_handler(vmloop_handlers):
    vm = vmloop_handlers(disk_failed)
    vm.emit("BLOCK_IO_ERROR", {"device": "vda"})
    assert vm.wait_event("SITE_DISK_FAILED").data == {"device": "vda"}

def test_a_file_of_handlers(vmloop_handlers):
    vm = vmloop_handlers("mail.py", limit=7)
    assert vm.vm.show().definition is not None
    vm.emit("BLOCK_IO_ERROR", {"device": "vdb"})
    vm.settle()
    assert [event.data for event in vm.events("SITE_DISK_FAILED")] == [{"device": "vdb"}]

def test_an_expected_failure(vmloop_handlers):
    vm = vmloop_handlers("mail.py")
    vm.fire_watchdog()
    assert "division by zero" in vm.expect_failure("mail.divide").data["error"]

def test_without_processes(handler_bench):
    bench = handler_bench(disk_failed)
    bench.vm.qmp_answers("query-block", [])
    [event] = bench.happen("BLOCK_IO_ERROR", {"device": "vda"})
    assert event.event == "SITE_DISK_FAILED"
"""
)


class Site:
    """A directory of a user's, and the temporary one of their runs."""

    def __init__(self, pytester: pytest.Pytester, temporary: Path) -> None:
        self.pytester = pytester
        self.temporary = temporary
        (pytester.path / "mail.py").write_text(HANDLERS)

    def run(self, text: str, *arguments: str) -> pytest.RunResult:
        self.pytester.makepyfile(text)
        return self.pytester.runpytest_subprocess("-p", "no:cacheprovider", "-q", *arguments, timeout=RUN_SECONDS)

    def left(self) -> list[str]:
        """What is in the temporary directory after a run."""
        return [path.name for path in self.temporary.iterdir()]


@pytest.fixture
def user(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    temporary = Path(tempfile.mkdtemp(prefix="vt-"))
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    try:
        yield Site(pytester, temporary)
    finally:
        shutil.rmtree(temporary)


def outcomes(result: pytest.RunResult) -> dict[str, int]:
    return {name: count for name, count in result.parseoutcomes().items() if name != "warnings"}


def test_a_users_tests_pass_and_leave_nothing(user: Site) -> None:
    result = user.run(USER)
    assert outcomes(result) == {"passed": 6}
    assert user.left() == []


def test_a_handler_that_fails_fails_the_test_with_its_traceback(user: Site) -> None:
    result = user.run(
        """
        def test_it(vmloop_handlers):
            vmloop_handlers("mail.py").fire_watchdog()
        """
    )
    assert outcomes(result) == {"failed": 1}
    result.stdout.fnmatch_lines(
        ["E*HandlerFailed: handler mail.divide failed on WATCHDOG (raised): ZeroDivisionError*"]
    )
    result.stdout.fnmatch_lines(["E*1 / 0"])
    assert user.left() == []


def test_a_file_that_cannot_be_loaded_fails_the_test(user: Site) -> None:
    (user.pytester.path / "broken.py").write_text("import no_such_module")
    result = user.run("def test_it(vmloop_handlers): vmloop_handlers('broken.py')")
    assert outcomes(result) == {"failed": 1}
    result.stdout.fnmatch_lines(["E*HandlerFailed: handler broken.py failed on * (import): ModuleNotFoundError*"])


def test_a_handler_that_hangs_fails_the_test_within_its_limit(user: Site) -> None:
    (user.pytester.path / "hang.py").write_text(
        "import asyncio\n"
        "from vmloop.worker.handlers import on\n"
        "@on('WATCHDOG')\n"
        "async def hang(vm, event):\n"
        "    await asyncio.Event().wait()\n"
    )
    result = user.run("def test_it(vmloop_handlers): vmloop_handlers('hang.py', limit=0.5).fire_watchdog()")
    assert outcomes(result) == {"failed": 1}
    result.stdout.fnmatch_lines(
        ["E*HandlerFailed: handler hang.hang failed on WATCHDOG (limit): over its limit of 0.5 s*"]
    )
    assert user.left() == []


def test_a_test_that_fails_by_itself_fails_for_that_alone_and_leaves_nothing(user: Site) -> None:
    result = user.run(
        """
        def test_it(vmloop_handlers, simulated_vm, handler_bench):
            vmloop_handlers("mail.py").fire_watchdog()
            simulated_vm.set_faults(frozen=True)
            assert 1 == 2
        """
    )
    assert outcomes(result) == {"failed": 1}
    result.stdout.fnmatch_lines(["E*assert 1 == 2"])
    assert "HandlerFailed" not in result.stdout.str()
    assert user.left() == []


def test_a_test_that_is_run_again_begins_anew(user: Site) -> None:
    (user.pytester.path / "conftest.py").write_text(
        "from _pytest.runner import runtestprotocol\n"
        "def pytest_runtest_protocol(item, nextitem):\n"
        "    for _ in range(2):\n"
        "        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)\n"
        "        item._initrequest()\n"
        "        runtestprotocol(item, nextitem=nextitem, log=True)\n"
        "    return True\n"
    )
    result = user.run("def test_it(vmloop_handlers): vmloop_handlers('mail.py')")
    assert outcomes(result) == {"passed": 2}


def test_a_wait_that_is_over_says_what_came_instead(user: Site) -> None:
    result = user.run(
        """
        def test_it(simulated_vm):
            simulated_vm.vm.pause()
            simulated_vm.wait_event("RESET", timeout=0.5)
        """
    )
    assert outcomes(result) == {"failed": 1}
    result.stdout.fnmatch_lines(["E*DeadlineExceeded: VM vm1: no event RESET within 0.5 s; passed: STOP, VM_STATE"])


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("no_handler", "no_handler is no handler: decorate it with @on(EVENT)*"),
        ("made_here", "made_here is made inside of test_it.<locals>: *use handler_bench"),
        ("'nowhere.py'", "the handlers in nowhere.py cannot be read*"),
        ("'_hidden.py'", "_hidden.py is no file of handlers*"),
    ],
)
def test_what_is_no_handler_is_refused_with_a_way_out(user: Site, source: str, why: str) -> None:
    result = user.run(
        f"""
        from vmloop.worker.handlers import on

        def no_handler(vm, event): ...

        def test_it(vmloop_handlers):
            @on("STOP")
            async def made_here(vm, event): ...
            vmloop_handlers({source})
        """
    )
    assert outcomes(result) == {"failed": 1}
    result.stdout.fnmatch_lines([f"E*ConfigError: {why}"])


def test_runs_side_by_side_do_not_meet(user: Site) -> None:
    user.pytester.makepyfile(USER)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "a_handler or a_vm"]
    runs = [subprocess.Popen(command, cwd=user.pytester.path, stdout=subprocess.PIPE) for _ in range(2)]
    for run in runs:
        out, _ = run.communicate(timeout=RUN_SECONDS)
        assert b"2 passed" in out
    assert user.left() == []


def test_the_plugin_costs_a_run_that_does_not_use_it_next_to_nothing(user: Site) -> None:
    result = user.run(
        """
        import sys

        def test_it(pytestconfig):
            assert pytestconfig.pluginmanager.hasplugin("vmloop")
            ours = {name for name in sys.modules if name.startswith("vmloop")}
            assert ours == {"vmloop", "vmloop.testing", "vmloop.testing.plugin"}
            assert not {"zmq", "msgspec", "msgpack", "asyncio", "psutil", "click"} & set(sys.modules)
        """
    )
    assert outcomes(result) == {"passed": 1}


def test_the_fixtures_are_documented_where_pytest_shows_them(user: Site) -> None:
    result = user.run("", "--fixtures")
    for name in (
        "broker",
        "simulated_vm",
        "simulated_vms",
        "vmloop_handlers",
        "handler_bench",
        "replayed_monitor",
        "replayed_vm",
    ):
        result.stdout.fnmatch_lines([f"{name} -- *testing/plugin.py:*", "    [A-Z]*"])


def test_an_asyncio_test_can_use_them_too(user: Site) -> None:
    result = user.run(
        HANDLERS
        + """
import asyncio

def test_it(vmloop_handlers, handler_bench):
    async def scene():
        bench = handler_bench(disk_failed)
        bench.vm.qmp_answers("query-block", [])
        assert bench.happen("BLOCK_IO_ERROR", {"device": "vda"})
        return vmloop_handlers(disk_failed).vm.qmp("query-status")
    assert asyncio.run(scene())["running"] is True
"""
    )
    assert outcomes(result) == {"passed": 1}
