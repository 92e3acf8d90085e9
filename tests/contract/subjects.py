# SPDX-License-Identifier: Apache-2.0
"""Who has to keep the contract: real QEMU and the simulated one, qemu-ga and the simulated agent, each as a process behind a socket.

Started by the fixtures in tests/contract/conftest.py. The two monitors are launched as vmloop's worker launches them: on an inherited
listening socket. Where the real one needs a trick (a guest of nine bytes, a FIFO that blocks), the simulated one uses a fault.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Final

from vmloop.common.definition import AGENT_ID, MONITOR_ID

from ..conftest import QEMU, require_binary
from ..fakes.raw_qmp import DEADLINE, RawClient, negotiated, until

MACHINE: Final = ["-nodefaults", "-machine", "q35,accel=tcg", "-m", "64", "-display", "none"]
SIMULATED: Final = [sys.executable, "-m", "vmloop.worker.qemu.simulated"]
BLOCKED_ID: Final = "blocked"  # the id of the command that a blocked VM hangs in

# cli; mov dx, 0x604; mov ax, 0x2000; out dx, ax; hlt: the whole guest. It switches a q35 off through its ACPI port.
SWITCH_OFF: Final = bytes.fromhex("fa ba0406 b80020 ef f4")

# The same with another port and value: what the guest does, QEMU's arguments for it, and the word of x-simulate for it.
DEEDS: Final[dict[str, tuple[bytes, tuple[str, ...]]]] = {
    "switch_off": (SWITCH_OFF, ()),
    "suspend": (bytes.fromhex("fa ba0406 b80024 ef f4"), ()),
    "hibernate": (bytes.fromhex("fa ba0406 b80028 ef f4"), ()),
    "panic": (bytes.fromhex("fa ba0505 b001 ee f4"), ("-device", "pvpanic")),
    "crashloaded": (bytes.fromhex("fa ba0505 b002 ee f4"), ("-device", "pvpanic")),
    "watchdog": (bytes.fromhex("fa ba4304 b00f ee f4"), ("-device", "ib700")),  # no seconds until it fires
}
SECTOR: Final = 512
DISK_BYTES: Final = 1 << 20


class Subject(ABC):
    """One process and the monitor that it was given."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "monitor.sock"
        self.agent_path = directory / "agent.sock"
        self.process: subprocess.Popen[bytes] | None = None
        self.printed = b""

    def start(self, *extra: str) -> None:
        """Launch it, paused."""
        self.path.unlink(missing_ok=True)
        self.agent_path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as monitor, socket.socket(socket.AF_UNIX) as agent:
            for listener, path in ((monitor, self.path), (agent, self.agent_path)):
                listener.bind(str(path))
                listener.listen(8)
            self.process = subprocess.Popen(
                [
                    *self.command(),
                    *("-S", "-name", "web1", "-uuid", "11111111-2222-3333-4444-555555555555"),
                    *("-chardev", f"socket,id={MONITOR_ID},fd={monitor.fileno()},server=on,wait=off"),
                    *("-mon", f"chardev={MONITOR_ID},mode=control"),
                    *("-chardev", f"socket,id={AGENT_ID},fd={agent.fileno()},server=on,wait=off"),
                    *("-device", "virtio-serial-pci"),
                    *("-device", f"virtserialport,chardev={AGENT_ID},name=org.qemu.guest_agent.0,id=channel0"),
                    *extra,
                ],
                pass_fds=[monitor.fileno(), agent.fileno()],
                stderr=subprocess.PIPE,
                cwd=self.directory,
            )

    def client(self) -> RawClient:
        """A client, greeted and with oob."""
        return negotiated(self.path)

    def signal(self, number: int) -> None:
        """Send the process a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def suspend(self) -> None:
        """Stop the process; each of its threads has stopped when this returns."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def wait(self) -> int:
        """The exit status, once it ends."""
        assert self.process is not None
        _, self.printed = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode

    def stop(self) -> None:
        """End it, however it is."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate(timeout=DEADLINE)

    @abstractmethod
    def command(self) -> list[str]:
        """The program and the arguments that are its own."""

    @abstractmethod
    def start_self_stopping(self, *extra: str) -> None:
        """Launch it with a guest that switches the machine off once `run_to_the_end` lets it."""

    @abstractmethod
    def run_to_the_end(self, client: RawClient) -> None:
        """Let that guest run; returns once the RESUME event has come."""

    @abstractmethod
    def start_for(self, deed: str, *extra: str) -> None:
        """Launch it with a guest that does one of DEEDS once it runs."""

    @abstractmethod
    def run_for(self, deed: str, client: RawClient) -> None:
        """Let that guest run; returns once the RESUME event has come."""

    @abstractmethod
    def block(self, client: RawClient) -> None:
        """Make the main loop hang in a command whose id is BLOCKED_ID."""

    @abstractmethod
    def unblock(self) -> None:
        """Let that command end."""


class RealQemu(Subject):
    """QEMU itself."""

    def command(self) -> list[str]:
        return [require_binary(QEMU), *MACHINE]

    def start_self_stopping(self, *extra: str) -> None:
        self.start_for("switch_off", *extra)

    def run_to_the_end(self, client: RawClient) -> None:
        self.run_for("switch_off", client)

    def start_for(self, deed: str, *extra: str) -> None:
        code, devices = DEEDS[deed]
        disk = self.directory / "disk.img"
        disk.write_bytes((code.ljust(SECTOR - 2, b"\0") + b"\x55\xaa").ljust(DISK_BYTES, b"\0"))
        self.start("-drive", f"file={disk},format=raw,if=ide", *devices, *extra)

    def run_for(self, deed: str, client: RawClient) -> None:
        client.send({"execute": "cont"})
        client.event("RESUME")

    def block(self, client: RawClient) -> None:
        fifo = self.directory / "fifo"
        if not fifo.exists():
            os.mkfifo(fifo)
        # QEMU's main loop opens the FIFO for writing, and waits for a reader in that.
        arguments = {"val": 0, "size": 16, "filename": str(fifo)}
        client.send({"execute": "pmemsave", "arguments": arguments, "id": BLOCKED_ID})

    def unblock(self) -> None:
        # A plain open waits for the writer just as the writer waits for us, so it does not matter who comes first.
        with (self.directory / "fifo").open("rb") as fifo:
            assert len(fifo.read()) == 16


class SimulatedQemu(Subject):
    """The stand-in."""

    def command(self) -> list[str]:
        # The guest of the real one is a firmware without anything to start: no agent, and it ignores the power button.
        return [*SIMULATED, *MACHINE, "-simulate", "ignore_powerdown,agent_absent"]

    def start_self_stopping(self, *extra: str) -> None:
        self.start(*extra)

    def run_to_the_end(self, client: RawClient) -> None:
        client.send({"execute": "cont"})
        client.event("RESUME")
        client.send({"execute": "system_powerdown"})
        client.event("POWERDOWN")
        client.send({"execute": "x-simulate", "arguments": {"ignore_powerdown": False, "powerdown_delay": 0}})

    def start_for(self, deed: str, *extra: str) -> None:
        self.start(*extra)

    def run_for(self, deed: str, client: RawClient) -> None:
        client.send({"execute": "cont"})
        client.event("RESUME")
        client.send({"execute": "x-simulate", "arguments": {deed: True}})

    def block(self, client: RawClient) -> None:
        client.send({"exec-oob": "x-simulate", "arguments": {"busy": True}, "id": "x-simulate"})
        client.reply("x-simulate")
        client.send({"execute": "stop", "id": BLOCKED_ID})

    def unblock(self) -> None:
        self.signal(signal.SIGUSR1)


MONITORS: Final[dict[str, type[Subject]]] = {"qemu": RealQemu, "simulated": SimulatedQemu}


class AgentSubject(ABC):
    """One agent behind a socket. What it has disabled, and whether it thinks its file systems frozen, is said beforehand."""

    disabled: tuple[str, ...] = ()
    frozen = False

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.scratch = str(directory)  # a directory of the agent's, for files
        self.path = directory / "agent.sock"
        self.process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def start(self) -> None:
        """Launch it; it answers when this returns."""

    def stop(self) -> None:
        """End it."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate(timeout=DEADLINE)


