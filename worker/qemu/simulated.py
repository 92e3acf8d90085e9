# SPDX-License-Identifier: Apache-2.0
"""A stand-in for QEMU that speaks real QMP and QGA: one VM as a process of its own, or many in one process on one loop.

Run by the worker for `binary = "simulated"` (`python -m vmloop.worker.qemu.simulated`, with QEMU's arguments), by tests and benchmarks
(`--directory DIR --count N`), and imported by tests that want to see both ends. What it does is split over simulated_vm (the machine),
simulated_monitor and simulated_commands (QMP), simulated_agent and simulated_guest (QGA), simulated_faults (what can be wrong),
simulated_port and simulated_json (sockets and JSON as QEMU treats them).

    -S                                      start paused
    -chardev socket,id=ID,fd=N|path=P,…     a listening socket, inherited or made here
    -mon chardev=ID,mode=control            a monitor on it
    -device virtserialport,chardev=ID,name=org.qemu.guest_agent.0[,id=PORT]       the agent on it
    -name NAME   -uuid UUID   -m MEGABYTES   -no-shutdown   -no-reboot   -action KEY=VALUE,…   -watchdog-action ACTION
    -simulate key=value,…                   faults (class Faults)
    -emitted FILE                           what the VM did (simulated_emitted); with --directory: --emitted DIR, for DIR/NAME.jsonl
    -fail MESSAGE                           print it and exit with status 1, as a QEMU that cannot start
    anything else                           accepted and ignored

SIGTERM, SIGINT and SIGHUP shut down as they do QEMU; SIGUSR1 ends every fault, for a VM that cannot be told so otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from ...common.definition import AGENT_ID, MONITOR_ID
from .simulated_agent import AgentPort
from .simulated_dump import Dump
from .simulated_emitted import Emitted
from .simulated_faults import Faults, faults_from_text
from .simulated_monitor import MonitorPort
from .simulated_table import Chardev, Jobs
from .simulated_vm import MIB, NO_UUID, Actions, SimulatedVm

__all__ = ["Faults", "SimulatedHost", "SimulatedVm", "listening", "main", "serve"]

AGENT_PORT: Final = "org.qemu.guest_agent.0"
DIRECTORY_PORT_ID: Final = "channel0"  # the agent port's id of VMs in a directory
BACKLOG: Final = 8  # clients that wait for their turn
PROGRAM: Final = "qemu-system-x86_64"  # the name that QEMU puts before its messages


# -- for tests and benchmarks: in the caller's own loop --


def serve(
    vm: SimulatedVm,
    monitors: dict[str, socket.socket],
    agent: tuple[str, socket.socket] | None = None,
    agent_port_id: str = "",
    emitted: Emitted | None = None,
) -> None:
    """Put a VM behind listening sockets, by chardev id, and let it begin. The VM owns the sockets and closes them when it ends.

    `emitted` is told what happens at the first monitor, to which it belongs, and which marks the agent leaves.
    """
    monitor_ports: dict[str, MonitorPort] = {}
    agent_port = AgentPort(agent[1], vm, emitted) if agent is not None else None

    def chardevs() -> list[Chardev]:
        lines = [Chardev(label, port.address, port.connected, True) for label, port in monitor_ports.items()]
        if agent is not None and agent_port is not None:
            lines.append(Chardev(agent[0], agent_port.address, agent_port.connected, vm.agent_open))
        return lines

    dump, jobs = Dump(vm), Jobs()
    for label, listener in monitors.items():
        told = emitted if not monitor_ports else None
        monitor_ports[label] = MonitorPort(listener, vm, chardevs, dump, jobs, told)
        vm.attach(monitor_ports[label])
    if agent_port is not None:
        vm.agent_port_id = agent_port_id
        vm.attach(agent_port)
    vm.start()


def listening(path: Path) -> socket.socket:
    """A new listening unix socket; what is left of an old one is removed."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


