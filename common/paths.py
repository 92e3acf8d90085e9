# SPDX-License-Identifier: Apache-2.0
"""Where every file and socket lives. Built once in each program's entry and passed down.

    run/client.sock  run/events.sock  run/worker.sock  run/zygote.sock  run/broker.lock  run/vms/NAME/
    state/vms/NAME/  state/epochs/NAME  etc/vmloop.toml  etc/handlers/

`--root DIR` puts the three trees under DIR; without it root uses /run/vmloop, /var/lib/vmloop and /etc/vmloop, others the XDG directories.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .errors import ConfigError
from .names import VmName

# sun_path is 108 bytes with its closing zero (unix(7)).
MAX_SOCKET_PATH_BYTES: Final = 107

JOURNAL: Final = "journal"  # directory of a VM's events, in its state directory


@dataclass(frozen=True, slots=True)
class Paths:
    """The three trees. All methods only compute; `create` makes directories."""

    run: Path
    state: Path
    etc: Path

    @property
    def client_socket(self) -> Path:
        return self.run / "client.sock"

    @property
    def events_socket(self) -> Path:
        return self.run / "events.sock"

    @property
    def worker_socket(self) -> Path:
        return self.run / "worker.sock"

    @property
    def zygote_socket(self) -> Path:
        return self.run / "zygote.sock"

    @property
    def broker_lock(self) -> Path:
        return self.run / "broker.lock"

    @property
    def broker_log(self) -> Path:
        """Of a private broker; others log to standard error."""
        return self.state / "broker.log"

    @property
    def boot_file(self) -> Path:
        return self.state / "boot-id"

    @property
    def capabilities(self) -> Path:
        """What QEMU binaries can do, a file each; made by whoever probes first."""
        return self.state / "capabilities"

    @property
    def settings_file(self) -> Path:
        return self.etc / "vmloop.toml"

    @property
    def vms_run(self) -> Path:
        return self.run / "vms"

    @property
    def vms_state(self) -> Path:
        return self.state / "vms"

    def vm(self, name: VmName) -> VmPaths:
        return VmPaths(self.vms_run / name, self.vms_state / name)

    def create(self) -> None:
        """Make the directories, 0700. `ConfigError` if one cannot be made, or if a socket's path would be too long."""
        for path in (self.client_socket, self.events_socket, self.worker_socket, self.zygote_socket):
            require_socket_path(path)
        try:
            for directory in (self.run, self.state, self.vms_run, self.vms_state):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make {error.filename}: {error.strerror}; choose another --root") from error
        for directory in (self.run, self.state):
            owner = directory.stat().st_uid
            if owner not in (0, os.geteuid()):  # who owns /tmp/vmloop-1000 could put sockets of their own there
                raise ConfigError(f"{directory} belongs to uid {owner}, not to you; choose another --root")


@dataclass(frozen=True, slots=True)
class VmPaths:
    """The two directories of one VM: `run` is gone after a reboot, `state` stays."""

    run: Path
    state: Path

    @property
    def monitor_socket(self) -> Path:
        return self.run / "monitor.sock"

    @property
    def agent_socket(self) -> Path:
        return self.run / "agent.sock"

    @property
    def page(self) -> Path:
        return self.run / "page"

    @property
    def lock(self) -> Path:
        return self.run / "lock"

    @property
    def stack(self) -> Path:
        return self.run / "stack"

    @property
    def definition(self) -> Path:
        return self.state / "vm.toml"

    @property
    def run_file(self) -> Path:
        return self.state / "run.json"

    @property
    def qemu_log(self) -> Path:
        return self.state / "qemu.log"

    @property
    def journal(self) -> Path:
        return self.state / JOURNAL

    @property
    def capabilities(self) -> Path:
        """What the QEMU of the newest run can do, as it was known when that began."""
        return self.state / "capabilities.json"

    @property
    def epoch(self) -> Path:
        """What stays when the VM is forgotten, outside of its directories."""
        return self.state.parent.parent / "epochs" / self.state.name

    @property
    def answers(self) -> Path:
        return self.run / "answers"

    @property
    def worker_log(self) -> Path:
        return self.state / "worker.log"

    def carry(self, index: int) -> Path:
        """One of the two files that hold the beginning of a monitor line longer than the socket's buffer."""
        return self.run / f"carry.{index}"

    def agent_carry(self, index: int) -> Path:
        """The same for the guest agent's connection."""
        return self.run / f"agent-carry.{index}"


def paths_under(root: Path) -> Paths:
    """Everything under one directory, as `--root` asks for."""
    root = root.absolute()
    return Paths(root / "run", root / "state", root / "etc")


def default_paths(environ: Mapping[str, str], uid: int) -> Paths:
    """The host's own places for uid 0, else the XDG base directories."""
    if uid == 0:
        return Paths(Path("/run/vmloop"), Path("/var/lib/vmloop"), Path("/etc/vmloop"))
    home = Path(environ.get("HOME", "/"))
    runtime = environ.get("XDG_RUNTIME_DIR")
    run = Path(runtime) / "vmloop" if runtime else Path(f"/tmp/vmloop-{uid}")
    state = Path(environ.get("XDG_STATE_HOME") or home / ".local/state") / "vmloop"
    etc = Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "vmloop"
    return Paths(run, state, etc)


def require_socket_path(path: Path) -> Path:
    """The path itself; `ConfigError` with its length if a unix socket cannot have it."""
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"the socket path {path} has {length} bytes, {MAX_SOCKET_PATH_BYTES} are possible; choose a shorter --root or name"
        )
    return path
