# SPDX-License-Identifier: Apache-2.0
"""A private broker whose owner does not come to the end of what it began: interrupted, cancelled, lost, or blind to its children's ends."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Final

import pytest

from vmloop.client import aio, connect, embedded, embedding
from vmloop.client.embedding import EmbeddedHost
from vmloop.common.errors import NoBroker
from vmloop.common.ownership import Ownership, ownership_to_argument

from ..fakes.interruption import Interruption
from .program import Script, ended
from .site import processes_of, wait_for

SECONDS: Final = 20.0
WEB1: Final = {"name": "web1", "qemu": {"binary": "simulated"}}
STUBBORN: Final = {"name": "web1", "qemu": {"binary": "simulated", "args": ["-simulate", "ignore_powerdown"]}}


def is_ending(host: EmbeddedHost) -> bool:
    """Whether the broker has begun to end: it takes up no new VM."""
    return "ending; what becomes of the VMs" in (host.root / "state/broker.log").read_text()


# -- blind to its children's ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["ignores", "reaps"])
def test_a_killed_broker_is_seen_by_who_ignores_or_reaps_its_children(place: Path, how: str) -> None:
    script = Script(
        place,
        f"how = {how!r}"
        + """
if how == "ignores":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
host = embedded(place)
host.define(WEB1)
vm = host.vm("web1").start().pid
broker = host.version().pid
os.kill(broker, signal.SIGKILL)
if how == "reaps":
    while os.waitpid(-1, 0)[0] != broker:
        pass
host.close()
told(gone=not os.path.exists(f"/proc/{vm}"))
""",
    )
    assert script.told() == {"gone": True}
    assert script.end() == 0
    assert ended(place)["reason"] == "shutdown"


# -- closed in other ways than once ---------------------------------------------------------------------------------------------


def test_a_close_that_was_interrupted_is_repeated_and_then_kills(place: Path) -> None:
    host = embedded(place, stop_timeout=600.0)
    host.define(STUBBORN)
    host.vm("web1").start()

    def interrupt() -> None:
        wait_for(lambda: is_ending(host), SECONDS)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            host.close()
    finally:
        thread.join(SECONDS)
        signal.signal(signal.SIGINT, before)
    assert processes_of(place)
    host.close()
    assert (host.broker_fd, processes_of(place)) == (None, {})
    assert ended(place)["reason"] == "destroyed"


def test_two_threads_may_close_it_and_both_have_waited(place: Path) -> None:
    host = embedded(place)
    host.define(WEB1)
    host.vm("web1").start()
    both, errors, left = threading.Barrier(2), [], []

    def close() -> None:
        both.wait(SECONDS)
        try:
            host.close()
        except Exception as error:  # noqa: BLE001 -- told below
            errors.append(error)
        left.append(processes_of(place))

    threads = [threading.Thread(target=close) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert (errors, left) == ([], [{}, {}])


def test_a_signal_handler_may_close_it_while_it_is_being_closed(place: Path) -> None:
    host = embedded(place, stop_timeout=600.0)
    host.define(STUBBORN)
    host.vm("web1").start()

    def on_signal(number: int, frame: FrameType | None) -> None:
        del number, frame
        host.close()

    def interrupt() -> None:
        wait_for(lambda: is_ending(host), SECONDS)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, on_signal)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        host.close()
    finally:
        thread.join(SECONDS)
        signal.signal(signal.SIGUSR1, before)
    assert ended(place)["reason"] == "destroyed"


# -- lost -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["del host; import gc; gc.collect()", "os.execv('/bin/sh', ['sh', '-c', 'read line'])"])
def test_a_host_that_is_lost_takes_its_broker_with_it(place: Path, how: str) -> None:
    """Not closed, and nobody has it any more; the process itself lives on."""
    script = Script(
        place,
        f"host = embedded(place)\nhost.define(WEB1)\nhost.vm('web1').start()\ntold()\n{how}\nsys.stdin.readline()",
        stderr=subprocess.DEVNULL,
    )
    script.told()
    gone = wait_for(lambda: set(processes_of(place)) <= {script.process.pid}, SECONDS)
    lives = script.process.poll() is None
    script.kill()
    assert gone
    assert lives
    assert ended(place)["reason"] == "shutdown"


STRIDE: Final = 9  # of the lines at which Ctrl-C comes


def begin_and_end(line: int) -> bool:
    """Whether it was long enough to be interrupted there."""
    interruption = Interruption(line, {embedding.__file__}, "line")
    try:
        with interruption:
            host = embedded(vms="kill")
            host.close()
    except KeyboardInterrupt:
        return True
    return False


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # what is lost is told of
def test_a_start_or_an_end_that_is_interrupted_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a process nor its temporary directory, wherever Ctrl-C comes."""
    monkeypatch.setattr("tempfile.tempdir", str(place))
    line, interrupted = 1, True
    while interrupted:
        interrupted = begin_and_end(line)
        gc.collect()
        gone = wait_for(lambda: not processes_of(place) and not list(place.iterdir()), SECONDS)
        assert gone, f"interrupted at line {line}: {processes_of(place)}, {list(place.iterdir())}"
        line += STRIDE
    assert line > 100