class SimulatedHost:
    """Many VMs in a directory, as NAME.qmp and NAME.qga. Running ones, unless said otherwise."""

    def __init__(self, directory: Path, emitted: Path | None = None) -> None:
        """`emitted`: the directory of the files that say what each VM did."""
        self._directory = directory
        self._emitted = emitted
        self.vms: dict[str, SimulatedVm] = {}

    def add(self, name: str, faults: Faults | None = None, *, paused: bool = False) -> SimulatedVm:
        """One more VM, listening when this returns."""
        vm = SimulatedVm(name, faults, paused=paused, on_end=self._ended)
        monitor = listening(self.monitor_path(name))
        agent = listening(self.agent_path(name))
        self.vms[name] = vm
        emitted = Emitted(self._emitted / f"{name}.jsonl", name) if self._emitted is not None else None
        serve(vm, {MONITOR_ID: monitor}, (AGENT_ID, agent), DIRECTORY_PORT_ID, emitted)
        return vm

    def monitor_path(self, name: str) -> Path:
        """Where a VM's monitor listens."""
        return self._directory / f"{name}.qmp"

    def agent_path(self, name: str) -> Path:
        """Where a VM's agent listens."""
        return self._directory / f"{name}.qga"

    def end_faults(self) -> None:
        """Set every VM right again."""
        for vm in list(self.vms.values()):
            vm.set_faults(Faults())

    def close(self) -> None:
        """End all VMs without a word."""
        for vm in list(self.vms.values()):
            vm.end(0)

    def _ended(self, vm: SimulatedVm, _status: int) -> None:
        del self.vms[vm.name]
        self.monitor_path(vm.name).unlink(missing_ok=True)
        self.agent_path(vm.name).unlink(missing_ok=True)


# -- as a program --


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(argument.split("=")[0] == "--directory" for argument in arguments):
        return asyncio.run(_run_many(_directory_options(arguments)))
    try:
        machine = machine_from_arguments(arguments)
        return asyncio.run(_run_one(machine))
    except LaunchError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)  # noqa: T201 - it is this program's way to say so
        return 1


class LaunchError(Exception):
    """The VM cannot start; the text is for standard error."""


class _DirectoryOptions(NamedTuple):
    directory: Path
    vms: int
    prefix: str
    faults: Faults
    emitted: Path | None


def _directory_options(arguments: list[str]) -> _DirectoryOptions:
    parser = argparse.ArgumentParser(prog="python -m vmloop.worker.qemu.simulated", description="Many simulated VMs.")
    parser.add_argument("--directory", type=Path, required=True, help="where the sockets go")
    parser.add_argument("--count", type=int, default=1, help="how many VMs")
    parser.add_argument("--prefix", default="sim", help="names are PREFIX-000, PREFIX-001 …")
    parser.add_argument("--simulate", default="", metavar="KEY=VALUE,…", help="faults of all of them")
    parser.add_argument("--emitted", type=Path, metavar="DIR", help="what each VM did goes to DIR/NAME.jsonl")
    options = parser.parse_args(arguments)
    try:
        faults = faults_from_text(options.simulate)
    except msgspec.ValidationError as error:
        parser.error(str(error))
    return _DirectoryOptions(options.directory, options.count, options.prefix, faults, options.emitted)


async def _run_many(options: _DirectoryOptions) -> int:
    _allow_many_files()
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, told.set)
    host = SimulatedHost(options.directory, options.emitted)
    loop.add_signal_handler(signal.SIGUSR1, host.end_faults)
    for index in range(options.vms):
        host.add(f"{options.prefix}-{index:03}", options.faults)
    print(f"ready {options.vms}", flush=True)  # noqa: T201 - whoever started this waits for the line
    await told.wait()
    host.close()
    return 0


def _allow_many_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Machine(msgspec.Struct):
    """What a QEMU command line says, as far as a simulated VM cares."""

    paused: bool = False
    actions: Actions = Actions()
    memory: int = 128 * MIB
    name: str = ""
    uuid: str = NO_UUID
    faults: Faults = Faults()
    chardevs: dict[str, dict[str, str]] = {}
    monitors: list[str] = []  # chardev ids
    agent: str | None = None  # chardev id
    agent_port_id: str = ""
    emitted: str = ""  # path


def machine_from_arguments(arguments: Sequence[str]) -> Machine:
    """Read a command line in QEMU's syntax; `LaunchError` for what would keep QEMU from starting."""
    machine = Machine()
    for position, argument in enumerate(arguments):
        option = argument.removeprefix("-") if argument.startswith("--") else argument
        following = arguments[position + 1] if position + 1 < len(arguments) else ""
        if option == "-S":
            machine.paused = True
        elif option == "-no-shutdown":
            _action(machine, "shutdown=pause")
        elif option == "-no-reboot":
            _action(machine, "reboot=shutdown")
        elif option in _OPTIONS:
            _OPTIONS[option](machine, following)
    missing = [label for label in (*machine.monitors, machine.agent) if label and label not in machine.chardevs]
    if missing:
        raise LaunchError(f"chardev '{missing[0]}' not found")
    return machine


def _chardev(machine: Machine, text: str) -> None:
    kind, _, rest = text.partition(",")
    values = _values(rest)
    if kind == "socket" and "id" in values:
        machine.chardevs[values["id"]] = values