class RealAgent(AgentSubject):
    """qemu-ga on this machine; the tests ask it nothing that changes anything but files below `scratch`."""

    def start(self) -> None:
        if self.frozen:  # as an agent that was killed while its file systems were frozen; nothing is, really
            (self.directory / "qga.state.isfrozen").touch()
        self.process = subprocess.Popen(
            [
                require_binary("qemu-ga"),
                *("--method=unix-listen", f"--path={self.path}"),
                *("-f", str(self.directory / "qga.pid"), "--statedir", str(self.directory)),
                *(("-b", ",".join(self.disabled)) if self.disabled else ()),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until(self._listens)

    def _listens(self) -> bool:
        try:
            RawClient(self.path).close()
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True


class SimulatedAgent(AgentSubject):
    """The stand-in's agent, in a VM that runs."""

    def start(self) -> None:
        faults = f"agent_disabled={'+'.join(self.disabled)}"
        self.process = subprocess.Popen(
            [*SIMULATED, "--directory", str(self.directory), "--count", "1", "--simulate", faults],
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready 1\n"
        self.path = self.directory / "sim-000.qga"
        self.scratch = "/tmp"
        if self.frozen:
            with RawClient(self.path) as client:
                assert client.ask("guest-fsfreeze-freeze")["return"] > 0


AGENTS: Final[dict[str, type[AgentSubject]]] = {"qemu-ga": RealAgent, "simulated": SimulatedAgent}


def without_timestamp(event: dict[str, Any]) -> dict[str, Any]:
    """An event without the only part that no two runs have in common."""
    assert set(event["timestamp"]) == {"seconds", "microseconds"}
    assert all(isinstance(value, int) for value in event["timestamp"].values())
    return {name: value for name, value in event.items() if name != "timestamp"}