# -- cancelled --------------------------------------------------------------------------------------------------------------------


def test_a_start_that_waits_for_its_directory_is_cancelled_at_once(place: Path) -> None:
    async def work() -> None:
        async with asyncio.timeout(SECONDS):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await aio.embedded(place, wait=600.0)

    with embedded(place) as host:
        asyncio.run(work())
        host.ping()


@pytest.mark.parametrize("times", [1, 2])
def test_a_start_may_be_cancelled_more_than_once(place: Path, times: int) -> None:
    async def work() -> None:
        starting = asyncio.ensure_future(aio.embedded(place)._start())
        assert await asyncio.to_thread(wait_for, lambda: bool(processes_of(place)), SECONDS)
        for _ in range(times):
            starting.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await starting

    asyncio.run(work())
    with pytest.raises(NoBroker):
        connect(root=place)


def test_a_cancelled_close_goes_on_and_is_waited_for_by_the_next(place: Path) -> None:
    async def work() -> None:
        host = await aio.embedded(place, stop_timeout=600.0)
        await host.define(STUBBORN)
        await host.vm("web1").start()
        closing = asyncio.ensure_future(host.close())
        log = place / "state/broker.log"
        assert await asyncio.to_thread(wait_for, lambda: "what becomes of the VMs" in log.read_text(), SECONDS)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        [broker] = [pid for pid, words in processes_of(place).items() if "--owned" in words]
        os.kill(broker, signal.SIGTERM)  # a second word kills
        await host.close()

    asyncio.run(work())
    assert ended(place)["reason"] == "destroyed"
    assert processes_of(place) == {}


def test_a_child_that_an_asyncio_program_forks_ends_nothing(place: Path) -> None:
    script = Script(
        place,
        """
import asyncio
from vmloop.client import aio
async def main():
    async with aio.embedded(place) as host:
        await host.define(WEB1)
        await host.vm("web1").start()
        child = os.fork()
        if child == 0:
            try:
                await host.close()
            finally:
                os._exit(0)
        code = os.waitpid(child, 0)[1]
        told(code=code, state=(await host.vm("web1").show()).state)
asyncio.run(main())
""",
    )
    assert script.told() == {"code": 0, "state": "running"}
    assert script.end() == 0
    assert ended(place)["reason"] == "shutdown"


# -- a broker that cannot serve -----------------------------------------------------------------------------------------------------


def test_a_temporary_root_goes_also_if_its_owner_is_gone_and_its_broker_cannot_serve(place: Path) -> None:
    root = place / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/vmloop.toml").write_text("[broker]\ndrian = 1\n")
    gone = subprocess.Popen(["true"])
    pidfd = os.pidfd_open(gone.pid)
    gone.wait(SECONDS)
    ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours[0].close()
    owned = ownership_to_argument(Ownership(pidfd, ours[1].fileno(), "kill", 1.0, temporary=True))
    try:
        broker = subprocess.run(
            [sys.executable, "-m", "vmloop.broker", str(root), "--owned", owned],
            pass_fds=[pidfd, ours[1].fileno()],
            capture_output=True,
            timeout=SECONDS,
            cwd="/",
        )
    finally:
        os.close(pidfd)
        ours[1].close()
    assert b"did you mean 'broker.drain'" in broker.stderr
    assert not root.exists()