def _mon(machine: Machine, text: str) -> None:
    values = _values(text, "chardev")
    if values.get("mode", "readline") == "control":
        machine.monitors.append(values.get("chardev", ""))


def _qmp(machine: Machine, text: str) -> None:
    kind, _, rest = text.partition(":")
    if kind == "unix":
        label = f"compat_monitor{sum(name.startswith('compat_monitor') for name in machine.monitors)}"
        machine.chardevs[label] = _values(rest, "path")
        machine.monitors.append(label)


def _device(machine: Machine, text: str) -> None:
    values = _values(text, "driver")
    if values.get("driver") == "virtserialport" and values.get("name") == AGENT_PORT and "chardev" in values:
        machine.agent = values["chardev"]
        machine.agent_port_id = values.get("id", "")


def _name(machine: Machine, text: str) -> None:
    machine.name = _values(text, "guest").get("guest", "")


def _uuid(machine: Machine, text: str) -> None:
    machine.uuid = text


def _action(machine: Machine, text: str) -> None:
    try:
        machine.actions = msgspec.convert({**msgspec.to_builtins(machine.actions), **_values(text)}, Actions)
    except msgspec.ValidationError as error:
        raise LaunchError(f"-action {text}: {error}") from None


def _watchdog_action(machine: Machine, text: str) -> None:
    _action(machine, f"watchdog={text}")


def _memory(machine: Machine, text: str) -> None:
    size = _values(text, "size").get("size", "")
    number = re.fullmatch(r"([0-9]{1,7})([MG]?)", size.removesuffix("B"), re.ASCII)
    if number is not None:
        machine.memory = int(number[1]) * MIB * (1024 if number[2] == "G" else 1)


def _simulate(machine: Machine, text: str) -> None:
    try:
        machine.faults = faults_from_text(text, machine.faults)
    except msgspec.ValidationError as error:
        raise LaunchError(f"-simulate {text}: {error}") from None


def _emitted(machine: Machine, text: str) -> None:
    machine.emitted = text


def _fail(_machine: Machine, text: str) -> None:
    raise LaunchError(text)


_OPTIONS: Final[dict[str, Callable[[Machine, str], None]]] = {
    "-chardev": _chardev,
    "-mon": _mon,
    "-qmp": _qmp,
    "-device": _device,
    "-name": _name,
    "-uuid": _uuid,
    "-m": _memory,
    "-action": _action,
    "-watchdog-action": _watchdog_action,
    "-simulate": _simulate,
    "-emitted": _emitted,
    "-fail": _fail,
}


def _values(text: str, first: str = "") -> dict[str, str]:
    """The pairs of `key=value,key=value`; a first part without a key belongs to the key `first`. A comma in a value is doubled."""
    values: dict[str, str] = {}
    for position, part in enumerate(text.replace(",,", "\0").split(",")):
        key, equals, value = part.replace("\0", ",").partition("=")
        if equals:
            values[key] = value
        elif position == 0 and first:
            values[first] = key
        elif key:
            values[key] = "on"
    return values


async def _run_one(machine: Machine) -> int:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()
    vm = SimulatedVm(
        machine.name,
        machine.faults,
        paused=machine.paused,
        uuid=machine.uuid,
        actions=machine.actions,
        memory=machine.memory,
        on_end=lambda _vm, status: ended.set_result(status),
    )
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, _terminate, vm, number)
    loop.add_signal_handler(signal.SIGUSR1, lambda: vm.set_faults(Faults()))
    monitors = {label: _listener(machine.chardevs[label]) for label in machine.monitors}
    agent = (machine.agent, _listener(machine.chardevs[machine.agent])) if machine.agent else None
    try:
        emitted = Emitted(Path(machine.emitted), machine.name) if machine.emitted else None
    except OSError as error:
        raise LaunchError(f"-emitted {machine.emitted}: {error}") from None
    serve(vm, monitors, agent, machine.agent_port_id, emitted)
    return await ended


def _terminate(vm: SimulatedVm, number: int) -> None:
    print(f"{PROGRAM}: terminating on signal {number}", file=sys.stderr, flush=True)  # noqa: T201 - as QEMU does
    vm.shutdown(guest=False, reason="host-signal")


def _listener(chardev: dict[str, str]) -> socket.socket:
    try:
        if "fd" in chardev:
            os.set_inheritable(int(chardev["fd"]), False)
            return socket.socket(fileno=int(chardev["fd"]))
        return listening(Path(chardev["path"]))
    except (OSError, ValueError, KeyError) as error:
        raise LaunchError(f"-chardev socket,{','.join('='.join(pair) for pair in chardev.items())}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
