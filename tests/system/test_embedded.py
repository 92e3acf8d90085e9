# SPDX-License-Identifier: Apache-2.0
"""vmloop inside a program, with a real broker process: from a plain script, from asyncio, from threads; whose caller forks or is killed.

Scripts run as programs of their own, for what is left when they end is the matter. After each test nothing of its directory may run, and
no socket may be there.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import threading
from pathlib import Path
from typing import Any, Final

import pytest

from vmloop.client import aio, connect, embedded
from vmloop.client.embedding import STOP_TIMEOUT
from vmloop.common.errors import BadRequest, ConfigError, Denied, NoBroker

from .managed import comm
from .program import Script, ended
from .site import REAL_ARGS, kill_process, processes_of, wait_for

SECONDS: Final = 20.0
WEB1: Final = {"name": "web1", "qemu": {"binary": "simulated"}}
REAL: Final = {"name": "real", "qemu": {"args": REAL_ARGS}}


def open_fds() -> set[str]:
    return {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists()}


# -- from where it is used ------------------------------------------------------------------------------------------------


def test_a_plain_script_has_its_vm_and_changes_nothing_of_itself(place: Path) -> None:
    script = Script(
        place,
        """
def self():
    mask = os.umask(0); os.umask(mask)
    handlers = [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP)]
    return [os.getcwd(), mask, sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())), handlers, threading.active_count()]
os.umask(0o027)
before = self()
with embedded("vms") as host:
    host.define(WEB1)
    started = host.vm("web1").start()
    told(state=started.state, status=host.vm("web1").qmp("query-status")["status"], root=str(host.root), same=self() == before)
told(same=self() == before, left=sorted(os.listdir("vms/run")))
""",
    )
    assert script.told() == {"state": "running", "status": "running", "root": str(place / "vms"), "same": True}
    assert script.told() == {"same": True, "left": ["broker.lock", "vms"]}
    assert script.end() == 0
    assert ended(place / "vms")["reason"] == "shutdown", "its guest was asked to power down"


def test_nothing_stays_open_in_the_caller(place: Path) -> None:
    with embedded(place / "first") as host:  # what is imported and opened once for all
        host.ping()
    before = open_fds()
    with embedded(place) as host:
        host.define(WEB1)
        host.vm("web1").start()
    assert open_fds() == before


def test_the_blocking_client_works_in_a_running_loop_as_in_a_notebook(place: Path) -> None:
    async def cell() -> None:
        host = embedded(place)
        host.define(WEB1)
        assert host.vm("web1").start().state == "running"
        host.close()

    asyncio.run(cell())


def test_asyncio_has_it_too(place: Path) -> None:
    async def work() -> str:
        async with aio.embedded(place) as host:
            await host.define(WEB1)
            return (await host.vm("web1").start()).state

    assert asyncio.run(work()) == "running"
    assert ended(place)["reason"] == "shutdown"


def test_a_cancelled_start_leaves_no_broker(place: Path) -> None:
    async def work() -> None:
        starting = asyncio.ensure_future(aio.embedded(place)._start())
        await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    asyncio.run(work())
    with pytest.raises(NoBroker):
        connect(root=place)


def test_two_threads_have_one_each(place: Path) -> None:
    states: dict[str, Any] = {}

    def work(name: str) -> None:
        with embedded(place / name) as host:
            host.define(WEB1 | {"name": name})
            states[name] = host.vm(name).start().state
            both.wait(SECONDS)
            states[f"{name} sees"] = [vm.name for vm in host.list()]

    both = threading.Barrier(2)
    threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert states == {"one": "running", "two": "running", "one sees": ["one"], "two sees": ["two"]}


def test_both_clients_take_the_same_arguments() -> None:
    assert inspect.signature(aio.embedded).parameters == inspect.signature(embedded).parameters
    assert inspect.signature(embedded).parameters["stop_timeout"].default == STOP_TIMEOUT


def test_a_program_without_standard_streams_that_blocks_signals_is_served(place: Path) -> None:
    script = Script(
        place,
        """
signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
out = os.dup(1)
for fd in (0, 1, 2):
    os.close(fd)
with embedded(place) as host:
    host.define(WEB1)
    host.vm("web1").start()
    worker = host.vm("web1").show().worker_pid
os.write(out, json.dumps({"gone": not os.path.exists(f"/proc/{worker}")}).encode() + b"\\n")
""",
    )
    assert script.told() == {"gone": True}
    assert script.end() == 0


def test_what_a_relative_pythonpath_names_is_found_by_the_broker_too(place: Path) -> None:
    (place / "lib").mkdir()
    (place / "lib/sitecustomize.py").write_text(
        "import pathlib, sys\nwith open(pathlib.Path(__file__).with_name('seen'), 'a') as seen:\n    print(*sys.orig_argv, file=seen)\n"
    )
    script = Script(place, "with embedded(place):\n    told()", env={**os.environ, "PYTHONPATH": "lib"})
    script.told()
    assert script.end() == 0
    seen = (place / "lib/seen").read_text()
    assert "-m vmloop.broker " in seen
    assert "-m vmloop.broker.zygote " in seen


# -- one directory ----------------------------------------------------------------------------------------------------------


def test_a_directory_has_one_broker_and_who_asks_may_join_it(place: Path) -> None:
    with embedded(place) as first:
        pid = first.version().pid
        with pytest.raises(Denied, match=f"pid {pid}.*join=True") as denied:
            embedded(place)
        assert denied.value.fields["pid"] == pid
        with embedded(place, join=True) as second:
            assert second.version().pid == pid
        assert first.version().pid == pid, "who has joined does not end it"


def test_a_path_too_long_for_sockets_is_refused_with_its_length(place: Path) -> None:
    long = place / ("x" * 100)
    with pytest.raises(ConfigError, match=r"has \d+ bytes, 107 are possible"):
        embedded(long)
    assert not long.exists()


@pytest.mark.parametrize(
    "arguments", [{"vms": "perhaps"}, {"stop_timeout": 0.0}, {"stop_timeout": float("nan")}, {"vms": "leave"}]
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        embedded(None, **arguments)


def test_settings_that_are_wrong_are_told_and_nothing_runs(place: Path) -> None:
    (place / "etc").mkdir()
    (place / "etc/vmloop.toml").write_text("[broker]\ndrian = 1\n")
    with pytest.raises(ConfigError, match=r"did you mean 'broker\.drain'"):
        embedded(place)


def test_a_temporary_directory_goes_with_its_host() -> None:
    with embedded() as host:
        root = host.root
        host.define(WEB1)
        host.vm("web1").start()
        assert root.is_dir()
    assert not root.exists()


# -- what becomes of the VMs --------------------------------------------------------------------------------------------------


def test_vms_that_are_left_are_found_again_with_the_same_process(place: Path) -> None:
    with embedded(place, vms="leave") as host:
        host.define(WEB1)
        pid = host.vm("web1").start().pid
    with embedded(place) as host:
        vm = host.vm("web1")
        vm.wait("running")
        assert vm.show().pid == pid
        assert vm.qmp("query-status")["status"] == "running"
    assert ended(place)["reason"] == "shutdown"


@pytest.mark.qemu
@pytest.mark.usefixtures("require_qemu")
def test_a_guest_that_does_not_power_down_is_killed_at_its_time(place: Path) -> None:
    with embedded(place, stop_timeout=0.5) as host:
        host.define(REAL)
        host.vm("real").start()
    assert ended(place, "real")["reason"] == "destroyed"


@pytest.mark.qemu
@pytest.mark.usefixtures("require_qemu")
def test_a_second_sigterm_to_the_broker_kills_what_is_being_stopped(place: Path) -> None:
    with embedded(place, stop_timeout=600.0) as host:
        host.define(REAL)
        host.vm("real").start()
        os.kill(host.version().pid, signal.SIGTERM)
        host.vm("real").show()  # by then it has been seen
    assert ended(place, "real")["reason"] == "destroyed"


def test_vms_can_be_killed_at_once(place: Path) -> None:
    with embedded(place, vms="kill") as host:
        host.define(WEB1)
        host.vm("web1").start()
    assert ended(place)["reason"] == "destroyed"


def test_a_vm_that_is_to_start_with_its_host_does_not_start_with_a_program(place: Path) -> None:
    with embedded(place) as host:
        host.define(WEB1 | {"autostart": True})
    assert not (place / "state/boot-id").exists(), "that is for the host's own broker to write"
    with embedded(place) as host:
        assert host.vm("web1").show().state == "shutoff"


# -- deaths -----------------------------------------------------------------------------------------------------------------------

STARTS: Final = """
with embedded(None if KEPT is None else place, vms=VMS) as host:
    host.define(WEB1)
    vm = host.vm("web1")
    told(pid=vm.start().pid, broker=host.version().pid, root=str(host.root))
    sys.stdin.readline()
"""


def test_a_caller_that_is_killed_takes_everything_with_it(place: Path) -> None:
    script = Script(place, "KEPT, VMS = place, 'stop'" + STARTS)
    script.told()
    script.kill()
    assert wait_for(lambda: not processes_of(place) or {}, SECONDS) is True
    assert ended(place)["reason"] == "shutdown"


def test_a_temporary_directory_goes_also_when_the_caller_is_killed(place: Path) -> None:
    script = Script(place, "KEPT, VMS = None, 'kill'" + STARTS)
    root = Path(script.told()["root"])
    script.kill()
    assert wait_for(lambda: not root.exists() and not processes_of(root), SECONDS)


def test_a_caller_that_is_killed_leaves_what_it_wanted_to_leave(place: Path) -> None:
    script = Script(place, "KEPT, VMS = place, 'leave'" + STARTS)
    told = script.told()
    script.kill()
    with embedded(place, wait=SECONDS) as host:
        host.vm("web1").wait("running")
        assert host.vm("web1").show().pid == told["pid"]
        assert host.version().pid != told["broker"]


def test_a_child_that_the_caller_forks_neither_ends_nor_keeps_anything(place: Path) -> None:
    script = Script(
        place,
        """
with embedded(place) as host:
    host.define(WEB1)
    host.vm("web1").start()
    if os.fork() == 0:
        sys.exit(0)  # through the end of the `with`
    code = os.wait()[1]
    lasting = os.fork()
    if lasting == 0:
        signal.pause()
        os._exit(1)
    told(code=code, state=host.vm("web1").show().state, child=lasting)
    sys.stdin.readline()
""",
    )
    told = script.told()
    try:
        assert (told["code"], told["state"]) == (0, "running")
        script.process.kill()
        script.process.wait(SECONDS)
        gone = wait_for(lambda: set(processes_of(place)) <= {told["child"]}, SECONDS)
        assert gone, "the child's copies of its fds keep nothing alive"
        assert Path(f"/proc/{told['child']}").exists()
        assert ended(place)["reason"] == "shutdown"
    finally:
        kill_process(told["child"])
        script.close()


def test_a_broker_that_was_killed_is_no_reason_to_leave_anything(place: Path) -> None:
    with embedded(place) as host:
        host.define(WEB1)
        host.vm("web1").start()
        kill_process(host.version().pid)
    assert ended(place)["reason"] == "shutdown"


def test_a_zygote_that_hangs_is_ended_too(place: Path) -> None:
    with embedded(place, vms="kill"):
        [zygote] = wait_for(lambda: [pid for pid in processes_of(place) if comm(pid) == "vml-zygote"], SECONDS)
        os.kill(zygote, signal.SIGSTOP)


def test_a_program_that_ends_without_a_word_leaves_nothing(place: Path) -> None:
    script = Script(place, "host = embedded(place)\nhost.define(WEB1)\nhost.vm('web1').start()\ntold()\nos._exit(3)")
    script.told()
    assert script.end() == 3
    assert wait_for(lambda: not processes_of(place) or {}, SECONDS) is True
    assert ended(place)["reason"] == "shutdown"
